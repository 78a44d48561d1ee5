"""Lanes that cannot advance fail alone; what the others give is what they give without them."""

from __future__ import annotations

import asyncio

import pytest
import torch

from app.engine import runner as module
from app.engine.isolation import isolate
from app.engine.jobs import Lane
from app.engine.runner import OutOfMemoryError, Runner
from app.engine.widths import Widths
from app.errors import DeviceMemory, EngineDead, StepFailed
from model.diffusion import samplers
from tests.engines import SCHEDULE, Ahead, FakeDevice, ask, engine_on, plan, until

pytestmark = pytest.mark.anyio
CPU = torch.device("cpu")


def stochastic(seeds, label: int = 0) -> list[Lane]:
    return [Lane(samplers.ddpm(SCHEDULE, 8), seed, label) for seed in seeds]


async def test_a_class_that_the_network_does_not_have_fails_its_own_job_alone(tiny_ckpt):
    """An index error of the lookup; the others draw the same noise and give the same bits, at one width."""
    widths = Widths((8,), (0.001,))
    async with engine_on(Runner(tiny_ckpt, CPU), widths) as engine:
        expected = [await ask(engine, stochastic([seed, seed + 1])) for seed in (1, 3)]
    async with engine_on(Runner(tiny_ckpt, CPU), widths) as engine:
        jobs = [stochastic([1, 2]), stochastic([7, 8], label=99), stochastic([3, 4])]
        first, poisoned, last = await asyncio.gather(*(ask(engine, job) for job in jobs), return_exceptions=True)
        assert isinstance(poisoned, StepFailed)
        assert "Error" in poisoned.detail
        assert engine.unready is None
        assert engine.worker._observer.failures == ["exception"]
        assert torch.equal(first.images, expected[0].images)
        assert torch.equal(last.images, expected[1].images)
        for _ in range(10):  # alone, and as often as it likes
            with pytest.raises(StepFailed):
                await ask(engine, stochastic([7], label=99))
        assert engine.unready is None
        assert (await ask(engine, stochastic([1, 2]))).images.isfinite().all()


@pytest.mark.parametrize("pooled", [False, True], ids=["in-order", "in-threads"])
async def test_noise_once_drawn_is_kept_where_another_lane_fails_to_draw(tiny_ckpt, monkeypatch, pooled):
    """A generator that raises once: the tick is repeated, and every lane has the bits that it has undisturbed."""
    draw, calls = module.draw_noise, []

    def sometimes(generator, shape):
        calls.append(generator)
        if len(calls) in (6, 7, 20):
            raise RuntimeError("no entropy")
        return draw(generator, shape)

    def device() -> Runner:
        found = Runner(tiny_ckpt, CPU)
        found._noise_pool = module.ThreadPoolExecutor(2) if pooled else None
        return found

    widths = Widths((4,), (0.001,))
    async with engine_on(device(), widths) as engine:
        expected = await ask(engine, stochastic(range(4)))
    monkeypatch.setattr(module, "draw_noise", sometimes)
    async with engine_on(device(), widths) as engine:
        result = await ask(engine, stochastic(range(4)))
    assert len(calls) > 20
    assert torch.equal(result.images, expected.images)


async def test_a_lane_is_tried_alone_before_its_job_fails():
    """Of eight jobs of three images one lane is bad: few forwards find it, and the others of its job stop."""

    def bad(lanes, width):
        if any(lane.seed == 13 for lane in lanes):
            raise IndexError("out of range")

    device = FakeDevice(fail=bad)
    async with engine_on(device) as engine:
        jobs = [[Lane(plan(3), seed) for seed in range(first, first + 3)] for first in range(0, 24, 3)]
        results = await asyncio.gather(*(ask(engine, job) for job in jobs), return_exceptions=True)
        assert [isinstance(result, StepFailed) for result in results] == [i == 4 for i in range(8)]
        assert not engine.worker.jobs


