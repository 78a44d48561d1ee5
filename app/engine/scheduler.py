"""Who advances next, and how wide: pure Python on plain data. It knows no tensors, no thread and no clock.

Width is a decision, not a maximum. Where a forward's cost grows with its width (a CPU, a saturated card), letting a
long lane ride along slows every short one; where it hardly grows, everybody should ride. So lanes are put in order and
the prefix of that order is taken that earns the most value per second of the measured forward:

    merit of lane i = slowdown_i^AGEING / work_i             slowdown = 1 + (now - since) / (total · seconds per row)
    value of lane i = merit_i / greatest merit + PRESSURE · (rows waiting / cap)^¾

where work is what the lane's whole job still needs and total what it needed when it came. The first term favours jobs
near their end and those that were slowed most; the second shades into full width as lanes pile up.

The order, each rule deciding among those that the rules before it leave equal: the one lane that was passed over
longest, if that is too long; priority; who must go now to keep a deadline, least slack first; merit. A lane whose
deadline is lost has none, so it takes what is left over.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeAlias, TypeVar

# All of these were chosen with ``unstir simulate`` on 10/20/100 steps (60/30/10 %) at loads of 60, 90 and 120 %, over
# three lines of forward times, two of them of CPUs and one of a card.
# The greater, the wider forwards are: long jobs gain, short ones lose. On the CPUs at 60 %, 2 makes p95 of 10 steps 5
# to 11 % shorter and that of 100 steps 9 to 14 % longer, and p99 slowdown at 90 %, which is no worse than shortest
# remaining first at full width, 15 to 27 % more; 3.5 takes 1 to 7 % off that p99, for 1 to 4 % more of the mean.
# With √(rows / cap) the mean at 60 % is 1 to 5 % more, p95 of 10 steps up to 4 % more, and that of 100 steps 1 to 5 %
# less; in proportion to rows / cap, p95 of 100 steps is another 1 to 8 % more, and the mean at 90 % 0 to 2 %.
PRESSURE = 3.0
# 0 is the shortest job first. ¼ takes 1 % off p99 slowdown at 90 and 120 %, for as much or twice that of the mean; ½
# takes off 1 to 2 % more, but costs another tenth of the mean at 120 %.
AGEING = 0.25
# A lane may be passed over PATIENCE + PATIENCE_PER_LANE · lanes ticks. The second part keeps a long backlog from
# becoming first come, first served: when all are overdue, one seat in one forward of eight or nine goes to them. A
# fixed 32 ticks added 10 % to p99 slowdown and 17 % to its mean at 120 %; at 60 and 90 % neither part matters.
PATIENCE = 64
PATIENCE_PER_LANE = 8
# A deadline is urgent when less time is left than this many times what the lane needs in the widest forwards. Where
# half of the requests have a timeout of 2 to 12 times their time alone, at 90 %, 11 % of these are missed with 0, 3 %
# with 1, 1.4 % with 1½ and 1.0 % with 3, and the mean slowdown of the other half is 3.1, 4.6, 4.6 and 5.1.
URGENCY = 1.5


class Waiting(Protocol):
    """What the scheduler sees of a lane."""

    @property
    def remaining(self) -> int:
        """Steps left, at least 1."""

    @property
    def rows(self) -> int:
        """Rows of a forward that a step of it takes, 1 or 2."""

    @property
    def work(self) -> int:
        """Row-steps that its whole job still needs, at least ``remaining * rows``."""

    @property
    def total(self) -> int:
        """Row-steps that its whole job needed when it came."""

    @property
    def since(self) -> float:
        """When its job came, in seconds on the clock of ``choose``'s ``now``."""

    @property
    def passed_over(self) -> int:
        """Ticks since it last advanced."""

    @property
    def exact(self) -> bool:
        """Whether it must ride in a forward of the exact network."""

    @property
    def reproducible(self) -> bool:
        """Whether it rides only in forwards of the canonical width; it is exact, then."""

    @property
    def priority(self) -> int:
        """-10..10; higher goes first."""

    @property
    def deadline(self) -> float | None:
        """When its job must be done, on the same clock; None if never."""


L = TypeVar("L", bound=Waiting)


