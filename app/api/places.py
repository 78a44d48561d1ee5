"""Places for jobs: a bounded number of them, and a promise for each that was refused. It knows no clock."""

from __future__ import annotations

import math
from collections.abc import Sequence

from app.errors import Overloaded

GRACE = 10.0  # seconds that a promise may be claimed after it is due


class PlacePromises:
    """Keeps a place for who was refused and returns when it is due."""

    def __init__(self) -> None:
        self._due: dict[str, float] = {}  # by who was refused, in the order of refusal

    def take(self, name: str, now: float, places: int, seconds_left: Sequence[float]) -> None:
        """Take a place, or be refused.

        Args:
            name: the same when it returns.
            places: how many there are.
            seconds_left: of each place that is taken, until it is free; sorted.

        Raises:
            Overloaded: a place is free after its ``Retry-After``, and kept for this name, unless the detail says that
                there are too many promises already.
        """
        self._due = {other: due for other, due in self._due.items() if due > now - GRACE}
        free = places - len(seconds_left)
        earlier = list(self._due).index(name) if name in self._due else len(self._due)
        if free > earlier:
            self._due.pop(name, None)
            return
        # Each refused one before takes the place that is free next; one beyond all places waits for another round.
        place = min(earlier - max(free, 0), len(seconds_left) - 1)
        left = seconds_left[place] if seconds_left else 0.0  # all places are free, and promised
        after = max(1, math.ceil(left))
        if name in self._due:  # it came early, or the jobs took longer than was thought
            after = max(1, math.ceil(max(self._due[name] - now, left)))
            self._due[name] = max(self._due[name], now + after)
        elif len(self._due) < places:
            self._due[name] = now + after
        kept = "for then there is a place for this one"
        if name not in self._due:
            kept = "though no place can be kept until then"
        raise Overloaded(
            f"{len(seconds_left)} jobs are under way, and no more than {places} are kept; "
            f"try again in {after} s, {kept}",
            retry_after=after,
        )
