"""Decides each tick: which lanes advance, and how wide the forward is. Pure Python on plain data; no tensors, no clock.

The widest forward is not always the best. Where a forward's cost grows with its width (a CPU, a saturated card), a long
lane in the batch slows every short one; where it hardly grows, all lanes should share it. So lanes are ranked, and the
batch is the prefix of that order with the most value per second of the forward's measured time:

    merit of lane i = slowdown_i^AGEING / work_i             slowdown = 1 + (now - since) / (total · seconds per row)
    value of lane i = merit_i / greatest merit + PRESSURE · (rows waiting / cap)^¾

Lanes are ranked by, in this order: being the one that was passed over longest, if that is too long; priority; an urgent
deadline, the least slack first; merit. A lane whose deadline is lost has no merit.

docs/scheduler.md explains the formulas, and how the constants were chosen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, Protocol, TypeVar

from app.engine.widths import Forwards, Widths

PRIORITIES = range(-4, 4)  # higher goes first, 0 is usual
PRESSURE = 3.0  # higher makes forwards wider, which is better for long jobs and worse for short ones
PRESSURE_POWER = 0.75  # of rows waiting / cap; lower widens forwards earlier as lanes accumulate
AGEING = 0.25  # 0 is shortest job first; higher favours jobs that were slowed down, at the cost of the mean
PATIENCE = 64  # ticks that a lane is passed over before it goes first
PATIENCE_PER_LANE = 8  # ticks more for each lane, lest a long backlog become first come, first served
URGENCY = 1.5  # a deadline is urgent when less than this many times the time needed in the widest forwards is left


class Schedulable(Protocol):
    """What the scheduler reads of a lane."""

    @property
    def remaining(self) -> int:
        """Steps left, at least 1."""

    @property
    def rows(self) -> int:
        """Rows of a forward that one of its steps takes, 1 or 2."""

    @property
    def work(self) -> int:
        """Row-steps that its whole job still needs, at least ``remaining * rows``."""

    @property
    def total(self) -> int:
        """Row-steps that its whole job needed at the start."""

    @property
    def since(self) -> float:
        """When its job was submitted, in seconds on the clock of ``choose``'s ``now``."""

    @property
    def passed_over(self) -> int:
        """Ticks since it last advanced."""

    @property
    def exact(self) -> bool:
        """Whether it needs the exact network."""

    @property
    def reproducible(self) -> bool:
        """Whether it needs a bit-identical width; it is exact, then."""

    @property
    def priority(self) -> int:
        """-10..10; higher goes first."""

    @property
    def deadline(self) -> float | None:
        """When its job must be done, on the same clock; None if never."""


L = TypeVar("L", bound=Schedulable)


@dataclass(frozen=True)
class Choice(Generic[L]):
    """What a tick does.

    Attributes:
        batch: the lanes that advance, each once.
        width: rows to pad the forward to.
        exact: whether it is a forward of the exact network.
    """

    batch: list[L]
    width: int
    exact: bool


class _Ranked(NamedTuple, Generic[L]):
    """A lane and its rank: lanes are taken in the order of these fields.

    Attributes:
        precedence: minus the priority; -inf of the lane that was passed over too long.
        tier: _URGENT or _ORDINARY.
        order: slack in seconds of an urgent lane, minus the merit of any other.
        place: in the sequence of lanes; it decides between equals.
        value: merit, weighed by priority.
    """

    precedence: float
    tier: int
    order: float
    place: int
    value: float
    rows: int
    lane: L

    def leads(self, other: _Ranked[L]) -> bool:
        """Whether a batch may begin with this lane, where the other ranks first."""
        return self.precedence == other.precedence and self.tier == other.tier


_URGENT, _ORDINARY = 0, 1


class _Option(NamedTuple, Generic[L]):
    """A forward that the tick could be; the greatest is the best, by the first two fields."""

    value_per_second: float
    lanes: int
    batch: list[_Ranked[L]]
    width: int


def patience(lanes: int) -> int:
    """Ticks after which, of so many lanes, the one that was passed over longest goes first."""
    return PATIENCE + PATIENCE_PER_LANE * lanes


def choose(lanes: Sequence[L], forwards: Forwards, now: float = 0.0) -> Choice[L]:
    """Decide one tick.

    Every lane is passed over at most ``patience(N) + N`` ticks in a row, N being the most lanes that wait meanwhile,
    whatever the priorities and deadlines. While none is overdue, the batch has a lane of the highest priority.

    Args:
        lanes: at least one; for each there is a forward that is wide enough, and bit-identical if it is reproducible.
        now: seconds on the clock of the lanes' ``since`` and ``deadline``.
    """
    if len(lanes) == 1:
        alone = lanes[0]
        width = (forwards.exact if alone.exact else forwards.fast).narrowest(alone.rows, alone.reproducible)
        assert width is not None, "This is a bug: a lane that fits into no forward."
        return Choice([alone], width, alone.exact)
    order = sorted(_rank(lanes, forwards, now))
    if forwards.shared:
        options = _list_options(order, forwards.fast, now, order[0])
    else:
        fast, exact = [each for each in order if not each.lane.exact], [each for each in order if each.lane.exact]
        options = _list_options(fast, forwards.fast, now, order[0])
        options += _list_options(exact, forwards.exact, now, order[0])
    best = max(options, key=lambda option: option[:2])
    batch = [each.lane for each in best.batch]
    return Choice(batch, best.width, any(lane.exact for lane in batch))


