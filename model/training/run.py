"""A training run: it can be killed at any moment and resumed, and writes a checkpoint."""

from __future__ import annotations

import math
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch

from model import checkpoint, data, images
from model.checkpoint import Card
from model.diffusion import machine, samplers
from model.diffusion.plan import Clip
from model.diffusion.schedule import NoiseSchedule
from model.network.unet import UNet
from model.output import ProgressBar, counted, say
from model.training.recipe import SCHEDULER_CONFIG, DivergedError, Recipe, TrainingError, advise_batch, advise_warmup
from model.training.state import STATE, background_of, read_facts, read_state, recipe_of, update_facts
from model.training.trainer import Trainer

LIMITS = ("steps", "minutes")  # of a run; raising them is no change of recipe


def train(
    source: Path,
    out: Path,
    recipe: Recipe,
    device: torch.device,
    *,
    resume: bool = False,
    save_seconds: float = 30.0,
    grid_minutes: float = 5.0,
    card: dict[str, Any] | None = None,
    classes: tuple[str, ...] = (),
) -> Trainer:
    """Train until a limit of the recipe is reached or SIGINT or SIGTERM comes; then save and return.

    ``out`` becomes a checkpoint with the averaged weights, rewritten with each grid of samples in ``out/samples``. A
    run that is killed loses at most ``save_seconds`` of work; resumed, it repeats them, on a CPU bit for bit.

    Args:
        card: values of the checkpoint's card; those not given stay as they are in a run that is resumed.
        classes: names and order of the classes, see :func:`model.data.load`; not given, a resumed run keeps its own.

    Raises:
        TrainingError: no limit given, ``out`` holds another run, nothing to resume, or a damaged or other run.
        DataError: nothing to train on.
        DivergedError: training went wrong; the state and the checkpoint on disk are as they were before.
        OSError: ``out`` cannot be written to.
    """
    state = out / STATE
    if recipe.steps is None and recipe.minutes is None:
        raise TrainingError("say how long to train: --minutes or --steps")
    facts, saved = dict(card or {}), None
    if resume:
        saved = read_state(state)
        _log_changes(recipe_of(state, saved), recipe)
        facts = {**saved.get("card", {}), **read_facts(out), **facts}
        classes = classes or tuple(saved.get("classes_given", ()))
    elif state.exists():
        raise TrainingError(f"{state} exists; continue that run with --resume, or choose another --out")
    dataset = data.load(
        source, recipe.size, 1 if recipe.grey else None, classes=classes, background=background_of(facts)
    )
    for notice in dataset.notices:
        say(notice)
    with _stop_signals() as stopping, _tensor_cores(device):
        trainer = Trainer.start(recipe, dataset, device)
        trainer.facts, trainer.classes_given = facts, classes
        if saved is not None:
            trainer.load_state(state, saved)
            saved = None  # several times the network's size
            update_facts(out, card or {})
        if trainer.precision == "auto" and device.type == "cpu":
            say("timing a few steps in bf16 and in fp32, to take the faster; they do not count as training")
        trainer.choose_precision(stopping)
        out.mkdir(parents=True, exist_ok=True)
        count, parameters = len(dataset.images), sum(p.numel() for p in trainer.net.parameters())
        say(f"{counted(count, 'image')}, {parameters / 1e6:.2f}M parameters, {device}, {trainer.precision}")
        for advice in (advise_batch(recipe, count), recipe.steps and advise_warmup(recipe, recipe.steps)):
            if advice:
                say(advice)
        if not trainer.batches.resident:
            say(f"the images need over half of the free memory of {device}; they are copied batch by batch")
        if recipe.compile == "on" or (recipe.compile == "auto" and device.type == "cuda"):
            _compile(trainer)
        try:
            _run(trainer, out, stopping, save_seconds, grid_minutes)
        except DivergedError as error:
            remedy = "nothing was saved yet; start again with a lower --lr"
            if trainer.saved is not None:
                remedy = f"{state} is that of step {trainer.saved}; continue with --resume and a lower --lr"
            raise DivergedError(error.step, error.loss, remedy) from error
    return trainer


def _log_changes(was: Recipe, now: Recipe) -> None:
    """Fields that differ from the saved recipe: they apply from here on, and the card will have only the new value."""
    for name, value in asdict(now).items():
        if value != (before := getattr(was, name)) and name not in LIMITS:
            say(f"{name} was {before} until now, and is {value} from here on")


def _run(trainer: Trainer, out: Path, stopping: Callable[[], bool], save_seconds: float, grid_minutes: float) -> None:
    """Advance until a limit is reached or a signal comes, saving at intervals and at the end."""
    state = out / STATE
    saved = drawn = time.monotonic()
    shown = 0.0
    with ProgressBar(1.0, bar_format="{percentage:3.0f}%|{bar:20}| {desc}") as bar:
        begun, start_step = time.monotonic(), trainer.step
        while trainer.progress() < 1 and not stopping():
            trainer.advance()
            now = time.monotonic()
            if now - shown > 1 or trainer.progress() == 1:
                trainer.check()
                bar.show(round(trainer.progress(), 4), _status(trainer, (trainer.step - start_step) / (now - begun)))
                shown = now
            if now - saved > save_seconds:
                trainer.save_state(state)
                saved = now
            if now - drawn > 60 * grid_minutes:
                publish(trainer, out)
                drawn = now
    trainer.save_state(state)
    finished = trainer.progress() == 1
    ending = f"{'finished' if finished else 'stopped (--resume continues)'} at step {trainer.step}"
    if trainer.step == 0:
        say(f"{ending}, before any training; {out} has no checkpoint yet")
        return
    publish(trainer, out, with_grid=finished)  # a stop signal should not have to wait for samples
    say(f"{ending}; the averaged weights are in {out}")
    # How many steps the minutes give was not known before.
    if finished and trainer.recipe.steps is None and (advice := advise_warmup(trainer.recipe, trainer.step)):
        say(advice)


