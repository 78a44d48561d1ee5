"""The engine: a device thread, its inbox, and the book of accepted work.

Two threads, and no lock but the inbox's own. The event loop owns the book (tickets) and completes futures; the device
thread owns the lanes. They speak by messages: jobs and cancellations go in through the inbox, endings come back through
``loop.call_soon_threadsafe``.

    event loop:     reserve ─ submit ─ await ──────────────────────────────▶ result
    device thread:        drain ─ schedule ─ advance ─ settle ─ publish ─ drain …
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Protocol

import torch

from app.engine.admission import Admission, check_deadline
from app.engine.lane import Job, Lane, Result
from app.engine.pace import Pace
from app.engine.runner import OutOfMemoryError
from app.engine.scheduler import Choice, Forwards, Widths, choose
from app.engine.ticket import Cancel, Close, Message, Submit, Terms, Ticket
from app.errors import DeviceMemory, Draining, EngineDead, NotFinite, Overloaded, UnstirError

STALL_SECONDS = 30.0
log = logging.getLogger("unstir.engine")


class Device(Protocol):
    """What the engine needs of a runner."""

    def advance(self, lanes: list[Lane], width: int, exact: bool) -> None:
        """One step of every lane; raises OutOfMemoryError with all lanes as they were."""

    def end(self, lane: Lane) -> torch.Tensor:
        """What a lane came to, [returns, C, H, W] on the CPU; it has done its last step."""


class Observer(Protocol):
    """Who is told what happened; called on the device thread."""

    def forward(self, width: int, rows: int, seconds: float) -> None:
        """One tick is over."""

    def cancelled(self, seconds: float) -> None:
        """A job's lanes were let go, so long after that was asked for."""

    def failed(self, kind: str) -> None:
        """A forward, or what came of it, was no good: oom, nan or exception."""


