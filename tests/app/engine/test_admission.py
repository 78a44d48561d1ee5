"""Admission: cases computed by hand, and a simulated crowd whose clients return when Retry-After says so."""

from __future__ import annotations

import heapq
import random

import pytest

from app.engine import admission as module
from app.engine.admission import GRACE, Admission, check_deadline
from app.errors import Overloaded, TooLate


def refused(admission: Admission, seconds: float, waiting: float, now: float, sender: str | None = None) -> int:
    with pytest.raises(Overloaded) as found:
        admission.admit(seconds, waiting, now, sender)
    return int(found.value.headers["Retry-After"])


def test_work_is_admitted_behind_a_short_queue_however_large_it_is():
    Admission(10).admit(1000, waiting=10, now=0, sender="a")


def test_each_one_refused_gets_a_promise_behind_the_others():
    admission = Admission(10)
    assert refused(admission, 3, waiting=12, now=0, sender="a") == 2
    assert refused(admission, 3, waiting=12, now=0, sender="b") == 5  # 12 s waiting and 3 s of a's
    assert refused(admission, 1, waiting=12, now=0, sender="c") == 8
    assert refused(admission, 1, waiting=12, now=0) == 9  # without a name: a time, but no promise
    assert [promise.sender for promise in admission.promises] == ["a", "b", "c"]


def test_a_promise_can_be_claimed_once_it_is_due_and_only_once():
    admission = Admission(10)
    after = refused(admission, 3, waiting=12, now=0, sender="a")
    refused(admission, 3, waiting=12, now=after - 0.5, sender="a")  # too early: this is another promise
    admission.admit(3, waiting=50, now=after, sender="a")
    assert len(admission.promises) == 1


def test_newcomers_do_not_take_promised_capacity():
    admission = Admission(10)
    after = refused(admission, 5, waiting=12, now=0, sender="a")
    assert refused(admission, 4, waiting=9.9, now=after, sender="b") >= 4  # there is room, but it is a's
    admission.admit(5, waiting=9.9, now=after, sender="a")


def test_newcomers_fill_the_queue_up_to_the_promised_capacity():
    admission = Admission(10)
    after = refused(admission, 5, waiting=12, now=0, sender="a")
    refused(admission, 4.01, waiting=6, now=after)
    admission.admit(4, waiting=6, now=after, sender="c")  # a would find 10 s ahead, which is what may wait


def test_newcomers_are_admitted_where_they_are_done_before_promises_are_due():
    admission = Admission(10)
    after = refused(admission, 5, waiting=20, now=0, sender="a")
    assert after == 10
    admission.admit(1, waiting=2, now=1, sender="b")  # the queue went down faster than expected


def two_promises() -> Admission:
    """8 s from t = 2 on for a, 1 s from t = 10 on for b."""
    admission = Admission(10)
    assert refused(admission, 8, waiting=12, now=0, sender="a") == 2
    assert refused(admission, 1, waiting=12, now=0, sender="b") == 10
    return admission


def test_the_device_is_not_left_idle_for_promises():
    admission = two_promises()  # neither has come at t = 10
    refused(admission, 2, waiting=4, now=10, sender="c")
    admission.admit(1, waiting=4, now=10, sender="d")


def test_promises_that_are_not_claimed_expire():
    admission = two_promises()
    refused(admission, 1, waiting=6, now=2 + GRACE - 1, sender="c")
    admission.admit(1, waiting=6, now=2 + GRACE + 0.5, sender="d")
    assert [promise.sender for promise in admission.promises] == ["b", "c"]


def test_promises_are_counted_until_they_expire():
    admission = two_promises()
    assert [admission.count_open(now) for now in (0, 1.9 + GRACE, 2.1 + GRACE, 10.1 + GRACE)] == [2, 2, 1, 0]


def test_the_promises_that_count_are_those_that_are_kept():
    for now in (1.9 + GRACE, 2 + GRACE, 2.1 + GRACE):  # a's is due at 2
        admission = two_promises()
        counted = admission.count_open(now)
        refused(admission, 8, waiting=6, now=now)
        assert len(admission.promises) == counted


def test_a_promise_is_kept_where_the_work_is_refused_for_other_reasons():
    admission = two_promises()
    admission.admit(8, waiting=0, now=5, sender="a", claim=False)
    assert [promise.sender for promise in admission.promises] == ["a", "b"]
    admission.admit(8, waiting=0, now=5, sender="a")
    assert [promise.sender for promise in admission.promises] == ["b"]


def test_promises_are_bounded(monkeypatch):
    monkeypatch.setattr(module, "MAX_PROMISES", 50)
    admission = Admission(1)
    for i in range(60):
        refused(admission, 0.001, waiting=2, now=0, sender=str(i))
    assert [promise.sender for promise in admission.promises] == [str(i) for i in range(50)]


@pytest.mark.parametrize("load", [1.2, 2.0, 5.0])
@pytest.mark.parametrize("speed", [0.8, 1.0, 1.25], ids=["faster", "as-expected", "slower"])
def test_clients_that_return_in_time_are_admitted(load, speed):
    """Poisson arrivals beyond capacity, a device faster or slower than estimated; one in five never returns."""
    draw = random.Random(f"{load} {speed}")
    admission = Admission(5)
    waiting, now, kept, broken, idle = 0.0, 0.0, 0, 0, 0.0
    returning: list[tuple[float, str, float]] = []
    arrival = 0.0
    names = 0
    seconds = 600 if load < 5 else 200  # the time it takes is quadratic in the promises
    while now < seconds:
        due = min(arrival, returning[0][0] if returning else arrival)
        done = (due - now) / speed
        idle += max(0.0, done - waiting) * speed
        waiting, now = max(0.0, waiting - done), due
        back = bool(returning) and returning[0][0] == now
        if back:
            _, name, work = heapq.heappop(returning)
        else:
            arrival = now + draw.expovariate(load / 0.2)
            names += 1
            name, work = str(names), draw.expovariate(1 / 0.2)
        try:
            admission.admit(work, waiting, now, name)
            waiting += work
            kept += back
        except Overloaded as error:
            broken += back
            if draw.random() < 0.8:
                again = now + int(error.headers["Retry-After"]) + draw.uniform(0, 0.05)
                heapq.heappush(returning, (again, name, work))
    assert kept > 100
    assert kept / (kept + broken) >= 0.95
    if load * speed > 1:
        assert idle < 0.02 * seconds  # unclaimed promises do not leave the device without work
    assert waiting < 15  # the bound of 5 s, and what promises add where the device is slower than estimated


def test_deadlines():
    check_deadline(1.0, lambda: 0.9, left=2.0)
    check_deadline(1.0, lambda: 1.0, left=2.0)  # just in time
    check_deadline(2.0, lambda: 0.0, left=2.0)
    with pytest.raises(TooLate, match="2000 ms are left, and this takes 2100 ms on an idle device; allow more"):
        check_deadline(2.1, lambda: 0.0, left=2.0)
    with pytest.raises(TooLate, match="with what is due before, 2500 ms are needed"):
        check_deadline(1.0, lambda: 1.5, left=2.0)