def _rank(lanes: Sequence[L], forwards: Forwards, now: float) -> list[_Ranked[L]]:
    ranked: list[_Ranked[L]] = []
    longest, overdue = patience(len(lanes)), -1
    fast = _Estimate(forwards.fast)
    exact = fast if forwards.shared else _Estimate(forwards.exact)
    for place, lane in enumerate(lanes):
        passed_over, work, rows, priority, deadline = (
            lane.passed_over,
            lane.work,
            lane.rows,
            lane.priority,
            lane.deadline,
        )
        if passed_over > longest:
            longest, overdue = passed_over, place
        estimate = exact if lane.exact else fast
        waited = (now - lane.since) / (lane.total * estimate.row)
        merit = (1.0 + waited) ** AGEING / work if waited > 0 else 1.0 / work
        tier, order = _ORDINARY, -merit
        if deadline is not None:
            left = deadline - now
            least, most = estimate.time_needed(lane)
            if left < least:
                merit, order = 0.0, 0.0
            elif left < URGENCY * most:
                tier, order = _URGENT, left - most
        value = merit * 2.0**priority if priority else merit
        ranked.append(_Ranked(-priority, tier, order, place, value, rows, lane))
    if overdue >= 0:
        ranked[overdue] = ranked[overdue]._replace(precedence=-math.inf, tier=_ORDINARY, order=0.0)
    return ranked


class _Estimate:
    """Estimates the time that a job needs, by one kind of forward; made once a tick.

    Attributes:
        row: seconds of a row-step when the device is full.
    """

    __slots__ = ("_narrow", "_wide", "row")

    def __init__(self, widths: Widths) -> None:
        self.row = widths.seconds_per_row
        identical = widths.bit_identical
        self._wide = {False: widths.seconds[-1]} | ({True: widths.time(identical[-1])} if identical else {})
        kinds = ((rows, reproducible) for rows in (1, 2) for reproducible in (False, True))
        narrow = {kind: widths.narrowest(*kind) for kind in kinds}
        self._narrow = {kind: widths.time(size) for kind, size in narrow.items() if size is not None}

    def time_needed(self, lane: Schedulable) -> tuple[float, float]:
        """Seconds until the lane's job can be done: in the narrowest forwards that can do it, and in the widest."""
        steps, shared = lane.remaining, lane.work * self.row
        narrow, wide = self._narrow[lane.rows, lane.reproducible], self._wide[lane.reproducible]
        return max(steps * narrow, shared), max(steps * wide, shared)


def _list_options(order: list[_Ranked[L]], widths: Widths, now: float, first: _Ranked[L]) -> list[_Option[L]]:
    """The best forwards of one kind: with reproducible and other lanes, at bit-identical widths, or of ordinary lanes.

    Args:
        order: the lanes that can use this kind of forward.
        first: of all lanes; a forward must begin with a lane that :meth:`_Ranked.leads`.
    """
    if not order:
        return []
    greatest = max([each.value for each in order]) or 1.0
    pressure = PRESSURE * (sum([each.rows for each in order]) / widths.cap) ** PRESSURE_POWER
    ordinary = [each for each in order if not each.lane.reproducible]
    options: list[_Option[L]] = []
    if len(ordinary) < len(order):
        for width in widths.bit_identical:
            batch = _fill(order, width)
            if batch and batch[0].leads(first) and any(each.lane.reproducible for each in batch):
                value = sum(each.value for each in batch) / greatest + pressure * len(batch)
                options.append(_Option(value / widths.time(width), len(batch), batch, width))
    batch = _fill(ordinary, widths.cap)
    if batch and batch[0].leads(first):
        options.append(_best_prefix(batch, widths, greatest, pressure, _limit_seconds(batch[0], now)))
    return options


def _best_prefix(batch: list[_Ranked[L]], widths: Widths, greatest: float, pressure: float, limit: float) -> _Option[L]:
    """A forward of the first lane, the first two, and so on, that takes at most ``limit`` seconds."""
    best_value, best_count, best_step = -1.0, 0, 0
    value, rows, step = 0.0, 0, 0
    for count, each in enumerate(batch, start=1):
        value += each.value / greatest + pressure
        rows += each.rows
        while widths.sizes[step] < rows:
            step += 1
        seconds = widths.seconds[step]
        if (count == 1 or seconds <= limit) and value / seconds >= best_value:
            best_value, best_count, best_step = value / seconds, count, step
    return _Option(best_value, best_count, batch[:best_count], widths.sizes[best_step])


def _limit_seconds(first: _Ranked[L], now: float) -> float:
    """How long a forward may take so that an urgent lane keeps its deadline."""
    lane = first.lane
    if first.tier == _ORDINARY or lane.deadline is None:
        return math.inf
    return (lane.deadline - now) / lane.remaining


def _fill(order: list[_Ranked[L]], width: int) -> list[_Ranked[L]]:
    """As many lanes as ``width`` rows hold, in this order; smaller lanes may pass one that no longer fits."""
    batch, room = [], width
    for each in order:
        if each.rows <= room:
            batch.append(each)
            room -= each.rows
            if not room:
                break
    return batch
