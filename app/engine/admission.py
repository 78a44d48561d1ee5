"""Admission: arithmetic on seconds of work. It knows no thread and no clock; times are passed in.

A server that answers a hundred clients at once with ``Retry-After: 3`` has promised the same capacity a hundred times.
So each one refused gets a promise of its own, behind all others: ``Retry-After`` says when it is due. Until then,
newcomers are admitted only as far as they leave room for it, or if the device would soon be idle. A client that returns
in time is always admitted; a promise that is not claimed expires a little later.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from app.errors import Overloaded, TooLate

GRACE = 10.0  # seconds that a promise may be claimed after it is due
MAX_PROMISES = 4096
REMEDY = "allow more in X-Request-Timeout-Ms, or ask for fewer steps"


@dataclass(frozen=True, slots=True)
class Promise:
    """Capacity kept for a client that was refused.

    Attributes:
        due: from when on it may be claimed.
        seconds: of work.
    """

    due: float
    seconds: float
    sender: str


class Admission:
    """Decides who is admitted, and keeps the promises.

    Attributes:
        promises: in the order in which they are due.
    """

    def __init__(self, max_seconds: float) -> None:
        self.max_seconds = max_seconds
        self.promises: list[Promise] = []

    def count_open(self, now: float) -> int:
        """How many promises can still be claimed."""
        return sum(promise.due > now - GRACE for promise in self.promises)

    def admit(self, seconds: float, waiting: float, now: float, sender: str | None, *, claim: bool = True) -> None:
        """Admit work, or refuse it.

        It is admitted while the work ahead of it takes at most ``max_seconds``, however large it is itself.

        Args:
            seconds: of the work.
            waiting: seconds of work that was admitted and is not done.
            sender: as in :class:`app.engine.reservation.SubmitOptions`; None gets no promise.
            claim: whether a promise is used up; not if the work must be refused for other reasons.

        Raises:
            Overloaded: with the whole seconds after which it will be admitted.
        """
        self.promises = [promise for promise in self.promises if promise.due > now - GRACE]
        promise = next((promise for promise in self.promises if promise.sender == sender and promise.due <= now), None)
        if promise is not None:
            if claim:
                self.promises.remove(promise)
            return
        ahead, fits = waiting, waiting <= self.max_seconds
        for promise in self.promises:  # the work that each would find ahead, were this admitted
            fits = fits and ahead + seconds - max(0.0, promise.due - now) <= self.max_seconds
            ahead += promise.seconds
        # Some promises are never claimed: newcomers are admitted before the device becomes idle.
        if fits or waiting + seconds <= self.max_seconds / 2:
            return
        after = max(1, math.ceil(ahead - self.max_seconds))
        if sender is not None and len(self.promises) < MAX_PROMISES:
            due = max(now + after, self.promises[-1].due if self.promises else 0.0)
            after = math.ceil(due - now)
            self.promises.append(Promise(due, seconds, sender))
        raise Overloaded(
            f"{waiting:.0f} s of work are waiting and {ahead - waiting:.0f} s are promised to others, at most "
            f"{self.max_seconds:g} s may wait; try again in {after} s, for then there is a place for this request",
            retry_after=after,
        )


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
