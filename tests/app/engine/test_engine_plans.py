"""Plans of every kind in one engine: each gives the result that it gives alone, and that of the plain loop."""

from __future__ import annotations

import asyncio

import pytest
import torch

from app.engine.jobs import Lane
from app.engine.runner import Runner
from app.engine.widths import Widths
from model.diffusion import inversion, samplers
from model.diffusion.plan import Clip
from tests import rounding
from tests.engines import ask, engine_on
from tests.oracles import guided

pytestmark = pytest.mark.anyio


def mixed_requests(ckpt) -> list[list[Lane]]:
    """Plans of every sampler and inversion, with different lengths, classes and seeds."""

    def ddim(steps, **options):
        return samplers.ddim(ckpt.schedule, steps, spacing="trailing", **options)

    def ddpm(steps, **options):
        return samplers.ddpm(ckpt.schedule, steps, spacing="trailing", **options)

    plans = [
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
        inversion.fixed_point(ckpt.schedule, 3, refinements=3, spacing="trailing"),
        inversion.obelm(ckpt.schedule, 10),
    ]
    return [
        [
            Lane(plan, seed=100 * k + i, label=(k + i) % 3, reproducible=True, guidance=1.0 if k % 3 else 2.5)
            for i in range(1 + k % 3)
        ]
        for k, plan in enumerate(plans)
    ]


async def test_plans_share_forwards_and_each_result_equals_its_solo_result(tiny_ckpt):
    runner = Runner(tiny_ckpt, torch.device("cpu"))
    widths = Widths((1, 2, 4, 8), (0.001, 0.0011, 0.0012, 0.0013), (4,))
    async with engine_on(runner, widths) as engine:
        together = await asyncio.gather(*(ask(engine, lanes) for lanes in mixed_requests(tiny_ckpt)))
        shared = len(engine.worker._observer.forwards)
    async with engine_on(runner, widths) as engine:
        alone = [await ask(engine, lanes) for lanes in mixed_requests(tiny_ckpt)]
        rows = sum(rows for _, rows in engine.worker._observer.forwards)
    for a, b in zip(together, alone, strict=True):
        assert torch.equal(a.images, b.images)
    assert shared < rows / 2


def assert_as_near_as_the_plain_loop(ckpt, requests, results) -> None:
    """To the exact result, as defined by tests/rounding.py. ``ckpt`` is on the CPU."""
    for lanes, result in zip(requests, results, strict=True):

        def sample(net, dtype, copies, lanes=lanes):
            lanes = lanes * copies
            seeds, labels = [lane.seed for lane in lanes], torch.tensor([lane.label for lane in lanes])
            net = guided(net, [lane.guidance for lane in lanes], null=3)
            return rounding.run_plan(net, lanes[0].plan, seeds, labels, ckpt.shape, dtype)

        exact, most = rounding.bound(ckpt.net, sample)
        assert (result.images - exact).abs().max() < most


async def test_every_row_is_as_near_to_the_exact_result_as_the_plain_loop(tiny_ckpt):
    """Forwards of other widths round in another order; inversions divide by what samplers multiply with."""
    runner = Runner(tiny_ckpt, torch.device("cpu"))
    async with engine_on(runner) as engine:
        requests = mixed_requests(tiny_ckpt)
        results = await asyncio.gather(*(ask(engine, lanes) for lanes in requests))
    assert_as_near_as_the_plain_loop(tiny_ckpt, requests, results)
