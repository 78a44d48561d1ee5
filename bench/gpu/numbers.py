"""What comes out on the device, beside the CPU: every sampler and inversion in float32, and images in bfloat16.

In float32 a walk may end as far from its float64 end as the plain float32 loop on the CPU does when its network errs at
random by as much as it errs in float32, four times over: see :mod:`tests.rounding`. In bfloat16 it is the image that
counts.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from app.engine.jobs import Lane
from app.settings import SHIPPED
from bench.gpu import engine
from bench.gpu.bench import Bench
from bench.gpu.engine import CANONICAL, Rides, Served
from bench.gpu.networks import SHIPPED_NAME, random
from model import checkpoint
from model.checkpoint import Card
from model.diffusion import machine
from model.diffusion.inversion.registry import INVERSIONS
from model.diffusion.machine import Net
from model.diffusion.plan import Plan
from model.diffusion.samplers import SAMPLERS
from model.network.config import UNetConfig
from model.network.unet import UNet
from model.training.recipe import SCHEDULER_CONFIG
from tests import rounding

KINDS, IMAGES = 3, 2
SMALL = UNetConfig(
    sample_size=16,
    block_out_channels=(16, 32),
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    layers_per_block=1,
    norm_num_groups=8,
    num_class_embeds=KINDS,
)


def measure(bench: Bench, found: dict[str, Any]) -> None:
    """Every sampler, every inversion, and DDIM-50 of the shipped checkpoint."""
    small = _small(bench)
    found["samplers"], found["inversions"] = samplers, inversions = {}, {}
    bench.tell("float32")
    for name, sampler in SAMPLERS.items():
        # ddpm is good from 100 steps on.
        steps = bench.of(sampler.default_steps or 100, 4)
        samplers[name] = {"steps": steps, **_sampled(small, small.plan(name, steps))}
    for name, method in INVERSIONS.items():
        steps = bench.of(10, 3)
        plan = method.compile(small.checkpoint.schedule, steps)
        inversions[name] = {"steps": steps, **_inverted(small, plan, method.slots)}
    bench.tell("images")
    found["images"] = images(bench, engine.load(bench, SHIPPED / SHIPPED_NAME, bench.of(16, 2)))


def _small(bench: Bench) -> Served:
    """A network of random weights and three classes, calibrated for forwards in float32."""
    folder = bench.folder / "small"
    net = random(bench.of(SMALL, replace(SMALL, sample_size=8)), seed=2)
    checkpoint.save(folder, net, net.state_dict(), SCHEDULER_CONFIG, Card("small", classes=("a", "b", "c")))
    return engine.load(bench, folder, CANONICAL, fast="float32")


def _on_cpu(served: Served) -> UNet:
    return checkpoint.load(served.folder).net


def _compared(ends: list[Tensor], exact: Tensor, bound: float) -> dict[str, Any]:
    """By how much the worst number is off, beside by how much it may be."""
    error = float((torch.stack(ends).double() - exact.double()).abs().max())
    return {"error": error, "bound": bound, "largest": float(exact.abs().max()), "within": error <= bound}


def _sampled(small: Served, plan: Plan) -> dict[str, Any]:
    seeds, shape, y = range(IMAGES), small.checkpoint.shape, torch.arange(IMAGES) % KINDS

    def walk(net: Net, dtype: torch.dtype) -> Tensor:
        return rounding.sampled(net, plan, seeds, y, shape, dtype)

    exact, bound = rounding.bound(_on_cpu(small), walk)
    lanes = [Lane(plan, seed, int(kind), exact=True) for seed, kind in zip(seeds, y, strict=True)]
    ends = [end[0] for end in Rides(small.runner).walk(lanes, CANONICAL, exact=True)]
    return _compared(ends, exact, bound)


def _inverted(small: Served, plan: Plan, slots: int) -> dict[str, Any]:
    """Of images that are as smooth as a few waves."""
    y = torch.arange(IMAGES) % KINDS
    wave = torch.linspace(0, 6, small.checkpoint.shape[-1])
    x = torch.stack([torch.sin(wave[None, :, None] * (i + 1) + wave) for i in range(IMAGES)])
    x = 0.8 * x.expand(-1, small.checkpoint.shape[0], -1, -1)

    def walk(net: Net, dtype: torch.dtype) -> Tensor:
        return machine.run_slots(net, plan, x[:, None].to(dtype), y)[:, :slots]

    exact, bound = rounding.bound(_on_cpu(small), walk)
    lanes = [
        Lane(plan, 0, int(kind), exact=True, initial_state=image[None], output_slots=slots)
        for image, kind in zip(x, y, strict=True)
    ]
    return _compared(Rides(small.runner).walk(lanes, CANONICAL, exact=True), exact, bound)


def images(bench: Bench, served: Served) -> dict[str, Any]:
    """PSNR of DDIM images beside those of the CPU in float32: in what is fastest here, and in float32."""
    count, steps = bench.of(16, 2), bench.of(50, 5)
    plan, kinds = served.plan("ddim", steps), served.classes or 1
    y = torch.arange(count) % kinds if served.classes else None
    with torch.inference_mode():
        expected = machine.sample(_on_cpu(served), plan, range(count), served.checkpoint.shape, y)
    found: dict[str, Any] = {"steps": steps, "images": count, "dtype": served.calibration.dtype}
    for name, exact in (("fast", False), ("exact", True)):
        width = max(served.calibration.exact if exact else served.calibration.fast)
        rides, ends = Rides(served.runner), []
        for first in range(0, count, width):
            lanes = [served.lane(plan, seed, exact=exact) for seed in range(first, min(first + width, count))]
            ends += [end[0] for end in rides.walk(lanes, width, exact=exact)]
        each = [psnr(end, image) for end, image in zip(ends, expected, strict=True)]
        found[name] = {"least": min(each), "median": float(torch.tensor(each).median())}
    return found


def psnr(a: Tensor, b: Tensor) -> float:
    """dB, of pixels in [-1, 1]; no more than 200, which stands for equal ones."""
    mse = (a.double().clamp(-1, 1) - b.double().clamp(-1, 1)).square().mean().clamp_min(4e-20)
    return float(10 * torch.log10(4 / mse))