def _compile(trainer: Trainer) -> None:
    began = time.monotonic()
    error = trainer.compile()
    if error is None:
        say(f"compiled in {time.monotonic() - began:.0f} s, which do not count as training")
    else:
        reason = " ".join(str(error).splitlines()[:2]).strip()  # the first line may hold only the backend's name
        say(f"torch.compile failed, so training goes on without it: {type(error).__name__}: {reason}")


@contextmanager
def _tensor_cores(device: torch.device) -> Iterator[None]:
    """On a CUDA device, TF32 for float32 operations, and cuDNN's fastest algorithms, since shapes are fixed."""
    if device.type != "cuda":
        yield
        return
    matmul, benchmark = torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark
    # Not backends.cuda.matmul.fp32_precision: torch.compile reads the older setting and would then raise (pytorch issue
    # 166387); this call sets both. Convolutions use TF32 by default.
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.benchmark = benchmark


def publish(trainer: Trainer, out: Path, with_grid: bool = True) -> None:
    """Write the averaged weights as a checkpoint, and a grid of their samples (DDIM, 50 steps, seeds 0, 1, 2…).

    Raises:
        DivergedError: they are not finite; ``out`` is as it was.
    """
    trainer.check(weights=True)
    dataset, recipe = trainer.dataset, trainer.recipe
    card = Card(
        **{
            "name": out.resolve().name,
            "classes": dataset.classes,
            "null_class": len(dataset.classes) if dataset.classes else None,
            "training": {
                **asdict(recipe),
                "precision": trainer.precision,
                "steps": trainer.step,
                "minutes": round(trainer.seconds / 60, 1),
                "images_seen": trainer.step * recipe.batch,
            },
            "numbers": {
                "parameters": sum(p.numel() for p in trainer.net.parameters()),
                "training_loss": round(trainer.loss, 5),
            },
            **trainer.facts,
        }
    )
    dtype = getattr(torch, recipe.weights)
    weights = {key: value.to(dtype) for key, value in trainer.ema.state_dict().items()}
    part = out / ".part"
    shutil.rmtree(part, ignore_errors=True)  # of a run that was killed
    try:
        # Beside the last checkpoint, which is replaced only when all of this one is written: a disk may be full.
        checkpoint.save(part, trainer.net, weights, SCHEDULER_CONFIG, card)
        for file in sorted(file for file in part.rglob("*") if file.is_file()):
            target = out / file.relative_to(part)
            target.parent.mkdir(parents=True, exist_ok=True)
            file.replace(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    if with_grid:
        (out / "samples").mkdir(exist_ok=True)
        drawn = images.png(grid(trainer.ema, dataset.classes), scale=2)
        (out / "samples" / f"step-{trainer.step:07d}.png").write_bytes(drawn)


@torch.inference_mode()
def grid(net: UNet, classes: tuple[str, ...], columns: int = 10) -> np.ndarray:
    """A sheet of samples, uint8 [H, W, C]: one row per class, or ``columns`` rows where there are none."""
    plan = samplers.ddim(NoiseSchedule.from_config(SCHEDULER_CONFIG), 50, clip=Clip(1.0))
    config = net.config
    shape = (config.in_channels, *config.size)
    device = next(net.parameters()).device
    net.eval()
    rows = []
    for k in range(len(classes) or columns):
        y = torch.full((columns,), k, device=device) if classes else None
        rows.append(machine.sample(net, plan, [k * columns + i for i in range(columns)], shape, y))
    net.train()
    return images.sheet(images.to_uint8(torch.cat(rows)), columns)


def _status(trainer: Trainer, steps_per_second: float) -> str:
    left = math.inf
    if trainer.recipe.minutes is not None:
        left = trainer.recipe.minutes * 60 - trainer.seconds
    if trainer.recipe.steps is not None and steps_per_second:
        left = min(left, (trainer.recipe.steps - trainer.step) / steps_per_second)
    rate, left = steps_per_second * trainer.recipe.batch, max(0.0, left)
    until = f"{left / 60:.0f} min" if left >= 90 else f"{left:.0f} s"
    return f"step {trainer.step}, {rate:.0f} images/s, loss {trainer.loss:.4f}, {until} left"


@contextmanager
def _stop_signals() -> Iterator[Callable[[], bool]]:
    """Yields a function that returns whether SIGINT or SIGTERM came; a second one has its usual effect."""
    received: list[int] = []
    previous: dict[int, Any] = {}

    def handle(number: int, _: FrameType | None) -> None:
        received.append(number)
        signal.signal(number, previous[number])

    for number in (int(signal.SIGINT), int(signal.SIGTERM)):
        previous[number] = signal.signal(number, handle)
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
