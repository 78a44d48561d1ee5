"""The engine without HTTP: every ending that a job can have, on the real runner and on devices that fail on purpose."""

from __future__ import annotations

import asyncio
import contextlib
import threading

import pytest
import torch

from app.engine.engine import Engine
from app.engine.lane import Lane
from app.engine.runner import OutOfMemoryError, Runner
from app.engine.scheduler import Forwards, Widths
from app.errors import DeviceMemory, Draining, EngineDead, NotFinite, Overloaded
from model import inversion, machine, samplers
from model.checkpoint import load
from model.plan import Clip
from model.schedule import NoiseSchedule

pytestmark = pytest.mark.anyio
WIDTHS = Widths((1, 2, 4, 8), (0.001, 0.001, 0.001, 0.001), (4,))
SCHEDULE = NoiseSchedule.from_config({})


class Log:
    """An observer that remembers (width, rows) of each forward."""

    def __init__(self) -> None:
        self.forwards: list[tuple[int, int]] = []
        self.cancellations: list[float] = []
        self.failures: list[str] = []

    def forward(self, width: int, rows: int, seconds: float) -> None:
        self.forwards.append((width, rows))

    def cancelled(self, seconds: float) -> None:
        self.cancellations.append(seconds)

    def failed(self, kind: str) -> None:
        self.failures.append(kind)


class FakeDevice:
    """Advances cursors; the picture is the seed. ``gate`` holds every forward until it is released."""

    def __init__(self, fail=None, gated: bool = False) -> None:
        self.fail = fail
        self.gate = threading.Semaphore(0) if gated else None
        self.seen: list[list[Lane]] = []
        self.entered = 0

    def advance(self, lanes: list[Lane], width: int, exact: bool) -> None:
        self.entered += 1
        if self.gate:
            assert self.gate.acquire(timeout=10)
        self.seen.append(list(lanes))
        if self.fail:
            self.fail(lanes, width)
        for lane in lanes:
            lane.cursor += 1

    def end(self, lane: Lane) -> torch.Tensor:
        return torch.full((1, 1, 2, 2), float(lane.seed))


@contextlib.asynccontextmanager
async def engine_on(device, widths: Widths = WIDTHS, max_queue_seconds: float = 10.0, max_lanes: int = 100):
    engine = Engine(
        device, Forwards(widths, widths), max_queue_seconds=max_queue_seconds, max_lanes=max_lanes, observer=Log()
    )
    engine.open()
    threading.Thread(target=engine.work, daemon=True).start()
    try:
        yield engine
    finally:
        engine.close()


def plan(steps: int = 10):
    return samplers.ddim(SCHEDULE, steps, spacing="trailing")


async def ask(engine: Engine, lanes: list[Lane]):
    with engine.reserve(len(lanes), sum(lane.remaining for lane in lanes)) as ticket:
        return await ticket.run(lanes)


async def until(condition, seconds: float = 5.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.002)


@pytest.fixture(scope="module")
def tiny_ckpt(tiny):
    return load(tiny)


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


async def test_every_row_equals_the_plain_loop(tiny_ckpt):
    """Across widths the last bits move, some 4e-7 of the largest value per step: 2e-5 of it after 50 steps.

    The way up divides by what the way down multiplies with, and what was lost in rounding grows with it: 2e-4.
    """
    runner = Runner(tiny_ckpt, torch.device("cpu"))
    async with engine_on(runner) as engine:
        requests = unlike_requests(tiny_ckpt)
        results = await asyncio.gather(*(ask(engine, lanes) for lanes in requests))
    up = len(requests) - 2
    for k, (lanes, result) in enumerate(zip(requests, results, strict=True)):
        seeds, labels = [lane.seed for lane in lanes], torch.tensor([lane.label for lane in lanes])
        net = machine.guided(tiny_ckpt.net, torch.tensor([lane.guidance for lane in lanes]), null=3)
        expected = machine.sample(net, lanes[0].plan, seeds, tiny_ckpt.shape, labels)
        limit = 2e-5 if k < up else 1e-3
        assert (result.pictures - expected).abs().max() < limit * expected.abs().max()


async def test_results_come_in_the_order_of_the_lanes():
    async with engine_on(FakeDevice()) as engine:
        result = await ask(engine, [Lane(plan(), seed) for seed in (3, 1, 2)])
    assert result.pictures[:, 0, 0, 0].tolist() == [3, 1, 2]
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
        assert (await other).pictures.mean() == 3
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
        assert (await first).pictures.mean() == 1
    assert [lane.seed for lanes in device.seen for lane in lanes] == [1]


