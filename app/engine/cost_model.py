"""What forwards cost here and now: the line measured at the start, corrected by every tick.

A device is slower than it was, for a while (neighbours on the same cores, heat) or for good (whatever else a tick is),
and a line measured in a second or two has errors of its own, which tilt the choice between narrow and wide: one that
had one row 7 % too cheap and eight 5 % too dear took the mean slowdown at 90 % load from 3.9 to 5.5, in simulation. So
each tick corrects two factors: that of all forwards, quickly, and that of its own width beside the others, slowly.

A width that nearly all ticks have says nothing about itself beside others: were it blamed for what slows all down, it
would soon seem too dear, and forwards become narrower than pays. So the more of the ticks are of a width, the less
they say of it. And one that is never tried could never be found to be cheaper than it was thought to be,
so it is thought to be a little cheaper with every tick of others.
"""

from __future__ import annotations

from app.engine.scheduler import Forwards, Widths

# Of the way that a tick corrects the factor of all, and that of its width. Neighbouring widths often differ by 3 to 6 %
# a row, and forwards on a shared CPU by a tenth for seconds on end: with 0.02 the first fifty ticks could decide wrong.
QUICK, SLOW = 0.05, 0.005
LARGEST = 2.0  # one tick counts for no more than this factor: it may have hung for reasons of its own
LARGEST_OWN = 1.25  # and for its own width no more than this: what hangs hangs in the longest forwards
FADING = 1 - 1e-6  # a width that seems too dear by 3 % is tried again after thirty thousand ticks
BOUND = 4.0  # of what all ticks together can make of either factor
Key = tuple[bool, int]  # kind and width


class CostModel:
    """Follows ticks.

    Attributes:
        overall: what ticks take of late, over what their forwards took at the start.
        forwards: with their times as they are of late; replaced, never changed, so that any thread may read it.
    """

    def __init__(self, start: Forwards) -> None:
        self.overall = 1.0
        self.forwards = start
        self._start = start
        kinds = {False: start.fast} if start.shared else {False: start.fast, True: start.exact}
        keys = [(exact, size) for exact, widths in kinds.items() for size in widths.sizes]
        self._own: dict[Key, float] = dict.fromkeys(keys, 1.0)  # of each width, beside ``overall``
        self._share: dict[Key, float] = dict.fromkeys(keys, 0.0)  # of the ticks of late
        self._ticks = 0

    def widths(self, exact: bool) -> Widths:
        """Of one kind of forward."""
        return self.forwards.exact if exact else self.forwards.fast

    def note(self, exact: bool, width: int, seconds: float) -> None:
        """A tick of this kind and width is over, and took so long; one that was given up meanwhile says nothing."""
        mine = (exact and not self._start.shared, width)
        widths = self._start.exact if exact else self._start.fast
        if width not in widths.sizes:
            return
        off = seconds / (widths.time(width) * self.overall * self._own[mine])
        much, little = _within(off, LARGEST), _within(off, LARGEST_OWN)
        self._ticks += 1
        rate = max(SLOW, 1 / self._ticks)
        for key in self._own:
            self._share[key] *= 1 - rate
            if key != mine:
                self._own[key] = _within(self._own[key] * FADING, BOUND)
        self._share[mine] += rate
        self.overall = _within(self.overall * much**QUICK, BOUND)
        self._own[mine] = _within(self._own[mine] * little ** (SLOW * (1 - self._share[mine])), BOUND)
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
            time * self.overall * self._own[exact, size]
            for size, time in zip(widths.sizes, widths.seconds, strict=True)
        )
        return Widths(widths.sizes, tuple(seconds), widths.alike)


def _within(factor: float, bound: float) -> float:
    return min(max(factor, 1 / bound), bound)
