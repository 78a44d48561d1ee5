"""DDPM's denoising regression, step by step, with a state that can be saved and resumed.

All randomness of a step follows from the seed and the step's number (see :mod:`model.training.batches`), so the state
on disk is weights, averages, Adam's moments and counters. On a CPU a resumed run is bit-identical to an uninterrupted
one. On a CUDA device it has the same images, timesteps and noise, but some kernels add in no fixed order, so it is
equal up to rounding.
"""

from __future__ import annotations

import copy
import io
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from model.data import Dataset
from model.diffusion.schedule import NoiseSchedule
from model.network.unet import UNet
from model.output import write_atomically
from model.training.batches import Batch, Batches
from model.training.recipe import SCHEDULER_CONFIG, DivergedError, Recipe, TrainingError, network, rate
from model.training.state import check_classes, check_network, damaged, plain, read_state

AHEAD = 4  # steps queued on a CUDA device at most: enough to keep it busy, few enough for clocks and signals
DIVERGED = 100.0  # smoothed loss from which a run is given up: a network that predicts only zeros has 1


def denoising_loss(
    net: Callable[..., Tensor], schedule: NoiseSchedule, x_0: Tensor, t: Tensor, eps: Tensor, y: Tensor | None
) -> Tensor:
    """L_simple = E ‖ε - εθ(√ᾱ_t x_0 + √(1-ᾱ_t) ε, t)‖² (DDPM eq. 14), a mean over everything.

    Args:
        net: predicts ε from (x_t, t, y).
        x_0: float32 [B, C, H, W] in [-1, 1].
        t: int64 [B].
        eps: standard normal, like ``x_0``.
        y: int64 [B] or None.
    """
    predicted = net(schedule.add_noise(x_0, t, eps), t, y)
    return (predicted.float() - eps).square().mean()


