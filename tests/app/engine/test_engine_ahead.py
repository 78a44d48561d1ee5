"""The engine on a device that works by itself: a tick is prepared while another is under way."""

from __future__ import annotations

import asyncio

import pytest
import torch

from app.engine.jobs import Lane
from app.engine.runner import OutOfMemoryError, Runner
from app.errors import DeviceMemory, EngineDead
from tests.app.engine.test_engine_plans import unlike_requests
from tests.engines import Ahead, ask, engine_on, plan, until

pytestmark = pytest.mark.anyio


async def test_one_tick_is_begun_while_another_is_under_way_and_no_more():
    device = Ahead(gated=True)
    async with engine_on(device) as engine:
        job = asyncio.create_task(ask(engine, [Lane(plan(4), 7)]))
        await until(lambda: device.begun == 2)
        await asyncio.sleep(0.02)
        assert (device.begun, device.completed) == (2, 0)
        device.completions.release()
        await until(lambda: device.begun == 3)
        await asyncio.sleep(0.02)
        assert (device.begun, device.completed) == (3, 1)
        assert not job.done()
        device.completions.release(3)
        result = await job
    assert result.images.mean() == 7
    assert (device.begun, device.completed, device.most) == (4, 4, 2)


async def test_an_end_is_read_when_its_tick_has_landed_and_not_at_the_next_ones_begin():
    """Lanes of one job end in different ticks; a device says so if it is asked too early."""
    async with engine_on(device := Ahead()) as engine:
        jobs = [ask(engine, [Lane(plan(k), 10 * k), Lane(plan(k + 1), 10 * k + 1)]) for k in range(1, 12)]
        results = await asyncio.gather(*jobs)
        assert engine.lanes == (0, 0)
        assert not engine.requests
    for k, result in enumerate(results, start=1):
        assert result.images[:, 0, 0, 0].tolist() == [10 * k, 10 * k + 1]
    assert device.most == 2
    assert engine.worker._observer.forwards
    assert sum(rows for _, rows in engine.worker._observer.forwards) == sum(2 * k + 1 for k in range(1, 12))


async def test_who_leaves_while_his_last_tick_is_under_way_is_not_answered_and_nobody_else_suffers():
    device = Ahead(gated=True)
    async with engine_on(device) as engine:
        doomed = asyncio.create_task(ask(engine, [Lane(plan(1), 1)]))
        await until(lambda: device.begun == 1)
        other = asyncio.create_task(ask(engine, [Lane(plan(2), 2)]))
        doomed.cancel()
        await asyncio.wait({doomed})
        device.completions.release(10)
        assert (await other).images.mean() == 2
        await until(lambda: device.completed == device.begun)
        assert not engine.worker.jobs


async def test_a_device_that_fails_on_the_way_answers_everybody():
    device = Ahead(gated=True)
    async with engine_on(device) as engine:
        jobs = [asyncio.create_task(ask(engine, [Lane(plan(), seed)])) for seed in range(5)]
        await until(lambda: device.begun == 2)
        device.completion_error = RuntimeError("an illegal memory access was encountered")
        device.completions.release()
        for result in await asyncio.wait_for(asyncio.gather(*jobs, return_exceptions=True), 5):
            assert isinstance(result, EngineDead)
            assert "illegal memory access" in result.detail
        assert "illegal memory access" in engine.unready


async def test_want_of_memory_is_met_when_all_that_is_under_way_has_landed():
    device = Ahead(gated=True)
    under_way = []

    def too_wide(lanes, width):
        if width > 2:
            under_way.append(device.begun - device.completed)
            raise OutOfMemoryError("too wide")

    device.fail = too_wide
    async with engine_on(device) as engine:
        first = asyncio.create_task(ask(engine, [Lane(plan(20), 1)]))
        await until(lambda: device.begun == 2)
        lanes = [Lane(plan(), 9, reproducible=True), *(Lane(plan(), seed) for seed in range(8))]
        jobs = [asyncio.create_task(ask(engine, [lane])) for lane in lanes]
        await asyncio.sleep(0)
        device.completions.release(200)
        refused, *results = await asyncio.gather(*jobs, return_exceptions=True)
        assert isinstance(refused, DeviceMemory)
        assert [result.images.mean() for result in results] == list(range(8))
        assert (await first).images.mean() == 1
        assert engine.forwards.fast.cap == 2
    assert under_way[0] == 1
    assert device.completed == device.begun


async def test_walks_come_out_the_same(tiny_ckpt):
    """A lane moves on from a state that its last tick may still be writing."""

    async def all_of_them(ahead):
        runner = Runner(tiny_ckpt, torch.device("cpu"))
        runner.ahead = ahead
        async with engine_on(runner) as engine:
            requests = unlike_requests(tiny_ckpt)
            for lanes in requests:
                lanes[0].snapshot_steps = frozenset({0, 2})
            return await asyncio.gather(*(ask(engine, lanes) for lanes in requests))

    for one, other in zip(await all_of_them(0), await all_of_them(1), strict=True):
        assert torch.equal(one.images, other.images)
        assert one.snapshots[0].keys() == other.snapshots[0].keys() == {0, 2}
