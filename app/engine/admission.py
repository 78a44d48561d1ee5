"""Who is let in: arithmetic on seconds of work. It knows no thread and no clock; times are passed in.

A server that tells a hundred clients at once to come back in three seconds has promised the same place a hundred times.
So each one refused is promised a place of its own, behind all others: ``Retry-After`` says when it will be free, and
until then newcomers are let in only as far as they do not take it, or the device would soon have nothing to do. Whoever
comes back in time is let in in any case; a promise that nobody claims is forgotten a little later.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from app.errors import Overloaded, TooLate

GRACE = 10.0  # seconds that a promised place is kept after its time
MOST_PROMISES = 4096


@dataclass(frozen=True, slots=True)
class Promise:
    """A place kept for one who was sent away.

    Attributes:
        due: from when on it may be claimed.
        seconds: of work.
    """

    due: float
    seconds: float
    sender: str


class Admission:
    """The promises, and who is let in beside them."""

    def __init__(self, max_seconds: float) -> None:
        self.max_seconds = max_seconds
        self.promises: list[Promise] = []  # in the order of their times

    def kept(self, now: float) -> int:
        """How many promises may still be claimed."""
        return sum(promise.due > now - GRACE for promise in self.promises)

    def admit(self, seconds: float, waiting: float, now: float, sender: str | None, *, claim: bool = True) -> None:
        """Let work in, or refuse it.

        It is let in while the work ahead of it takes at most ``max_seconds``, however large it is itself.

        Args:
            seconds: of work that is asked for.
            waiting: seconds of work that were let in and are not done.
            sender: as :class:`app.engine.reservation.SubmitOptions` has it; None is promised nothing.
            claim: whether a place that was promised is taken; not if the work must be refused for other reasons.

        Raises:
            Overloaded: with the whole seconds after which it will be let in.
        """
        self.promises = [promise for promise in self.promises if promise.due > now - GRACE]
        kept = next((promise for promise in self.promises if promise.sender == sender and promise.due <= now), None)
        if kept is not None:
            if claim:
                self.promises.remove(kept)
            return
        ahead, fits = waiting, waiting <= self.max_seconds
        for promise in self.promises:  # what each of them would find ahead, if this one were let in
            fits = fits and ahead + seconds - max(0.0, promise.due - now) <= self.max_seconds
            ahead += promise.seconds
        # Of those who were promised a place some never come back; it goes to newcomers before the device runs dry.
        if fits or waiting + seconds <= self.max_seconds / 2:
            return
        after = max(1, math.ceil(ahead - self.max_seconds))
        if sender is not None and len(self.promises) < MOST_PROMISES:
            due = max(now + after, self.promises[-1].due if self.promises else 0.0)
            after = math.ceil(due - now)
            self.promises.append(Promise(due, seconds, sender))
        raise Overloaded(
            f"{waiting:.0f} s of work are waiting and {ahead - waiting:.0f} s are promised to others, at most "
            f"{self.max_seconds:g} s may wait; try again in {after} s, for then there is a place for this request",
            retry_after=after,
        )


def check_deadline(alone: float, ahead: Callable[[], float], left: float) -> None:
    """Refuse at once what cannot be done in time.

    Args:
        alone: seconds that it takes on an idle device.
        ahead: seconds of work that must be done before it, since their deadlines are earlier.
        left: seconds until its deadline.

    Raises:
        TooLate: with what it takes.
    """
    if alone > left:
        raise TooLate(f"{left * 1e3:.0f} ms are left, and this takes {alone * 1e3:.0f} ms on an idle device; {REMEDY}")
    if (needed := alone + ahead()) > left:
        raise TooLate(
            f"{left * 1e3:.0f} ms are left, and with what is due before, {needed * 1e3:.0f} ms are needed; {REMEDY}"
        )


REMEDY = "allow more in X-Request-Timeout-Ms, or ask for fewer steps"
