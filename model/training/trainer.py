"""Training: the plain denoising regression of DDPM, one step at a time, in a state that can be kept and taken up again.

All randomness of a step follows from the seed and the step's number (see :mod:`model.training.batches`). So the state
on disk is
weights, moments and counters, and a resumed run is the uninterrupted run: to the last bit on a CPU. On a CUDA device it
has the same images, timesteps and noise, but some of the kernels there add in whatever order they come to, so it is
the same up to rounding.
"""

from __future__ import annotations

import copy
import io
import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model.data import Dataset
from model.diffusion.schedule import NoiseSchedule
from model.files import write_atomically
from model.network.unet import UNet
from model.training.batches import Batch, Batches
from model.training.recipe import SCHEDULER_CONFIG, Recipe, TrainingError, network

AHEAD = 4  # steps that wait for a CUDA device at most: enough to keep it busy, few enough for clocks and signals


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
    """The state of a run, and one step of it.

    On a CUDA device steps are queued: the host runs up to ``AHEAD`` of them in front, and waits for their numbers only
    where somebody reads them.

    Attributes:
        forward: the network, or what :meth:`compile` made of it.
        seconds: spent training, by all resumed runs together; without compilation, saving and samples, so that a bound
            of minutes buys the same training however often the run is resumed.
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
    smoothed: Tensor  # the loss over about a hundred steps: float64, of no dimension, on the device
    step: int = 0
    seconds: float = 0.0
    _queued: deque[torch.cuda.Event] = field(default_factory=deque)

    @classmethod
    def start(cls, recipe: Recipe, dataset: Dataset, device: torch.device, resident: bool | None = None) -> Trainer:
        """A run at step 0, on ``device``; ``resident`` as :class:`model.training.batches.Batches` has it."""
        net = network(recipe, dataset).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        schedule = NoiseSchedule.from_config(SCHEDULER_CONFIG)
        trainer = cls(
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
        )
        if recipe.precision == "auto":
            trainer.precision = _faster_precision(trainer)
        return trainer

    @property
    def device(self) -> torch.device:
        """Where all tensors of the run are."""
        return self.batches.device

    @property
    def loss(self) -> float:
        """Smoothed over about a hundred steps; reading it waits for the device."""
        return float(self.smoothed)

    @loss.setter
    def loss(self, value: float) -> None:
        self.smoothed.fill_(value)

    def compile(self, backend: str | Callable[..., Any] = "inductor") -> Exception | None:
        """Have the network compiled, by a trial gradient that leaves no trace; it may take minutes.

        Returns:
            What torch.compile failed with, or None; the run can go on in either case.
        """
        # All batches are of one shape, so nothing has to be kept general.
        self.forward = torch.compile(self.net, backend=backend, dynamic=False)
        try:
            self._gradient(self.batches.at(self.step)).item()  # read, so that a kernel that fails does so here
        except Exception as error:  # by backend, version and machine it can be anything
            self.forward = self.net
            return error
        return None

    def progress(self) -> float:
        """Share of the run that is done, 0..1; whichever bound comes first counts."""
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
            ramp = min(1.0, (self.step + 1) / max(1, recipe.warmup))
            group["lr"] = recipe.lr * ramp * 0.5 * (1 + math.cos(math.pi * self.progress()))
        loss = self._gradient(batch)
        nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self.optimizer.step()
        decay = min(recipe.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.ema.parameters()), list(self.net.parameters()), 1 - decay)
        self.step += 1
        self.smoothed += (loss - self.smoothed) * max(0.01, 1 / self.step)
        if self.device.type == "cuda":
            self._queued.append(torch.cuda.Event(blocking=True))  # type: ignore[no-untyped-call]
            self._queued[-1].record(torch.cuda.current_stream(self.device))
        self._await(AHEAD)
        self.seconds += time.perf_counter() - began

    def catch_up(self) -> None:
        """Wait for all steps that are queued, and count the time that they take."""
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
        """Write everything that :meth:`load_state` needs, at once or not at all."""
        self.catch_up()
        state = {
            "recipe": {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self.recipe).items()},
            "net": self.net.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            **{key: getattr(self, key) for key in ("precision", "step", "seconds", "loss")},
        }
        torch.save(state, buffer := io.BytesIO())
        write_atomically(path, buffer.getbuffer())

    def load_state(self, path: Path) -> None:
        """Continue from where :meth:`save_state` was; bounds may have been raised since, the network may not."""
        state = torch.load(path, map_location=self.device, weights_only=True)
        for key in ("size", "channels", "layers", "attention", "head_dim", "groups"):
            was, now = state["recipe"][key], getattr(self.recipe, key)
            if was != (list(now) if isinstance(now, tuple) else now):
                raise TrainingError(f"{path}: was trained with {key} = {was}, not {now}; keep it, or use another --out")
        was, now = state["net"].get("class_embedding.weight"), self.net.state_dict().get("class_embedding.weight")
        if (None if was is None else was.shape) != (None if now is None else now.shape):
            raise TrainingError(f"{path}: was trained with other classes")
        self.net.load_state_dict(state["net"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        for key in ("precision", "step", "seconds", "loss"):
            setattr(self, key, state[key])


def _faster_precision(trainer: Trainer) -> str:
    """bf16 autocast pays where the device computes in it; on a CPU one has to time it: three gradients of each."""
    if trainer.device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    batch = trainer.batches.at(0)
    seconds = {}
    for precision in ("fp32", "bf16"):
        trainer.precision = precision
        trainer._gradient(batch)
        began = time.perf_counter()
        for _ in range(3):
            trainer._gradient(batch)
        seconds[precision] = time.perf_counter() - began
    return min(seconds, key=lambda precision: seconds[precision])
