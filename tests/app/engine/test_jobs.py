"""Lanes and their jobs: what the scheduler reads of a lane is that of its whole job."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import weakref

import pytest
import torch

from app.engine.jobs import Job, Lane
from app.engine.runner import Runner
from app.errors import NotFinite, StepFailed
from app.errors.frames import forget_frames
from tests.engines import engine_on, plan, until

pytestmark = pytest.mark.anyio


def test_lanes_have_the_work_of_their_whole_job():
    lanes = [Lane(plan(10), 1), Lane(plan(5), 2, guidance=2.0)]
    job = Job(lanes, priority=3, deadline=7.0)
    job.progress.submitted = 5.0
    job.progress.work -= 3
    for lane in lanes:
        assert (lane.total, lane.work) == (10 + 2 * 5, 10 + 2 * 5 - 3)
        assert (lane.since, lane.priority, lane.deadline) == (5.0, 3, 7.0)


def test_a_lane_without_a_job_has_its_own():
    lane = Lane(plan(5), 1, guidance=2.0)
    lane.cursor = 2
    assert (lane.total, lane.remaining, lane.work, lane.since) == (10, 3, 6, 0.0)


def test_what_is_reproducible_needs_exact_forwards():
    assert Lane(plan(), 1, reproducible=True).exact
    assert Lane(plan(), 1, exact=True).exact
    assert not Lane(plan(), 1).exact


@pytest.mark.parametrize("ending", ["success", "failure", "not-finite", "cancelled", "cancelled-while-it-waits"])
async def test_a_job_is_free_when_it_ends_without_a_garbage_collection(tiny_ckpt, ending, caplog):
    """Lanes, snapshots and outputs; nothing of them is part of a cycle, and the idle device thread holds none."""

    class Ends(Runner):
        def advance(self, lanes, width, exact):
            if ending.startswith("cancelled"):
                assert gate.wait(10)
            if ending == "failure" and lanes[0].cursor == 2:
                raise IndexError("out of range")
            return super().advance(lanes, width, exact)

        def read_output(self, lane):
            return super().read_output(lane) * (float("nan") if ending == "not-finite" else 1)

    caplog.set_level(logging.CRITICAL, "unstir.engine")  # its records would keep what was raised
    gate = threading.Event()
    async with engine_on(Ends(tiny_ckpt, torch.device("cpu")), max_lanes=2) as engine:
        gc.collect()
        gc.disable()
        try:
            watched = await end(engine, gate, ending)
            await until(lambda: not engine.worker.jobs)
            await until(lambda: not [each for each in watched if each() is not None])
        finally:
            gc.enable()


async def end(engine, gate, ending: str) -> list[weakref.ref]:
    """Two jobs of two images, of which the second waits for the first; references to all that they were made of."""
    watched: list[weakref.ref] = []

    async def run(seed: int) -> None:
        lanes = [
            Lane(plan(4), seed + i, 0, initial_state=torch.zeros(1, 1, 8, 8), snapshot_steps=frozenset({0, 1}))
            for i in range(2)
        ]
        watched.extend(weakref.ref(each) for lane in lanes for each in (lane, lane.initial_state))
        with engine.reserve(1, 8) as reservation:
            reservation.on_submit = lambda: watched.append(weakref.ref(reservation.job))
            await reservation.run(lanes)

    tasks = [asyncio.create_task(run(seed)) for seed in (1, 5)]
    await until(lambda: len(watched) == 10)
    if ending == "cancelled":
        await asyncio.sleep(0.01)
    for task in tasks:
        if ending.startswith("cancelled"):
            task.cancel()
    gate.set()
    errors = await asyncio.gather(*tasks, return_exceptions=True)
    kinds = {"success": type(None), "failure": StepFailed, "not-finite": NotFinite}
    assert all(isinstance(error, kinds.get(ending, asyncio.CancelledError)) for error in errors)
    for error in errors:
        forget_frames(error)  # as whoever keeps an error does
    return watched
