"""The engine without HTTP: submitting, cancelling, admission and draining; test_engine_failures.py has what fails."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from app.engine.cost_model import CostModel
from app.engine.jobs import Job, Lane
from app.engine.reservation import Close, SubmitOptions
from app.engine.widths import Forwards, Widths
from app.engine.worker import Worker
from app.errors import Draining, Overloaded, TooLate
from tests.engines import WIDTHS, FakeDevice, Log, ask, engine_on, plan, until

pytestmark = pytest.mark.anyio


async def test_results_come_in_the_order_of_the_lanes():
    async with engine_on(FakeDevice()) as engine:
        result = await ask(engine, [Lane(plan(), seed) for seed in (3, 1, 2)])
    assert result.images[:, 0, 0, 0].tolist() == [3, 1, 2]
    assert result.queue_seconds >= 0
    assert result.device_seconds > 0


class Slow(FakeDevice):
    """A forward takes 5 ms at least."""

    def advance(self, lanes, width, exact):
        time.sleep(0.005)
        return super().advance(lanes, width, exact)


async def test_a_result_says_how_long_it_waited_and_how_long_it_took():
    """One row at a time: the longer job begins when the shorter one is done."""
    async with engine_on(Slow(), Widths((1,), (0.005,))) as engine:
        began = time.monotonic()
        short, long = await asyncio.gather(ask(engine, [Lane(plan(4), 1)]), ask(engine, [Lane(plan(8), 2)]))
        elapsed = time.monotonic() - began
    for result, steps in ((short, 4), (long, 8)):
        assert result.device_seconds >= 0.005 * steps
        assert 0 <= result.queue_seconds <= result.queue_seconds + result.device_seconds <= elapsed
        assert began <= result.started <= began + elapsed
    assert long.started >= short.started + short.device_seconds


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
        [latency] = engine.worker._observer.cancellations
        assert 0 <= latency < 5
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


async def test_a_lane_with_guidance_counts_twice():
    async with engine_on(FakeDevice(gated=True)) as engine:
        lanes = [Lane(plan(10), 1, 0, guidance=2.0), Lane(plan(10), 2)]
        job = asyncio.create_task(ask(engine, lanes))
        await until(lambda: engine.worker.jobs)
        assert engine.wait_seconds == pytest.approx(30 * engine.forwards.fast.seconds_per_row)
        engine.worker.device.gate.release(100)
        await job
        assert all(rows == 3 for _, rows in engine.worker._observer.forwards[:10])


async def test_a_lane_knows_for_how_many_ticks_it_was_passed_over():
    device = FakeDevice(gated=True)
    async with engine_on(device, Widths((1,), (0.001,))) as engine:
        short, long = Lane(plan(10), 1), Lane(plan(50), 2)
        jobs = [asyncio.create_task(ask(engine, [short]))]
        await until(lambda: device.entered == 1)
        jobs.append(asyncio.create_task(ask(engine, [long])))
        await asyncio.sleep(0)
        device.gate.release(4)
        await until(lambda: device.entered == 5)
        assert (short.passed_over, long.passed_over) == (0, 3)  # the first tick was before it
        device.gate.release(100)
        await asyncio.gather(*jobs)


async def test_admission_is_arithmetic():
    """A row-step takes 1/8 s."""
    async with engine_on(FakeDevice(gated=True), Widths((8,), (1.0,)), max_queue_seconds=10) as engine:
        with engine.reserve(8, 40), engine.reserve(8, 40), engine.reserve(8, 24):
            assert engine.wait_seconds == pytest.approx(13)
            with pytest.raises(Overloaded) as refused:
                engine.reserve(1, 1)
            assert refused.value.headers["Retry-After"] == "3"
        assert engine.wait_seconds == 0


async def test_one_request_does_not_fill_the_queue_for_all_others():
    """A row-step takes 1/8 s: 64 images of 1,000 steps with guidance are 16,000 s."""
    async with engine_on(FakeDevice(gated=True), Widths((8,), (1.0,)), max_queue_seconds=300) as engine:
        with engine.reserve(64, 128_000):  # nothing is ahead of it
            assert engine.wait_seconds == pytest.approx(16_000)
            with pytest.raises(Overloaded, match="takes 16000 s, and while others wait at most 300 s are taken") as no:
                engine.reserve(1, 128_000)
            assert no.value.headers["Retry-After"] == "16000"
            for _ in range(4):
                engine.reserve(8, 8 * 50).__enter__()  # 50 s each
            with pytest.raises(Overloaded) as refused:
                engine.reserve(1, 1)
            assert refused.value.headers["Retry-After"] == "50"


async def test_images_in_progress_are_bounded():
    async with engine_on(FakeDevice(), max_lanes=10) as engine:
        with engine.reserve(8, 1), pytest.raises(Overloaded, match="8 images are in progress, and 3 more"):
            engine.reserve(3, 1)
        with engine.reserve(1, 1), pytest.raises(Overloaded, match="1 images are in progress, and 10 more"):
            engine.reserve(10, 1)
        assert not engine.requests


async def test_gauges_follow_the_reservations():
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


async def test_lanes_advance_in_forwards_of_their_own_kind():
    device = FakeDevice()
    fast, exact = Widths((1, 8), (0.001, 0.001)), Widths((2, 4), (0.001, 0.001), (4,))
    async with engine_on(device, Forwards(fast, exact)) as engine:
        for lane, kind in (
            (Lane(plan(1), 1), (1, False)),
            (Lane(plan(1), 1, exact=True), (2, True)),
            (Lane(plan(1), 1, reproducible=True), (4, True)),
        ):
            await ask(engine, [lane])
            assert device.kinds.pop() == kind


async def test_work_is_counted_in_the_seconds_of_its_own_kind_of_forward():
    """80 row-steps are ten forwards of eight rows."""
    async with engine_on(FakeDevice(), Forwards(Widths((8,), (1.0,)), Widths((8,), (3.0,), (8,))), 100) as engine:
        with engine.reserve(8, 80) as ordinary:
            assert engine.wait_seconds == pytest.approx(10)
            with engine.reserve(8, 80, exact=True) as exact:
                assert engine.wait_seconds == pytest.approx(10 + 30)
                assert engine.seconds_left(exact) == pytest.approx(10 + 30)
                assert engine.seconds_left(ordinary) == pytest.approx(10 + 10)  # the shorter half of the other's
        now = asyncio.get_running_loop().time()
        options = SubmitOptions(deadline=now + 20)
        engine.reserve(8, 80, options=options)
        with pytest.raises(TooLate):
            engine.reserve(8, 80, exact=True, options=options)


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


async def test_gauges_count_lanes_and_requests_before_and_after_their_first_step():
    device = FakeDevice(gated=True)
    async with engine_on(device) as engine:
        with engine.reserve(3, 8, options=SubmitOptions(endpoint="/sample")) as reservation:
            assert (engine.lanes, engine.requests) == ((3, 0), {("/sample", False): 1})
            assert not reservation.running
            job = asyncio.create_task(reservation.run([Lane(plan(2), 1), Lane(plan(4), 2)]))
            await until(lambda: device.entered)
            assert (engine.lanes, engine.requests) == ((3, 0), {("/sample", False): 1})
            device.gate.release()
            await until(lambda: device.entered == 2)
            assert (engine.lanes, engine.requests) == ((1, 2), {("/sample", True): 1})
            assert reservation.running
            device.gate.release()
            await until(lambda: device.entered == 3)
            assert engine.lanes == (1, 1)  # one is done, and one of the three was never submitted
            device.gate.release(2)
            await job
            assert (engine.lanes, reservation.remaining) == ((1, 0), 2)  # of the work that was reserved


async def test_a_request_can_submit_one_job_after_another():
    async with engine_on(FakeDevice()) as engine:
        submitted = []
        with engine.reserve(2, 30) as reservation:
            reservation.on_submit = lambda: submitted.append(reservation.job)
            assert (reservation.total, reservation.remaining) == (30, 30)
            await reservation.run([Lane(plan(10), 1)])
            assert reservation.remaining == 20
            await reservation.run([Lane(plan(10), 1), Lane(plan(10), 2)])
            assert reservation.remaining == 0
        assert [len(job.lanes) for job in submitted] == [1, 2]


async def test_position_and_time_left_count_the_work_that_goes_first():
    """A forward takes 1 ms, at any width, and a row of a full one 1/8 ms."""
    async with engine_on(FakeDevice()) as engine:
        with engine.reserve(1, 10) as small, engine.reserve(2, 10) as equal, engine.reserve(50, 1000) as large:
            assert [engine.position(each) for each in (small, equal, large)] == [1, 1, 2]
            assert engine.seconds_left(small) == pytest.approx(10 * 0.001)  # ten forwards, one after another
            assert engine.seconds_left(equal) == pytest.approx(5 * 0.001)
            assert engine.seconds_left(large) == pytest.approx((10 + 10 + 1000) * 0.001 / 8)


async def test_a_request_that_runs_is_the_first_in_its_queue():
    device = FakeDevice(gated=True)
    async with engine_on(device) as engine:
        with engine.reserve(1, 1), engine.reserve(1, 3) as running:
            assert engine.position(running) == 1
            job = asyncio.create_task(running.run([Lane(plan(3), 1)]))
            device.gate.release()
            await until(lambda: device.entered == 2)
            assert engine.position(running) == 0
            device.gate.release(2)
            await job


async def test_work_that_is_due_earlier_counts_against_a_deadline(monkeypatch):
    """Each request is 80 row-steps of 1/8 ms: 10 ms of work."""
    monkeypatch.setattr("app.engine.engine.time", SimpleNamespace(monotonic=lambda: 1000.0))
    async with engine_on(FakeDevice()) as engine:

        def reserve(milliseconds: float | None, priority: int = 0):
            deadline = None if milliseconds is None else 1000.0 + milliseconds / 1e3
            return engine.reserve(8, 80, options=SubmitOptions(deadline, priority))

        with pytest.raises(TooLate, match="on an idle device"):
            reserve(9.9)
        reserve(10.1)
        with reserve(15):
            reserve(20.1)
            with pytest.raises(TooLate, match="20 ms are needed"):
                reserve(19.9)
            reserve(14.9)  # the other is due later
            reserve(19.9, priority=1)  # the other is less important
        with reserve(15, priority=1), pytest.raises(TooLate):
            reserve(19.9)
        with reserve(None):
            reserve(19.9)


async def test_a_crowd_waits_for_as_long_as_its_share_of_the_work():
    """80 row-steps of 1/8 s, of 8 images of at most 10: 4 more must wait until two of them are done."""
    async with engine_on(FakeDevice(), Widths((8,), (1.0,)), max_lanes=10) as engine:
        with engine.reserve(8, 80):
            engine.reserve(2, 1)
            with pytest.raises(Overloaded, match="8 images are in progress, and 4 more would exceed 10") as refused:
                engine.reserve(4, 1)
            assert refused.value.headers["Retry-After"] == "3"  # 2/8 of 10 s
        engine.reserve(11, 1)  # nothing else is in progress


async def test_a_refused_request_is_promised_its_place():
    async with engine_on(FakeDevice(), Widths((8,), (1.0,)), max_lanes=10, max_queue_seconds=10) as engine:
        with engine.reserve(8, 80):
            for sender in ("a", "b"):
                with pytest.raises(Overloaded):
                    engine.reserve(4, 1, options=SubmitOptions(sender=sender, caller=sender))
            assert engine.promised == 2


async def test_who_is_refused_for_want_of_places_is_admitted_when_it_returns(monkeypatch):
    """However many images are in progress by then: they wait before their first step, and take no memory."""
    clock = SimpleNamespace(monotonic=lambda: 1000.0)
    monkeypatch.setattr("app.engine.engine.time", clock)
    async with engine_on(FakeDevice(), Widths((8,), (1.0,)), max_lanes=8) as engine:
        with engine.reserve(8, 80):
            options = SubmitOptions(sender="a")
            with pytest.raises(Overloaded, match="8 images are in progress, and 4 more would exceed 8") as refused:
                engine.reserve(4, 1, options=options)
            after = int(refused.value.headers["Retry-After"])
            assert after == 5
            clock.monotonic = lambda: 1000.0 + after - 1
            with pytest.raises(Overloaded, match="try again in 1 s, for then there is a place"):
                engine.reserve(4, 1, options=options)
            clock.monotonic = lambda: 1000.0 + after
            engine.reserve(4, 1, options=options)
            assert engine.promised == 0


async def test_no_more_images_than_may_be_are_begun_at_once():
    """Ten were admitted where eight may have a state: two begin when others end, the most urgent first."""
    device = FakeDevice(gated=True)
    async with engine_on(device, Widths((1, 16), (0.001, 0.001)), max_lanes=8) as engine:
        jobs = []
        for seeds in (range(7), range(7, 9)):
            lanes = [Lane(plan(2), seed, 0) for seed in seeds]
            with engine.reserve(8, 1) as place:
                jobs.append(asyncio.create_task(place._run(Job(lanes))))
        urgent = [Lane(plan(2), 99)]
        jobs.append(asyncio.create_task(engine._run(Job(urgent, priority=1))))
        await until(lambda: device.entered)
        device.gate.release(100)
        await asyncio.gather(*jobs)
    steps: Counter[Lane] = Counter()
    for lanes in device.seen:
        assert len({lane for lane, done in steps.items() if done == 1} | set(lanes)) <= 8
        steps.update(lanes)
    assert set(steps.values()) == {2}
    assert len(steps) == 10
    assert urgent[0] in device.seen[1]  # the first tick was before it


async def test_the_device_thread_sleeps_while_there_is_nothing_to_do():
    worker = Worker(FakeDevice(), CostModel(Forwards(WIDTHS, WIDTHS)), Log(), publish=print, on_death=print)
    thread = threading.Thread(target=worker.tick, daemon=True)
    thread.start()
    thread.join(0.05)
    assert thread.is_alive()
    worker.inbox.put(Close())
    thread.join(5)
    assert not thread.is_alive()
