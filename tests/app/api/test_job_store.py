"""Which results are kept when there are too many: nobody loses theirs to another's many."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from app.api.job_store import JobStore, StoredJob
from app.errors import NoSuchJob, Overloaded
from app.settings import Settings


@dataclass
class Task:
    """Stands in for a RequestTask: done, with a result of so many bytes; or under way."""

    nbytes: int = 1
    ended: float | None = 0.0
    error: Exception | None = None
    cancelled_by: Exception | None = None

    @property
    def done(self) -> bool:
        return self.ended is not None

    @property
    def result(self):
        return SimpleNamespace(nbytes=self.nbytes) if self.done else None

    def cancel(self, error=None):
        self.cancelled_by = error


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr("app.api.job_store.time", SimpleNamespace(monotonic=lambda: now.seconds, time=lambda: 0.0))
    return now


def store_of(max_jobs: int = 8, max_bytes: int = 1 << 20) -> JobStore:
    return JobStore(Settings(max_jobs=max_jobs, max_job_bytes=max_bytes, job_seconds=600))


def keep(store: JobStore, clock, caller: str, nbytes: int = 1, *, key: str | None = None, done: bool = True):
    clock.seconds += 1
    task = Task(nbytes, clock.seconds if done else None)
    job = StoredJob(task, None, None, "", f"{clock.seconds}", caller, key and f"{caller} {key}", key is None)
    store.add(job, lambda other: 0.0 if other.task.done else 9.0)
    return job


def is_kept(store: JobStore, job: StoredJob) -> bool:
    try:
        return store.get(job.id) is job
    except NoSuchJob:
        return False


def test_many_small_results_of_one_caller_evict_only_their_own(clock):
    store = store_of(max_jobs=8)
    mine = [keep(store, clock, "me") for _ in range(2)]
    others = [keep(store, clock, "another") for _ in range(100)]
    assert all(is_kept(store, job) for job in mine)
    assert [is_kept(store, job) for job in others] == [False] * 94 + [True] * 6


def test_large_results_of_one_caller_evict_only_their_own(clock):
    store = store_of(max_jobs=1000, max_bytes=1 << 20)
    mine = keep(store, clock, "me", 100_000)
    for _ in range(20):
        keep(store, clock, "another", 300_000)
    assert is_kept(store, mine)
    assert store.totals()[1] <= 1 << 20


def test_the_newest_is_kept_however_large(clock):
    store = store_of(max_bytes=1 << 20)
    job = keep(store, clock, "me", 5 << 20)
    assert is_kept(store, job)


def test_results_under_keys_and_jobs_do_not_crowd_each_other_out(clock):
    store = store_of(max_jobs=3)
    for _ in range(3):
        keep(store, clock, "me", done=False)
    keyed = [keep(store, clock, "me", key=f"{i}") for i in range(3)]
    assert all(store.find(job.key, job.digest) is job for job in keyed)
    with pytest.raises(Overloaded) as refused:
        keep(store, clock, "me", done=False)
    assert refused.value.headers["Retry-After"] == "9"


def test_a_key_belongs_to_its_caller(clock):
    store = store_of()
    mine = keep(store, clock, "me", key="k")
    assert store.find("another k", "whatever") is None
    assert store.find("me k", mine.digest) is mine


def test_what_has_expired_is_gone(clock):
    store = store_of()
    job = keep(store, clock, "me")
    clock.seconds += 601
    assert not is_kept(store, job)
