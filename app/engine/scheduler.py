"""Decides each tick: which lanes advance, and how wide the forward is. Pure Python on plain data; no tensors, no clock.

The widest forward is not always the best. Where a forward's cost grows with its width (a CPU, a saturated card), a long
lane in the batch slows every short one; where it hardly grows, all lanes should share it. So lanes are ranked, and the
batch is the prefix of that order with the most value per second of the forward's measured time:

    merit of lane i = slowdown_i^AGEING / work_i             slowdown = 1 + (now - since) / (total · seconds per row)
    value of lane i = merit_i / greatest merit + PRESSURE · (rows waiting / cap)^¾

Lanes are ranked by, in this order: being the one that was passed over longest, if that is too long; priority; an urgent
deadline, the least slack first; merit. A lane whose deadline is lost has no merit. One forward in a few is led by a
lane below the highest priority.

docs/scheduler.md explains the formulas, and how the constants were chosen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, NamedTuple

from app.engine.schedulable import L, Schedulable
from app.engine.widths import Forwards, Widths

PRIORITIES = range(-4, 4)  # higher goes first, 0 is usual
PRESSURE = 3.0  # higher makes forwards wider, which is better for long jobs and worse for short ones
PRESSURE_POWER = 0.75  # of rows waiting / cap; lower widens forwards earlier as lanes accumulate
AGEING = 0.25  # 0 is shortest job first; higher favours jobs that were slowed down, at the cost of the mean
PATIENCE = 64  # ticks that a lane is passed over before it goes first
PATIENCE_PER_LANE = 8  # ticks more for each lane, lest a long backlog become first come, first served
SHARE = 4  # a forward in so many is led by the best lane below the highest priority, lest that take all of them
URGENCY = 1.5  # a deadline is urgent when less than this many times the time needed in the widest forwards is left


@dataclass(frozen=True)
class Choice(Generic[L]):
    """What a tick does.

    Attributes:
        batch: the lanes that advance, each once.
        width: rows to pad the forward to.
        exact: whether it is a forward of the exact network.
        favoured: for the next call of :func:`choose`.
    """

    batch: list[L]
    width: int
    exact: bool
    favoured: int = field(default=0, compare=False)


_URGENT, _ORDINARY = 0, 1
_BELOW = -1e6  # precedence of all lanes below the highest priority where one of them leads


class _Option(NamedTuple):
    """A forward that the tick could be; the greatest is the best, by the first two fields."""

    value_per_second: float
    lanes: int
    batch: list[int]
    width: int


def patience(lanes: int) -> int:
    """Ticks after which, of so many lanes, the one that was passed over longest goes first."""
    return PATIENCE + PATIENCE_PER_LANE * lanes


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
    ranking = _Ranking(lanes, forwards, now)
    below = ranking.best_below
    order = ranking.sort(lead_below=below >= 0 and favoured >= SHARE - 1 and ranking.overdue < 0)
    if forwards.shared:
        options = _list_options(order, forwards.fast, now, ranking)
    else:
        options = _list_options([place for place in order if not lanes[place].exact], forwards.fast, now, ranking)
        options += _list_options([place for place in order if lanes[place].exact], forwards.exact, now, ranking)
    best = max(options, key=lambda option: option[:2])
    batch = [lanes[place] for place in best.batch]
    without = below >= 0 and below not in best.batch
    return Choice(batch, best.width, any(lane.exact for lane in batch), favoured + 1 if without else 0)


class _Ranking(Generic[L]):
    """The lanes by their place in the sequence, in arrays: each tick there may be thousands.

    They are taken by class, which is minus the priority and a tier, the least first; within one by order, then place.

    Attributes:
        reproducible: whether any is.
        rows, values: of each; the value is its merit, weighed by priority.
        orders: slack in seconds of an urgent lane, minus the merit of any other.
        overdue: the place of the lane that was passed over too long, or -1.
        best_below: that of the first lane below the highest priority, were all of those of one; or -1.
    """

    def __init__(self, lanes: Sequence[L], forwards: Forwards, now: float) -> None:
        self.lanes = lanes
        self.rows = [lane.rows for lane in lanes]
        self.reproducible = any(lane.reproducible for lane in lanes)
        self.values: list[float] = []
        self.orders: list[float] = []
        self._urgent: set[int] = set()
        self._classes: dict[tuple[float, int], list[int]] = {}
        self._weigh(forwards, now)
        passed_over = [lane.passed_over for lane in lanes]
        longest = max(passed_over)
        self.overdue = passed_over.index(longest) if longest > patience(len(lanes)) else -1
        if self.overdue >= 0:
            self._urgent.discard(self.overdue)
            self.orders[self.overdue] = 0.0
        highest = min(self._classes)[0]
        self._below = [name for name in self._classes if name[0] > highest]
        below = (place for name in self._below for place in self._classes[name])
        self.best_below = min(below, key=lambda place: (self._tier(place), self.orders[place], place), default=-1)
        self._first, self._leads_alone = -1, False

    def _weigh(self, forwards: Forwards, now: float) -> None:
        fast = _Estimate(forwards.fast)
        exact = fast if forwards.shared else _Estimate(forwards.exact)
        job: object = None
        kind, value, order, deadline = fast, 0.0, 0.0, None
        ordinary: dict[int, list[int]] = {}  # by priority
        add_value, add_order, add_place = self.values.append, self.orders.append, list[int]().append
        for place, lane in enumerate(self.lanes):
            estimate = exact if lane.exact else fast
            progress = lane.progress
            if progress is None or progress is not job or estimate is not kind:
                job, kind, deadline = progress, estimate, lane.deadline
                work, priority = lane.work, lane.priority
                waited = (now - lane.since) / (lane.total * estimate.row)
                value = (1.0 + waited) ** AGEING / work if waited > 0 else 1.0 / work
                order = -value
                if priority:
                    value *= 2.0**priority
                if (places := ordinary.get(priority)) is None:
                    places = ordinary[priority] = []
                add_place = places.append
            add_value(value)
            add_order(order)
            add_place(place)
            if deadline is not None:
                self._weigh_deadline(place, ordinary[lane.priority], deadline - now, *estimate.time_needed(lane))
        self._classes |= {(-priority, _ORDINARY): places for priority, places in ordinary.items() if places}

    def _weigh_deadline(self, place: int, ordinary: list[int], left: float, least: float, most: float) -> None:
        if left < least:
            self.values[place] = self.orders[place] = 0.0
        elif left < URGENCY * most:
            self.orders[place] = left - most
            self._urgent.add(ordinary.pop())
            self._classes.setdefault((-self.lanes[place].priority, _URGENT), []).append(place)

    def _tier(self, place: int) -> int:
        return _URGENT if place in self._urgent else _ORDINARY

    def sort(self, *, lead_below: bool) -> list[int]:
        """The places in the order in which lanes are taken.

        Args:
            lead_below: the best lane below the highest priority comes first, and all others below it next.
        """
        first, classes = self.overdue, self._classes
        if lead_below:
            first = self.best_below
            classes = {name: places for name, places in classes.items() if name not in self._below}
            for tier in {tier for _, tier in self._below}:
                together = [self._classes[name] for name in self._below if name[1] == tier]
                classes[_BELOW, tier] = sorted(place for places in together for place in places)
        order = [] if first < 0 else [first]
        for name in sorted(classes):
            order += sorted(classes[name], key=self.orders.__getitem__)
        if first >= 0:
            del order[order.index(first, 1)]
        self._first, self._leads_alone = order[0], first >= 0
        return order

    def may_lead(self, place: int) -> bool:
        """Whether a batch may begin with this lane: it equals the first in all but order, or is it."""
        first = self._first
        same = self.lanes[place].priority == self.lanes[first].priority and self._tier(place) == self._tier(first)
        return place == first or (same and not self._leads_alone)

    def limit_seconds(self, place: int, now: float) -> float:
        """How long a forward may take that begins with this lane, so that it keeps its deadline if that is urgent."""
        lane = self.lanes[place]
        if place not in self._urgent or lane.deadline is None:
            return math.inf
        return (lane.deadline - now) / lane.remaining


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


def _list_options(order: list[int], widths: Widths, now: float, ranking: _Ranking[L]) -> list[_Option]:
    """The best forwards of one kind: with reproducible and other lanes, at bit-identical widths, or of ordinary lanes.

    Args:
        order: the lanes that can use this kind of forward.
    """
    if not order:
        return []
    values, rows, lanes = ranking.values, ranking.rows, ranking.lanes
    some = len(order) < len(lanes)  # or all of them, which needs no look at each
    greatest = max(map(values.__getitem__, order) if some else values) or 1.0
    waiting = sum(map(rows.__getitem__, order) if some else rows)
    pressure = PRESSURE * (waiting / widths.cap) ** PRESSURE_POWER
    ordinary = [place for place in order if not lanes[place].reproducible] if ranking.reproducible else order
    options: list[_Option] = []
    if len(ordinary) < len(order):
        for width in widths.bit_identical:
            batch = _fill(order, rows, width)
            if batch and ranking.may_lead(batch[0]) and any(lanes[place].reproducible for place in batch):
                value = sum(values[place] for place in batch) / greatest + pressure * len(batch)
                options.append(_Option(value / widths.time(width), len(batch), batch, width))
    batch = _fill(ordinary, rows, widths.cap)
    if batch and ranking.may_lead(batch[0]):
        worth = [values[place] / greatest + pressure for place in batch]
        limit = ranking.limit_seconds(batch[0], now)
        options.append(_best_prefix(batch, worth, [rows[place] for place in batch], widths, limit))
    return options


def _best_prefix(batch: list[int], worth: list[float], rows: list[int], widths: Widths, limit: float) -> _Option:
    """A forward of the first lane, the first two, and so on, that takes at most ``limit`` seconds."""
    best_value, best_count, best_step = -1.0, 0, 0
    value, total, step = 0.0, 0, 0
    for count, (each, more) in enumerate(zip(worth, rows, strict=True), start=1):
        value += each
        total += more
        while widths.sizes[step] < total:
            step += 1
        seconds = widths.seconds[step]
        if (count == 1 or seconds <= limit) and value / seconds >= best_value:
            best_value, best_count, best_step = value / seconds, count, step
    return _Option(best_value, best_count, batch[:best_count], widths.sizes[best_step])


def _fill(order: list[int], rows: list[int], width: int) -> list[int]:
    """As many lanes as ``width`` rows hold, in this order; smaller lanes may pass one that no longer fits."""
    batch, room = [], width
    for place in order:
        if rows[place] <= room:
            batch.append(place)
            room -= rows[place]
            if not room:
                break
    return batch
