"""The present cost of forwards: their times as measured at the start, corrected by every tick.

A device slows down for a while (neighbours on the same cores, heat) or for good (a tick is more than its forward), and
times measured in a second or two have errors of their own, which tilt the choice between narrow and wide forwards. So
each tick corrects two factors: that of all forwards, quickly, and that of its own width beside the others, slowly.

A width that nearly all ticks have says nothing about itself beside others: were it blamed for what slows all of them,
it would soon seem too expensive, and forwards would become narrower than pays. So the larger a width's share of the
ticks, the less they correct it. And a width that is never tried could never be found to be cheaper than assumed, so
with every tick of others it is assumed to be a little cheaper.

Widths for which there was no memory are given up by halves, and come back one half at a time after enough ticks that
had room; each time that proves too early, it takes four times as many.
"""

from __future__ import annotations

import logging
from typing import NamedTuple

from app.engine.widths import Forwards, Widths

# How much of a tick's deviation corrects the factor of all forwards, and that of its width. Neighbouring widths often
# differ by 3 to 6 % per row, and forwards on a shared CPU by a tenth for seconds: with 0.02 for a width, the first
# fifty ticks could decide wrong.
RATE, WIDTH_RATE = 0.05, 0.005
MAX_DEVIATION = 2.0  # one tick counts for no more than this factor: it may have hung for other reasons
MAX_WIDTH_DEVIATION = 1.25  # the same for its width: hangs hit the longest forwards most often
DECAY = 1 - 1e-6  # of the factors of widths not tried: one that seems 3 % too expensive is tried after 30,000 ticks
MAX_RATIO = 64.0  # whatever the ticks were: threads that wait for busy cores have been 50 times as slow
MAX_FACTOR = 4.0  # the same for the factor of a width
SLOW, RECOVERED = 2.0, 1.25  # ratio that is worth a warning, and from which on another may follow
WIDEN_TICKS, MAX_WIDEN_TICKS = 1000, 1_000_000  # without want of memory, before widths that were given up come back

log = logging.getLogger("unstir.engine")


class _Key(NamedTuple):
    """A kind of forward, and its width; exact is False where there is one kind."""

    exact: bool
    width: int


class CostModel:
    """Follows the times of ticks.

    Attributes:
        ratio: recent time of a tick over the time of its forward at the start.
        forwards: with present times; replaced, never changed, so that any thread may read it.
    """

    def __init__(self, start: Forwards) -> None:
        self.ratio = 1.0
        self.forwards = start
        self._start = start
        kinds = {False: start.fast} if start.shared else {False: start.fast, True: start.exact}
        keys = [_Key(exact, size) for exact, widths in kinds.items() for size in widths.sizes]
        self._factors = dict.fromkeys(keys, 1.0)  # of each width, beside ``ratio``
        self._shares = dict.fromkeys(keys, 0.0)  # of recent ticks
        self._ticks = 0
        self._given_up: list[Forwards] = []  # the widest first
        self._roomy_ticks = 0  # since the widths changed
        self._widen_ticks = WIDEN_TICKS
        self._on_trial = False  # whether the last change was to wider ones
        self._warned = False

    def widths(self, exact: bool) -> Widths:
        return self.forwards.exact if exact else self.forwards.fast

    def update(self, exact: bool, width: int, seconds: float) -> None:
        """Correct the costs by a tick's time; a width that was given up meanwhile is ignored."""
        self._widen_in_time()
        own = _Key(exact and not self._start.shared, width)
        widths = self._start.exact if exact else self._start.fast
        if width not in widths.sizes:
            return
        deviation = seconds / (widths.time(width) * self.ratio * self._factors[own])
        self._ticks += 1
        rate = max(WIDTH_RATE, 1 / self._ticks)
        for key in self._factors:
            self._shares[key] *= 1 - rate
            if key != own:
                self._factors[key] = _clamp(self._factors[key] * DECAY, MAX_FACTOR)
        self._shares[own] += rate
        self.ratio = _clamp(self.ratio * _clamp(deviation, MAX_DEVIATION) ** RATE, MAX_RATIO)
        width_rate = WIDTH_RATE * (1 - self._shares[own])
        self._factors[own] = _clamp(
            self._factors[own] * _clamp(deviation, MAX_WIDTH_DEVIATION) ** width_rate, MAX_FACTOR
        )
        self._apply()
        self._warn()

    def _warn(self) -> None:
        if self.ratio < RECOVERED:
            self._warned = False
        if self.ratio > SLOW and not self._warned:
            self._warned = True
            log.warning(
                "forwards take %.0f times as long as they were calibrated: other processes use the cores, "
                "or the device is throttled; with fewer UNSTIR_THREADS a forward waits less for busy cores",
                self.ratio,
            )

    def halve(self) -> bool:
        """Give up the wider half of the forwards, for want of memory; False if nothing would be left."""
        narrower = self._start.halve()
        if narrower is None:
            return False
        if self._on_trial:
            self._widen_ticks = min(4 * self._widen_ticks, MAX_WIDEN_TICKS)
        self._on_trial = False
        self._roomy_ticks = 0
        self._given_up.append(self._start)
        self._start = narrower
        self._apply()
        return True

    def _widen_in_time(self) -> None:
        """Count a tick that had room, and after enough of them take back the widths given up last."""
        if not self._given_up and not self._on_trial:
            return
        self._roomy_ticks += 1
        if self._roomy_ticks < self._widen_ticks:
            return
        self._roomy_ticks, self._on_trial = 0, bool(self._given_up)
        if self._given_up:
            self._start = self._given_up.pop()
            self._apply()
            log.info("forwards of up to %d rows are tried again", self.forwards.fast.cap)
        else:
            self._widen_ticks = WIDEN_TICKS

    def _apply(self) -> None:
        start = self._start
        fast = self._correct(start.fast, exact=False)
        self.forwards = Forwards(fast, fast if start.shared else self._correct(start.exact, exact=True))

    def _correct(self, widths: Widths, *, exact: bool) -> Widths:
        seconds = (
            time * self.ratio * self._factors[_Key(exact, size)]
            for size, time in zip(widths.sizes, widths.seconds, strict=True)
        )
        return Widths(widths.sizes, tuple(seconds), widths.bit_identical)


def _clamp(factor: float, bound: float) -> float:
    return min(max(factor, 1 / bound), bound)
