"""Visits that are kept: asynchronous jobs, answers under an ``Idempotency-Key``. Bounded in number, bytes and time."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, field
from typing import Literal

from app.api.tasks import RequestTask
from app.errors import KeyReused, NoSuchJob, Overloaded
from app.settings import Settings

State = Literal["waiting", "running", "done", "failed", "cancelled"]


@dataclass(eq=False)
class StoredJob:
    """A visit that can be asked about.

    Attributes:
        request_id: of the request that began it.
        digest: of that request's path and body; a key stands for this and nothing else.
    """

    visit: RequestTask
    request_id: str
    digest: str
    key: str | None = None
    asynchronous: bool = False
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: float = field(default_factory=time.time)

    @property
    def state(self) -> State:
        """What has become of it."""
        task = self.visit.task
        if not task.done():
            ticket = self.visit.caller.ticket
            return "running" if ticket is not None and ticket.running else "waiting"
        if task.cancelled():
            return "cancelled"
        return "failed" if task.exception() else "done"

    @property
    def size(self) -> int:
        """Bytes that its result takes."""
        return self.visit.task.result().size if self.state == "done" else 0


class JobStore:
    """All that are kept. All methods are called on the event loop."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._kept: dict[str, StoredJob] = {}  # oldest first
        self._keyed: dict[str, StoredJob] = {}

    def add(self, job: StoredJob) -> None:
        """Keep it, and let the oldest that are done go where there is no room.

        Raises:
            Overloaded: none of them is done.
        """
        self._tidy(room=1)
        if len(self._kept) >= self._settings.max_jobs:
            raise Overloaded(
                f"{len(self._kept)} jobs are under way, and no more are kept; try again later", retry_after=1
            )
        self._kept[job.id] = job
        job.visit.task.add_done_callback(lambda _: self._unless_failed(job))
        if job.key is not None:
            self._keyed[job.key] = job

    def get(self, identifier: str) -> StoredJob:
        """The job.

        Raises:
            NoSuchJob: there is none.
        """
        self._tidy()
        job = self._kept.get(identifier)
        if job is None or not job.asynchronous:
            raise NoSuchJob(f"job = {identifier[:64]}: it is unknown here, or was forgotten; ask for it anew")
        return job

    def under(self, key: str, digest: str) -> StoredJob | None:
        """What was begun under this key, unless it failed: then it may be tried again.

        Raises:
            KeyReused: for another request.
        """
        self._tidy()
        job = self._keyed.get(key)
        if job is None:
            return None
        if job.digest != digest:
            raise KeyReused(f"Idempotency-Key = {key[:64]}: it came with another request before; take a new key")
        self._unless_failed(job)
        return self._keyed.get(key)

    def _unless_failed(self, job: StoredJob) -> None:
        """Only asynchronous jobs are kept to tell of their failure; an answer under a key may be asked for again."""
        if job.state in ("failed", "cancelled") and not job.asynchronous:
            self.forget(job)

    def forget(self, job: StoredJob) -> None:
        """Let it go; if it is under way, nobody can ask about it any more."""
        self._kept.pop(job.id, None)
        if job.key is not None and self._keyed.get(job.key) is job:
            del self._keyed[job.key]

    @property
    def held(self) -> tuple[int, int]:
        """How many are kept, and the bytes of their results."""
        self._tidy()
        return len(self._kept), sum(job.size for job in self._kept.values())

    def _tidy(self, room: int = 0) -> None:
        """Forget what is too old, then the oldest that are done while there are too many or they are too large.

        However large the newest is by itself, it stays: somebody has waited for it.
        """
        now = time.monotonic()
        done = [job for job in self._kept.values() if job.visit.task.done()]
        done.sort(key=lambda job: job.visit.ended or 0.0)
        total = sum(job.size for job in done)
        for job in done:
            old = now - (job.visit.ended or now) > self._settings.job_seconds
            heavy = total > self._settings.max_job_bytes and job is not done[-1]
            crowded = len(self._kept) + room > self._settings.max_jobs or heavy
            if not old and not crowded:
                break
            self.forget(job)
            total -= job.size
