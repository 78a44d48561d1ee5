"""The engine without HTTP: every ending that a job can have, on the real runner and on devices that fail on purpose."""

from __future__ import annotations

import asyncio

import pytest
import torch

from app.engine.jobs import Lane
from app.engine.reservation import SubmitOptions
from app.engine.runner import OutOfMemoryError, Runner
from app.engine.widths import Widths
from app.errors import DeviceMemory, Draining, EngineDead, NotFinite, Overloaded, TooLate
from model.diffusion import machine, samplers
from tests.engines import SCHEDULE, FakeDevice, ask, engine_on, plan, until

pytestmark = pytest.mark.anyio


async def test_results_come_in_the_order_of_the_lanes():
    async with engine_on(FakeDevice()) as engine:
        result = await ask(engine, [Lane(plan(), seed) for seed in (3, 1, 2)])
    assert result.images[:, 0, 0, 0].tolist() == [3, 1, 2]
    assert result.queue_seconds >= 0
    assert result.device_seconds > 0


async def test_cancelled_lanes_leave_before_the_next_tick():
    device = FakeDevice(gated=True)
    async with engine_on(device) as engine:
        doomed = asyncio.create_task(ask(engine, [Lane(plan(1000), 1), Lane(plan(1000), 2)]))
        await until(lambda: device.entered)
        device.gate.release()
        await until(lambda: len(device.seen) == 1)
        doomed.cancel()
        with pytest.raises(asyncio.CancelledError):
            await doomed
        assert not engine.requests
        assert engine.wait_seconds == 0
        other = asyncio.create_task(ask(engine, [Lane(plan(1), 3)]))
        await asyncio.sleep(0)
        device.gate.release(2)  # the forward that was under way, and the other's
        assert (await other).images.mean() == 3
    assert all(lane.seed == 3 for lane in device.seen[-1])
    assert len(device.seen) <= 3


async def test_cancel_while_waiting_in_the_inbox():
    device = FakeDevice(gated=True)
    async with engine_on(device) as engine:
        first = asyncio.create_task(ask(engine, [Lane(plan(1), 1)]))
        await until(lambda: device.entered)
        doomed = asyncio.create_task(ask(engine, [Lane(plan(1), 2)]))
        await asyncio.sleep(0.01)
        doomed.cancel()
        with pytest.raises(asyncio.CancelledError):
            await doomed
        device.gate.release(10)
        assert (await first).images.mean() == 1
    assert [lane.seed for lanes in device.seen for lane in lanes] == [1]


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


async def test_out_of_memory_halves_the_width_and_nobody_notices(tiny_ckpt):
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


async def test_a_guided_job_counts_twice_in_the_book():
    async with engine_on(FakeDevice(gated=True)) as engine:
        lanes = [Lane(plan(10), 1, 0, guidance=2.0), Lane(plan(10), 2)]
        job = asyncio.create_task(ask(engine, lanes))
        await until(lambda: engine.worker.jobs)
        assert engine.wait_seconds == pytest.approx(30 * engine.forwards.fast.seconds_per_row)
        engine.worker.device.gate.release(100)
        await job
        assert all(rows == 3 for _, rows in engine.worker._observer.forwards[:10])


async def test_no_room_for_a_single_row_ends_the_engine():
    def full(lanes, width):
        raise OutOfMemoryError("nothing fits")

    async with engine_on(FakeDevice(fail=full)) as engine:
        with pytest.raises(EngineDead, match="nothing fits"):
            await ask(engine, [Lane(plan(), 1)])


async def test_a_dead_device_answers_everybody_and_refuses_the_next():
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
        assert engine.lanes == (0, 0)


