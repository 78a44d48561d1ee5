"""The noise levels of diffusers' schedulers, quirks included, and sampling with them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.diffusion.levels import Hop, Level


def diffusers_grid(config: Mapping[str, Any], steps: int) -> list[int]:
    """The timesteps of DDPMScheduler and DDIMScheduler, float accumulation and all."""
    T = config["num_train_timesteps"]
    match config["timestep_spacing"]:
        case "leading":
            # T // N is cut to an integer first, so where N does not divide T the noisy end is left out.
            # steps_offset lifts the whole grid, and the last step then starts at t = 1.
            grid = np.arange(steps)[::-1] * (T // steps) + config["steps_offset"]
        case "trailing":
            # The float step accumulates; for 62 values of N there are N + 1 entries, the last of them t = -1.
            grid = np.round(np.arange(T, 0, -T / steps)) - 1
        case "linspace":
            grid = np.round(np.linspace(0, T - 1, steps))[::-1]
    return [int(t) for t in grid]


def diffusers_hops(scheduler: Any, steps: int) -> list[Hop]:
    """The hops that this DDPMScheduler or DDIMScheduler takes, which are not always those of its own grid."""
    config = scheduler.config
    T, grid = config.num_train_timesteps, diffusers_grid(config, steps)
    abar = scheduler.alphas_cumprod.double().numpy()
    is_ddim = type(scheduler).__name__ == "DDIMScheduler"
    # Without set_alpha_to_one DDIM stops at the level of t = 0 instead of the clean image.
    final = float(abar[0]) if is_ddim and not config.set_alpha_to_one else 1.0
    hops = []
    for i, t in enumerate(grid):
        if is_ddim:
            previous = t - T // steps  # not the next grid entry
            noisy = True  # DDIM draws at every step, also where the coefficient is 0
        else:
            previous = grid[i + 1] if i + 1 < len(grid) else -1
            noisy = t > 0  # with an offset DDPM adds noise on the very last step
        hops.append(Hop(t, float(abar[t]), float(abar[previous]) if previous >= 0 else final, noisy))
    return hops


def diffusers_sample(
    scheduler: Any,
    steps: int,
    net: Callable[[Tensor, Tensor, None], Tensor],
    x: Tensor,
    seeds: Sequence[int] | None = None,
    **options: Any,
) -> Tensor:
    """Sample from ``x`` with diffusers itself, each image's noise from its own generator; ``options`` go to step.

    Args:
        seeds: None for schedulers that draw no noise.
    """
    if seeds is not None:
        options["generator"] = [torch.Generator().manual_seed(seed) for seed in seeds]
    scheduler.set_timesteps(steps)
    if type(scheduler).__name__ == "HeunDiscreteScheduler":
        x = x * (scheduler.sigmas[0] ** 2 + 1) ** 0.5  # its state is x / α
    for t in scheduler.timesteps:
        output = net(scheduler.scale_model_input(x, t), t.expand(len(x)), None)
        x = scheduler.step(output, t, x, **options).prev_sample
    return x


def diffusers_levels(scheduler: Any, steps: int) -> list[Level]:
    """The levels of a solver of diffusers: its own timesteps, and ᾱ from its own σ/α, float32 as they are.

    HeunDiscreteScheduler lists every level but the first twice.
    """
    scheduler.set_timesteps(steps)
    every = 2 if type(scheduler).__name__ == "HeunDiscreteScheduler" else 1
    *ratios, last = scheduler.sigmas.double().tolist()
    levels = zip(scheduler.timesteps[::every].tolist(), ratios[::every], strict=True)
    # The network is not evaluated at the last level, so its t does not matter.
    return [Level(t, 1 / (1 + ratio**2)) for t, ratio in [*levels, (0, last)]]


def diffusers_pndm_levels(scheduler: Any, steps: int) -> list[Level]:
    """The levels of PNDMScheduler; like DDIM it counts t down by T // N, which here must be its grid."""
    config = scheduler.config
    grid = diffusers_grid(config, steps)
    stride = config.num_train_timesteps // steps
    assert all(after == t - stride for t, after in itertools.pairwise(grid)), "its hops would leave the grid"
    abar = scheduler.alphas_cumprod.double()
    levels = [Level(t, float(abar[t])) for t in grid]
    # Without set_alpha_to_one the last step leads to the level of t = 0, and from t = 0 nowhere.
    return [*levels, Level(0, 1.0 if config.set_alpha_to_one else float(abar[0]))]
