"""The device thread: it reads messages, chooses a batch each tick, advances its lanes and publishes results.

    inbox ─ drain ─ schedule ─ advance ─ settle ─ publish ─ drain …

Where the device is asynchronous, the tick that is settled is the one before the tick just begun: the host prepares a
tick while the device is busy with another, so the device never waits for it.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol

import torch

from app.engine.cost_model import CostModel
from app.engine.jobs import Job, Lane, Result
from app.engine.reservation import Cancel, Close, Message, Submit
from app.engine.runner import OutOfMemoryError
from app.engine.scheduler import Choice, choose
from app.errors import DeviceMemory, NotFinite, UnstirError

log = logging.getLogger("unstir.engine")
Outcome = Result | UnstirError


class TickHandle(Protocol):
    """A tick that a device has begun: :class:`app.engine.pending.PendingTick`."""

    def wait(self) -> float:
        """Wait until it is complete; returns the seconds that the device took."""


class Device(Protocol):
    """What the engine needs of :class:`app.engine.runner.Runner`.

    Attributes:
        ahead: ticks that may be begun while an earlier one runs.
    """

    ahead: int

    def advance(self, lanes: list[Lane], width: int, exact: bool) -> TickHandle:
        """Begin one step of every lane; cursors move at once. Raises OutOfMemoryError with all lanes as they were."""

    def read_output(self, lane: Lane) -> torch.Tensor:
        """A finished lane's output, [output_slots, C, H, W] on the CPU; its last tick is complete."""


class Observer(Protocol):
    """Receives events for metrics; called on the device thread."""

    def on_forward(self, width: int, rows: int, seconds: float) -> None:
        """A tick is complete."""

    def on_cancel(self, seconds: float) -> None:
        """A job's lanes were dropped, so many seconds after it was cancelled."""

    def on_failure(self, kind: str) -> None:
        """A forward or its results failed: oom, nan or exception."""


class _Tick(NamedTuple):
    handle: TickHandle
    choice: Choice[Lane]
    done: list[Lane]  # those of its lanes for which it is the last


class Worker:
    """Owns the lanes. Other threads put messages into ``inbox``; they may read ``last_tick`` and the cost model.

    Attributes:
        jobs: the unfinished lanes of every job.
        last_tick: when the last message was read or tick completed, on the engine's clock.
        stopped: set once the thread has ended.
    """

    def __init__(
        self,
        device: Device,
        cost_model: CostModel,
        observer: Observer,
        *,
        publish: Callable[[Job, Outcome], None],
        on_death: Callable[[str], None],
    ) -> None:
        """Both callbacks are called on this thread: with a job's outcome, and with why there will be no others."""
        self.device = device
        self.cost_model = cost_model
        self.inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self.jobs: dict[Job, list[Lane]] = {}
        self.last_tick = time.monotonic()
        self.stopped = threading.Event()
        self._pending: deque[_Tick] = deque()
        self._observer = observer
        self._publish = publish
        self._on_death = on_death

    def work(self) -> None:
        """Run the device thread until it is closed."""
        try:
            while self.tick():
                pass
        except Exception as error:
            log.exception("the device thread has ended")
            self._observer.on_failure("exception")
            self._on_death(f"{type(error).__name__}: {error}")
        finally:
            self.stopped.set()

    def tick(self) -> bool:
        """Read the inbox and advance some lanes by a step; False once the thread should end."""
        if not self._drain():
            return False
        lanes = [lane for lanes in self.jobs.values() for lane in lanes if lane.remaining]
        ahead = self.device.ahead
        if not lanes or not self._advance(choose(lanes, self.cost_model.forwards, time.monotonic())):
            ahead = 0
        while len(self._pending) > ahead:
            self._complete_oldest()
        return True

    def _drain(self) -> bool:
        """Read the inbox empty, blocking on it while there is nothing to do; False once the thread should end."""
        while True:
            try:
                message = self.inbox.get(block=not self.jobs and not self._pending)
            except queue.Empty:
                return True
            self.last_tick = time.monotonic()
            match message:
                case Submit(job):
                    self.jobs[job] = list(job.lanes)
                    self._fail_oversized([job])
                case Cancel(job, since):
                    self._drop(job)
                    self._observer.on_cancel(self.last_tick - since)
                case Close():
                    return False

    def _drop(self, job: Job) -> None:
        """Forget the job and free its tensors, since others may still hold the job itself."""
        for lane in self.jobs.pop(job, ()):
            lane.release()

    def _advance(self, choice: Choice[Lane]) -> bool:
        """Begin a tick; False if the device has no memory for it."""
        began = time.monotonic()
        batch = choice.batch
        try:
            handle = self.device.advance(batch, choice.width, choice.exact)
        except OutOfMemoryError:
            while self._pending:  # they may hold the memory that is missing
                self._complete_oldest()
            self._observer.on_failure("oom")
            if not self.cost_model.halve():
                raise
            self._fail_oversized(list(self.jobs))
            return False
        self._pending.append(_Tick(handle, choice, [lane for lane in batch if not lane.remaining]))
        for job, lanes in self.jobs.items():
            for lane in lanes:
                lane.passed_over += 1
            if not job.started and any(lane.cursor for lane in lanes):
                job.started = began
        for lane in batch:
            lane.passed_over = 0
            if lane.job:
                lane.job.work -= lane.rows
        return True

    def _complete_oldest(self) -> None:
        """Wait for the oldest pending tick, and settle it."""
        handle, choice, done = self._pending.popleft()
        seconds = handle.wait()
        self.last_tick = time.monotonic()
        self.cost_model.update(choice.exact, choice.width, seconds)
        self._observer.on_forward(choice.width, sum(lane.rows for lane in choice.batch), seconds)
        if done:
            self._settle(set(done))

    def _settle(self, done: set[Lane]) -> None:
        """Read the outputs of these lanes, and publish the jobs that are done with them."""
        for job, lanes in list(self.jobs.items()):
            for lane in done.intersection(lanes):
                job.outputs[job.lanes.index(lane)] = self.device.read_output(lane)
                lanes.remove(lane)
            if not lanes:
                del self.jobs[job]
                job.ended = time.monotonic()
                self._publish(job, self._outcome(job))

    def _outcome(self, job: Job) -> Outcome:
        outputs = [job.outputs[i] for i in range(len(job.lanes))]
        if not all(output.isfinite().all() for output in outputs):
            self._observer.on_failure("nan")
            return NotFinite("the network returned NaN or infinity; try another seed, or more steps")
        snapshots = [lane.snapshots for lane in job.lanes]
        return Result(outputs, snapshots, job.started - job.submitted, job.ended - job.started, job.started)

    def _fail_oversized(self, jobs: Iterable[Job]) -> None:
        """Fail the jobs that need wider forwards than the device has memory for."""
        for job in jobs:
            if all(self.cost_model.widths(lane.exact).narrowest(lane.rows, lane.reproducible) for lane in job.lanes):
                continue
            if any(lane.reproducible for lane in job.lanes):
                detail, remedy = (
                    "reproducible needs forwards of more rows",
                    "ask without it, or lower UNSTIR_REPRODUCIBLE_WIDTH",
                )
            else:
                detail, remedy = "guidance needs 2 rows", "ask without it"
            self._drop(job)
            self._publish(job, DeviceMemory(f"{detail}, and the device has no room for them; {remedy}"))
