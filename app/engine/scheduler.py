"""Who advances next, and how wide: pure Python on plain data. It knows no tensors, no thread and no clock.

Width is a decision, not a maximum. Where a forward's cost grows with its width (a CPU, a saturated card), letting a
long lane ride along slows every short one; where it hardly grows, everybody should ride. So lanes are ordered by the
work (row-steps) that they have left, and the prefix is taken that earns the most value per second of the measured
forward:

    value of lane i = (r_min / r_i)^½ + PRESSURE · rows waiting / cap

The first term favours lanes near their end, the second shades into full width as lanes pile up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol, TypeVar

PRESSURE = 2.0
PATIENCE = 32  # ticks that a lane may be passed over before it goes first, whatever it costs


class Waiting(Protocol):
    """What the scheduler sees of a lane."""

    @property
    def remaining(self) -> int:
        """Steps left, at least 1."""

    @property
    def rows(self) -> int:
        """Rows of a forward that a step of it takes, 1 or 2."""

    @property
    def passed_over(self) -> int:
        """Ticks since it last advanced."""

    @property
    def reproducible(self) -> bool:
        """Whether it must ride in a forward of the canonical width."""


L = TypeVar("L", bound=Waiting)


@dataclass(frozen=True)
class Widths:
    """The widths that forwards come in, and what each costs.

    Attributes:
        sizes: rows after padding, rising.
        seconds: measured time of one forward of each size.
        canonical: the one size that reproducible lanes ride in; not necessarily among ``sizes``.
        canonical_seconds: its measured time.
    """

    sizes: tuple[int, ...]
    seconds: tuple[float, ...]
    canonical: int
    canonical_seconds: float

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
        return Widths(self.sizes[:kept], self.seconds[:kept], self.canonical, self.canonical_seconds) if kept else None


def choose(lanes: Sequence[L], widths: Widths) -> tuple[list[L], int]:
    """Decide one tick.

    Every lane is passed over at most ``PATIENCE + len(lanes)`` ticks in a row: beyond PATIENCE it comes before all that
    waited less, and the first in that order always rides.

    Args:
        lanes: at least one; each fits, that is, takes at most ``widths.cap`` rows, and if it is reproducible,
            ``widths.canonical`` is at least that and at most ``widths.cap``.

    Returns:
        The lanes that ride, each once, and the width to pad them to.
    """
    if len(lanes) == 1:
        alone = lanes[0]
        return [alone], widths.canonical if alone.reproducible else widths.padded(alone.rows)[0]
    order = sorted(lanes, key=lambda lane: (-max(0, lane.passed_over - PATIENCE), lane.remaining * lane.rows))
    shortest = min(lane.remaining * lane.rows for lane in order)
    pressure = PRESSURE * sum(lane.rows for lane in order) / widths.cap

    def worth(lane: L) -> float:
        return float((shortest / (lane.remaining * lane.rows)) ** 0.5) + pressure

    # Reproducible lanes fix the width; others may join them. Or ordinary lanes ride alone, as wide as pays.
    company = _fitting(order, widths.canonical)
    ordinary = _fitting([lane for lane in order if not lane.reproducible], widths.cap)
    options: list[tuple[float, list[L], int]] = []
    if any(lane.reproducible for lane in company):
        options.append((sum(map(worth, company)) / widths.canonical_seconds, company, widths.canonical))
    if ordinary:
        rows = accumulate(lane.rows for lane in ordinary)
        for count, (taken, value) in enumerate(zip(rows, accumulate(map(worth, ordinary)), strict=True), start=1):
            size, seconds = widths.padded(taken)
            options.append((value / seconds, ordinary[:count], size))
    if order[0].passed_over > PATIENCE:
        options = [option for option in options if option[1][0] is order[0]]
    _, riders, width = max(options, key=lambda option: (option[0], len(option[1])))
    return riders, width


def _fitting(order: Sequence[L], width: int) -> list[L]:
    """As many lanes as ``width`` rows hold, in this order; one that no longer fits lets smaller ones pass."""
    taken, room = [], width
    for lane in order:
        if lane.rows <= room:
            taken.append(lane)
            room -= lane.rows
            if not room:
                break
    return taken
