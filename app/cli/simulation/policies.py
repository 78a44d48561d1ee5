"""Policies to compare: ours, and what others do."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from app.cli.simulation.simulate import Lane, Policy
from app.engine.scheduler import choose
from app.engine.widths import Forwards, Widths


class Unstir:
    """The scheduler of the service itself."""

    def choose(self, lanes: Sequence[Lane], widths: Widths, now: float) -> tuple[list[Lane], int]:
        choice = choose(lanes, Forwards(widths, widths), now)
        return choice.batch, choice.width


class FirstCome:
    """Every lane that fits, first come: what step-level batching does where width is taken to be free."""

    def choose(self, lanes: Sequence[Lane], widths: Widths, now: float) -> tuple[list[Lane], int]:  # noqa: ARG002
        riders = list(lanes[: widths.cap])
        return riders, widths.pad(len(riders))[0]


class ShortestRemaining:
    """Every lane that fits, those first whose request has the least work left."""

    def choose(self, lanes: Sequence[Lane], widths: Widths, now: float) -> tuple[list[Lane], int]:  # noqa: ARG002
        riders = sorted(lanes, key=lambda lane: lane.work)[: widths.cap]
        return riders, widths.pad(len(riders))[0]


class RequestLevel:
    """Batches of whole requests in order of arrival, each run to its end before the next is formed.

    Args:
        mixed: whether a batch takes whoever waits, and a row leaves when it is done; otherwise all of a batch have
            as many steps as the first that waits.
    """

    def __init__(self, *, mixed: bool) -> None:
        self._mixed = mixed
        self._batch: list[Lane] = []

    def choose(self, lanes: Sequence[Lane], widths: Widths, now: float) -> tuple[list[Lane], int]:  # noqa: ARG002
        present = set(map(id, lanes)) if any(lane.deadline is not None for lane in self._batch) else None
        self._batch = [lane for lane in self._batch if lane.remaining and (present is None or id(lane) in present)]
        if not self._batch:
            steps = lanes[0].remaining
            fitting = [lane for lane in lanes if self._mixed or lane.remaining == steps]
            self._batch = fitting[: widths.cap]
        return list(self._batch), widths.pad(len(self._batch))[0]


POLICIES: dict[str, Callable[[], Policy]] = {
    "unstir": Unstir,
    "fifo": FirstCome,
    "srpt": ShortestRemaining,
    "request": lambda: RequestLevel(mixed=False),
    "request-mixed": lambda: RequestLevel(mixed=True),
}
