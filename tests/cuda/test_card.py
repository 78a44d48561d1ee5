"""What only a card can show: that graphs, kernels and streams do there what the CPU's tests say they do."""

from __future__ import annotations

import asyncio
import itertools

import pytest
import torch

from app.engine.calibration import CalibrationOptions, build_networks, calibrate
from app.engine.jobs import Lane
from app.engine.runner import Runner
from model import checkpoint
from model.device import to_host
from model.diffusion import samplers
from model.diffusion.plan import Clip
from model.network.cuda_graphs import Arithmetic, GraphedUNet
from model.network.inference import InferenceUNet
from tests.app.engine.test_engine_plans import assert_as_near_as_the_plain_loop, mixed_requests
from tests.engines import ask, engine_on
from tests.model.network.test_inference import SHAPES, network, rows

pytestmark = [pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"), pytest.mark.anyio]
CARD = torch.device("cuda")


@pytest.fixture(scope="module")
def ckpt(tiny):
    return checkpoint.load(tiny, CARD)


@pytest.fixture(scope="module")
def found(ckpt):
    return calibrate(ckpt, CARD, CalibrationOptions(max_width=32, reproducible_width=4), None)


@pytest.fixture(scope="module")
def prepared(ckpt, found):
    return build_networks(ckpt, CARD, found)


@pytest.fixture
def runner(ckpt, prepared):
    return Runner(ckpt, CARD, prepared)


@pytest.mark.parametrize("layout", ["channels_last", "fused"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@torch.inference_mode()
def test_a_replayed_forward_has_the_bits_of_a_launched_one(shape, dtype, layout):
    net = network(**SHAPES[shape]).to(CARD)
    fold = InferenceUNet(net, 1000, dtype, layout)
    graphed = GraphedUNet(fold, Arithmetic())
    graphed.capture([1, 5])
    x, t, y = (None if each is None else each.to(CARD) for each in rows(net))
    for _ in range(3):
        with Arithmetic().apply():
            assert torch.equal(graphed(x, t, y), fold(x, t, y))
        x = torch.randn_like(x)


@pytest.mark.parametrize("layout", ["channels_last", "fused"])
@pytest.mark.parametrize("shape", SHAPES)
@torch.inference_mode()
def test_the_card_computes_the_same_function(shape, layout):
    """Without tf32: to 1e-5 of an output of about 1, sums in another order."""
    net = network(**SHAPES[shape])
    x, t, y = rows(net)
    said = net(x, t, y)
    there = GraphedUNet(InferenceUNet(net.to(CARD), 1000, layout=layout), Arithmetic())
    there.capture([5])
    assert (there(x.to(CARD), t, y).cpu() - said).abs().max() < 1e-5


def test_calibration_takes_the_fused_form_and_doubling_widths(found):
    assert found.layout == "fused"
    assert {1, 2, 4} <= found.exact.keys()
    assert 4 in found.bit_identical


async def test_rows_do_not_depend_on_neighbours_slots_or_joins(runner, found):
    """The same reproducible walks: one after another; all at once; joining one by one while others are under way."""

    async def served(how):
        async with engine_on(runner, found.widths(exact=True)) as engine:
            return await how(engine, mixed_requests(runner.checkpoint))

    async def in_turn(engine, requests):
        return [await ask(engine, lanes) for lanes in requests]

    async def at_once(engine, requests):
        return await asyncio.gather(*(ask(engine, lanes) for lanes in requests))

    async def joining(engine, requests):
        tasks = []
        for lanes in requests:
            tasks.append(asyncio.create_task(ask(engine, lanes)))
            await asyncio.sleep(0.003)
        return await asyncio.gather(*tasks)

    solo = await served(in_turn)
    for how in (at_once, joining):
        for one, other in zip(solo, await served(how), strict=True):
            assert torch.equal(one.images, other.images)


async def test_every_plan_is_as_near_to_the_exact_result_as_a_plain_loop_on_the_cpu(runner, found, tiny_ckpt):
    async with engine_on(runner, found.widths(exact=True)) as engine:
        requests = mixed_requests(tiny_ckpt)
        results = await asyncio.gather(*(ask(engine, lanes) for lanes in requests))
    assert_as_near_as_the_plain_loop(tiny_ckpt, requests, results)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_no_tick_waits_for_the_card(runner):
    """Whatever would wait raises. Thresholding by quantile is left out: it reads a quantile of each row."""
    schedule = runner.checkpoint.schedule
    plans = [
        samplers.ddim(schedule, 6, clip=Clip(1.0)),
        samplers.ddpm(schedule, 6),
        samplers.dpmpp_2m(schedule, 6, spacing="karras"),
        samplers.unipc(schedule, 6),
    ]
    guidance = itertools.cycle([1.0, 3.0])
    lanes = [
        Lane(plan, i, i % 3, guidance=next(guidance), snapshot_steps=frozenset({1, 3})) for i, plan in enumerate(plans)
    ]
    runner.advance(lanes, 8).wait()
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        pending_ticks = [runner.advance(lanes, 8) for _ in range(5)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(pending.wait() > 0 for pending in pending_ticks)
    for lane in lanes:
        assert lane.snapshots.keys() == {1, 3}
        assert not lane.remaining
        assert runner.read_output(lane).isfinite().all()


def test_what_is_copied_home_is_there_when_its_event_is_over():
    big = torch.randn(64, 1 << 20, device=CARD)
    for _ in range(5):
        big = big.roll(1, 1)
        home, ended = to_host(big[:4]), torch.cuda.Event()
        ended.record()
        ended.synchronize()
        seen = home.clone()  # before anything else waits for the card
        assert torch.equal(seen, big[:4].cpu())


def test_tf32_is_for_those_who_ask_for_it(ckpt, tiny_ckpt):
    """A product of numbers that need more than 10 bits of mantissa shows which it was."""
    asked = calibrate(ckpt, CARD, CalibrationOptions(max_width=8, reproducible_width=4, dtype="tf32"), None)
    assert asked.dtype == "tf32"
    forms = build_networks(ckpt, CARD, asked)
    x = torch.randn(4, *ckpt.shape, generator=torch.Generator().manual_seed(0))
    t, y = torch.tensor([1.0, 300, 600, 999]), torch.tensor([0, 1, 2, 3])
    said = tiny_ckpt.net(x, t, y)
    fast, exact = (float((form(x.to(CARD), t, y).cpu() - said).abs().max()) for form in (forms.fast, forms.exact))
    assert exact < 1e-5
    assert fast > exact