def test_the_search_takes_few_forwards_and_advances_each_lane_once():
    lanes = [Lane(plan(1), seed) for seed in range(64)]
    owners = {lane: lane.seed // 8 for lane in lanes}
    tried, moved = [], []

    def advance(part):
        tried.append(len(part))
        if any(lane.seed in range(8, 16) for lane in part):
            raise ValueError
        moved.extend(part)

    assert list(isolate(lanes, owners, advance)) == [1]
    assert sorted(lane.seed for lane in moved) == [seed for seed in range(64) if seed // 8 != 1]
    assert len(tried) <= 2 * 6 + 1


async def test_a_device_that_fails_at_what_no_request_has_any_part_in_has_failed():
    def dead(lanes, width):
        raise RuntimeError("the card fell off the bus")

    async with engine_on(FakeDevice(fail=dead)) as engine:
        with pytest.raises(EngineDead, match="fell off the bus"):
            await ask(engine, [Lane(plan(), 1)])
        assert "fell off the bus" in engine.failure


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), GeneratorExit()], ids=lambda e: type(e).__name__)
async def test_whatever_ends_the_device_thread_is_logged_and_answered(error, caplog):
    def exits(lanes, width):
        raise error

    async with engine_on(FakeDevice(fail=exits)) as engine:
        with pytest.raises(EngineDead, match=type(error).__name__):
            await ask(engine, [Lane(plan(), 1)])
        assert type(error).__name__ in engine.failure
        assert type(error).__name__ in engine.unready
        assert engine.worker.stopped.wait(5)
    assert "the device thread has ended" in caplog.text


async def test_what_a_tick_could_not_hand_over_fails_the_jobs_of_that_tick():
    """A device that works on, and whose tick is lost: its lanes have moved, so the step cannot be repeated."""
    device = Ahead(gated=True)
    async with engine_on(device) as engine:
        lost = asyncio.create_task(ask(engine, [Lane(plan(), 1)]))
        await until(lambda: device.begun == 2)
        device.check = lambda: None
        device.completion_error = MemoryError("no room for a snapshot")
        device.completions.release(2)
        with pytest.raises(DeviceMemory, match="no room for a snapshot"):
            await lost
        device.completion_error = None
        device.begun = device.completed
        device.completions.release(20)
        assert (await ask(engine, [Lane(plan(), 2)])).images.mean() == 2


@pytest.mark.parametrize(
    "error",
    [
        pytest.param(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), id="torch"),
        pytest.param(MemoryError(), id="python"),
        pytest.param(torch.OutOfMemoryError("CUDA out of memory"), id="cuda"),
    ],
)
async def test_whichever_allocator_has_no_room_the_width_is_halved(tiny_ckpt, error, caplog):
    class Small(Runner):
        def _forward(self, lanes, width, exact, pending):
            if width > 2:
                raise error
            return super()._forward(lanes, width, exact, pending)

    async with engine_on(Small(tiny_ckpt, CPU)) as engine:
        results = await asyncio.gather(*(ask(engine, stochastic([seed])) for seed in range(8)))
        assert engine.forwards.fast.cap == 2
        assert engine.worker._observer.failures == ["oom", "oom"]
    assert all(result.images.isfinite().all() for result in results)
    assert "at most 4 rows from now on" in caplog.text


async def test_widths_come_back_when_there_is_room_again(monkeypatch):
    monkeypatch.setattr("app.engine.cost_model.WIDEN_TICKS", 100)
    full = True

    def crowded(lanes, width):
        if full and width > 2:
            raise MemoryError("no room")

    class Small(FakeDevice):
        def advance(self, lanes, width, exact):
            try:
                return super().advance(lanes, width, exact)
            except MemoryError as error:
                raise OutOfMemoryError("no room") from error

    async with engine_on(Small(fail=crowded)) as engine:
        await asyncio.gather(*(ask(engine, [Lane(plan(), seed)]) for seed in range(8)))
        assert engine.forwards.fast.cap == 2
        full = False
        await ask(engine, [Lane(plan(100), 1)])
        assert engine.forwards.fast.cap == 4
        await ask(engine, [Lane(plan(100), 1)])
        assert engine.forwards.fast.cap == 8
        assert engine.forwards.exact.bit_identical == (4,)