class Engine:
    """Accepts work, batches it step by step, and answers all of it."""

    def __init__(
        self, device: Device, forwards: Forwards, *, max_queue_seconds: float, max_lanes: int, observer: Observer
    ) -> None:
        self.draining = False
        self.failure: str | None = None
        self._pace = Pace(forwards)
        self._device = device
        self._observer = observer
        self._admission = Admission(max_queue_seconds)
        self._max_lanes = max_lanes
        self._tickets: set[Ticket] = set()
        self._futures: dict[Job, asyncio.Future[Result]] = {}
        self._inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._jobs: dict[Job, list[Lane]] = {}  # the device thread's: lanes still under way
        self._last_tick = time.monotonic()
        self._ended = threading.Event()

    # The event loop's side.

    def open(self) -> None:
        """Name the running event loop as the one that awaits results; some thread must :meth:`work`."""
        self._loop = asyncio.get_running_loop()

    def reserve(self, lanes: int, row_steps: int, *, exact: bool = False, terms: Terms | None = None) -> Ticket:
        """Take a place for ``lanes`` pictures at once and ``row_steps`` rows of forwards in all, or refuse at once.

        Raises:
            EngineDead, Draining: nothing is accepted any more.
            TooLate: it cannot be done before its deadline.
            Overloaded: with the seconds after which there will be a place.
        """
        terms = terms or Terms()
        if self.failure:
            raise EngineDead(f"the engine has failed: {self.failure}; the process must be restarted")
        if self.draining:
            raise Draining("this process is stopping and takes no new work; ask another replica", retry_after=5)
        now = time.monotonic()
        widths = self._widths(exact)
        seconds = row_steps * widths.seconds_per_row
        if (deadline := terms.deadline) is not None:
            in_turn = row_steps / lanes * widths.seconds[0]
            check_deadline(max(seconds, in_turn), lambda: self._due_before(deadline, terms.priority), deadline - now)
        wait = self.wait_seconds
        self._admission.admit(seconds, wait, now, terms.sender)
        held = sum(ticket.lanes for ticket in self._tickets)
        if held and held + lanes > self._max_lanes:
            raise Overloaded(
                f"{held} pictures are in flight, and {lanes} more would exceed {self._max_lanes}; try again later",
                retry_after=wait * min(1.0, (held + lanes - self._max_lanes) / held),
            )
        return Ticket(self._tickets, self._run, lanes, row_steps, exact, terms)

    @property
    def forwards(self) -> Forwards:
        """What forwards there are, and what they cost of late."""
        return self._pace.forwards

    @property
    def pace(self) -> float:
        """What a tick takes of late, over what its forward took at the start."""
        return self._pace.overall

    def _widths(self, exact: bool) -> Widths:
        return self.forwards.exact if exact else self.forwards.fast

    def _seconds(self, ticket: Ticket) -> float:
        return ticket.remaining * self._widths(ticket.exact).seconds_per_row

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
        if self.failure:
            raise EngineDead(f"the engine has failed: {self.failure}; the process must be restarted")
        job.submitted = time.monotonic()
        self._futures[job] = self._loop.create_future()
        self._inbox.put(Submit(job))
        try:
            return await self._futures[job]
        except asyncio.CancelledError:
            self._inbox.put(Cancel(job, time.monotonic()))
            raise
        finally:
            del self._futures[job]

    @property
    def wait_seconds(self) -> float:
        """How long the device needs for everything accepted so far."""
        return sum(map(self._seconds, self._tickets))

    @property
    def lanes(self) -> tuple[int, int]:
        """(pictures that have not begun, pictures under way)."""
        jobs = [ticket.job for ticket in self._tickets if ticket.job is not None]
        running = sum(0 < lane.cursor < lane.plan.nfe for job in jobs for lane in job.lanes)
        done = sum(lane.cursor == lane.plan.nfe for job in jobs for lane in job.lanes)
        return sum(ticket.lanes for ticket in self._tickets) - running - done, running

    @property
    def requests(self) -> Counter[tuple[str, bool]]:
        """Requests that hold a place, by endpoint and whether their first step is done."""
        return Counter((ticket.terms.endpoint, ticket.running) for ticket in self._tickets)

    @property
    def promised(self) -> int:
        """Requests that were refused, and for which a place is kept."""
        return len(self._admission.promises)

    def position(self, ticket: Ticket) -> int:
        """How many requests of less remaining work are ahead of one that has not begun: about its place in line."""
        if ticket.running:
            return 0
        return sum(other.remaining <= ticket.remaining for other in self._tickets if other is not ticket)

    def seconds_left(self, ticket: Ticket) -> float:
        """About how long until it is done: its own steps one after another, and what goes first."""
        widths = self._widths(ticket.exact)
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
        idle = time.monotonic() - self._last_tick
        widest = max(self.forwards.fast.seconds[-1], self.forwards.exact.seconds[-1])
        if sum(self.lanes) and idle > STALL_SECONDS + 20 * widest:
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
        """End the device thread after the tick under way; requests still waiting are told so. Can be called again."""
        self._inbox.put(Close())
        self._ended.wait()
        self.failure = self.failure or "it was closed"
        for job in list(self._futures):
            self._complete(
                job, Draining("the process stopped before this was done; ask another replica", retry_after=5)
            )

    def _complete(self, job: Job, outcome: Result | UnstirError) -> None:
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

    # The device thread's side.

    def work(self) -> None:
        """Be the device thread, until :meth:`close`."""
        try:
            while self._tick():
                pass
        except Exception as error:
            log.exception("the device thread has ended")
            self._observer.failed("exception")
            self._tell(self._die, f"{type(error).__name__}: {error}")
        finally:
            self._ended.set()

    def _tick(self) -> bool:
        if not self._drain():
            return False
        lanes = [lane for lanes in self._jobs.values() for lane in lanes]
        choice = choose(lanes, self.forwards, time.monotonic())
        if self._advance(choice):
            self._settle(choice.riders)
        return True

    def _drain(self) -> bool:
        """Read the inbox empty, blocking on it while there is nothing to do; False once the thread should end."""
        while True:
            try:
                message = self._inbox.get(block=not self._jobs)
            except queue.Empty:
                return True
            self._last_tick = time.monotonic()
            match message:
                case Submit(job):
                    self._jobs[job] = list(job.lanes)
                    self._refuse_impossible([job])
                case Cancel(job, since):
                    self._jobs.pop(job, None)
                    self._observer.cancelled(self._last_tick - since)
                case Close():
                    return False

    def _advance(self, choice: Choice[Lane]) -> bool:
        began = time.monotonic()
        riders = choice.riders
        try:
            self._device.advance(riders, choice.width, choice.exact)
        except OutOfMemoryError:
            self._observer.failed("oom")
            if not self._pace.halve():
                raise
            self._refuse_impossible(list(self._jobs))
            return False
        self._last_tick = time.monotonic()
        seconds = self._last_tick - began
        for job, lanes in self._jobs.items():
            for lane in lanes:
                lane.passed_over += 1
            if not job.started and any(lane.cursor for lane in lanes):
                job.started = began
        for lane in riders:
            lane.passed_over = 0
            if lane.job:
                lane.job.work -= lane.rows
        self._pace.note(choice.exact, choice.width, seconds)
        self._observer.forward(choice.width, sum(lane.rows for lane in riders), seconds)
        return True

    def _settle(self, riders: Iterable[Lane]) -> None:
        """Answer the jobs whose last lane has ended."""
        ended = {lane for lane in riders if not lane.remaining}
        if not ended:
            return
        for job, lanes in list(self._jobs.items()):
            for lane in ended.intersection(lanes):
                job.ends[job.lanes.index(lane)] = self._device.end(lane)
                lanes.remove(lane)
            if not lanes:
                del self._jobs[job]
                job.ended = time.monotonic()
                self._publish(job, self._outcome(job))

    def _outcome(self, job: Job) -> Result | UnstirError:
        ends = [job.ends[i] for i in range(len(job.lanes))]
        if not all(end.isfinite().all() for end in ends):
            self._observer.failed("nan")
            return NotFinite("the network gave NaN or infinity on this walk; try another seed, or more steps")
        frames = [lane.frames for lane in job.lanes]
        return Result(ends, frames, job.started - job.submitted, job.ended - job.started, job.started)

    def _refuse_impossible(self, jobs: Iterable[Job]) -> None:
        """Fail the jobs that need wider forwards than the device has room for."""
        for job in jobs:
            if all(self._widths(lane.exact).least(lane.rows, lane.reproducible) for lane in job.lanes):
                continue
            if any(lane.reproducible for lane in job.lanes):
                detail, remedy = (
                    "reproducible needs forwards of more rows",
                    "ask without it, or lower UNSTIR_REPRODUCIBLE_WIDTH",
                )
            else:
                detail, remedy = "guidance needs 2 rows", "ask without it"
            del self._jobs[job]
            self._publish(job, DeviceMemory(f"{detail}, and the device has no room for them; {remedy}"))

    def _publish(self, job: Job, outcome: Result | UnstirError) -> None:
        self._tell(self._complete, job, outcome)

    def _tell(self, callback: Callable[..., None], *arguments: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the process was told to stop at once
            self._loop.call_soon_threadsafe(callback, *arguments)
