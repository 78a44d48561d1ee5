"""Places for jobs: a bounded number of them, and a promise for each that was refused. It knows no clock."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from app.engine.credit import Credit
from app.errors import Overloaded

GRACE = 10.0  # seconds that a promise may be claimed after it is due


@dataclass(slots=True)
class PlacePromise:
    """A place that is kept for a caller, from when it is due."""

    caller: str
    due: float


class PlacePromises:
    """Keeps a place for who was refused and returns when it is due.

    There are at most as many promises as places; one caller has at most half of them, fewer if it does not return.

    Args:
        places: how many there are.
    """

    def __init__(self, places: int) -> None:
        self._places = places
        self._promises: dict[str, PlacePromise] = {}  # by the name of what was refused, in the order of refusal
        self._credit = Credit(start=places / 2, most=places / 2)

    def take(self, name: str, caller: str, now: float, seconds_left: Sequence[float]) -> None:
        """Take a place, or be refused.

        Args:
            name: the same when it returns.
            caller: that the promise is counted against.
            seconds_left: of each place that is taken, until it is free; sorted.

        Raises:
            Overloaded: a place is free after its ``Retry-After``, and kept for this name, unless the detail says that
                there are too many promises already.
        """
        self._expire(now)
        own = self._promises.get(name)
        free = self._places - len(seconds_left)
        earlier = list(self._promises).index(name) if own else len(self._promises)
        if free > earlier:
            if own:
                del self._promises[name]
                self._credit.gain(own.caller, 1)
            return
        # Each refused one before takes the place that is free next; one beyond all places waits for another round.
        place = min(earlier - max(free, 0), len(seconds_left) - 1)
        left = seconds_left[place] if seconds_left else 0.0  # all places are free, and promised
        after = max(1, math.ceil(left))
        if own:  # it came early, or the jobs took longer than was thought
            after = max(1, math.ceil(max(own.due - now, left)))
            own.due = max(own.due, now + after)
        elif self._may_promise(caller):
            own = self._promises[name] = PlacePromise(caller, now + after)
        kept = "for then there is a place for this one" if own else "though no place can be kept until then"
        raise Overloaded(
            f"{len(seconds_left)} jobs are under way, and no more than {self._places} are kept; "
            f"try again in {after} s, {kept}",
            retry_after=after,
        )

    def _expire(self, now: float) -> None:
        for name, promise in list(self._promises.items()):
            if promise.due <= now - GRACE:
                del self._promises[name]
                self._credit.lose(promise.caller, 1)

    def _may_promise(self, caller: str) -> bool:
        held = sum(promise.caller == caller for promise in self._promises.values())
        return len(self._promises) < self._places and (held == 0 or held + 1 <= self._credit.of(caller))
