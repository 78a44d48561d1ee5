"""Failures: a forward that is not finite, memory that runs out, a device that fails or stalls."""

from __future__ import annotations

import asyncio

import pytest
import torch

from app.engine.jobs import Lane
from app.engine.runner import OutOfMemoryError, Runner
from app.engine.widths import Forwards, Widths
from app.errors import DeviceMemory, Draining, EngineDead, NotFinite
from model.diffusion import machine, samplers
from tests.engines import SCHEDULE, FakeDevice, ask, engine_on, plan, until

pytestmark = pytest.mark.anyio


async def test_a_lane_that_turns_nan_fails_its_own_job_only(tiny_ckpt):
    class Poisoned(Runner):
        def read_output(self, lane):
            x = super().read_output(lane)
            return x * float("nan") if lane.seed == 13 else x

    async with engine_on(Poisoned(tiny_ckpt, torch.device("cpu"))) as engine:
        jobs = [ask(engine, [Lane(plan(4), seed, 0), Lane(plan(4), seed + 1, 0)]) for seed in (1, 12, 20)]
        results = await asyncio.gather(*jobs, return_exceptions=True)
        assert isinstance(results[1], NotFinite)
        assert results[0].images.isfinite().all()
        assert results[2].images.isfinite().all()
        assert engine.unready is None
        assert engine.worker._observer.failures == ["nan"]


async def test_out_of_memory_halves_the_width_and_changes_no_result(tiny_ckpt):
    class Small(Runner):
        def advance(self, lanes, width, exact):
            if width > 2:
                raise OutOfMemoryError("too wide")
            return super().advance(lanes, width, exact)

    lanes = [[Lane(samplers.ddpm(SCHEDULE, 10), seed, 0)] for seed in range(8)]
    expected = [machine.sample(tiny_ckpt.net, lane.plan, [lane.seed], (1, 8, 8), torch.tensor([0])) for [lane] in lanes]
    async with engine_on(Small(tiny_ckpt, torch.device("cpu"))) as engine:
        results = await asyncio.gather(*(ask(engine, job) for job in lanes))
        assert engine.forwards.fast.cap == 2
        assert engine.worker._observer.failures == ["oom", "oom"]  # of 8 rows and of 4
        with pytest.raises(DeviceMemory, match="UNSTIR_REPRODUCIBLE_WIDTH"):
            await ask(engine, [Lane(plan(), 1, 0, reproducible=True)])
    for result, image in zip(results, expected, strict=True):
        assert (result.images - image).abs().max() < 1e-5 * image.abs().max()


async def test_a_step_that_is_tried_again_sees_the_same_noise(tiny_ckpt, monkeypatch):
    plan = samplers.ddpm(SCHEDULE, 10)
    expected = machine.sample(tiny_ckpt.net, plan, [5], (1, 8, 8), torch.tensor([0]))
    advance, failures = machine.advance, iter([False, True, False, True])

    def sometimes(net, state, rows, noise, **others):
        if next(failures, False):
            noise()  # drawn, and then the update finds no room
            raise torch.OutOfMemoryError("no room")
        return advance(net, state, rows, noise=noise, **others)

    monkeypatch.setattr(machine, "advance", sometimes)
    async with engine_on(Runner(tiny_ckpt, torch.device("cpu"))) as engine:
        result = await ask(engine, [Lane(plan, 5, 0)])
        assert engine.forwards.fast.cap == 2  # halved twice
    assert (result.images - expected).abs().max() < 1e-5 * expected.abs().max()


async def test_out_of_memory_fails_the_reproducible_jobs_under_way():
    def too_wide(lanes, width):
        if width > 2:
            raise OutOfMemoryError("too wide")

    async with engine_on(FakeDevice(fail=too_wide)) as engine:
        doomed = ask(engine, [Lane(plan(), 1, reproducible=True)])
        fine = ask(engine, [Lane(plan(), 2)])
        results = await asyncio.gather(doomed, fine, return_exceptions=True)
    assert isinstance(results[0], DeviceMemory)
    assert results[1].images.mean() == 2


