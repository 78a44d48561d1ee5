"""Admission: cases computed by hand, and a simulated crowd whose clients return when Retry-After says so."""

from __future__ import annotations

import heapq
import math
import random

import pytest

from app.engine import admission as module
from app.engine.admission import GRACE, MAX_PROMISED, Admission, Demand, Load, check_deadline
from app.errors import Overloaded, TooLate


def admit(
    admission: Admission,
    seconds: float,
    waiting: float,
    now: float,
    sender: str | None = None,
    caller: str | None = None,
    lanes: int = 1,
    held: int = 1,
    size: float | None = None,
) -> None:
    admission.admit(
        Demand(seconds, seconds if size is None else size, lanes, sender, caller or sender or ""),
        Load(waiting, held, waiting),
        now,
    )


def refused(admission: Admission, *arguments, **more) -> int:
    with pytest.raises(Overloaded) as found:
        admit(admission, *arguments, **more)
    return int(found.value.headers["Retry-After"])


def test_work_is_admitted_behind_a_short_queue():
    admit(Admission(10), 10, waiting=10, now=0, sender="a")


def test_work_larger_than_the_queue_is_admitted_while_nothing_waits_and_told_what_would_fit():
    admission = Admission(10)
    admit(admission, 1000, waiting=0, now=0, sender="a")
    with pytest.raises(Overloaded, match="takes 40 s, and while others wait at most 10 s are taken; ask for 25 %"):
        admit(admission, 40, waiting=3, now=0, sender="a")
    assert not admission.promises


def test_one_request_counts_for_at_most_half_of_the_queue():
    admission = Admission(10)
    assert [admission.count(seconds) for seconds in (1, 5, 1000)] == [1, 5, 5]


def test_each_one_refused_gets_a_promise_behind_the_others():
    admission = Admission(10)
    assert refused(admission, 3, waiting=12, now=0, sender="a") == 2
    assert refused(admission, 3, waiting=12, now=0, sender="b") == 5  # 12 s waiting and 3 s of a's
    assert refused(admission, 1, waiting=12, now=0, sender="c") == 8
    assert refused(admission, 1, waiting=12, now=0) == 9  # without a name: a time, but no promise
    assert [promise.demand.sender for promise in admission.promises] == ["a", "b", "c"]


def test_a_promise_can_be_claimed_once_it_is_due_and_only_once():
    admission = Admission(10)
    after = refused(admission, 3, waiting=12, now=0, sender="a")
    assert refused(admission, 3, waiting=12, now=after - 0.5, sender="a") == 1  # too early: it is the same promise
    assert len(admission.promises) == 1
    admit(admission, 3, waiting=50, now=after, sender="a")
    assert not admission.promises


def test_a_promise_is_claimed_by_the_work_that_it_was_given_for():
    """An Idempotency-Key may come with another request: one that is larger finds no place, and gets no second one."""
    admission = Admission(10)
    after = refused(admission, 3, waiting=12, now=0, sender="a")
    refused(admission, 9, waiting=12, now=after, sender="a")
    refused(admission, 3, waiting=12, now=after, sender="a", lanes=2)
    assert len(admission.promises) == 1
    admit(admission, 9, waiting=12, now=after, sender="a", size=3)  # forwards have become slower meanwhile


def test_newcomers_do_not_take_promised_capacity():
    admission = Admission(10)
    after = refused(admission, 5, waiting=12, now=0, sender="a")
    assert refused(admission, 4, waiting=9.9, now=after, sender="b") >= 4  # there is room, but it is a's
    admit(admission, 5, waiting=9.9, now=after, sender="a")


def test_newcomers_fill_the_queue_up_to_the_promised_capacity():
    admission = Admission(10)
    after = refused(admission, 5, waiting=12, now=0, sender="a")
    refused(admission, 4.01, waiting=6, now=after)
    admit(admission, 4, waiting=6, now=after, sender="c")  # a would find 10 s ahead, which is what may wait


def test_newcomers_are_admitted_where_they_are_done_before_promises_are_due():
    admission = Admission(10)
    after = refused(admission, 5, waiting=20, now=0, sender="a")
    assert after == 10
    admit(admission, 1, waiting=2, now=1, sender="b")  # the queue went down faster than expected


def two_promises() -> Admission:
    """8 s from t = 2 on for a, 1 s from t = 10 on for b."""
    admission = Admission(10)
    assert refused(admission, 8, waiting=12, now=0, sender="a") == 2
    assert refused(admission, 1, waiting=12, now=0, sender="b") == 10
    return admission


def test_the_device_is_not_left_idle_for_promises():
    admission = two_promises()  # neither has come at t = 10
    refused(admission, 2, waiting=4, now=10, sender="c")
    admit(admission, 1, waiting=4, now=10, sender="d")


def test_promises_that_are_not_claimed_expire():
    admission = two_promises()
    refused(admission, 1, waiting=6, now=2 + GRACE - 1, sender="c")
    admit(admission, 1, waiting=6, now=2 + GRACE + 0.5, sender="d")
    assert [promise.demand.sender for promise in admission.promises] == ["b", "c"]


def test_promises_are_counted_until_they_expire():
    admission = two_promises()
    assert [admission.count_open(now) for now in (0, 1.9 + GRACE, 2.1 + GRACE, 10.1 + GRACE)] == [2, 2, 1, 0]


def test_the_promises_that_count_are_those_that_are_kept():
    for now in (1.9 + GRACE, 2 + GRACE, 2.1 + GRACE):  # a's is due at 2
        admission = two_promises()
        counted = admission.count_open(now)
        refused(admission, 8, waiting=6, now=now)
        assert len(admission.promises) == counted


