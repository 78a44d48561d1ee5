"""Jobs that are kept: asynchronous ones, and results under an ``Idempotency-Key``; bounded in number, bytes, time."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Literal

from app.api import problems
from app.api.operation import Operation
from app.api.responses.schemas import JobStatus
from app.api.tasks import RequestTask
from app.errors import KeyReused, NoSuchJob, Overloaded
from app.operations.service import Service
from app.settings import Settings

State = Literal["waiting", "running", "done", "failed", "cancelled"]


@dataclass(eq=False)
class StoredJob:
    """A task that can be asked about.

    Attributes:
        request_id: of the request that started it.
        digest: of that request; its key stands for this and nothing else.
    """

    task: RequestTask
    operation: Operation
    request_id: str
    digest: str
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
            result=f"/jobs/{self.id}/result" if state == "done" else None,
            error=problem,
        )


class JobStore:
    """All jobs that are kept; its methods are called on the event loop."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._kept: dict[str, StoredJob] = {}  # oldest first
        self._keyed: dict[str, StoredJob] = {}

    def add(self, job: StoredJob) -> None:
        """Keep it; where there is no room, the oldest that are done are evicted.

        Raises:
            Overloaded: none of them is done; the task is cancelled.
        """
        self._evict(room=1)
        if len(self._kept) >= self._settings.max_jobs:
            detail = f"{len(self._kept)} jobs are under way, and no more are kept; try again later"
            job.task.cancel(Overloaded(detail, retry_after=1))
            raise Overloaded(detail, retry_after=1)
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

    def _evict(self, room: int = 0) -> None:
        """Drop what has expired, then the oldest that are done while there are too many or they are too large.

        The newest stays, however large it is: somebody has waited for it. A failure is kept only where the client can
        ask for it; a request under a key may be tried again.
        """
        now = time.monotonic()
        done = [job for job in self._kept.values() if job.task.done]
        for job in [job for job in done if job.task.error and not job.asynchronous]:
            self.forget(job)
            done.remove(job)
        done.sort(key=lambda job: job.task.ended or now)
        total = sum(job.nbytes for job in done)
        for job in done:
            expired = now - (job.task.ended or now) > self._settings.job_seconds
            too_large = total > self._settings.max_job_bytes and job is not done[-1]
            too_many = len(self._kept) + room > self._settings.max_jobs
            if not (expired or too_large or too_many):
                break
            self.forget(job)
            total -= job.nbytes
