"""Lanes and their jobs: what the scheduler reads of a lane is that of its whole job."""

from __future__ import annotations

from app.engine.jobs import Job, Lane
from tests.engines import plan


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
