"""Noise: x_T and the z of stochastic steps.

Each image has its own CPU generator, seeded with its seed. x_T is drawn first, then one z for each stochastic step, in
float32. diffusers draws in this order when it is given a list of generators, so a seed gives the same noise here and
there, and no image depends on the others of its batch.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor


def seeded_generator(seed: int) -> Generator:
    """The generator of all noise of one image; ``seed`` in 0..2^64 - 1."""
    return Generator().manual_seed(seed)


def draw_noise(generator: Generator, shape: tuple[int, ...]) -> Tensor:
    """The next standard normal [C, H, W], float32 on the CPU."""
    return torch.randn(shape, generator=generator)
