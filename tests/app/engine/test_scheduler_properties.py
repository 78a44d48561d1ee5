"""The scheduler: what holds of every decision, and of thousands of random schedules with the tick as their clock."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.engine import scheduler
from app.engine.scheduler import PATIENCE, PATIENCE_PER_LANE, choose, patience
from app.engine.widths import Forwards, Widths
from tests import reference_scheduler
from tests.lanes import SIZES, TWO, Toy, one, tick

lane = st.builds(
    Toy,
    st.integers(1, 60),
    st.booleans(),
    st.integers(0, 3 * PATIENCE + 40 * PATIENCE_PER_LANE),
    rows=st.integers(1, 2),
    exact=st.booleans(),
    priority=st.integers(-10, 10),
    deadline=st.none() | st.floats(-5, 20),
    since=st.floats(-100, 1),
    others=st.integers(0, 200),
)
costs = st.lists(st.floats(0.001, 1.0), min_size=4, max_size=4).map(sorted)


@st.composite
def forwards(draw):
    bit_identical = draw(st.sampled_from([(2,), (4,), (2, 4), (4, 8), SIZES]))
    kinds = [Widths(SIZES, tuple(seconds), bit_identical) for seconds in (draw(costs), draw(costs))]
    return Forwards(kinds[0], kinds[draw(st.integers(0, 1))])


@given(st.lists(lane, min_size=2, max_size=40), forwards(), st.floats(-1, 20), st.integers(0, 5))
@settings(max_examples=600, deadline=None)
def test_every_decision_is_that_of_the_plain_reference(lanes, forwards, now, favoured):
    found, wanted = choose(lanes, forwards, now, favoured), reference_scheduler.choose(lanes, forwards, now, favoured)
    assert list(map(id, found.batch)) == list(map(id, wanted.batch))
    assert (found.width, found.exact, found.favoured) == (wanted.width, wanted.exact, wanted.favoured)


@given(st.lists(lane, min_size=1, max_size=40), forwards())
@settings(max_examples=600, deadline=None)
def test_every_decision_is_sound(lanes, forwards):
    choice = choose(lanes, forwards)
    batch, width = choice.batch, choice.width
    widths = forwards.exact if choice.exact else forwards.fast
    assert batch
    assert len({id(each) for each in batch}) == len(batch)
    assert all(any(each is lane for lane in lanes) for each in batch)
    assert sum(each.rows for each in batch) <= width <= widths.cap
    if any(each.reproducible for each in batch):
        assert choice.exact
        assert width in widths.bit_identical
    else:
        assert width == widths.pad(sum(each.rows for each in batch))[0]
    if any(each.exact for each in batch):
        assert choice.exact
    if not forwards.shared:
        assert all(each.exact is choice.exact for each in batch)
    longest = max(lane.passed_over for lane in lanes)
    if len(lanes) > 1 and longest > patience(len(lanes)):
        assert batch[0].passed_over == longest
    else:
        assert batch[0].priority == max(lane.priority for lane in lanes)


def fill(lanes: list[Toy], width: int) -> list[Toy]:
    batch: list[Toy] = []
    for each in lanes:
        if sum(other.rows for other in batch) + each.rows <= width:
            batch.append(each)
    return batch


def best_value(lanes: list[Toy], widths: Widths, now: float) -> tuple[float, dict[int, float]]:
    """The formulas of docs/scheduler.md, by brute force: the most value per second, and the value of each lane by id.

    No lane has a deadline or is overdue.
    """
    row = widths.seconds[-1] / widths.cap
    slowdown = {id(each): 1 + max(0.0, now - each.since) / (each.total * row) for each in lanes}
    merit = {id(each): slowdown[id(each)] ** scheduler.AGEING / each.work for each in lanes}
    weighed = {id(each): merit[id(each)] * 2**each.priority for each in lanes}
    rows = sum(each.rows for each in lanes)
    pressure = scheduler.PRESSURE * (rows / widths.cap) ** scheduler.PRESSURE_POWER
    value = {key: each / max(weighed.values()) + pressure for key, each in weighed.items()}
    order = sorted(lanes, key=lambda each: (-each.priority, -merit[id(each)]))
    plain = fill([each for each in order if not each.reproducible], widths.cap)
    options = [(plain[:count], widths.pad(sum(each.rows for each in plain[:count]))[0]) for count in range(1, 9)]
    options += [(fill(order, width), width) for width in widths.bit_identical]
    return max(
        sum(value[id(each)] for each in batch) / widths.time(width)
        for batch, width in options
        if batch and batch[0].priority == order[0].priority and (batch == plain[: len(batch)] or reproducible(batch))
    ), value


def reproducible(batch: list[Toy]) -> bool:
    return any(each.reproducible for each in batch)


plain_lane = st.builds(
    Toy,
    st.integers(1, 60),
    st.booleans(),
    rows=st.integers(1, 2),
    priority=st.integers(-1, 1),
    since=st.floats(-100, 1),
    others=st.integers(0, 200),
)


@given(st.lists(plain_lane, min_size=2, max_size=20), forwards(), st.floats(0, 10))
@settings(max_examples=300, deadline=None)
def test_the_batch_has_the_most_value_per_second(lanes, forwards, now):
    widths = forwards.fast
    best, value = best_value(lanes, widths, now)
    choice = choose(lanes, one(widths), now)
    found = sum(value[id(each)] for each in choice.batch) / widths.time(choice.width)
    assert found == pytest.approx(best, rel=1e-9)


@given(st.lists(lane, min_size=2, max_size=12), forwards(), st.integers(1, 10))
@settings(max_examples=200, deadline=None)
def test_a_decision_depends_on_nothing_but_its_arguments(lanes, forwards, now):
    assert choose(lanes, forwards, now) == choose(list(lanes), forwards, now)


@given(st.lists(lane, min_size=2, max_size=12), forwards(), st.floats(0, 10))
@settings(max_examples=60, deadline=None)
def test_a_device_that_is_slower_throughout_decides_the_same(lanes, forwards, now):
    """With all times 4096 times as long; a power of two, so that no rounding differs."""

    def slow(seconds):
        return None if seconds is None else 4096 * seconds

    def slowed(widths):
        return Widths(widths.sizes, tuple(map(slow, widths.seconds)), widths.bit_identical)

    others = [replace(each, since=slow(each.since), deadline=slow(each.deadline)) for each in lanes]
    fast = slowed(forwards.fast)
    kinds = Forwards(fast, fast if forwards.shared else slowed(forwards.exact))
    choice, other = choose(lanes, forwards, now), choose(others, kinds, slow(now))
    assert [lanes.index(each) for each in choice.batch] == [others.index(each) for each in other.batch]
    assert (choice.width, choice.exact) == (other.width, other.exact)


arrival = st.tuples(
    st.integers(0, 30),
    st.builds(
        Toy,
        st.integers(1, 40),
        st.booleans(),
        rows=st.integers(1, 2),
        exact=st.booleans(),
        priority=st.integers(-10, 10),
        deadline=st.none() | st.floats(0, 20),
    ),
)


@given(st.lists(arrival, min_size=1, max_size=24), forwards())
@settings(max_examples=200, deadline=None)
def test_every_lane_ends_and_none_waits_beyond_the_bound(arrivals, forwards):
    """Lanes arrive at random ticks; ticks needed never exceed the sum of the work, one lane at a time."""
    coming = sorted(arrivals, key=lambda pair: pair[0])
    everyone = [toy for _, toy in coming]
    work = sum(toy.remaining for toy in everyone)
    lanes: list[Toy] = []
    now = advanced = 0
    while coming or lanes:
        while coming and coming[0][0] <= now:
            lanes.append(coming.pop(0)[1])
        if lanes:
            advanced += len(tick(lanes, forwards, now / 50).batch)
        now += 1
        assert now <= 31 + work
    assert advanced == work
    assert max(toy.worst for toy in everyone) <= patience(len(everyone)) + len(everyone)


@pytest.mark.parametrize("exact", [False, True])
def test_long_lanes_are_not_starved_by_an_endless_stream_that_outranks_them(exact):
    """The stream is short, of the highest priority, and always about to miss its deadlines; time stands still."""
    long = [Toy(4, priority=-10, exact=exact) for _ in range(3)]
    lanes = list(long)
    ticks = 0
    while any(toy.remaining for toy in long):
        while len(lanes) < 30:
            lanes.append(Toy(5, priority=10, deadline=0.3))
        tick(lanes, TWO)
        ticks += 1
        assert ticks <= 4 * (patience(30) + 30)
    assert PATIENCE < max(toy.worst for toy in long) <= patience(30) + 30
