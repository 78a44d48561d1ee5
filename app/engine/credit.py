"""How many seconds of promises a caller may hold: more, the more of its promises it has claimed."""

from __future__ import annotations

from collections import OrderedDict

MAX_HOSTS = 4096
FLOOR = 0.25  # of the start, below which no caller falls: some of its clients may be others than those that stay away


class Credit:
    """Seconds by caller; those heard of least recently are forgotten, and start anew."""

    def __init__(self, start: float, most: float) -> None:
        self._start, self._most = start, most
        self._seconds: OrderedDict[str, float] = OrderedDict()

    def of(self, caller: str) -> float:
        """Seconds of work that it may be promised at once; a single promise may be larger."""
        return self._seconds.get(caller, self._start)

    def gain(self, caller: str, seconds: float) -> None:
        """A promise was claimed."""
        self._set(caller, min(self._most, self.of(caller) + seconds))

    def lose(self, caller: str, seconds: float) -> None:
        """A promise was not claimed."""
        self._set(caller, max(FLOOR * self._start, self.of(caller) - seconds))

    def _set(self, caller: str, seconds: float) -> None:
        self._seconds[caller] = seconds
        self._seconds.move_to_end(caller)
        if len(self._seconds) > MAX_HOSTS:
            self._seconds.popitem(last=False)
