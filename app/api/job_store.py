"""Jobs that are kept: asynchronous ones, and results under an ``Idempotency-Key``; bounded in number, bytes, time."""

from __future__ import annotations

import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Literal

from app.api import problems
from app.api.operation import Formats, Operation
from app.api.places import PlacePromises
from app.api.responses.schemas import JobStatus
from app.api.tasks import RequestTask
from app.errors import KeyReused, NoSuchJob, UnstirError
from app.operations.service import Service
from app.settings import Settings

State = Literal["waiting", "running", "done", "failed", "cancelled"]


@dataclass(eq=False)
class StoredJob:
    """A task that can be asked about.

    Attributes:
        formats: of its response.
        request_id: of the request that started it.
        digest: of that request; its key stands for this and nothing else.
        caller: who sent it.
        key: the caller's ``Idempotency-Key``, together with the caller.
    """

    task: RequestTask
    operation: Operation
    formats: Formats
    request_id: str
    digest: str
    caller: str
    key: str | None = None
    asynchronous: bool = False
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: float = field(default_factory=time.time)
    _nbytes: int | None = field(default=None, init=False)

    @property
    def state(self) -> State:
        reservation = self.task.context.reservation
        if not self.task.done:
            return "running" if reservation is not None and reservation.running else "waiting"
        if self.task.cancelled:
            return "cancelled"
        return "failed" if self.task.error else "done"

    @property
    def nbytes(self) -> int:
        """Memory that its result takes; counted once, as every look into a full store asks all results."""
        if self._nbytes is None and (result := self.task.result) is not None:
            self._nbytes = result.nbytes
        return self._nbytes or 0

    def status(self, service: Service) -> JobStatus:
        """What ``GET /jobs/{id}`` shows."""
        reservation, error, state = self.task.context.reservation, self.task.error, self.state
        total = reservation.total if reservation else 0
        done = total - reservation.remaining if reservation else 0
        active = reservation if state in ("waiting", "running") else None
        problem = (
            problems.describe(problems.to_unstir_error(error, self.request_id), self.request_id) if error else None
        )
        return JobStatus(
            id=self.id,
            operation=self.operation.path,
            state=state,
            position=service.engine.position(active) if active else 0,
            done=done,
            total=total,
            progress=round(done / total, 4) if total else 0.0,
            seconds_left=round(service.engine.seconds_left(active), 3) if active else 0.0,
            created=datetime.fromtimestamp(self.created, UTC).isoformat(timespec="milliseconds"),
            request_id=self.request_id,
            result=f"{service.settings.root_path}/jobs/{self.id}/result" if state == "done" else None,
            error=problem,
        )


class JobStore:
    """All jobs that are kept; its methods are called on the event loop.

    Asynchronous jobs and results under a key are counted apart, so that neither crowds out the other.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._kept: dict[str, StoredJob] = {}  # oldest first
        self._keyed: dict[str, StoredJob] = {}
        self._places = PlacePromises(settings.max_jobs)

    def add(self, job: StoredJob, seconds_left: Callable[[StoredJob], float]) -> None:
        """Keep it; where there is no room, one that is done is evicted.

        Args:
            seconds_left: until a job that is under way is done.

        Raises:
            Overloaded: none of them is done; the task is cancelled, and there is a place after ``Retry-After``.
        """
        self._evict(adding=job)
        alike = [other for other in self._kept.values() if other.asynchronous == job.asynchronous]
        try:
            self._places.take(
                f"{job.asynchronous} {job.key or job.caller + job.digest}",
                job.caller,
                time.monotonic(),
                sorted(seconds_left(other) for other in alike),
            )
        except UnstirError as error:
            job.task.cancel(error)
            raise
        self._kept[job.id] = job
        if job.key is not None:
            self._keyed[job.key] = job

    def get(self, identifier: str) -> StoredJob:
        """The asynchronous job of this id.

        Raises:
            NoSuchJob: there is none.
        """
        self._evict()
        job = self._kept.get(identifier)
        if job is None or not job.asynchronous:
            raise NoSuchJob(f"job = {identifier[:64]}: it is unknown here, or has expired; send the request again")
        return job

    def find(self, key: str, digest: str) -> StoredJob | None:
        """The job with this key, unless it failed: then the request may be tried again.

        Raises:
            KeyReused: the key belongs to another request.
        """
        self._evict()
        job = self._keyed.get(key)
        if job is not None and job.digest != digest:
            raise KeyReused(f"Idempotency-Key = {key[:64]}: it came with another request before; take a new key")
        return job

    def forget(self, job: StoredJob) -> None:
        """Drop it; if it is under way, it goes on, and nobody can ask about it any more."""
        self._kept.pop(job.id, None)
        if job.key is not None and self._keyed.get(job.key) is job:
            del self._keyed[job.key]

    def totals(self) -> tuple[int, int]:
        """How many are kept, and the bytes of their results."""
        self._evict()
        return len(self._kept), sum(job.nbytes for job in self._kept.values())

    def _evict(self, adding: StoredJob | None = None) -> None:
        """Drop what has expired, then results while they are too many or too large.

        The caller that holds most loses its oldest first, so that nobody loses theirs to another's many. The newest
        stays, however large it is: somebody has waited for it. A failure is kept only where the client can ask for it;
        a request under a key may be tried again.
        """
        now = time.monotonic()
        done = [job for job in self._kept.values() if job.task.done]
        for job in done:
            if now - (job.task.ended or now) > self._settings.job_seconds or (job.task.error and not job.asynchronous):
                self.forget(job)
        done = sorted((job for job in done if job.id in self._kept), key=lambda job: job.task.ended or now)
        self._shrink(done[:-1], lambda job: job.nbytes, self._settings.max_job_bytes - sum(j.nbytes for j in done[-1:]))
        for asynchronous in (True, False):
            alike = [job for job in self._kept.values() if job.asynchronous == asynchronous]
            under_way = sum(not job.task.done for job in alike) + bool(adding and adding.asynchronous == asynchronous)
            evictable = [job for job in done if job.id in self._kept and job.asynchronous == asynchronous]
            self._shrink(evictable, lambda _: 1, self._settings.max_jobs - under_way)

    def _shrink(self, jobs: Sequence[StoredJob], size: Callable[[StoredJob], int], limit: int) -> None:
        """Forget jobs, the oldest of whoever holds most, until their sizes come to at most the limit."""
        held: Counter[str] = Counter()
        queues: dict[str, deque[StoredJob]] = {}
        for job in jobs:
            held[job.caller] += size(job)
            queues.setdefault(job.caller, deque()).append(job)
        total = held.total()
        while total > limit and total:
            caller = max(queues, key=lambda name: held[name])
            job = queues[caller].popleft()
            self.forget(job)
            held[caller] -= size(job)
            total -= size(job)
            if not queues[caller]:
                del queues[caller]
