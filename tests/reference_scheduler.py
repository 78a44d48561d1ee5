"""The scheduler as it is easiest to read: every lane ranked, all of them sorted. Its choices are those to be had."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Generic, NamedTuple

from app.engine.schedulable import L, Schedulable
from app.engine.scheduler import (
    AGEING,
    PRESSURE,
    PRESSURE_POWER,
    SHARE,
    URGENCY,
    Choice,
    patience,
)
from app.engine.widths import Forwards, Widths


class _Ranked(NamedTuple, Generic[L]):
    """A lane and its rank: lanes are taken in the order of these fields.

    Attributes:
        precedence: minus the priority; -inf of the lane that was passed over too long, or leads for those below.
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
_BELOW = -1e6  # precedence of all lanes below the highest priority where they lead


class _Option(NamedTuple, Generic[L]):
    """A forward that the tick could be; the greatest is the best, by the first two fields."""

    value_per_second: float
    lanes: int
    batch: list[_Ranked[L]]
    width: int


def choose(lanes: Sequence[L], forwards: Forwards, now: float = 0.0, favoured: int = 0) -> Choice[L]:
    """Decide one tick.

    Every lane is passed over at most ``patience(N) + N`` ticks in a row, N being the most lanes that wait meanwhile,
    whatever the priorities and deadlines. While none is overdue, the batch has a lane of the highest priority, but for
    one forward in ``SHARE``, which the lane of the greatest merit below it leads, if it has advanced in none of those
    between.

    Args:
        lanes: at least one; for each there is a forward that is wide enough, and bit-identical if it is reproducible.
        now: seconds on the clock of the lanes' ``since`` and ``deadline``.
        favoured: ticks in a row without the best lane below the highest priority; from the last tick's choice.
    """
    if len(lanes) == 1:
        alone = lanes[0]
        width = (forwards.exact if alone.exact else forwards.fast).narrowest(alone.rows, alone.reproducible)
        assert width is not None, "This is a bug: a lane that fits into no forward."
        return Choice([alone], width, alone.exact)
    ranked = _rank(lanes, forwards, now)
    below = _best_below(ranked)
    if below is not None and favoured >= SHARE - 1 and min(ranked).precedence > -math.inf:
        ranked = _lead_with(below, ranked)
    order = sorted(ranked)
    if forwards.shared:
        options = _list_options(order, forwards.fast, now, order[0])
    else:
        fast, exact = [each for each in order if not each.lane.exact], [each for each in order if each.lane.exact]
        options = _list_options(fast, forwards.fast, now, order[0])
        options += _list_options(exact, forwards.exact, now, order[0])
    best = max(options, key=lambda option: option[:2])
    batch = [each.lane for each in best.batch]
    without = below is not None and all(lane is not below.lane for lane in batch)
    return Choice(batch, best.width, any(lane.exact for lane in batch), favoured + 1 if without else 0)


def _best_below(ranked: list[_Ranked[L]]) -> _Ranked[L] | None:
    """Of the lanes below the highest priority the first, were they all of one."""
    highest = max(each.lane.priority for each in ranked)
    below = [each for each in ranked if each.lane.priority < highest]
    return min(below, key=lambda each: (each.tier, each.order, each.place), default=None)


def _lead_with(best: _Ranked[L], ranked: list[_Ranked[L]]) -> list[_Ranked[L]]:
    """The best lane below the highest priority first, then the others below it, and only then the highest."""
    highest = max(each.lane.priority for each in ranked)
    return [
        each._replace(
            precedence=-math.inf if each is best else _BELOW if each.lane.priority < highest else each.precedence
        )
        for each in ranked
    ]


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