def test_promises_are_bounded_in_number(monkeypatch):
    monkeypatch.setattr(module, "MAX_PROMISES", 50)
    admission = Admission(1)
    for i in range(60):
        refused(admission, 0.001, waiting=2, now=0, sender=str(i))
    assert [promise.demand.sender for promise in admission.promises] == [str(i) for i in range(50)]


def test_promises_are_bounded_in_seconds_for_each_caller_and_for_all():
    admission = Admission(10)
    for i in range(300):
        assert refused(admission, 2, waiting=12, now=0, sender=str(i), caller="rude") <= 2 + 10 / 2
    assert len(admission.promises) == 2  # 5 s, half of what may wait
    for i in range(300):
        assert refused(admission, 2, waiting=12, now=0, sender=str(i), caller=str(i)) <= 2 + MAX_PROMISED * 10
    assert sum(promise.demand.seconds for promise in admission.promises) == MAX_PROMISED * 10


def test_images_that_are_promised_are_bounded():
    admission = Admission(10, max_lanes=8)
    for i in range(300):
        refused(admission, 0.1, waiting=5, now=0, sender=str(i), caller=str(i), lanes=4, held=8)
    assert len(admission.promises) == 2


def test_a_refusal_without_a_promise_says_so():
    admission = Admission(10)
    for _ in range(3):
        refused(admission, 5, waiting=12, now=0, sender="a", caller="h")
    with pytest.raises(Overloaded, match="try again in 7 s, though no place can be kept until then"):
        admit(admission, 5, waiting=12, now=0, sender="b", caller="h")
    with pytest.raises(Overloaded, match="try again in 2 s, for then there is a place for this request"):
        admit(admission, 5, waiting=12, now=0, sender="a", caller="h")


def test_what_a_host_may_be_promised_follows_what_it_claims():
    """Half of what may wait at first; as much more as it claims, and as much less as it does not."""
    admission = Admission(10)

    def promised(now: float) -> int:
        for i in range(100):
            refused(admission, 1, waiting=20, now=now, sender=f"{now} {i}", caller="h")
        return sum(str(promise.demand.sender).startswith(f"{now} ") for promise in admission.promises)

    assert promised(0) == 5
    due = admission.promises[-1].due
    for promise in list(admission.promises):
        admit(admission, 1, waiting=20, now=due, sender=promise.demand.sender, caller="h")
    assert promised(due) == 10
    late = admission.promises[-1].due + GRACE
    assert promised(late) == 1  # none of the ten was claimed: one at a time, from now on
    assert promised(late + 1) == 0


def test_fifteen_retries_of_one_request_are_one_promise():
    """20 s of work, sent again every second while 90 s wait: a newcomer finds 75 s and that one before it."""
    admission = Admission(10)
    told = [refused(admission, 20 / 3, waiting=90 - now, now=now, sender="rude", caller="r") for now in range(15)]
    assert told == [80 - now for now in range(15)]
    assert refused(admission, 1, waiting=75, now=15, sender="new", caller="n") == math.ceil(75 + 20 / 3 - 10)


def test_a_burst_that_never_comes_back_delays_others_by_what_it_may_be_promised():
    admission = Admission(30)
    for i in range(300):
        refused(admission, 30, waiting=35, now=0, sender=str(i), caller="burst")
    after = refused(admission, 3, waiting=35, now=0, sender="polite", caller="polite")
    assert after == 35 + 30 - 30  # one promise of any size, and no second
    admit(admission, 3, waiting=0, now=after, sender="polite", caller="polite")


def test_rude_clients_get_no_more_than_polite_ones():
    """Three send a new request every second, two wait as they are told: 1 s of work each, for two minutes."""
    for fresh in (False, True):
        admission = Admission(5)
        waiting, answers = 5.0, dict.fromkeys(("r1", "r2", "r3", "p1", "p2"), 0)
        busy: dict[str, float] = {}  # until when a polite one is being answered
        again = dict.fromkeys(answers, 0.0)
        number = dict.fromkeys(answers, 0)
        for tick in range(1200):
            now, waiting = tick / 10, max(0.0, waiting - 0.1)
            for name in answers:
                if now < max(again[name], busy.get(name, 0.0)):
                    continue
                try:
                    admit(admission, 1, waiting, now, sender=f"{name} {number[name]}", caller=name)
                    waiting += 1
                    answers[name] += 1
                    busy[name] = now + waiting
                    number[name] += 1
                except Overloaded as error:
                    again[name] = now + (1 if name.startswith("r") else int(error.headers["Retry-After"]))
                    number[name] += fresh and name.startswith("r")
        polite, rude = [[answers[name] for name in answers if name.startswith(kind)] for kind in "pr"]
        assert min(polite) >= 0.8 * max(rude), (fresh, answers)
        assert sum(answers.values()) >= 0.9 * 120


@pytest.mark.parametrize("load", [1.2, 2.0, 5.0])
@pytest.mark.parametrize("speed", [0.8, 1.0, 1.25], ids=["faster", "as-expected", "slower"])
@pytest.mark.parametrize("hosts", [1, 10**6], ids=["one-caller", "many-hosts"])
def test_clients_that_return_in_time_are_admitted(load, speed, hosts):
    """Poisson arrivals beyond capacity, a device faster or slower than estimated; one in five never returns."""
    draw = random.Random(f"{load} {speed}")
    admission = Admission(5)
    waiting, now, kept, broken, idle = 0.0, 0.0, 0, 0, 0.0
    returning: list[tuple[float, str, float]] = []
    arrival = 0.0
    names = 0
    seconds = 600 if load < 2 else 100
    promised: set[str] = set()
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
            admit(admission, work, waiting, now, name, caller=str(int(name) % hosts))
            waiting += work
            kept += name in promised
        except Overloaded as error:
            broken += name in promised
            (promised.add if "there is a place" in error.detail else promised.discard)(name)
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
