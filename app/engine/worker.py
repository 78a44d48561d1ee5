"""The device thread: it takes messages, decides tick by tick, advances lanes and tells what became of jobs.

    inbox ─ drain ─ schedule ─ advance ─ settle ─ publish ─ drain …

Where the device works by itself, the tick that is settled is not the one that was just begun but the one before: the
thread prepares a tick while the device is busy with another, and the device never waits for it.
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


class Landing(Protocol):
    """A tick that a device was told to do."""

    def wait(self) -> float:
        """Seconds that the device took, once it is over."""


class Device(Protocol):
    """What the engine needs of a runner.

    Attributes:
        ahead: ticks that it may be told to do while an earlier one is not over.
    """

    ahead: int

    def advance(self, lanes: list[Lane], width: int, exact: bool) -> Landing:
        """Begin one step of every lane; cursors move at once. Raises OutOfMemoryError with all lanes as they were."""

    def end(self, lane: Lane) -> torch.Tensor:
        """What a lane came to, [returns, C, H, W] on the CPU; its last tick is over."""


class _Tick(NamedTuple):
    """One that is under way."""

    landing: Landing
    choice: Choice[Lane]
    ended: list[Lane]


class Observer(Protocol):
    """Who is told what happened; called on the device thread."""

    def forward(self, width: int, rows: int, seconds: float) -> None:
        """One tick is over."""

    def cancelled(self, seconds: float) -> None:
        """A job's lanes were let go, so long after that was asked for."""

    def failed(self, kind: str) -> None:
        """A forward, or what came of it, was no good: oom, nan or exception."""


class Worker:
    """Owns the lanes. Other threads put messages into ``inbox``, and may read ``last_tick`` and what ``pace`` says.

    Attributes:
        device: that lanes are advanced on.
        jobs: lanes under way.
        ended: is set once the thread has ended.
    """

    def __init__(
        self,
        device: Device,
        pace: CostModel,
        observer: Observer,
        *,
        publish: Callable[[Job, Outcome], None],
        die: Callable[[str], None],
    ) -> None:
        """Publish and die are called on this thread: a job's outcome is there; there will be no others, and why."""
        self.device = device
        self.pace = pace
        self.inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self.jobs: dict[Job, list[Lane]] = {}
        self.last_tick = time.monotonic()
        self.ended = threading.Event()
        self._under_way: deque[_Tick] = deque()
        self._observer = observer
        self._publish = publish
        self._die = die

    def work(self) -> None:
        """Be the device thread, until told to close."""
        try:
            while self.tick():
                pass
        except Exception as error:
            log.exception("the device thread has ended")
            self._observer.failed("exception")
            self._die(f"{type(error).__name__}: {error}")
        finally:
            self.ended.set()

    def tick(self) -> bool:
        """Read the inbox and advance some lanes by a step; False once the thread should end."""
        if not self._drain():
            return False
        lanes = [lane for lanes in self.jobs.values() for lane in lanes if lane.remaining]
        ahead = self.device.ahead
        if not lanes or not self._advance(choose(lanes, self.pace.forwards, time.monotonic())):
            ahead = 0
        while len(self._under_way) > ahead:
            self._land()
        return True

    def _drain(self) -> bool:
        """Read the inbox empty, blocking on it while there is nothing to do; False once the thread should end."""
        while True:
            try:
                message = self.inbox.get(block=not self.jobs and not self._under_way)
            except queue.Empty:
                return True
            self.last_tick = time.monotonic()
            match message:
                case Submit(job):
                    self.jobs[job] = list(job.lanes)
                    self._refuse_impossible([job])
                case Cancel(job, since):
                    self._drop(job)
                    self._observer.cancelled(self.last_tick - since)
                case Close():
                    return False

    def _drop(self, job: Job) -> None:
        """It may be kept for long by whoever asked for it; its states must not be."""
        for lane in self.jobs.pop(job, ()):
            lane.let_go()

    def _advance(self, choice: Choice[Lane]) -> bool:
        """Tell the device; False if it has no room for that."""
        began = time.monotonic()
        riders = choice.riders
        try:
            landing = self.device.advance(riders, choice.width, choice.exact)
        except OutOfMemoryError:
            while self._under_way:  # what they hold may be what is missing
                self._land()
            self._observer.failed("oom")
            if not self.pace.halve():
                raise
            self._refuse_impossible(list(self.jobs))
            return False
        self._under_way.append(_Tick(landing, choice, [lane for lane in riders if not lane.remaining]))
        for job, lanes in self.jobs.items():
            for lane in lanes:
                lane.passed_over += 1
            if not job.started and any(lane.cursor for lane in lanes):
                job.started = began
        for lane in riders:
            lane.passed_over = 0
            if lane.job:
                lane.job.work -= lane.rows
        return True

    def _land(self) -> None:
        """Wait for the oldest tick under way, and settle it."""
        landing, choice, ended = self._under_way.popleft()
        seconds = landing.wait()
        self.last_tick = time.monotonic()
        self.pace.note(choice.exact, choice.width, seconds)
        self._observer.forward(choice.width, sum(lane.rows for lane in choice.riders), seconds)
        if ended:
            self._settle(set(ended))

    def _settle(self, ended: set[Lane]) -> None:
        """Answer the jobs whose last lane has ended."""
        for job, lanes in list(self.jobs.items()):
            for lane in ended.intersection(lanes):
                job.ends[job.lanes.index(lane)] = self.device.end(lane)
                lanes.remove(lane)
            if not lanes:
                del self.jobs[job]
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
            if all(self.pace.widths(lane.exact).least(lane.rows, lane.reproducible) for lane in job.lanes):
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
