"""What the scheduler reads of a lane: of the engine's, of a simulation's, of a test's."""

from __future__ import annotations

from typing import Protocol, TypeVar


class Schedulable(Protocol):
    """What the scheduler reads of a lane."""

    @property
    def remaining(self) -> int:
        """Steps left, at least 1."""

    @property
    def rows(self) -> int:
        """Rows of a forward that one of its steps takes, 1 or 2."""

    @property
    def work(self) -> int:
        """Row-steps that its whole job still needs, at least ``remaining * rows``."""

    @property
    def total(self) -> int:
        """Row-steps that its whole job needed at the start."""

    @property
    def since(self) -> float:
        """When its job was submitted, in seconds on the clock of ``choose``'s ``now``."""

    @property
    def passed_over(self) -> int:
        """Ticks since it last advanced."""

    @property
    def progress(self) -> object:
        """The same object for lanes whose work, total, since, priority and deadline are those of one job; or None."""

    @property
    def exact(self) -> bool:
        """Whether it needs the exact network."""

    @property
    def reproducible(self) -> bool:
        """Whether it needs a bit-identical width; it is exact, then."""

    @property
    def priority(self) -> int:
        """-10..10; higher goes first."""

    @property
    def deadline(self) -> float | None:
        """When its job must be done, on the same clock; None if never."""


L = TypeVar("L", bound=Schedulable)
