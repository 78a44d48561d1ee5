"""What forwards cost here and now: the line measured at the start, corrected by every tick.

A device is slower than it was, for a while (neighbours on the same cores, heat) or for good (whatever else a tick is),
and a line measured in a second or two has errors of its own, which tilt the choice between narrow and wide: one that
had one row 7 % too cheap and eight 5 % too dear took the mean slowdown at 90 % load from 3.9 to 5.5, in simulation. So
each tick corrects two factors: that of all forwards, quickly, and that of its own width beside the others, slowly.
"""

from __future__ import annotations

from app.engine.scheduler import Forwards, Widths

QUICK, SLOW = 0.05, 0.02  # of the way that a tick corrects the factor of all, and that of its width
LARGEST = 2.0  # one tick counts for no more than this factor: it may have hung for reasons of its own
BOUND = 4.0  # of what all ticks together can make of either factor


class Pace:
    """Follows ticks.

    Attributes:
        overall: what ticks take of late, over what their forwards took at the start.
        forwards: with their times as they are of late; replaced, never changed, so that any thread may read it.
    """

    def __init__(self, start: Forwards) -> None:
        self.overall = 1.0
        self.forwards = start
        self._start = start
        self._own: dict[tuple[bool, int], float] = {}  # of each kind and width, beside ``overall``

    def widths(self, exact: bool) -> Widths:
        """Of one kind of forward."""
        return self.forwards.exact if exact else self.forwards.fast

    def note(self, exact: bool, width: int, seconds: float) -> None:
        """A tick of this kind and width is over, and took so long."""
        key = (exact and not self._start.shared, width)
        own = self._own.get(key, 1.0)
        widths = self._start.exact if exact else self._start.fast
        off = seconds / (widths.time(width) * self.overall * own)
        off = min(max(off, 1 / LARGEST), LARGEST)
        self.overall = _bounded(self.overall * off**QUICK)
        self._own[key] = _bounded(own * off**SLOW)
        self._follow()

    def halve(self) -> bool:
        """Give up the wider half of the forwards, for want of memory; False if there is nothing left to give up."""
        narrower = self._start.halved()
        if narrower is None:
            return False
        self._start = narrower
        self._follow()
        return True

    def _follow(self) -> None:
        start = self._start
        fast = self._of_late(start.fast, exact=False)
        self.forwards = Forwards(fast, fast if start.shared else self._of_late(start.exact, exact=True))

    def _of_late(self, widths: Widths, *, exact: bool) -> Widths:
        seconds = (
            time * self.overall * self._own.get((exact, size), 1.0)
            for size, time in zip(widths.sizes, widths.seconds, strict=True)
        )
        return Widths(widths.sizes, tuple(seconds), widths.alike)


def _bounded(factor: float) -> float:
    return min(max(factor, 1 / BOUND), BOUND)
