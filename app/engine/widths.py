"""The widths that forwards come in, and what each costs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Widths:
    """The widths of one kind of forward.

    Attributes:
        sizes: rows after padding, rising.
        seconds: time of one forward of each size.
        bit_identical: those sizes at which a row has the same bits; reproducible lanes use no others.
    """

    sizes: tuple[int, ...]
    seconds: tuple[float, ...]
    bit_identical: tuple[int, ...] = ()

    @property
    def cap(self) -> int:
        """The most rows of one forward."""
        return self.sizes[-1]

    @property
    def seconds_per_row(self) -> float:
        """Cost of one step of one row when the device is full."""
        return self.seconds[-1] / self.sizes[-1]

    def time(self, size: int) -> float:
        """Seconds of a forward of one of the sizes."""
        return self.seconds[self.sizes.index(size)]

    def pad(self, rows: int) -> tuple[int, float]:
        """The smallest size that holds ``rows``, and its time; 1 <= rows <= cap."""
        return next((size, time) for size, time in zip(self.sizes, self.seconds, strict=True) if size >= rows)

    def narrowest(self, rows: int, reproducible: bool) -> int | None:
        """The narrowest forward for a lane of so many rows; None if there is none."""
        return next((size for size in (self.bit_identical if reproducible else self.sizes) if size >= rows), None)

    def halve(self) -> Widths | None:
        """Without the sizes above half the cap; None if nothing would be left."""
        kept = sum(size <= self.cap // 2 for size in self.sizes)
        identical = tuple(size for size in self.bit_identical if size <= self.cap // 2)
        return Widths(self.sizes[:kept], self.seconds[:kept], identical) if kept else None


@dataclass(frozen=True)
class Forwards:
    """The two kinds of forward that a tick can be.

    Attributes:
        fast: of the fastest network, in whatever precision.
        exact: of the float32 network; the same object as ``fast`` where that is the fastest.
    """

    fast: Widths
    exact: Widths

    @property
    def shared(self) -> bool:
        """Whether there is one kind, so that all lanes can share forwards."""
        return self.fast is self.exact

    def halve(self) -> Forwards | None:
        """Without the wider half of each kind; None if nothing would be left."""
        fast = self.fast.halve()
        exact = fast if self.shared else self.exact.halve()
        return Forwards(fast, exact) if fast and exact else None
