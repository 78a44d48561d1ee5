"""The device thread: it reads messages, chooses a batch each tick, advances its lanes and publishes results.

    inbox ─ drain ─ schedule ─ advance ─ settle ─ publish ─ drain …

Where the device is asynchronous, the tick that is settled is the one before the tick just begun: the host prepares a
tick while the device is busy with another, so the device never waits for it.

A tick that fails is repeated in ever smaller parts: a lane that fails alone fails its job, and the others go on. Only a
device that no longer computes a row of zeros ends the thread.
"""

from __future__ import annotations

import logging
import queue
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol

import torch

from app.engine.cost_model import CostModel
from app.engine.isolation import isolate, no_room_for
from app.engine.jobs import Job, Lane, Result
from app.engine.reservation import Cancel, Close, Message, Submit
from app.engine.runner import OutOfMemoryError
from app.engine.scheduler import Choice, choose
from app.errors import DeviceMemory, NotFinite, StepFailed, UnstirError
from app.errors.frames import forget_frames

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
        """Begin one step of every lane; cursors move at once. Whatever it raises, all lanes are as they were."""

    def check(self) -> None:
        """Compute something that no request has any part in; raises if the device has failed."""

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
        max_lanes: int = sys.maxsize,
    ) -> None:
        """Both callbacks are called on this thread: with a job's outcome, and with why there will be no others.

        Args:
            max_lanes: that have a state at once; further ones begin as others end.
        """
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
        self._max_lanes = max_lanes
        self._favoured = 0

    def work(self) -> None:
        """Run the device thread until it is closed."""
        try:
            while self.tick():
                pass
        except BaseException as error:  # a SystemExit would end the thread without a word
            log.critical("the device thread has ended: %s", type(error).__name__, exc_info=error)
            self._observer.on_failure("exception")
            self._on_death(f"{type(error).__name__}: {error}")
            forget_frames(error)
        finally:
            self.stopped.set()

    def tick(self) -> bool:
        """Read the inbox and advance some lanes by a step; False once the thread should end."""
        if not self._drain():
            return False
        lanes = self._lanes()
        ahead = self.device.ahead
        if not lanes or not self._advance(self._choose(lanes)):
            ahead = 0
        while len(self._pending) > ahead:
            self._complete_oldest()
        return True

    def _choose(self, lanes: list[Lane]) -> Choice[Lane]:
        choice = choose(lanes, self.cost_model.forwards, time.monotonic(), self._favoured)
        self._favoured = choice.favoured
        return choice

    def _lanes(self) -> list[Lane]:
        """Those that can advance: with a step left, and while too many are begun, without those that are not."""
        lanes = [lane for lanes in self.jobs.values() for lane in lanes if lane.remaining]
        if len(lanes) <= self._max_lanes:
            return lanes
        waiting = sorted((lane for lane in lanes if not lane.cursor), key=lambda lane: -lane.priority)
        left_out = set(waiting[max(0, self._max_lanes - (len(lanes) - len(waiting))) :])
        return [lane for lane in lanes if lane not in left_out]

    def _drain(self) -> bool:
        """Read the inbox empty, blocking on it while there is nothing to do; False once the thread should end."""
        while True:
            try:
                if not self._receive(self.inbox.get(block=not self.jobs and not self._pending)):
                    return False
            except queue.Empty:
                return True

    def _receive(self, message: Message) -> bool:
        """Do what a message says; False once the thread should end. Nothing of it stays in a variable afterwards."""
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
        return True

    def _drop(self, job: Job) -> None:
        """Forget the job and free its tensors, since others may still hold the job itself."""
        if self.jobs.pop(job, None) is not None:
            job.release()

    def _fail(self, job: Job, error: UnstirError) -> None:
        """Answer the job with an error, unless it is answered already."""
        if job in self.jobs:
            self._drop(job)
            self._publish(job, error)

    def _advance(self, choice: Choice[Lane]) -> bool:
        """Begin a tick; False if it failed."""
        try:
            self._begin(choice)
        except OutOfMemoryError as error:
            self._complete_all()  # what is pending may hold the memory that is missing
            self._observer.on_failure("oom")
            if self.cost_model.halve():
                log.warning("%s; at most %d rows from now on", error, self.cost_model.forwards.fast.cap)
                self._fail_oversized(list(self.jobs))
            else:
                self._isolate(choice, error)
        except Exception as error:
            log.warning("a forward of %d rows failed: %s: %s", choice.width, type(error).__name__, error)
            self._isolate(choice, error)
        else:
            return True
        return False

    def _isolate(self, choice: Choice[Lane], why: Exception) -> None:
        """Fail the jobs with a lane that cannot advance, and advance the other lanes of a tick that failed.

        Raises:
            Exception: the device fails at what no request has any part in: it is the device that has failed.
        """
        self._complete_all()
        self._check(why)
        owners = {lane: job for job, lanes in self.jobs.items() for lane in lanes}
        widths = self.cost_model.widths(choice.exact)

        def advance(part: list[Lane]) -> None:
            width = widths.narrowest(sum(lane.rows for lane in part), any(lane.reproducible for lane in part))
            assert width is not None, "This is a bug: a part that is wider than the whole."
            self._begin(Choice(part, width, choice.exact))
            self._complete_all()

        for job, error in isolate(choice.batch, owners, advance).items():
            self._fail_alone(job, error)

    def _check(self, why: Exception) -> None:
        try:
            self.device.check()
        except Exception as error:
            raise error from why

    def _fail_alone(self, job: Job, error: Exception) -> None:
        """Answer one job with what only its own lanes have met."""
        if isinstance(error, OutOfMemoryError | MemoryError):
            self._fail(job, DeviceMemory(f"{error}; try again when the device has more room"))
        else:
            self._observer.on_failure("exception")
            log.error("a job has failed, the others go on", exc_info=error)
            why = f"{type(error).__name__}: {error}"[:500]
            self._fail(job, StepFailed(f"the network cannot compute a step of this request: {why}"))
        forget_frames(error)
        error.__traceback__ = error.__context__ = None  # its frames lead to this one's callers, which hold the error

    def _begin(self, choice: Choice[Lane]) -> None:
        """Begin a tick."""
        began = time.monotonic()
        batch = choice.batch
        handle = self.device.advance(batch, choice.width, choice.exact)
        self._pending.append(_Tick(handle, choice, [lane for lane in batch if not lane.remaining]))
        for job, lanes in self.jobs.items():
            for lane in lanes:
                lane.passed_over += 1
            if not job.started and any(lane.cursor for lane in lanes):
                job.started = began
        for lane in batch:
            lane.passed_over = 0
            if lane.progress:
                lane.progress.work -= lane.rows

    def _complete_all(self) -> None:
        while self._pending:
            self._complete_oldest()

    def _complete_oldest(self) -> None:
        """Wait for the oldest pending tick, and settle it."""
        handle, choice, done = self._pending.popleft()
        try:
            seconds = handle.wait()
        except Exception as error:  # its lanes have moved: what it computed is lost
            self._check(error)
            lost = set(choice.batch)
            for job in [job for job, lanes in self.jobs.items() if not lost.isdisjoint(lanes)]:
                self._fail_alone(job, error)
            return
        self.last_tick = time.monotonic()
        self.cost_model.update(choice.exact, choice.width, seconds)
        self._observer.on_forward(choice.width, sum(lane.rows for lane in choice.batch), seconds)
        if done:
            self._settle(set(done))

    def _settle(self, done: set[Lane]) -> None:
        """Read the outputs of these lanes, and publish the jobs that are done with them."""
        for job, lanes in list(self.jobs.items()):
            try:
                for lane in done.intersection(lanes):
                    job.outputs[job.lanes.index(lane)] = self.device.read_output(lane)
                    lanes.remove(lane)
                if lanes:
                    continue
                job.ended = time.monotonic()
                outcome = self._outcome(job)
            except Exception as error:
                self._check(error)
                self._fail_alone(job, error)
                continue
            del self.jobs[job]
            job.outputs.clear()
            self._publish(job, outcome)

    def _outcome(self, job: Job) -> Outcome:
        outputs = [job.outputs[i] for i in range(len(job.lanes))]
        if not all(output.isfinite().all() for output in outputs):
            self._observer.on_failure("nan")
            return NotFinite("the network returned NaN or infinity; try another seed, or more steps")
        snapshots = [lane.snapshots for lane in job.lanes]
        return Result(outputs, snapshots, job.started - job.progress.submitted, job.ended - job.started, job.started)

    def _fail_oversized(self, jobs: Iterable[Job]) -> None:
        """Fail the jobs that need wider forwards than the device has memory for."""
        for job in jobs:
            if all(self.cost_model.widths(lane.exact).narrowest(lane.rows, lane.reproducible) for lane in job.lanes):
                continue
            self._fail(job, no_room_for(job))
