"""Places for jobs: who is refused and returns when it is due finds one."""

from __future__ import annotations

import pytest

from app.api.places import GRACE, PlacePromises
from app.errors import Overloaded


def refused(places: PlacePromises, name: str, now: float, left: list[float], count: int = 3) -> int:
    """Its Retry-After."""
    with pytest.raises(Overloaded) as caught:
        places.take(name, now, count, left)
    return int(caught.value.headers["Retry-After"])


def test_each_refused_one_is_promised_the_next_free_place():
    places = PlacePromises()
    assert [refused(places, name, 0, [2, 5, 9]) for name in "abc"] == [2, 5, 9]
    assert refused(places, "d", 0, [2, 5, 9]) == 9  # as far as can be known


def test_a_promise_is_kept_and_newcomers_leave_room_for_it():
    places = PlacePromises()
    assert refused(places, "a", 0, [2, 5, 9]) == 2
    assert refused(places, "newcomer", 2, [3, 7]) == 3  # the place that is free is a's
    places.take("a", 2, 3, [3, 7])


def test_who_comes_early_has_one_promise():
    places = PlacePromises()
    for second in range(5):
        assert refused(places, "a", second, [10 - second] * 3) == 10 - second
    assert refused(places, "b", 5, [5, 6, 7]) == 6


def test_a_promise_that_is_not_claimed_ends():
    places = PlacePromises()
    assert refused(places, "a", 0, [2, 5, 9]) == 2
    places.take("newcomer", 2 + GRACE, 3, [1, 1])


def test_there_are_never_more_promises_than_places():
    places = PlacePromises()
    for i in range(1000):
        assert refused(places, f"{i}", 0, [1, 2, 3]) <= 3
    with pytest.raises(Overloaded, match="no place can be kept"):
        places.take("999", 0, 3, [1, 2, 3])
    with pytest.raises(Overloaded, match="there is a place for this one"):
        places.take("0", 0, 3, [1, 2, 3])
    places.take("1", 3, 3, [])
    assert refused(places, "newcomer", 3, [5]) == 5  # the other two places are promised
    places.take("0", 3, 3, [5])


def test_a_place_that_is_free_and_promised_is_refused():
    places = PlacePromises()
    assert refused(places, "a", 0, [5], count=1) == 5
    assert refused(places, "newcomer", 1, [], count=1) == 1
    places.take("a", 5, 1, [])
