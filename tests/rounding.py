"""Where a walk ends in float64, and how near to it float32 can be asked to come.

Whoever computes the same walk in another order rounds otherwise, and random weights amplify that: a fixed tolerance is
either slack or holds on one processor only. So the bound is measured: the plain loop in float32, several times, with a
network that errs at random by as much as its float32 form errs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from model.diffusion import machine
from model.diffusion.machine import Net
from model.diffusion.noise import draw_noise, seeded_generator
from model.diffusion.plan import Plan
from model.network.unet import UNet

Walk: TypeAlias = Callable[[Net, torch.dtype], Tensor]  # takes its network there in that precision

DRAWS = 8
# Of a normal distribution, one in 4,000 is more than four times the largest of eight others.
MARGIN = 4.0


@torch.inference_mode()
def bound(net: UNet, walk: Walk) -> tuple[Tensor, float]:
    """(where the walk ends in float64, how far from there it may end in float32)."""
    double = _in_double(net)
    exact = walk(double, torch.float64)
    ends = [walk(_erring(net, double, seed), torch.float32) for seed in range(DRAWS)]
    farthest = max(float((end - exact).abs().max()) for end in ends)
    return exact, MARGIN * farthest + 10 * torch.finfo(torch.float32).eps * float(exact.abs().max())


def sampled(
    net: Net, plan: Plan, seeds: Sequence[int], y: Tensor, shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    """``machine.sample`` in any precision, with the same noise."""
    generators = [seeded_generator(seed) for seed in seeds]

    def draw() -> Tensor:
        return torch.stack([draw_noise(generator, shape) for generator in generators]).to(dtype)

    return machine.run(net, plan, draw(), y, draw)


def _in_double(net: UNet) -> UNet:
    """The same function in float64, but for the sinusoids of the timestep, which are float32 by definition."""
    double = copy.deepcopy(net).double()
    double.time_embedding.register_forward_pre_hook(lambda _, arguments: (arguments[0].double(),))
    return double


def _erring(net: UNet, double: UNet, seed: int) -> Net:
    generator = torch.Generator().manual_seed(seed)

    def said(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        answer = net(x, t, y)
        error = (answer - double(x.double(), t, y)).square().mean((1, 2, 3), keepdim=True).sqrt()
        wrong: Tensor = answer + error.float() * torch.randn(answer.shape, generator=generator)
        return wrong

    return said
