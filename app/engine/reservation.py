"""Admitted work, and the messages by which the event loop speaks to the device thread."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from app.engine.jobs import Job, Lane, Result


@dataclass(frozen=True, slots=True)
class Submit:
    """Message: advance this job's lanes."""

    job: Job


@dataclass(frozen=True, slots=True)
class Cancel:
    """Message: drop this job's lanes.

    Attributes:
        since: when it was cancelled, on the engine's clock.
    """

    job: Job
    since: float


@dataclass(frozen=True, slots=True)
class Close:
    """Message: end the thread."""


Message = Submit | Cancel | Close


@dataclass(frozen=True, slots=True)
class SubmitOptions:
    """How a request's work is to be scheduled.

    Attributes:
        deadline: when it must be done, on the engine's clock; None if never.
        priority: one of the scheduler's ``PRIORITIES``.
        sender: equal for a request that is sent again, and seldom for another; None if it will not be.
        caller: that promises to it are counted against.
        endpoint: the path, as a label of gauges.
    """

    deadline: float | None = None
    priority: int = 0
    sender: str | None = None
    caller: str = ""
    endpoint: str = ""


def _do_nothing() -> None:
    pass


class Reservation:
    """Work that was admitted; a context manager, since it counts as admitted until it is left.

    A request may submit several jobs, one after another, where one needs the result of the last.

    Attributes:
        lanes: most images at once.
        total: row-steps of all its jobs together.
        exact: whether its forwards are exact.
        options: as it was asked for.
        job: the latest submitted.
        on_submit: called when a job is submitted.
    """

    def __init__(
        self,
        admitted: set[Reservation],
        run: Callable[[Job], Awaitable[Result]],
        lanes: int,
        row_steps: int,
        exact: bool,
        options: SubmitOptions,
    ) -> None:
        self._admitted = admitted
        self._run = run
        self._unsubmitted = row_steps
        self.lanes = lanes
        self.total = row_steps
        self.exact = exact
        self.options = options
        self.job: Job | None = None
        self.on_submit: Callable[[], None] = _do_nothing

    @property
    def remaining(self) -> int:
        """Row-steps still to be done."""
        return self._unsubmitted + (0 if self.job is None else self.job.work)

    @property
    def running(self) -> bool:
        """Whether its first step is done."""
        return self.job is not None and self.remaining < self.total

    async def run(self, lanes: list[Lane]) -> Result:
        """Submit the lanes and wait for their outputs. Cancelling this call frees the lanes before the next tick.

        Raises:
            NotFinite, DeviceMemory: this job failed.
            EngineDead: the device failed, and every job with it.
        """
        self.job = Job(lanes, self.options.priority, self.options.deadline)
        self._unsubmitted = max(0, self._unsubmitted - self.job.work)
        self.on_submit()
        return await self._run(self.job)

    def __enter__(self) -> Reservation:
        self._admitted.add(self)
        return self

    def __exit__(self, *_: object) -> None:
        self._admitted.discard(self)
        self.on_submit = _do_nothing  # which may refer to the reservation