@dataclass(frozen=True)
class Widths:
    """The widths that forwards come in, and what each costs.

    Attributes:
        sizes: rows after padding, rising.
        seconds: measured time of one forward of each size.
        alike: those of them that give a row the same bits; reproducible lanes ride in no other.
    """

    sizes: tuple[int, ...]
    seconds: tuple[float, ...]
    alike: tuple[int, ...] = ()

    @property
    def cap(self) -> int:
        """The most rows of one forward."""
        return self.sizes[-1]

    @property
    def seconds_per_row(self) -> float:
        """What one step of one lane costs when the device is full."""
        return self.seconds[-1] / self.sizes[-1]

    def padded(self, rows: int) -> tuple[int, float]:
        """The smallest size that holds ``rows``, and its time; 1 <= rows <= cap."""
        return next((size, time) for size, time in zip(self.sizes, self.seconds, strict=True) if size >= rows)

    def halved(self) -> Widths | None:
        """Without the sizes above half the cap; None when nothing is left to give up."""
        kept = sum(size <= self.cap // 2 for size in self.sizes)
        alike = tuple(size for size in self.alike if size <= self.cap // 2)
        return Widths(self.sizes[:kept], self.seconds[:kept], alike) if kept else None

    def least(self, rows: int, reproducible: bool) -> int | None:
        """The narrowest forward that a lane of so many rows can ride in; None if there is none."""
        return next((size for size in (self.alike if reproducible else self.sizes) if size >= rows), None)

    def time(self, size: int) -> float:
        """Of a forward of one of the sizes."""
        return self.seconds[self.sizes.index(size)]


@dataclass(frozen=True)
class Forwards:
    """The two kinds of forward that a tick can be.

    Attributes:
        fast: of the network in whatever precision is fastest.
        exact: of the network in float32; the same object as ``fast`` where there is but one kind.
    """

    fast: Widths
    exact: Widths

    @property
    def shared(self) -> bool:
        """Whether there is but one kind, so that all lanes may ride together."""
        return self.fast is self.exact

    def halved(self) -> Forwards | None:
        """Without the wider half of each kind; None when nothing is left to give up."""
        fast = self.fast.halved()
        exact = fast if self.shared else self.exact.halved()
        return Forwards(fast, exact) if fast and exact else None


@dataclass(frozen=True)
class Choice(Generic[L]):
    """What a tick does.

    Attributes:
        riders: the lanes that advance, each once.
        width: rows to pad the forward to.
        exact: whether it is a forward of the exact network.
    """

    riders: list[L]
    width: int
    exact: bool


# What decides about a lane, so that sorting puts them in order: minus its priority; 0 if it must go now, else 1; slack
# or minus merit; its place, so that nothing is left to chance; merit, weighed by priority; and the lane itself.
_Ranked: TypeAlias = tuple[float, int, float, int, float, L]
_Option: TypeAlias = tuple[float, list[_Ranked[L]], int]  # value per second, riders in order, width

_ORDINARY = 1


def patience(lanes: int) -> int:
    """Ticks after which the one among so many lanes that was passed over longest goes first."""
    return PATIENCE + PATIENCE_PER_LANE * lanes


def choose(lanes: Sequence[L], forwards: Forwards, now: float = 0.0) -> Choice[L]:
    """Decide one tick.

    Every lane is passed over at most ``patience(N) + N`` ticks in a row, N being the most lanes that wait meanwhile,
    whatever the priorities and deadlines. While none is overdue, a lane of the highest priority always rides.

    Args:
        lanes: at least one; each fits, that is, takes at most the ``cap`` rows of its kind of forward, and if it is
            reproducible, one of the widths ``alike`` is at least that.
        now: seconds on the clock of the lanes' ``since`` and ``deadline``.
    """
    if len(lanes) == 1:
        alone = lanes[0]
        widths = forwards.exact if alone.exact else forwards.fast
        width = widths.least(alone.rows, alone.reproducible)
        assert width is not None, "This is a bug: a lane that fits into no forward."
        return Choice([alone], width, alone.exact)
    order = sorted(_ranked(lanes, forwards, now))
    options: list[_Option[L]] = []
    if forwards.shared:
        _add_options(options, order, forwards.fast, now)
    else:
        _add_options(options, [ranked for ranked in order if not ranked[-1].exact], forwards.fast, now)
        _add_options(options, [ranked for ranked in order if ranked[-1].exact], forwards.exact, now)
    first = order[0][:2]
    led = [option for option in options if option[1][0][:2] == first]
    _, riders, width = max(led, key=lambda option: (option[0], len(option[1])))
    chosen = [ranked[-1] for ranked in riders]
    return Choice(chosen, width, any(lane.exact for lane in chosen))


def _ranked(lanes: Sequence[L], forwards: Forwards, now: float) -> list[_Ranked[L]]:
    ranked: list[_Ranked[L]] = []
    longest, overdue = patience(len(lanes)), -1
    fast = _Pace(forwards.fast)
    exact = fast if forwards.shared else _Pace(forwards.exact)
    for place, lane in enumerate(lanes):
        passed_over, work, priority, deadline = lane.passed_over, lane.work, lane.priority, lane.deadline
        if passed_over > longest:
            longest, overdue = passed_over, place
        pace = exact if lane.exact else fast
        waited = (now - lane.since) / (lane.total * pace.each)
        merit = (1.0 + waited) ** AGEING / work if waited > 0 else 1.0 / work
        urgency, order = _ORDINARY, -merit
        if deadline is not None:
            left = deadline - now
            least, most = pace.needs(lane)
            if left < least:
                merit, order = 0.0, 0.0
            elif left < URGENCY * most:
                urgency, order = 0, left - most
        ranked.append((-priority, urgency, order, place, merit * 2.0**priority if priority else merit, lane))
    if overdue >= 0:
        _, _, _, place, weighed, lane = ranked[overdue]
        ranked[overdue] = (-math.inf, _ORDINARY, 0.0, place, weighed, lane)
    return ranked


class _Pace:
    """What a job's time left is reckoned with, of one kind of forward; looked up once in a tick."""

    __slots__ = ("each", "narrow", "wide")

    def __init__(self, widths: Widths) -> None:
        self.each = widths.seconds_per_row
        self.wide = {False: widths.seconds[-1]} | ({True: widths.time(widths.alike[-1])} if widths.alike else {})
        kinds = ((rows, alike) for rows in (1, 2) for alike in (False, True))
        narrow = {kind: widths.least(*kind) for kind in kinds}
        self.narrow = {kind: widths.time(size) for kind, size in narrow.items() if size is not None}

    def needs(self, lane: Waiting) -> tuple[float, float]:
        """Seconds until the lane's job can be done: in the narrowest forwards that can do it, and in the widest."""
        steps, shared = lane.remaining, lane.work * self.each
        narrow, wide = self.narrow[lane.rows, lane.reproducible], self.wide[lane.reproducible]
        return max(steps * narrow, shared), max(steps * wide, shared)


def _add_options(options: list[_Option[L]], order: list[_Ranked[L]], widths: Widths, now: float) -> None:
    """Add what one kind of forward could do for the lanes that may ride in it."""
    greatest = max((ranked[4] for ranked in order), default=0.0) or 1.0
    pressure = PRESSURE * (sum(ranked[-1].rows for ranked in order) / widths.cap) ** 0.75
    ordinary = order
    # Reproducible lanes fix the width; others may join them. Or ordinary lanes ride alone, as wide as pays.
    if any(ranked[-1].reproducible for ranked in order):
        ordinary = [ranked for ranked in order if not ranked[-1].reproducible]
        for size in widths.alike:
            company = _fitting(order, size)
            if any(ranked[-1].reproducible for ranked in company):
                value = sum(ranked[4] for ranked in company) / greatest + pressure * len(company)
                options.append((value / widths.time(size), company, size))
    riders = _fitting(ordinary, widths.cap)
    if not riders:
        return
    limit = _limit(riders[0], now)
    value, taken, step = 0.0, 0, 0
    for count, ranked in enumerate(riders, start=1):
        value += ranked[4] / greatest + pressure
        taken += ranked[-1].rows
        while widths.sizes[step] < taken:
            step += 1
        seconds = widths.seconds[step]
        if count == 1 or seconds <= limit:
            options.append((value / seconds, riders[:count], widths.sizes[step]))


def _limit(first: _Ranked[L], now: float) -> float:
    """How long a forward may take so that the lane that goes first keeps its deadline, if it is urgent."""
    lane = first[-1]
    if first[1] == _ORDINARY or lane.deadline is None:
        return math.inf
    return (lane.deadline - now) / lane.remaining


def _fitting(order: list[_Ranked[L]], width: int) -> list[_Ranked[L]]:
    """As many lanes as ``width`` rows hold, in this order; one that no longer fits lets smaller ones pass."""
    taken, room = [], width
    for ranked in order:
        rows = ranked[-1].rows
        if rows <= room:
            taken.append(ranked)
            room -= rows
            if not room:
                break
    return taken
