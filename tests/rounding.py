"""The result of a plan in float64, and how near to it a float32 result must be.

Computing the same plan in another order rounds differently, and random weights amplify that: a fixed tolerance is
either loose or holds on one processor only. So the bound is measured: the plain loop in float32, several times, with a
network whose output has random errors as large as those of float32.
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

# Samples with this network in this precision, so many copies of every image after one another: [copies · n, C, H, W].
Sample: TypeAlias = Callable[[Net, torch.dtype, int], Tensor]

DRAWS = 8
# Of a normal distribution, one in 4,000 is more than four times the largest of eight others.
MARGIN = 4.0


@torch.inference_mode()
def bound(net: UNet, sample: Sample) -> tuple[Tensor, float]:
    """(the float64 result, how far from it a float32 result may be)."""
    double = _in_double(net)
    exact = sample(double, torch.float64, 1)
    draws = sample(_add_errors(net, double), torch.float32, DRAWS).unflatten(0, (DRAWS, len(exact)))
    farthest = float((draws - exact).abs().max())
    return exact, MARGIN * farthest + 10 * torch.finfo(torch.float32).eps * float(exact.abs().max())


def run_plan(
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


def _add_errors(net: UNet, double: UNet) -> Net:
    generator = torch.Generator().manual_seed(0)

    def forward(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        output = net(x, t, y)
        error = (output - double(x.double(), t, y)).square().mean((1, 2, 3), keepdim=True).sqrt()
        wrong: Tensor = output + error.float() * torch.randn(output.shape, generator=generator)
        return wrong

    return forward