async def test_out_of_memory_down_to_one_row_fails_guided_jobs_alone():
    def too_wide(lanes, width):
        if width > 1:
            raise OutOfMemoryError("too wide")

    async with engine_on(FakeDevice(fail=too_wide), Widths((1, 2), (0.001, 0.001), (2,))) as engine:
        doomed = ask(engine, [Lane(plan(), 1, 0, guidance=2.0)])
        fine = ask(engine, [Lane(plan(), 2)])
        results = await asyncio.gather(doomed, fine, return_exceptions=True)
    assert isinstance(results[0], DeviceMemory)
    assert "guidance needs 2 rows" in results[0].detail
    assert results[1].images.mean() == 2


async def test_no_room_for_a_single_row_ends_the_engine():
    def full(lanes, width):
        raise OutOfMemoryError("nothing fits")

    async with engine_on(FakeDevice(fail=full)) as engine:
        with pytest.raises(EngineDead, match="nothing fits"):
            await ask(engine, [Lane(plan(), 1)])


async def test_a_dead_device_fails_all_requests_and_refuses_the_next():
    def explode(lanes, width):
        raise RuntimeError("the card fell off the bus")

    device = FakeDevice(fail=explode, gated=True)
    async with engine_on(device) as engine:
        jobs = [asyncio.create_task(ask(engine, [Lane(plan(), seed)])) for seed in range(5)]
        await asyncio.sleep(0.01)
        device.gate.release()
        for result in await asyncio.wait_for(asyncio.gather(*jobs, return_exceptions=True), 5):
            assert isinstance(result, EngineDead)
            assert "fell off the bus" in result.detail
        with pytest.raises(EngineDead):
            engine.reserve(1, 1)
        assert "fell off the bus" in engine.unready
        assert engine.worker._observer.failures == ["exception"]
        assert engine.lanes == (0, 0)


async def test_closing_does_not_wait_for_a_device_that_hangs(monkeypatch):
    monkeypatch.setattr("app.engine.engine.CLOSE_SECONDS", 0.05)
    device = FakeDevice(gated=True)
    async with engine_on(device) as engine:
        job = asyncio.create_task(ask(engine, [Lane(plan(5), 1)]))
        await until(lambda: device.entered)
        engine.close()
        assert not engine.worker.stopped.is_set()
        with pytest.raises(Draining, match="stopped before"):
            await job
        with pytest.raises(Draining, match="stopped before"):
            engine.reserve(1, 1)
        device.gate.release()


async def test_who_has_a_place_and_reads_his_image_is_not_stalled():
    async with engine_on(FakeDevice()) as engine:
        engine.worker.last_tick -= 1e6
        with engine.reserve(1, 10):
            assert engine.lanes == (1, 0)
            assert engine.unready is None


@pytest.mark.parametrize("slower", ["fast", "exact"])
async def test_a_device_may_be_as_slow_as_its_widest_forwards_before_it_is_stalled(slower):
    """30 s, and 20 times the 2 s that its widest forward takes."""
    quick, slow = Widths((1, 8), (0.5, 1.0)), Widths((1, 8), (0.5, 2.0))
    device = FakeDevice(gated=True)
    async with engine_on(device, Forwards(quick, slow) if slower == "exact" else Forwards(slow, quick)) as engine:
        job = asyncio.create_task(ask(engine, [Lane(plan(1), 1)]))
        await until(lambda: device.entered)
        assert engine.unready is None
        engine.worker.last_tick -= 60
        assert engine.unready is None
        engine.worker.last_tick -= 11
        assert "no forward has ended for 71 s" in engine.unready
        device.gate.release()
        await job


async def test_a_stalled_device_is_not_ready(monkeypatch):
    monkeypatch.setattr("app.engine.engine.STALL_SECONDS", 0.05)
    device = FakeDevice(gated=True)
    async with engine_on(device) as engine:
        job = asyncio.create_task(ask(engine, [Lane(plan(1), 1)]))
        await until(lambda: engine.unready is not None)
        assert "stalled" in engine.unready
        device.gate.release()
        await job
        assert engine.unready is None