async def test_admission_is_arithmetic():
    """Ten steps at 1/8 ms a row: a hundred rows are 125 ms of work."""
    async with engine_on(FakeDevice(gated=True), max_queue_seconds=0.1) as engine:
        with engine.reserve(100, 100 * 10):
            assert engine.wait_seconds == pytest.approx(0.125)
            with pytest.raises(Overloaded) as refused:
                engine.reserve(1, 1)
            assert refused.value.headers["Retry-After"] == "1"
        assert engine.wait_seconds == 0
        # Large, but nothing is ahead of it.
        with engine.reserve(100, 100 * 100_000), pytest.raises(Overloaded) as refused:
            engine.reserve(1, 1)
        assert refused.value.headers["Retry-After"] == str(1250)  # 1250 s of work, 0.1 s of which may wait


async def test_images_in_flight_are_bounded():
    async with engine_on(FakeDevice(), max_lanes=10) as engine:
        with engine.reserve(8, 1), pytest.raises(Overloaded, match="8 images are in progress, and 3 more"):
            engine.reserve(3, 1)
        assert not engine.requests


async def test_gauges_follow_the_book():
    device = FakeDevice(gated=True)
    async with engine_on(device) as engine:
        job = asyncio.create_task(ask(engine, [Lane(plan(2), seed) for seed in range(3)]))
        await until(lambda: device.entered)
        assert engine.lanes == (3, 0)
        device.gate.release()
        await until(lambda: engine.lanes == (0, 3))
        assert engine.wait_seconds == pytest.approx(3 * engine.forwards.fast.seconds_per_row)
        device.gate.release()
        await job
        assert engine.lanes == (0, 0)
        assert not engine.requests


async def test_draining_finishes_what_was_accepted_and_takes_nothing_new():
    device = FakeDevice(gated=True)
    async with engine_on(device) as engine:
        job = asyncio.create_task(ask(engine, [Lane(plan(2), 1)]))
        await until(lambda: device.entered)
        draining = asyncio.create_task(engine.drain(5))
        await asyncio.sleep(0)
        with pytest.raises(Draining):
            engine.reserve(1, 1)
        assert "draining" in engine.unready
        device.gate.release(2)
        assert await draining == 0
        assert (await job).images.mean() == 1


async def test_drain_time_ends_and_closing_answers_the_rest():
    device = FakeDevice(gated=True)
    async with engine_on(device) as engine:
        job = asyncio.create_task(ask(engine, [Lane(plan(1000), 1)]))
        await until(lambda: device.entered)
        assert await engine.drain(0.05) == 1
        device.gate.release()
    with pytest.raises(Draining, match="stopped before"):
        await job


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


async def test_what_is_cancelled_keeps_no_memory():
    device = FakeDevice(gated=True)
    async with engine_on(device) as engine:
        lanes = [Lane(plan(5), seed, initial_state=torch.zeros(1, 1, 2, 2)) for seed in range(2)]
        job = asyncio.create_task(ask(engine, lanes))
        await until(lambda: device.entered)
        for lane in lanes:
            lane.state = torch.zeros(1, 1, 2, 2)
        job.cancel()
        await asyncio.wait({job})
        device.gate.release()
        await until(lambda: not engine.worker.jobs)
        assert [(lane.state, lane.initial_state) for lane in lanes] == [(None, None)] * 2


async def test_a_deadline_counts_steps_that_follow_each_other():
    """Rows of one step share a forward: with guidance 40 rows are 20 forwards, which 30 narrow ones have room for."""
    async with engine_on(FakeDevice()) as engine:
        now, forward = asyncio.get_running_loop().time(), engine.forwards.fast.seconds[0]
        options = SubmitOptions(deadline=now + 30 * forward)
        assert 40 * engine.forwards.fast.seconds_per_row < 29 * forward
        engine.reserve(1, 40, steps=20, options=options)
        with pytest.raises(TooLate):
            engine.reserve(1, 40, options=options)


async def test_who_has_a_place_and_reads_his_image_is_not_stalled():
    async with engine_on(FakeDevice()) as engine:
        engine.worker.last_tick -= 1e6
        with engine.reserve(1, 10):
            assert engine.lanes == (1, 0)
            assert engine.unready is None


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
