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
from collections.abc import Callable, Iterable
from typing import Protocol

import torch

from app.engine.lane import Job, Lane, Result
from app.engine.runner import OutOfMemoryError
from app.engine.scheduler import Widths, choose
from app.engine.ticket import Cancel, Close, Message, Submit, Ticket
from app.errors import DeviceMemory, Draining, EngineDead, NotFinite, Overloaded, UnstirError

STALL_SECONDS = 30.0
log = logging.getLogger("unstir.engine")


class Device(Protocol):
    """What the engine needs of a runner."""

    def advance(self, lanes: list[Lane], width: int) -> None:
        """One step of every lane; raises OutOfMemoryError with all lanes as they were."""

    def end(self, lane: Lane) -> torch.Tensor:
        """What a lane came to, [returns, C, H, W] on the CPU; it has done its last step."""


class Observer(Protocol):
    """Who is told what happened; called on the device thread."""

    def forward(self, width: int, rows: int, seconds: float) -> None:
        """One tick is over."""


class Engine:
    """Accepts work, batches it step by step, and answers all of it."""

    def __init__(
        self, device: Device, widths: Widths, *, max_queue_seconds: float, max_lanes: int, observer: Observer
    ) -> None:
        self.widths = widths
        self.draining = False
        self.failure: str | None = None
        self._device = device
        self._observer = observer
        self._max_queue_seconds = max_queue_seconds
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

    def reserve(self, lanes: int, row_steps: int) -> Ticket:
        """Take a place for ``lanes`` pictures at once and ``row_steps`` rows of forwards in all, or refuse at once.

        A request is admitted while the work ahead of it takes at most ``max_queue_seconds``, however large it is.

        Raises:
            EngineDead, Draining: nothing is accepted any more.
            Overloaded: with the seconds until there will be room again.
        """
        if self.failure:
            raise EngineDead(f"the engine has failed: {self.failure}; the process must be restarted")
        if self.draining:
            raise Draining("this process is stopping and takes no new work; ask another replica", retry_after=5)
        wait = self.wait_seconds
        held = sum(ticket.lanes for ticket in self._tickets)
        if wait > self._max_queue_seconds:
            raise Overloaded(
                f"{wait:.0f} s of work are waiting, at most {self._max_queue_seconds:g} are allowed; try again later",
                retry_after=wait - self._max_queue_seconds,
            )
        if held and held + lanes > self._max_lanes:
            raise Overloaded(
                f"{held} pictures are in flight, and {lanes} more would exceed {self._max_lanes}; try again later",
                retry_after=wait * min(1.0, (held + lanes - self._max_lanes) / held),
            )
        return Ticket(self._tickets, self._run, lanes, row_steps)

    async def _run(self, job: Job) -> Result:
        if self.failure:
            raise EngineDead(f"the engine has failed: {self.failure}; the process must be restarted")
        job.submitted = time.monotonic()
        self._futures[job] = self._loop.create_future()
        self._inbox.put(Submit(job))
        try:
            return await self._futures[job]
        except asyncio.CancelledError:
            self._inbox.put(Cancel(job))
            raise
        finally:
            del self._futures[job]

    @property
    def wait_seconds(self) -> float:
        """How long the device needs for everything accepted so far."""
        return sum(ticket.remaining for ticket in self._tickets) * self.widths.seconds_per_row

    @property
    def lanes(self) -> tuple[int, int]:
        """(pictures that have not begun, pictures under way)."""
        jobs = [ticket.job for ticket in self._tickets if ticket.job is not None]
        running = sum(0 < lane.cursor < lane.plan.nfe for job in jobs for lane in job.lanes)
        done = sum(lane.cursor == lane.plan.nfe for job in jobs for lane in job.lanes)
        return sum(ticket.lanes for ticket in self._tickets) - running - done, running

    @property
    def requests(self) -> int:
        """Requests that hold a place."""
        return len(self._tickets)

    @property
    def unready(self) -> str | None:
        """Why nothing should be sent here now, or None."""
        if self.failure:
            return f"the engine has failed: {self.failure}"
        if self.draining:
            return "draining: accepted work is being finished, nothing new is taken"
        idle = time.monotonic() - self._last_tick
        if sum(self.lanes) and idle > STALL_SECONDS + 20 * self.widths.seconds[-1]:
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
            self._tell(self._die, f"{type(error).__name__}: {error}")
        finally:
            self._ended.set()

    def _tick(self) -> bool:
        if not self._drain():
            return False
        riders, width = choose([lane for lanes in self._jobs.values() for lane in lanes], self.widths)
        if self._advance(riders, width):
            self._settle(riders)
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
                case Cancel(job):
                    self._jobs.pop(job, None)
                case Close():
                    return False

    def _advance(self, riders: list[Lane], width: int) -> bool:
        began = time.monotonic()
        try:
            self._device.advance(riders, width)
        except OutOfMemoryError:
            narrower = self.widths.halved()
            if narrower is None:
                raise
            self.widths = narrower
            self._refuse_impossible(list(self._jobs))
            return False
        self._last_tick = time.monotonic()
        for job, lanes in self._jobs.items():
            for lane in lanes:
                lane.passed_over += 1
            if not job.started and any(lane.cursor for lane in lanes):
                job.started = began
        for lane in riders:
            lane.passed_over = 0
        self._observer.forward(width, sum(lane.rows for lane in riders), self._last_tick - began)
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
            return NotFinite("the network gave NaN or infinity on this walk; try another seed, or more steps")
        frames = [lane.frames for lane in job.lanes]
        return Result(ends, frames, job.started - job.submitted, job.ended - job.started)

    def _refuse_impossible(self, jobs: Iterable[Job]) -> None:
        """Fail the jobs that need wider forwards than the device has room for."""
        cap = self.widths.cap
        if max(2, self.widths.canonical) <= cap:
            return
        for job in jobs:
            if any(lane.reproducible for lane in job.lanes) and self.widths.canonical > cap:
                detail = f"reproducible needs {self.widths.canonical} rows, the device holds {cap}"
                remedy = "ask without it, or lower UNSTIR_REPRODUCIBLE_WIDTH"
            elif any(lane.rows > cap for lane in job.lanes):
                detail, remedy = f"guidance needs 2 rows, the device holds {cap}", "ask without it"
            else:
                continue
            del self._jobs[job]
            self._publish(job, DeviceMemory(f"{detail}; {remedy}"))

    def _publish(self, job: Job, outcome: Result | UnstirError) -> None:
        self._tell(self._complete, job, outcome)

    def _tell(self, callback: Callable[..., None], *arguments: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the process was told to stop at once
            self._loop.call_soon_threadsafe(callback, *arguments)
