"""Places for jobs: who is refused and returns when it is due finds one."""

from __future__ import annotations

import pytest

from app.api.places import GRACE, PlacePromises
from app.errors import Overloaded


def refused(places: PlacePromises, name: str, now: float, left: list[float], caller: str | None = None) -> int:
    """Its Retry-After; each is a caller of its own, unless one is named."""
    with pytest.raises(Overloaded) as caught:
        places.take(name, caller or name, now, left)
    return int(caught.value.headers["Retry-After"])


def test_each_refused_one_is_promised_the_next_free_place():
    places = PlacePromises(3)
    assert [refused(places, name, 0, [2, 5, 9]) for name in "abc"] == [2, 5, 9]
    assert refused(places, "d", 0, [2, 5, 9]) == 9  # as far as can be known


def test_a_promise_is_kept_and_newcomers_leave_room_for_it():
    places = PlacePromises(3)
    assert refused(places, "a", 0, [2, 5, 9]) == 2
    assert refused(places, "newcomer", 2, [3, 7]) == 3  # the place that is free is a's
    places.take("a", "a", 2, [3, 7])


def test_who_comes_early_has_one_promise():
    places = PlacePromises(3)
    for second in range(5):
        assert refused(places, "a", second, [10 - second] * 3) == 10 - second
    assert refused(places, "b", 5, [5, 6, 7]) == 6


def test_a_promise_that_is_not_claimed_ends():
    places = PlacePromises(3)
    assert refused(places, "a", 0, [2, 5, 9]) == 2
    places.take("newcomer", "newcomer", 2 + GRACE, [1, 1])


def test_there_are_never_more_promises_than_places():
    places = PlacePromises(3)
    for i in range(1000):
        assert refused(places, f"{i}", 0, [1, 2, 3]) <= 3
    with pytest.raises(Overloaded, match="no place can be kept"):
        places.take("999", "999", 0, [1, 2, 3])
    with pytest.raises(Overloaded, match="there is a place for this one"):
        places.take("0", "0", 0, [1, 2, 3])
    places.take("1", "1", 3, [])
    assert refused(places, "newcomer", 3, [5]) == 5  # the other two places are promised
    places.take("0", "0", 3, [5])


def test_a_place_that_is_free_and_promised_is_refused():
    places = PlacePromises(1)
    assert refused(places, "a", 0, [5]) == 5
    assert refused(places, "newcomer", 1, []) == 1
    places.take("a", "a", 5, [])


def hold(places: PlacePromises, caller: str, now: float, left: list[float]) -> int:
    """How many promises a caller has after a hundred refusals."""
    held = 0
    for i in range(100):
        with pytest.raises(Overloaded) as caught:
            places.take(f"{caller} {i}", caller, now, left)
        held += "there is a place for this one" in caught.value.detail
    return held


def test_one_caller_is_promised_at_most_half_of_the_places():
    places = PlacePromises(16)
    assert hold(places, "rude", 0, [1.0] * 16) == 8
    assert refused(places, "polite", 0, [1.0] * 16) == 1
    places.take("polite", "polite", 1, [1.0] * 7)  # eight are kept for the rude one, and one is free


def test_a_caller_that_does_not_return_is_promised_less_until_it_does():
    places = PlacePromises(16)
    full = [1.0] * 16
    assert hold(places, "rude", 0, full) == 8
    assert hold(places, "rude", 1 + GRACE, full) == 2  # a quarter of what it had at first
    for i in range(2):
        places.take(f"rude {i}", "rude", 3 + GRACE, [])
    assert hold(places, "rude", 4 + GRACE, full) == 4
    assert hold(PlacePromises(1), "only", 0, [1.0]) == 1
