"""How much may be promised to a caller at once: more, the more of its promises it has claimed."""

from __future__ import annotations

from collections import OrderedDict

MAX_CALLERS = 4096
FLOOR = 0.25  # of the start, below which no caller falls: some of its clients may be others than those that stay away


class Credit:
    """Amounts by caller, in any unit; those heard of least recently are forgotten, and start anew."""

    def __init__(self, start: float, most: float) -> None:
        self._start, self._most = start, most
        self._amounts: OrderedDict[str, float] = OrderedDict()

    def of(self, caller: str) -> float:
        """How much it may be promised at once; a single promise may be larger."""
        return self._amounts.get(caller, self._start)

    def gain(self, caller: str, amount: float) -> None:
        """A promise was claimed."""
        self._set(caller, min(self._most, self.of(caller) + amount))

    def lose(self, caller: str, amount: float) -> None:
        """A promise was not claimed."""
        self._set(caller, max(FLOOR * self._start, self.of(caller) - amount))

    def _set(self, caller: str, amount: float) -> None:
        self._amounts[caller] = amount
        self._amounts.move_to_end(caller)
        if len(self._amounts) > MAX_CALLERS:
            self._amounts.popitem(last=False)