@dataclass
class Trainer:
    """The state of a run, and its steps.

    On a CUDA device the host queues up to ``AHEAD`` steps; reading ``loss`` waits for them.

    Attributes:
        ema: exponential moving average of the weights. Not an ``AveragedModel`` of torch: that starts with a copy after
            the first step and knows no growing decay, and its state would not be a UNet's.
        forward: the network, or its compiled form.
        smoothed: the loss over about a hundred steps: float64, of no dimension, on the device.
        sound: the number of steps that went well, int64 on the device; ``step``, unless the run diverged.
        seconds: of training, including those before a resumption; without the choice of precision, compilation, saving
            and samples, so that a limit of minutes gives the same training however often the run is resumed.
        facts: values of the checkpoint's card that people gave.
        classes_given: names and order of the classes, where they were given and not read from the data.
        saved: the step of the state on disk, if there is one.
    """

    recipe: Recipe
    dataset: Dataset
    batches: Batches
    net: UNet
    ema: UNet
    optimizer: torch.optim.Optimizer
    schedule: NoiseSchedule
    precision: str
    forward: Callable[..., Tensor]
    smoothed: Tensor
    sound: Tensor
    step: int = 0
    seconds: float = 0.0
    facts: dict[str, Any] = field(default_factory=dict)
    classes_given: tuple[str, ...] = ()
    saved: int | None = None
    _queued: deque[torch.cuda.Event] = field(default_factory=deque)

    @classmethod
    def start(cls, recipe: Recipe, dataset: Dataset, device: torch.device, resident: bool | None = None) -> Trainer:
        """A run at step 0, on ``device``; ``resident`` as :class:`model.training.batches.Batches` has it."""
        net = network(recipe, dataset).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        schedule = NoiseSchedule.from_config(SCHEDULER_CONFIG)
        return cls(
            recipe=recipe,
            dataset=dataset,
            batches=Batches(recipe, dataset, schedule.T, device, resident),
            net=net,
            ema=copy.deepcopy(net).requires_grad_(False),
            optimizer=torch.optim.Adam(net.parameters(), recipe.lr, betas=(0.9, 0.99), fused=True),
            schedule=schedule,
            precision=recipe.precision,
            forward=net,
            smoothed=torch.ones((), dtype=torch.float64, device=device),
            sound=torch.zeros((), dtype=torch.int64, device=device),
        )

    def choose_precision(self, stopping: Callable[[], bool] = lambda: False) -> None:
        """Replace ``auto``: by bf16 if the CUDA device has it; on a CPU by whichever is faster for three gradients.

        Args:
            stopping: asked before each gradient; once it is true, the precision stays ``auto``.
        """
        if self.precision != "auto":
            return
        if self.device.type == "cuda":
            self.precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
            return
        batch = self.batches.at(0)
        seconds = {"fp32": 0.0, "bf16": 0.0}
        for precision in seconds:
            for attempt in range(4):
                if stopping():
                    self.precision = "auto"
                    return
                self.precision, began = precision, time.perf_counter()
                self._gradient(batch)
                if attempt:  # the first one also allocates
                    seconds[precision] += time.perf_counter() - began
        self.precision = min(seconds, key=lambda precision: seconds[precision])

    @property
    def device(self) -> torch.device:
        """The device of all tensors of the run."""
        return self.batches.device

    @property
    def loss(self) -> float:
        """Smoothed over about a hundred steps; reading it synchronizes with the device."""
        return float(self.smoothed)

    @loss.setter
    def loss(self, value: float) -> None:
        self.smoothed.fill_(value)

    def compile(self, backend: str | Callable[..., Any] = "inductor") -> Exception | None:
        """Compile the network, with one gradient that is thrown away; this may take minutes.

        Returns:
            The exception of torch.compile, after which training continues uncompiled, or None.
        """
        # All batches have one shape.
        self.forward = torch.compile(self.net, backend=backend, dynamic=False)
        try:
            self._gradient(self.batches.at(self.step)).item()  # synchronizes, so that a kernel that fails does so here
        except Exception as error:  # depends on backend, version and machine
            self.forward = self.net
            return error
        return None

    def progress(self) -> float:
        """Share of the run that is done, 0..1, by the limit that is nearer."""
        shares = [0.0]
        if self.recipe.steps is not None:
            shares.append(self.step / self.recipe.steps)
        if self.recipe.minutes is not None:
            shares.append(self.seconds / (60 * self.recipe.minutes))
        return min(1.0, max(shares))

    def advance(self) -> None:
        """One optimizer step."""
        began = time.perf_counter()
        recipe = self.recipe
        batch = self.batches.at(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.lr * rate(self.step, recipe.warmup, self.progress())
        loss = self._gradient(batch)
        norm = nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self.optimizer.step()
        decay = min(recipe.ema, (1 + self.step) / (10 + self.step))
        get_ema_multi_avg_fn(decay)(list(self.ema.parameters()), list(self.net.parameters()), self.step)  # type: ignore[no-untyped-call]
        self.step += 1
        self.smoothed += (loss - self.smoothed) * max(0.01, 1 / self.step)
        # Kept on the device: reading it here would synchronize. It never grows again after a step that went wrong.
        self.sound += (self.smoothed < DIVERGED) & norm.isfinite() & (self.sound == self.step - 1)
        if self.device.type == "cuda":
            self._queued.append(torch.cuda.Event(blocking=True))  # type: ignore[no-untyped-call]
            self._queued[-1].record(torch.cuda.current_stream(self.device))
        self._await(AHEAD)
        self.seconds += time.perf_counter() - began

    def check(self, weights: bool = False) -> None:
        """Synchronize with the device, and see whether the run is still sound.

        Args:
            weights: look at every weight and average, too; at least before they are written.

        Raises:
            DivergedError: it is not.
        """
        if (sound := int(self.sound)) < self.step:
            raise DivergedError(sound + 1, self.loss)
        if weights and not _all_finite([*self.net.parameters(), *self.ema.parameters()]):
            raise DivergedError(self.step, self.loss)

    def catch_up(self) -> None:
        """Wait for all queued steps, and count their time."""
        began = time.perf_counter()
        self._await(0)
        self.seconds += time.perf_counter() - began

    def _await(self, ahead: int) -> None:
        while len(self._queued) > ahead:
            self._queued.popleft().synchronize()

    def _gradient(self, batch: Batch) -> Tensor:
        self.optimizer.zero_grad()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            loss = denoising_loss(self.forward, self.schedule, *batch)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach().double()

    def save_state(self, path: Path) -> None:
        """Write the state atomically.

        Raises:
            DivergedError: it is not finite; ``path`` is as it was.
        """
        self.catch_up()
        self.check(weights=True)
        state = {
            "recipe": plain(self.recipe),
            "classes": list(self.dataset.classes),
            "classes_given": list(self.classes_given),
            "card": self.facts,
            "net": self.net.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            **{key: getattr(self, key) for key in ("precision", "step", "seconds", "loss")},
        }
        torch.save(state, buffer := io.BytesIO())
        write_atomically(path, buffer.getbuffer())
        self.saved = self.step

    def load_state(self, path: Path, state: dict[str, Any] | None = None) -> None:
        """Continue from a saved state; the recipe's limits may differ, its network may not.

        Args:
            state: what was read from ``path`` already.

        Raises:
            TrainingError: the state is of another network or other classes, of a run that diverged, or damaged.
        """
        state = read_state(path) if state is None else state
        check_network(path, state, self.recipe, self.dataset.images.shape[-1])
        check_classes(path, state, self.dataset.classes)
        was, now = state["net"].get("class_embedding.weight"), self.net.state_dict().get("class_embedding.weight")
        if (None if was is None else was.shape) != (None if now is None else now.shape):
            raise TrainingError(f"{path}: was trained with other classes")
        try:
            self.net.load_state_dict(state["net"])
            self.ema.load_state_dict(state["ema"])
            self.optimizer.load_state_dict(state["optimizer"])
        except Exception as error:  # tensors that are not those of this network
            raise damaged(path) from error
        if not math.isfinite(state["loss"]) or not _all_finite([*self.net.parameters(), *self.ema.parameters()]):
            raise TrainingError(f"{path}: this run diverged before it was saved; start again with a lower --lr")
        for key in ("precision", "step", "seconds", "loss"):
            setattr(self, key, state[key])
        self.saved = self.step
        self.sound.fill_(self.step)


def _all_finite(tensors: Sequence[Tensor]) -> bool:
    # A maximum propagates nan; one transfer to the host for all.
    return bool(torch.stack([tensor.detach().abs().amax() for tensor in tensors]).isfinite().all())
