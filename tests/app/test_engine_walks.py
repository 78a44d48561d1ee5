"""Unlike walks through one engine: each comes out as it would alone, and as the plain loop has it."""

from __future__ import annotations

import asyncio
import copy

import pytest
import torch

from app.engine.lane import Lane
from app.engine.runner import Runner
from app.engine.scheduler import Widths
from model import inversion, latents, machine, samplers
from model.plan import Clip
from tests.engines import ask, engine_on

pytestmark = pytest.mark.anyio


def unlike_requests(ckpt) -> list[list[Lane]]:
    """Every kind of walk there is, with different lengths, classes and seeds."""

    def ddim(steps, **options):
        return samplers.ddim(ckpt.schedule, steps, spacing="trailing", **options)

    def ddpm(steps, **options):
        return samplers.ddpm(ckpt.schedule, steps, spacing="trailing", **options)

    walks = [
        ddim(10),
        ddim(20, eta=0.5),
        ddim(50, clip=Clip(1.0)),
        ddpm(40, clip=Clip(1.0)),
        ddpm(15, variance="fixed_large"),
        ddim(7, clip=Clip(2.0, quantile=0.99)),
        ddim(3, eta=1.0, rederive=True, clip=Clip(1.0)),
        *(sampler.compile(ckpt.schedule, 6, spacing="trailing") for sampler in samplers.SAMPLERS.values()),
        samplers.pndm(ckpt.schedule, 5, warmup=True, spacing="trailing"),
        samplers.dpmpp_2m(ckpt.schedule, 9, order=3, spacing="karras"),
        inversion.fixed_point(ckpt.schedule, 5, refinements=3, spacing="trailing"),
        inversion.obelm(ckpt.schedule, 10),
    ]
    return [
        [
            Lane(walk, seed=100 * k + i, label=(k + i) % 3, reproducible=True, guidance=1.0 if k % 3 else 2.5)
            for i in range(1 + k % 3)
        ]
        for k, walk in enumerate(walks)
    ]


def in_double(net):
    """The same function in float64, but for the sinusoids of the timestep, which are float32 by definition."""
    double = copy.deepcopy(net).double()
    double.time_embedding.register_forward_pre_hook(lambda _, arguments: (arguments[0].double(),))
    return double


@torch.inference_mode()
def sampled(net, plan, seeds, shape, y, dtype):
    """``machine.sample`` in another precision, with the same noise."""
    generators = [latents.generator(seed) for seed in seeds]

    def draw():
        return torch.stack([latents.draw(generator, shape) for generator in generators]).to(dtype)

    return machine.run(net, plan, draw(), y, draw)


async def test_unlike_walks_share_forwards_and_each_equals_its_solo_answer(tiny_ckpt):
    runner = Runner(tiny_ckpt, torch.device("cpu"))
    widths = Widths((1, 2, 4, 8), (0.001, 0.0011, 0.0012, 0.0013), (4,))
    async with engine_on(runner, widths) as engine:
        together = await asyncio.gather(*(ask(engine, lanes) for lanes in unlike_requests(tiny_ckpt)))
        shared = len(engine._observer.forwards)
    async with engine_on(runner, widths) as engine:
        alone = [await ask(engine, lanes) for lanes in unlike_requests(tiny_ckpt)]
        rows = sum(rows for _, rows in engine._observer.forwards)
    for a, b in zip(together, alone, strict=True):
        assert torch.equal(a.pictures, b.pictures)
    assert shared < rows / 2


async def test_every_row_is_as_near_to_the_exact_walk_as_the_plain_loop(tiny_ckpt):
    """Beside the same walks in float64: what the engine loses to rounding is what the plain float32 loop loses.

    Forwards of other widths round in another order, so the two errors differ, but not in size; the walks up divide by
    what the walks down multiply with, and both lose a thousand times more there. Four times the loop's own, and ten
    units in the last place where that loses next to nothing.
    """
    runner = Runner(tiny_ckpt, torch.device("cpu"))
    async with engine_on(runner) as engine:
        requests = unlike_requests(tiny_ckpt)
        results = await asyncio.gather(*(ask(engine, lanes) for lanes in requests))
    for lanes, result in zip(requests, results, strict=True):
        seeds, labels = [lane.seed for lane in lanes], torch.tensor([lane.label for lane in lanes])
        scale = torch.tensor([lane.guidance for lane in lanes])
        net = machine.guided(tiny_ckpt.net, scale, null=3)
        plain = machine.sample(net, lanes[0].plan, seeds, tiny_ckpt.shape, labels)
        net = machine.guided(in_double(tiny_ckpt.net), scale.double(), null=3)
        exact = sampled(net, lanes[0].plan, seeds, tiny_ckpt.shape, labels, torch.float64)
        least = 10 * torch.finfo(torch.float32).eps * exact.abs().max()
        assert (result.pictures - exact).abs().max() < 4 * (plain - exact).abs().max() + least
