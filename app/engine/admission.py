"""Admission: arithmetic on seconds of work. It knows no thread and no clock; times are passed in.

A server that answers a hundred clients at once with ``Retry-After: 3`` has promised the same capacity a hundred times.
So each one refused gets a promise of its own, behind all others: ``Retry-After`` says when it is due. Until then,
newcomers are admitted only as far as they leave room for it, or if the device would soon be idle. A client that returns
in time is always admitted; one that returns early finds the same promise; one that is not claimed expires a little
after it is due.

Promises hold capacity that others could use, so they are bounded: all together, and for each caller by its credit,
which grows with promises that were claimed and shrinks with those that were not. Beyond these bounds a refusal has no
promise, and says so.

One request does not fill the queue for all others: it counts for at most half of it, since the scheduler lets shorter
ones go first, and one that takes longer than all that may wait is admitted only while nothing does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from app.engine.credit import Credit
from app.errors import Overloaded, TooLate

GRACE = 10.0  # seconds that a promise may be claimed after it is due
MAX_PROMISES = 4096
MAX_PROMISED = 4.0  # times the seconds that may wait: of all promises together
REMEDY = "allow more in X-Request-Timeout-Ms, or ask for fewer steps"


@dataclass(frozen=True, slots=True)
class Demand:
    """What a request needs, and from whom it is.

    Attributes:
        seconds: of work, at present.
        size: of it whatever a forward costs: row-steps.
        lanes: images at once.
        sender: as in :class:`app.engine.reservation.SubmitOptions`; None gets no promise.
        caller: that the promise is counted against.
    """

    seconds: float
    size: float
    lanes: int = 1
    sender: str | None = None
    caller: str = ""


@dataclass(frozen=True, slots=True)
class Load:
    """What was admitted and is not done.

    Attributes:
        seconds: of work, as :meth:`Admission.count` has it.
        lanes: images.
        total: seconds of all the work.
    """

    seconds: float
    lanes: int
    total: float


@dataclass(frozen=True, slots=True)
class Promise:
    """Capacity kept for a client that was refused.

    Attributes:
        due: from when on it may be claimed.
    """

    due: float
    demand: Demand


class Admission:
    """Decides who is admitted, and keeps the promises.

    Attributes:
        promises: in the order in which they are due.
    """

    def __init__(self, max_seconds: float, max_lanes: int = 2**62) -> None:
        self.max_seconds, self.max_lanes = max_seconds, max_lanes
        self.promises: list[Promise] = []
        self._credit = Credit(start=max_seconds / 2, most=MAX_PROMISED * max_seconds)

    def count_open(self, now: float) -> int:
        """How many promises can still be claimed."""
        return sum(promise.due > now - GRACE for promise in self.promises)

    def count(self, seconds: float) -> float:
        """What a request's remaining work counts for those that come after it."""
        return min(seconds, self.max_seconds / 2)

    def admit(self, demand: Demand, load: Load, now: float) -> None:
        """Admit work, or refuse it.

        It is admitted while the work ahead of it counts for at most ``max_seconds``, and there are at most
        ``max_lanes`` images with its own, or no others. A promise that is due is kept in any case.

        Raises:
            Overloaded: with the whole seconds after which it will be admitted; or without a promise, after which there
                may be room.
        """
        self._expire(now)
        own = self._find(demand)
        if own is not None and own.due <= now:
            self._claim(own)
            return
        if demand.seconds > self.max_seconds and load.seconds > 0:
            raise self._too_large(demand, load)
        crowded = load.lanes > 0 and load.lanes + demand.lanes > self.max_lanes
        ahead, fits = load.seconds, load.seconds <= self.max_seconds
        for promise in self.promises:  # the work that each would find ahead, were this admitted
            if promise is not own:
                fits = fits and ahead + demand.seconds - max(0.0, promise.due - now) <= self.max_seconds
                ahead += promise.demand.seconds
        # Some promises are never claimed: newcomers are admitted before the device becomes idle.
        if not crowded and (fits or load.seconds + demand.seconds <= self.max_seconds / 2):
            if own is not None:
                self._claim(own)
            return
        if own is None:
            own = self._promise(demand, load, ahead, now)
        raise self._refusal(demand, load, own, ahead, now)

    def _expire(self, now: float) -> None:
        for promise in self.promises:
            if promise.due <= now - GRACE:
                self._credit.lose(promise.demand.caller, promise.demand.seconds)
        self.promises = [promise for promise in self.promises if promise.due > now - GRACE]

    def _find(self, demand: Demand) -> Promise | None:
        """The promise for this very request; an ``Idempotency-Key`` could name a larger one the second time."""
        for promise in self.promises:
            held = promise.demand
            if demand.sender is not None and held.sender == demand.sender:
                return promise if demand.size <= held.size and demand.lanes <= held.lanes else None
        return None

    def _claim(self, promise: Promise) -> None:
        self.promises.remove(promise)
        self._credit.gain(promise.demand.caller, promise.demand.seconds)

    def _promise(self, demand: Demand, load: Load, ahead: float, now: float) -> Promise | None:
        """A promise behind all others; None if there are too many already."""
        held = [promise.demand for promise in self.promises]
        of_caller = [each.seconds for each in held if each.caller == demand.caller]
        if (
            demand.sender is None
            or any(each.sender == demand.sender for each in held)
            or len(held) >= MAX_PROMISES
            or (of_caller and sum(of_caller) + demand.seconds > self._credit.of(demand.caller))
            or (held and ahead - load.seconds + demand.seconds > MAX_PROMISED * self.max_seconds)
            or (held and sum(each.lanes for each in held) + demand.lanes > self.max_lanes)
        ):
            return None
        after = self._wait(demand, load, ahead)
        promise = Promise(max(now + after, self.promises[-1].due if self.promises else 0.0), demand)
        self.promises.append(promise)
        return promise

    def _wait(self, demand: Demand, load: Load, ahead: float) -> int:
        """Whole seconds until the device has done what must be done before, at least one."""
        excess = load.lanes + demand.lanes - self.max_lanes
        crowd = load.total * min(1.0, excess / load.lanes) if load.lanes and excess > 0 else 0.0
        return max(1, math.ceil(max(ahead - self.max_seconds, crowd)))

    def _too_large(self, demand: Demand, load: Load) -> Overloaded:
        after = max(1, math.ceil(load.total))
        share = math.floor(100 * self.max_seconds / demand.seconds)
        return Overloaded(
            f"this request alone takes {demand.seconds:.0f} s, and while others wait at most {self.max_seconds:g} s "
            f"are taken; ask for {share} % of its images or steps at a time, or try again in {after} s",
            after,
        )

    def _refusal(self, demand: Demand, load: Load, own: Promise | None, ahead: float, now: float) -> Overloaded:
        if load.lanes > 0 and load.lanes + demand.lanes > self.max_lanes:
            why = f"{load.lanes} images are in progress, and {demand.lanes} more would exceed {self.max_lanes}"
        else:
            why = (
                f"{load.total:.0f} s of work are waiting and {ahead - load.seconds:.0f} s are promised to others, at "
                f"most {self.max_seconds:g} s may wait"
            )
        if own is not None:
            after = max(1, math.ceil(own.due - now))
            return Overloaded(f"{why}; try again in {after} s, for then there is a place for this request", after)
        after = self._wait(demand, load, ahead)
        return Overloaded(f"{why}; try again in {after} s, though no place can be kept until then", after)


def check_deadline(alone: float, ahead: Callable[[], float], left: float) -> None:
    """Refuse work that cannot be done in time.

    Args:
        alone: seconds that it takes on an idle device.
        ahead: gives the seconds of work that is due before it.
        left: seconds until its deadline.

    Raises:
        TooLate: with the time that it needs.
    """
    if alone > left:
        raise TooLate(f"{left * 1e3:.0f} ms are left, and this takes {alone * 1e3:.0f} ms on an idle device; {REMEDY}")
    if (needed := alone + ahead()) > left:
        raise TooLate(
            f"{left * 1e3:.0f} ms are left, and with what is due before, {needed * 1e3:.0f} ms are needed; {REMEDY}"
        )
