"""A place in the book of accepted work, and the messages by which the event loop speaks to the device thread."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from app.engine.jobs import Job, Lane, Result


@dataclass(frozen=True, slots=True)
class Submit:
    """Message: take up this job."""

    job: Job


@dataclass(frozen=True, slots=True)
class Cancel:
    """Message: let this job's lanes go.

    Attributes:
        since: when that was asked for, on the engine's clock.
    """

    job: Job
    since: float


@dataclass(frozen=True, slots=True)
class Close:
    """Message: end the thread."""


Message = Submit | Cancel | Close


@dataclass(frozen=True, slots=True)
class SubmitOptions:
    """What a client asks for beside the work itself.

    Attributes:
        deadline: when it must be done, on the engine's clock; None if never.
        priority: -4..3, higher goes first.
        sender: the same for a request that is sent again, and seldom for another; None if nobody will.
        endpoint: the path, for the gauges.
    """

    deadline: float | None = None
    priority: int = 0
    sender: str | None = None
    endpoint: str = ""


class Reservation:
    """A place in the book of accepted work; a context manager, since a place must always be given back.

    One request may submit several jobs, one after another, where the one needs what the other found.

    Attributes:
        lanes: most images that it has in flight at once.
        total: row-steps of all its jobs together.
        exact: whether they are exact ones.
        job: the latest submitted.
        on_submit: is called when a job is submitted.
    """

    def __init__(
        self,
        book: set[Reservation],
        run: Callable[[Job], Awaitable[Result]],
        lanes: int,
        row_steps: int,
        exact: bool,
        terms: SubmitOptions,
    ) -> None:
        self._book = book
        self._run = run
        self._unsubmitted = row_steps
        self.lanes = lanes
        self.total = row_steps
        self.exact = exact
        self.terms = terms
        self.job: Job | None = None
        self.on_submit: Callable[[], None] = lambda: None

    @property
    def remaining(self) -> int:
        """Row-steps that are still to be done."""
        return self._unsubmitted + (0 if self.job is None else self.job.work)

    @property
    def running(self) -> bool:
        """Whether its first step is done."""
        return self.job is not None and self.remaining < self.total

    async def run(self, lanes: list[Lane]) -> Result:
        """Submit the lanes and wait for their ends. Cancelling this call frees the lanes before the next tick.

        Raises:
            NotFinite, DeviceMemory: this job alone failed.
            EngineDead: the device did, and everybody's job with it.
        """
        self.job = Job(lanes, self.terms.priority, self.terms.deadline)
        self._unsubmitted = max(0, self._unsubmitted - self.job.work)
        self.on_submit()
        return await self._run(self.job)

    def __enter__(self) -> Reservation:
        self._book.add(self)
        return self

    def __exit__(self, *_: object) -> None:
        self._book.discard(self)
