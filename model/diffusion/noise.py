"""Latents: where x_T and all later noise come from.

Each image has one CPU generator of its own, seeded by its seed. x_T is drawn from it first, then one z for each
stochastic step, in float32. diffusers draws in this order too when it is given a list of generators, so a seed means
here what it means there, and no image depends on its neighbours in a batch.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor


def seeded_generator(seed: int) -> Generator:
    """The source of all noise of one image; ``seed`` in 0..2^64 - 1."""
    return Generator().manual_seed(seed)


def draw_noise(source: Generator, shape: tuple[int, ...]) -> Tensor:
    """The next standard normal image [C, H, W], float32 on the CPU."""
    return torch.randn(shape, generator=source)
