"""Policies to compare: the service's own scheduler, and those of other servers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from app.cli.simulation.simulate import Policy, SimulatedLane
from app.engine.scheduler import choose
from app.engine.widths import Forwards, Widths


class Unstir:
    """The scheduler of the service itself."""

    def choose(self, lanes: Sequence[SimulatedLane], widths: Widths, now: float) -> tuple[list[SimulatedLane], int]:
        choice = choose(lanes, Forwards(widths, widths), now)
        return choice.batch, choice.width


class FirstCome:
    """Every lane that fits, first come, first served: step-level batching that takes width to be free."""

    def choose(self, lanes: Sequence[SimulatedLane], widths: Widths, now: float) -> tuple[list[SimulatedLane], int]:  # noqa: ARG002
        batch = list(lanes[: widths.cap])
        return batch, widths.pad(len(batch))[0]


class ShortestRemaining:
    """Every lane that fits, least remaining work of its request first."""

    def choose(self, lanes: Sequence[SimulatedLane], widths: Widths, now: float) -> tuple[list[SimulatedLane], int]:  # noqa: ARG002
        batch = sorted(lanes, key=lambda lane: lane.work)[: widths.cap]
        return batch, widths.pad(len(batch))[0]


class RequestLevel:
    """Batches of whole requests in order of arrival, each run to its end before the next is formed.

    Args:
        mixed: whether a batch takes all that wait, and a row leaves when it is done; otherwise all of a batch have as
            many steps as the first that waits.
    """

    def __init__(self, *, mixed: bool) -> None:
        self._mixed = mixed
        self._batch: list[SimulatedLane] = []

    def choose(self, lanes: Sequence[SimulatedLane], widths: Widths, now: float) -> tuple[list[SimulatedLane], int]:  # noqa: ARG002
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
