"""The engine: the book of accepted work, and a worker on the device thread who does it.

Two threads, and no lock but the inbox's own. The event loop owns the book (tickets) and completes futures; the worker
owns the lanes. They speak by messages: jobs and cancellations go in through the worker's inbox, endings come back
through ``loop.call_soon_threadsafe``.

    event loop:     reserve ─ submit ─ await ──────────────────────────────▶ result
    device thread:        drain ─ schedule ─ advance ─ settle ─ publish ─ drain …
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Callable
from functools import partial

from app.engine.admission import Admission, check_deadline
from app.engine.cost_model import CostModel
from app.engine.jobs import Job, Result
from app.engine.reservation import Cancel, Close, Reservation, Submit, SubmitOptions
from app.engine.scheduler import Forwards
from app.engine.worker import Device, Observer, Outcome, Worker
from app.errors import Draining, EngineDead, Overloaded

STALL_SECONDS = 30.0
CLOSE_SECONDS = 5.0  # that a forward may take to end when the process stops
STOPPED = "the process stopped before this was done; ask another replica"


class Engine:
    """Accepts work, batches it step by step, and answers all of it."""

    def __init__(
        self, device: Device, forwards: Forwards, *, max_queue_seconds: float, max_lanes: int, observer: Observer
    ) -> None:
        self.draining = self._closed = False
        self.failure: str | None = None
        self._pace = CostModel(forwards)
        self.worker = Worker(
            device,
            self._pace,
            observer,
            publish=partial(self._tell, self._complete),
            die=partial(self._tell, self._die),
        )
        self._admission = Admission(max_queue_seconds)
        self._max_lanes = max_lanes
        self._tickets: set[Reservation] = set()
        self._futures: dict[Job, asyncio.Future[Result]] = {}

    def open(self) -> None:
        """Name the running event loop as the one that awaits results; some thread must :meth:`work`."""
        self._loop = asyncio.get_running_loop()

    def reserve(
        self,
        lanes: int,
        row_steps: int,
        *,
        steps: int | None = None,
        exact: bool = False,
        terms: SubmitOptions | None = None,
    ) -> Reservation:
        """Take a place for ``lanes`` images at once and ``row_steps`` rows of forwards in all, or refuse at once.

        Args:
            steps: forwards that it needs one after another, whatever company they have; by default as if all lanes
                were alike, of one row.

        Raises:
            EngineDead, Draining: nothing is accepted any more.
            TooLate: it cannot be done before its deadline.
            Overloaded: with the seconds after which there will be a place.
        """
        terms = terms or SubmitOptions()
        self._check_alive()
        if self.draining:
            raise Draining("this process is stopping and takes no new work; ask another replica", retry_after=5)
        now = time.monotonic()
        widths = self._pace.widths(exact)
        seconds = row_steps * widths.seconds_per_row
        if (deadline := terms.deadline) is not None:
            in_turn = (row_steps / lanes if steps is None else steps) * widths.seconds[0]
            check_deadline(max(seconds, in_turn), lambda: self._due_before(deadline, terms.priority), deadline - now)
        wait = self.wait_seconds
        held = sum(ticket.lanes for ticket in self._tickets)
        crowded = held > 0 and held + lanes > self._max_lanes
        self._admission.admit(seconds, wait, now, terms.sender, claim=not crowded)
        if crowded:
            raise Overloaded(
                f"{held} images are in flight, and {lanes} more would exceed {self._max_lanes}; try again later",
                retry_after=wait * min(1.0, (held + lanes - self._max_lanes) / held),
            )
        return Reservation(self._tickets, self._run, lanes, row_steps, exact, terms)

    def _check_alive(self) -> None:
        if self.failure:
            raise EngineDead(f"the engine has failed: {self.failure}; the process must be restarted")
        if self._closed:
            raise Draining(STOPPED, retry_after=5)

    @property
    def forwards(self) -> Forwards:
        """What forwards there are, and what they cost of late."""
        return self._pace.forwards

    @property
    def pace(self) -> float:
        """What a tick takes of late, over what its forward took at the start."""
        return self._pace.overall

    def _seconds(self, ticket: Reservation) -> float:
        return ticket.remaining * self._pace.widths(ticket.exact).seconds_per_row

    def _due_before(self, deadline: float, priority: int) -> float:
        """Seconds of work that goes first, since it is no less important and due earlier."""
        return sum(
            self._seconds(ticket)
            for ticket in self._tickets
            if ticket.terms.deadline is not None
            and ticket.terms.deadline <= deadline
            and ticket.terms.priority >= priority
        )

    async def _run(self, job: Job) -> Result:
        self._check_alive()
        job.submitted = time.monotonic()
        self._futures[job] = self._loop.create_future()
        self.worker.inbox.put(Submit(job))
        try:
            return await self._futures[job]
        except asyncio.CancelledError:
            self.worker.inbox.put(Cancel(job, time.monotonic()))
            raise
        finally:
            del self._futures[job]

    @property
    def wait_seconds(self) -> float:
        """How long the device needs for everything accepted so far."""
        return sum(map(self._seconds, self._tickets))

    @property
    def lanes(self) -> tuple[int, int]:
        """(images that have not begun, images under way)."""
        jobs = [ticket.job for ticket in self._tickets if ticket.job is not None]
        steps = [(lane.cursor, lane.plan.nfe) for job in jobs for lane in job.lanes]  # the device thread moves them
        running = sum(0 < cursor < nfe for cursor, nfe in steps)
        done = sum(cursor == nfe for cursor, nfe in steps)
        return sum(ticket.lanes for ticket in self._tickets) - running - done, running

    @property
    def requests(self) -> Counter[tuple[str, bool]]:
        """Requests that hold a place, by endpoint and whether their first step is done."""
        return Counter((ticket.terms.endpoint, ticket.running) for ticket in self._tickets)

    @property
    def promised(self) -> int:
        """Requests that were refused, and for which a place is kept."""
        return self._admission.kept(time.monotonic())

    def position(self, ticket: Reservation) -> int:
        """How many requests of less remaining work are ahead of one that has not begun: about its place in line."""
        if ticket.running:
            return 0
        return sum(other.remaining <= ticket.remaining for other in self._tickets if other is not ticket)

    def seconds_left(self, ticket: Reservation) -> float:
        """About how long until it is done: its own steps one after another, and what goes first."""
        widths = self._pace.widths(ticket.exact)
        in_turn = ticket.remaining / ticket.lanes * widths.seconds[0]
        ahead = sum(min(self._seconds(other), self._seconds(ticket)) for other in self._tickets if other is not ticket)
        return max(in_turn, ahead + self._seconds(ticket))

    @property
    def unready(self) -> str | None:
        """Why nothing should be sent here now, or None."""
        if self.failure:
            return f"the engine has failed: {self.failure}"
        if self.draining:
            return "draining: accepted work is being finished, nothing new is taken"
        idle = time.monotonic() - self.worker.last_tick
        widest = max(self.forwards.fast.seconds[-1], self.forwards.exact.seconds[-1])
        if self._futures and idle > STALL_SECONDS + 20 * widest:
            return f"stalled: work is waiting and no forward has ended for {idle:.0f} s"
        return None

    async def drain(self, seconds: float) -> int:
        """Take nothing new, and wait until all accepted work is answered; returns how many requests were cut off."""
        self.draining = True
        deadline = time.monotonic() + seconds
        while self._tickets and not self.failure and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        return len(self._tickets)

    def close(self) -> None:
        """Tell requests still waiting that they will not be done, and end the device thread after the tick under way.

        A device that hangs is not waited for any longer than ``CLOSE_SECONDS``. Can be called again.
        """
        self.draining = self._closed = True
        for job in list(self._futures):
            self._complete(job, Draining(STOPPED, retry_after=5))
        self.worker.inbox.put(Close())
        self.worker.ended.wait(CLOSE_SECONDS)

    def _complete(self, job: Job, outcome: Outcome) -> None:
        future = self._futures.get(job)
        if future is None or future.done():  # the client has gone in the meantime
            return
        if isinstance(outcome, Result):
            future.set_result(outcome)
        else:
            future.set_exception(outcome)

    def _die(self, why: str) -> None:
        self.failure = self.failure or why
        for job in list(self._futures):
            self._complete(job, EngineDead(f"the engine has failed: {why}; the process must be restarted"))

    # Called on the device thread.

    def work(self) -> None:
        """Be the device thread, until :meth:`close`."""
        self.worker.work()

    def _tell(self, callback: Callable[..., None], *arguments: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the process was told to stop at once
            self._loop.call_soon_threadsafe(callback, *arguments)