async def test_a_lane_that_turns_nan_fails_its_own_job_only(tiny_ckpt):
    class Poisoned(Runner):
        def end(self, lane):
            x = super().end(lane)
            return x * float("nan") if lane.seed == 13 else x

    async with engine_on(Poisoned(tiny_ckpt, torch.device("cpu"))) as engine:
        jobs = [ask(engine, [Lane(plan(4), seed, 0), Lane(plan(4), seed + 1, 0)]) for seed in (1, 12, 20)]
        results = await asyncio.gather(*jobs, return_exceptions=True)
        assert isinstance(results[1], NotFinite)
        assert results[0].pictures.isfinite().all()
        assert results[2].pictures.isfinite().all()
        assert engine.unready is None


async def test_out_of_memory_halves_the_width_and_nobody_notices(tiny_ckpt):
    class Small(Runner):
        def advance(self, lanes, width, exact):
            if width > 2:
                raise OutOfMemoryError("too wide")
            super().advance(lanes, width, exact)

    lanes = [[Lane(samplers.ddpm(SCHEDULE, 10), seed, 0)] for seed in range(8)]
    expected = [machine.sample(tiny_ckpt.net, lane.plan, [lane.seed], (1, 8, 8), torch.tensor([0])) for [lane] in lanes]
    async with engine_on(Small(tiny_ckpt, torch.device("cpu"))) as engine:
        results = await asyncio.gather(*(ask(engine, job) for job in lanes))
        assert engine.forwards.fast.cap == 2
        with pytest.raises(DeviceMemory, match="UNSTIR_REPRODUCIBLE_WIDTH"):
            await ask(engine, [Lane(plan(), 1, 0, reproducible=True)])
    for result, picture in zip(results, expected, strict=True):
        assert (result.pictures - picture).abs().max() < 1e-5 * picture.abs().max()


async def test_a_step_that_is_tried_again_sees_the_same_noise(tiny_ckpt, monkeypatch):
    plan = samplers.ddpm(SCHEDULE, 10)
    expected = machine.sample(tiny_ckpt.net, plan, [5], (1, 8, 8), torch.tensor([0]))
    advance, failures = machine.advance, iter([False, True, False, True])

    def sometimes(net, state, rows, y, noise, show):
        if next(failures, False):
            noise()  # drawn, and then the update finds no room
            raise torch.OutOfMemoryError("no room")
        return advance(net, state, rows, y, noise, show)

    monkeypatch.setattr(machine, "advance", sometimes)
    async with engine_on(Runner(tiny_ckpt, torch.device("cpu"))) as engine:
        result = await ask(engine, [Lane(plan, 5, 0)])
        assert engine.forwards.fast.cap == 2  # halved twice
    assert (result.pictures - expected).abs().max() < 1e-5 * expected.abs().max()


async def test_out_of_memory_fails_the_reproducible_jobs_under_way():
    def too_wide(lanes, width):
        if width > 2:
            raise OutOfMemoryError("too wide")

    async with engine_on(FakeDevice(fail=too_wide)) as engine:
        doomed = ask(engine, [Lane(plan(), 1, reproducible=True)])
        fine = ask(engine, [Lane(plan(), 2)])
        results = await asyncio.gather(doomed, fine, return_exceptions=True)
    assert isinstance(results[0], DeviceMemory)
    assert results[1].pictures.mean() == 2


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
    assert results[1].pictures.mean() == 2


async def test_a_guided_job_counts_twice_in_the_book():
    async with engine_on(FakeDevice(gated=True)) as engine:
        lanes = [Lane(plan(10), 1, 0, guidance=2.0), Lane(plan(10), 2)]
        job = asyncio.create_task(ask(engine, lanes))
        await until(lambda: engine._jobs)
        assert engine.wait_seconds == pytest.approx(30 * engine.forwards.fast.seconds_per_row)
        engine._device.gate.release(100)
        await job
        assert all(rows == 3 for _, rows in engine._observer.forwards[:10])


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


async def test_pictures_in_flight_are_bounded():
    async with engine_on(FakeDevice(), max_lanes=10) as engine:
        with engine.reserve(8, 1), pytest.raises(Overloaded, match="8 pictures are in flight, and 3 more"):
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
        assert engine.wait_seconds == pytest.approx(engine.pace * 3 * 0.001 / 8)
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
        assert (await job).pictures.mean() == 1


async def test_drain_time_ends_and_closing_answers_the_rest():
    device = FakeDevice(gated=True)
    async with engine_on(device) as engine:
        job = asyncio.create_task(ask(engine, [Lane(plan(1000), 1)]))
        await until(lambda: device.entered)
        assert await engine.drain(0.05) == 1
        device.gate.release()
    with pytest.raises(Draining, match="stopped before"):
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
