"""The engine: admits work, and hands it to a worker on the device thread.

Two threads, and no lock but the inbox's own. The event loop owns the reservations and completes futures; the worker
owns the lanes. Jobs and cancellations go in as messages through the worker's inbox, outcomes come back through
``loop.call_soon_threadsafe``.

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

from app.engine.admission import Admission, Demand, Load, check_deadline
from app.engine.cost_model import CostModel
from app.engine.jobs import Job, Result
from app.engine.reservation import Cancel, Close, Reservation, Submit, SubmitOptions
from app.engine.widths import Forwards
from app.engine.worker import Device, Observer, Outcome, Worker
from app.errors import Draining, EngineDead

STALL_SECONDS = 30.0  # without a tick, beside what the widest forwards take
CLOSE_SECONDS = 5.0  # that the last tick may take when the process stops
POLL_SECONDS = 0.02  # between two looks at what is still admitted, while draining
STOPPED = "the process stopped before this was done; ask another replica"


class Engine:
    """Admits work, batches it step by step, and answers all of it."""

    def __init__(
        self, device: Device, forwards: Forwards, *, max_queue_seconds: float, max_lanes: int, observer: Observer
    ) -> None:
        self.draining = self._closed = False
        self.failure: str | None = None
        self._cost_model = CostModel(forwards)
        self.worker = Worker(
            device,
            self._cost_model,
            observer,
            publish=partial(self._call_on_loop, self._complete),
            on_death=partial(self._call_on_loop, self._fail),
            max_lanes=max_lanes,
        )
        self._admission = Admission(max_queue_seconds, max_lanes)
        self._admitted: set[Reservation] = set()
        self._futures: dict[Job, asyncio.Future[Result]] = {}

    def open(self) -> None:
        """Use the running event loop for results; some thread must :meth:`work`."""
        self._loop = asyncio.get_running_loop()

    def reserve(
        self,
        lanes: int,
        row_steps: int,
        *,
        steps: int | None = None,
        exact: bool = False,
        options: SubmitOptions | None = None,
    ) -> Reservation:
        """Admit up to ``lanes`` images at once and ``row_steps`` rows of forwards in all, or refuse at once.

        Args:
            steps: forwards that must follow one another, in whatever batches; by default ``row_steps / lanes``.

        Raises:
            EngineDead, Draining: nothing is admitted any more.
            TooLate: it cannot be done before its deadline.
            Overloaded: with the seconds after which it would be admitted.
        """
        options = options or SubmitOptions()
        self._check_alive()
        if self.draining:
            raise Draining("this process is stopping and takes no new work; ask another replica", retry_after=5)
        now = time.monotonic()
        widths = self._cost_model.widths(exact)
        seconds = row_steps * widths.seconds_per_row
        if (deadline := options.deadline) is not None:
            sequential = (row_steps / lanes if steps is None else steps) * widths.seconds[0]
            alone = max(seconds, sequential)
            check_deadline(alone, lambda: self._due_before(deadline, options.priority), deadline - now)
        self._admission.admit(Demand(seconds, row_steps, lanes, options.sender, options.caller), self._load(), now)
        return Reservation(self._admitted, self._run, lanes, row_steps, exact, options)

    def _check_alive(self) -> None:
        if self.failure:
            raise EngineDead(f"the engine has failed: {self.failure}; the process must be restarted")
        if self._closed:
            raise Draining(STOPPED, retry_after=5)

    @property
    def forwards(self) -> Forwards:
        """The widths of forwards, and what they cost at present."""
        return self._cost_model.forwards

    @property
    def cost_ratio(self) -> float:
        """Recent time of a tick over the time of its forward at the start."""
        return self._cost_model.ratio

    def _load(self) -> Load:
        """What is admitted and not done."""
        seconds = [self._seconds(reservation) for reservation in self._admitted]
        lanes = sum(reservation.lanes for reservation in self._admitted)
        return Load(sum(map(self._admission.count, seconds)), lanes, sum(seconds))

    def _seconds(self, reservation: Reservation) -> float:
        return reservation.remaining * self._cost_model.widths(reservation.exact).seconds_per_row

    def _due_before(self, deadline: float, priority: int) -> float:
        """Seconds of work that goes first: of at least this priority, and due no later."""
        return sum(
            self._seconds(reservation)
            for reservation in self._admitted
            if reservation.options.deadline is not None
            and reservation.options.deadline <= deadline
            and reservation.options.priority >= priority
        )

    async def _run(self, job: Job) -> Result:
        self._check_alive()
        job.progress.submitted = time.monotonic()
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
        """How long the device needs for everything admitted."""
        return sum(map(self._seconds, self._admitted))

    @property
    def lanes(self) -> tuple[int, int]:
        """(images before their first step, images after it)."""
        jobs = [reservation.job for reservation in self._admitted if reservation.job is not None]
        steps = [(lane.cursor, lane.plan.nfe) for job in jobs for lane in job.lanes]  # the device thread moves them
        running = sum(0 < cursor < nfe for cursor, nfe in steps)
        done = sum(cursor == nfe for cursor, nfe in steps)
        return sum(reservation.lanes for reservation in self._admitted) - running - done, running

    @property
    def requests(self) -> Counter[tuple[str, bool]]:
        """Admitted requests, by endpoint and whether their first step is done."""
        return Counter((reservation.options.endpoint, reservation.running) for reservation in self._admitted)

    @property
    def promised(self) -> int:
        """Requests that were refused and hold a promise."""
        return self._admission.count_open(time.monotonic())

    def position(self, reservation: Reservation) -> int:
        """About its place in the queue: requests with no more work left; 0 once it runs."""
        if reservation.running:
            return 0
        return sum(other.remaining <= reservation.remaining for other in self._admitted if other is not reservation)

    def seconds_left(self, reservation: Reservation) -> float:
        """About how long until it is done: its own steps one after another, and the work that goes first."""
        widths = self._cost_model.widths(reservation.exact)
        sequential = reservation.remaining / reservation.lanes * widths.seconds[0]
        own = self._seconds(reservation)
        ahead = sum(min(self._seconds(other), own) for other in self._admitted if other is not reservation)
        return max(sequential, ahead + own)

    @property
    def unready(self) -> str | None:
        """Why a load balancer should send nothing here now, or None."""
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
        """Admit nothing new, and wait until all admitted work is answered; returns how many requests were cut off."""
        self.draining = True
        deadline = time.monotonic() + seconds
        while self._admitted and not self.failure and time.monotonic() < deadline:
            await asyncio.sleep(POLL_SECONDS)
        return len(self._admitted)

    def close(self) -> None:
        """Fail the requests still waiting, and end the device thread after its current tick.

        It waits at most ``CLOSE_SECONDS`` for a device that hangs. It may be called again.
        """
        self.draining = self._closed = True
        for job in list(self._futures):
            self._complete(job, Draining(STOPPED, retry_after=5))
        self.worker.inbox.put(Close())
        self.worker.stopped.wait(CLOSE_SECONDS)

    def _complete(self, job: Job, outcome: Outcome) -> None:
        future = self._futures.get(job)
        if future is None or future.done():  # the client has left in the meantime
            return
        if isinstance(outcome, Result):
            future.set_result(outcome)
        else:
            future.set_exception(outcome)

    def _fail(self, why: str) -> None:
        self.failure = self.failure or why
        for job in list(self._futures):
            self._complete(job, EngineDead(f"the engine has failed: {why}; the process must be restarted"))

    # Called on the device thread.

    def work(self) -> None:
        """Run the device thread until :meth:`close`."""
        self.worker.work()

    def _call_on_loop(self, callback: Callable[..., None], *arguments: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the process was stopped at once
            self._loop.call_soon_threadsafe(callback, *arguments)
