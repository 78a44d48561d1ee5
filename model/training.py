"""Training: the plain denoising regression of DDPM, one step at a time, in a state that can be kept and taken up again.

Everything random in step k is drawn from a generator seeded by (seed, k), and the order of the pictures in epoch e by
(seed, e). So the state on disk is weights, moments and counters, and a resumed run is the uninterrupted run.
"""

from __future__ import annotations

import copy
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from model import pictures
from model.data import Dataset
from model.recipe import SCHEDULER_CONFIG, Recipe, TrainingError, network
from model.schedule import NoiseSchedule
from model.unet import UNet


def denoising_loss(
    net: nn.Module, schedule: NoiseSchedule, x_0: Tensor, t: Tensor, eps: Tensor, y: Tensor | None
) -> Tensor:
    """L_simple = E ‖ε - εθ(√ᾱ_t x_0 + √(1-ᾱ_t) ε, t)‖² (DDPM eq. 14), a mean over everything.

    Args:
        x_0: float32 [B, C, H, W] in [-1, 1].
        t: int64 [B].
        eps: standard normal, like ``x_0``.
        y: int64 [B] or None.
    """
    predicted = net(schedule.add_noise(x_0, t, eps), t, y)
    loss: Tensor = (predicted.float() - eps).square().mean()
    return loss


@dataclass
class Trainer:
    """The state of a run, and one step of it."""

    recipe: Recipe
    dataset: Dataset
    net: UNet
    ema: UNet
    optimizer: torch.optim.Optimizer
    schedule: NoiseSchedule
    precision: str
    step: int = 0
    seconds: float = 0.0  # spent training, by all resumed runs together
    loss: float = 1.0  # smoothed over about a hundred steps

    @classmethod
    def start(cls, recipe: Recipe, dataset: Dataset, device: torch.device) -> Trainer:
        """A run at step 0, on ``device``."""
        net = network(recipe, dataset).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        ema = copy.deepcopy(net).requires_grad_(False)
        optimizer = torch.optim.Adam(net.parameters(), recipe.lr, betas=(0.9, 0.99), fused=True)
        trainer = cls(recipe, dataset, net, ema, optimizer, NoiseSchedule.from_config(SCHEDULER_CONFIG), "fp32")
        trainer.precision = _faster_precision(trainer) if recipe.precision == "auto" else recipe.precision
        return trainer

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
        x_0, t, eps, y = self._batch()
        for group in self.optimizer.param_groups:
            ramp = min(1.0, (self.step + 1) / max(1, recipe.warmup))
            group["lr"] = recipe.lr * ramp * 0.5 * (1 + math.cos(math.pi * self.progress()))
        loss = self._gradient(x_0, t, eps, y)
        nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self.optimizer.step()
        decay = min(recipe.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.ema.parameters()), list(self.net.parameters()), 1 - decay)
        self.step += 1
        self.loss += (loss - self.loss) * max(0.01, 1 / self.step)
        self.seconds += time.perf_counter() - began

    def _gradient(self, x_0: Tensor, t: Tensor, eps: Tensor, y: Tensor | None) -> float:
        self.optimizer.zero_grad()
        with torch.autocast(x_0.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            loss = denoising_loss(self.net, self.schedule, x_0, t, eps, y)
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    def _batch(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """x_0, t, ε and labels of this step."""
        recipe, n = self.recipe, len(self.dataset.images)
        torch.manual_seed(int(np.random.SeedSequence([recipe.seed, self.step]).generate_state(1, np.uint64)[0] >> 1))
        index = _shuffled(recipe.seed, n, self.step * recipe.batch, recipe.batch)
        device = next(self.net.parameters()).device
        x_0 = pictures.from_uint8(self.dataset.images[index]).to(device, memory_format=torch.channels_last)
        if recipe.flip:
            x_0 = torch.where(torch.rand(len(x_0), 1, 1, 1).to(device) < 0.5, x_0.flip(-1), x_0)
        # Antithetic timesteps: every t comes with T - 1 - t, which evens out the loss between batches.
        t = torch.randint(0, self.schedule.T, ((recipe.batch + 1) // 2,))
        t = torch.cat([t, self.schedule.T - 1 - t])[: recipe.batch].to(device)
        eps = torch.randn(x_0.shape).to(device)
        if self.dataset.labels is None:
            return x_0, t, eps, None
        y = torch.from_numpy(self.dataset.labels[index])
        y = torch.where(torch.rand(len(y)) < recipe.label_drop, len(self.dataset.classes), y)
        return x_0, t, eps, y.to(device)

    def save_state(self, path: Path) -> None:
        """Write everything that :meth:`load_state` needs, at once or not at all."""
        state = {
            "recipe": {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self.recipe).items()},
            "net": self.net.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            **{key: getattr(self, key) for key in ("precision", "step", "seconds", "loss")},
        }
        torch.save(state, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)

    def load_state(self, path: Path) -> None:
        """Continue from where :meth:`save_state` was; bounds may have been raised since, the network may not."""
        state = torch.load(path, map_location=next(self.net.parameters()).device, weights_only=True)
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


def _shuffled(seed: int, n: int, first: int, count: int) -> np.ndarray:
    """Picture indices ``first``..``first + count`` of an endless stream that visits all n once per epoch."""
    epochs = range(first // n, (first + count - 1) // n + 1)
    orders = [np.random.default_rng([seed, epoch]).permutation(n) for epoch in epochs]
    offset = first - epochs[0] * n
    return np.concatenate(orders)[offset : offset + count]


def _faster_precision(trainer: Trainer) -> str:
    """bf16 autocast pays on some processors and costs on others: time three gradients of each."""
    batch = trainer._batch()
    seconds = {}
    for precision in ("fp32", "bf16"):
        trainer.precision = precision
        trainer._gradient(*batch)
        began = time.perf_counter()
        for _ in range(3):
            trainer._gradient(*batch)
        seconds[precision] = time.perf_counter() - began
    return min(seconds, key=lambda precision: seconds[precision])
