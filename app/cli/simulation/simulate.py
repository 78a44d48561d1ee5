"""The event loop of a simulation: each forward that a policy chooses moves the clock by its measured time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from app.cli.simulation.traffic import SimulatedRequest
from app.engine.widths import Widths


@dataclass(eq=False, slots=True)
class SimulatedJob:
    """A request in the system.

    Attributes:
        number: its place in order of arrival.
        work: row-steps that it still needs.
        started: when its first forward began; -1 until then.
    """

    number: int
    request: SimulatedRequest
    work: int
    started: float = -1.0


@dataclass(eq=False, slots=True)
class SimulatedLane:
    """One image of a request, as the scheduler sees it; nothing here is exact or reproducible."""

    job: SimulatedJob
    remaining: int
    since: float
    total: int
    priority: int
    deadline: float | None
    passed_over: int = 0
    rows: int = 1
    exact: bool = False
    reproducible: bool = False

    @property
    def progress(self) -> SimulatedJob:
        """Of its whole request."""
        return self.job

    @property
    def work(self) -> int:
        """Row-steps that its whole request still needs."""
        return self.job.work


class Policy(Protocol):
    """Decides ticks; may keep a memory of one run."""

    def choose(self, lanes: Sequence[SimulatedLane], widths: Widths, now: float) -> tuple[list[SimulatedLane], int]:
        """The batch, and the width to pad it to; ``lanes`` come in order of arrival and are at least one."""


@dataclass(frozen=True, slots=True)
class SimulatedRecord:
    """A request and its times, in seconds.

    Attributes:
        started: when its first forward began; -1 if there was none.
        alone: seconds that it takes in an empty system.
        missed: whether it was dropped, between two forwards, because its timeout had passed.
    """

    request: SimulatedRequest
    started: float
    ended: float
    alone: float
    missed: bool = False

    @property
    def latency(self) -> float:
        """Seconds in the system."""
        return self.ended - self.request.at

    @property
    def slowdown(self) -> float:
        """Time in the system over time alone; at least 1 unless it was missed."""
        return self.latency / self.alone


@dataclass(frozen=True, slots=True)
class SimulatedRun:
    """One simulation.

    Attributes:
        records: in order of arrival.
        busy: seconds of forwards.
        ended: when the last forward ended.
        ticks: forwards.
        rows: row-steps done.
        padded: the same with padding.
    """

    records: list[SimulatedRecord]
    busy: float
    ended: float
    ticks: int
    rows: int
    padded: int


def alone(request: SimulatedRequest, widths: Widths) -> float:
    """Seconds that a request takes in an empty system, all its images side by side."""
    full, rest = divmod(request.n, widths.cap)
    return request.steps * (full * widths.seconds[-1] + (widths.pad(rest)[1] if rest else 0.0))


def simulate(requests: Sequence[SimulatedRequest], policy: Policy, widths: Widths) -> SimulatedRun:
    """Serve every request, from an empty system until it is empty again.

    Args:
        requests: in order of arrival.
        policy: a fresh one.
    """
    seconds = dict(zip(widths.sizes, widths.seconds, strict=True))
    coming = 0
    lanes: list[SimulatedLane] = []
    records: dict[int, SimulatedRecord] = {}
    now = busy = 0.0
    ticks = rows = padded = 0
    timed = any(request.timeout_ms is not None for request in requests)
    while coming < len(requests) or lanes:
        if not lanes:
            now = max(now, requests[coming].at)
        while coming < len(requests) and requests[coming].at <= now:
            lanes += _lanes(coming, requests[coming])
            coming += 1
        if timed:
            for job in {lane.job for lane in lanes if lane.deadline is not None and lane.deadline <= now}:
                records[job.number] = _record(job, now, widths, missed=True)
            lanes = [lane for lane in lanes if lane.deadline is None or lane.deadline > now]
            if not lanes:
                continue
        batch, width = policy.choose(lanes, widths, now)
        begun = now
        now += seconds[width]
        busy += seconds[width]
        ticks += 1
        rows += len(batch)
        padded += width
        for lane in lanes:
            lane.passed_over += 1
        for lane in batch:
            lane.passed_over = 0
            lane.remaining -= 1
            job = lane.job
            job.work -= 1
            if job.started < 0:
                job.started = begun
            if not job.work:
                records[job.number] = _record(job, now, widths)
        if any(not lane.remaining for lane in batch):
            lanes = [lane for lane in lanes if lane.remaining]
    return SimulatedRun([records[number] for number in range(len(requests))], busy, now, ticks, rows, padded)


def _lanes(number: int, request: SimulatedRequest) -> list[SimulatedLane]:
    job = SimulatedJob(number, request, request.work)
    deadline = None if request.timeout_ms is None else request.at + request.timeout_ms / 1000
    return [
        SimulatedLane(job, request.steps, request.at, request.work, request.priority, deadline)
        for _ in range(request.n)
    ]


def _record(job: SimulatedJob, now: float, widths: Widths, *, missed: bool = False) -> SimulatedRecord:
    return SimulatedRecord(job.request, job.started, now, alone(job.request, widths), missed)


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that ``share`` of the values do not exceed; nan of none."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else math.nan
