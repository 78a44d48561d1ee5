"""Other ways to the same pictures: loops written from the papers' equations, and the walks of diffusers' schedulers.

Nothing here imports ``model.plan`` or ``model.machine``; where these agree with a compiled plan, two roads met.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.schedule import NoiseSchedule
from model.walk import Hop

Predict = Callable[[Tensor, int], Tensor]  # ε from (x_t, t)


def ddpm_loop(
    predict: Predict,
    levels: Sequence[tuple[int, float, float]],
    x: Tensor,
    zs: Iterator[Tensor],
    *,
    variance: str = "fixed_small",
    clip: float | None = None,
) -> Tensor:
    """DDPM's Algorithm 2 on a subset of timesteps; ``levels`` are (t, ᾱ_t, ᾱ where the step lands)."""
    for t, abar, abar_next in levels:
        eps = predict(x, t)
        beta = 1 - abar / abar_next
        if clip is None:  # eq. 11
            mean = (x - beta / math.sqrt(1 - abar) * eps) / math.sqrt(1 - beta)
        else:  # eq. 15, then eq. 7
            x_0 = ((x - math.sqrt(1 - abar) * eps) / math.sqrt(abar)).clamp(-clip, clip)
            mean = math.sqrt(abar_next) * beta / (1 - abar) * x_0
            mean = mean + math.sqrt(1 - beta) * (1 - abar_next) / (1 - abar) * x
        if abar_next == 1:
            return mean  # "z = 0 if t = 1"
        sigma_sq = beta if variance == "fixed_large" else (1 - abar_next) / (1 - abar) * beta  # section 3.2
        x = mean + math.sqrt(sigma_sq) * next(zs)
    raise AssertionError("the walk does not end at the clean picture")


def ddim_loop(
    predict: Predict,
    levels: Sequence[tuple[int, float, float]],
    x: Tensor,
    zs: Iterator[Tensor],
    *,
    eta: float = 0.0,
    clip: float | None = None,
    rederive: bool = False,
) -> Tensor:
    """DDIM eq. 12 with the σ of eq. 16; ``rederive`` reads ε back out of the clipped x̂0, as OpenAI's code does."""
    for t, abar, abar_next in levels:
        eps = predict(x, t)
        x_0 = (x - math.sqrt(1 - abar) * eps) / math.sqrt(abar)
        if clip is not None:
            x_0 = x_0.clamp(-clip, clip)
        if rederive:
            eps = (x - math.sqrt(abar) * x_0) / math.sqrt(1 - abar)
        sigma = eta * math.sqrt((1 - abar_next) / (1 - abar)) * math.sqrt(1 - abar / abar_next)
        x = math.sqrt(abar_next) * x_0 + math.sqrt(1 - abar_next - sigma**2) * eps
        if sigma:
            x = x + sigma * next(zs)
    return x


def diffusers_grid(config: Mapping[str, Any], steps: int) -> list[int]:
    """The timesteps of DDPMScheduler and DDIMScheduler, float accumulation and all."""
    T = config["num_train_timesteps"]
    match config["timestep_spacing"]:
        case "leading":
            # §1.10.3: T // N is cut to an integer first, so where N does not divide T the noisy end is left out.
            # §1.10.4: steps_offset lifts the whole grid, and the last step then starts at t = 1.
            grid = np.arange(steps)[::-1] * (T // steps) + config["steps_offset"]
        case "trailing":
            # §1.10.2: the float step accumulates; for 62 values of N there are N + 1 entries, the last of them t = -1.
            grid = np.round(np.arange(T, 0, -T / steps)) - 1
        case "linspace":
            grid = np.round(np.linspace(0, T - 1, steps))[::-1]
    return [int(t) for t in grid]


def diffusers_walk(scheduler: Any, steps: int) -> list[Hop]:
    """The hops that this DDPMScheduler or DDIMScheduler takes, which are not always those of its own grid."""
    config = scheduler.config
    T, grid = config.num_train_timesteps, diffusers_grid(config, steps)
    abar = scheduler.alphas_cumprod.double().numpy()
    is_ddim = type(scheduler).__name__ == "DDIMScheduler"
    # §1.10.4: without set_alpha_to_one DDIM stops at the level of t = 0 instead of the clean picture.
    final = float(abar[0]) if is_ddim and not config.set_alpha_to_one else 1.0
    hops = []
    for i, t in enumerate(grid):
        if is_ddim:
            previous = t - T // steps  # §1.10.1: not the next grid entry
            noisy = True  # §1.1: DDIM draws at every step, also where the coefficient is 0
        else:
            previous = grid[i + 1] if i + 1 < len(grid) else -1
            noisy = t > 0  # §1.4, §1.10.4: with an offset DDPM adds noise on the very last step
        hops.append(Hop(t, float(abar[t]), float(abar[previous]) if previous >= 0 else final, noisy))
    return hops


def diffusers_sample(
    scheduler: Any,
    steps: int,
    net: Callable[[Tensor, Tensor, None], Tensor],
    x: Tensor,
    seeds: Sequence[int],
    **options: Any,
) -> Tensor:
    """Walk ``x`` down with diffusers itself, each picture's noise from its own generator; ``options`` go to step."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        output = net(x, t.expand(len(x)), None)
        x = scheduler.step(output, t, x, generator=generators, **options).prev_sample
    return x


def levels_of(schedule: NoiseSchedule, grid: Sequence[int]) -> list[tuple[int, float, float]]:
    """(t, ᾱ_t, ᾱ of the next grid entry, or 1 after the last) for a descending grid."""
    abar = [float(schedule.alphas_cumprod[t]) for t in grid]
    return list(zip(grid, abar, [*abar[1:], 1.0], strict=True))
