"""The scheduler as tables and as thousands of random schedules; its clock is the tick."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.engine.scheduler import PATIENCE, Widths, choose

CPU = Widths((1, 2, 4, 8), (0.0265, 0.044, 0.079, 0.149), 4, 0.079)  # 9 + 17.5 w ms: nearly linear
GPU = Widths((1, 2, 4, 8), (0.010, 0.010, 0.010, 0.0101), 4, 0.010)  # flat


@dataclass(eq=False)
class Toy:
    remaining: int
    reproducible: bool = False
    passed_over: int = 0
    rows: int = 1
    worst: int = 0


def tick(lanes: list[Toy], widths: Widths) -> tuple[list[Toy], int]:
    """What the engine does around a decision: advance the riders, age the others, drop who has ended."""
    riders, width = choose(lanes, widths)
    for lane in lanes:
        lane.passed_over += 1
        lane.worst = max(lane.worst, lane.passed_over)
    for lane in riders:
        lane.passed_over = 0
        lane.remaining -= 1
    lanes[:] = [lane for lane in lanes if lane.remaining]
    return riders, width


def remaining(riders: list[Toy]) -> list[int]:
    return [lane.remaining for lane in riders]


@pytest.mark.parametrize(
    ("lanes", "widths", "expected", "width"),
    [
        pytest.param([7], CPU, [7], 1, id="alone"),
        pytest.param([7], GPU, [7], 1, id="alone-on-a-card"),
        pytest.param([10, 100], CPU, [10], 1, id="a-short-lane-does-not-carry-a-long-one-where-that-costs"),
        pytest.param([100, 10], GPU, [10, 100], 2, id="everybody-rides-where-it-is-free"),
        pytest.param([50, 50, 50], GPU, [50, 50, 50], 4, id="padded-to-the-next-size"),
        pytest.param([20] * 8, CPU, [20] * 8, 8, id="equal-lanes-fill-the-width"),
        pytest.param([90] * 20 + [5] * 3, GPU, [5, 5, 5] + [90] * 5, 8, id="shortest-first-up-to-the-cap"),
        pytest.param([400] * 30, CPU, [400] * 8, 8, id="a-backlog-fills-the-width"),
    ],
)
def test_decisions(lanes, widths, expected, width):
    riders, got = choose([Toy(n) for n in lanes], widths)
    assert (remaining(riders), got) == (expected, width)


def test_reproducible_lanes_ride_at_the_canonical_width_alone_or_not():
    alone = [Toy(9, reproducible=True)]
    assert choose(alone, CPU) == (alone, 4)
    crowd = [Toy(9, reproducible=True) for _ in range(11)]
    riders, width = choose(crowd, GPU)
    assert (len(riders), width) == (4, 4)


def test_an_overdue_lane_goes_first_whatever_it_costs():
    lanes = [Toy(1000, passed_over=PATIENCE + 1)] + [Toy(1) for _ in range(50)]
    riders, _ = choose(lanes, CPU)
    assert riders[0] is lanes[0]


def test_a_guided_lane_takes_two_rows():
    guided, plain = Toy(10, rows=2), Toy(10)
    assert choose([guided], CPU) == ([guided], 2)
    assert choose([guided, plain], GPU) == ([plain, guided], 4)  # three rows; the plain one has less work left
    riders, width = choose([Toy(10, rows=2) for _ in range(9)], GPU)
    assert (len(riders), width) == (4, 8)
    riders, width = choose([Toy(10, reproducible=True, rows=2) for _ in range(9)], GPU)
    assert (len(riders), width) == (2, 4)


def test_what_no_longer_fits_lets_smaller_lanes_pass():
    lanes = [Toy(1) for _ in range(7)] + [Toy(1, rows=2), Toy(9)]
    riders, width = choose(lanes, GPU)
    assert (sum(lane.rows for lane in riders), width) == (8, 8)
    assert lanes[7] not in riders


def test_halving_gives_up_the_widest_first_and_ends():
    assert CPU.halved().sizes == (1, 2, 4)
    assert CPU.halved().halved().halved().sizes == (1,)
    assert CPU.halved().halved().halved().halved() is None
    assert CPU.halved().canonical == 4


lane = st.builds(Toy, st.integers(1, 60), st.booleans(), st.integers(0, 3 * PATIENCE), rows=st.integers(1, 2))
arrival = st.tuples(st.integers(0, 30), st.integers(1, 40), st.booleans(), st.integers(1, 2))
costs = st.lists(st.floats(0.001, 1.0), min_size=4, max_size=4).map(sorted)


@given(st.lists(lane, min_size=1, max_size=40), costs, st.sampled_from([2, 3, 4, 8]))
@settings(max_examples=1000, deadline=None)
def test_every_decision_is_sound(lanes, seconds, canonical):
    widths = Widths((1, 2, 4, 8), tuple(seconds), canonical, max(seconds))
    riders, width = choose(lanes, widths)
    assert riders
    assert len({id(rider) for rider in riders}) == len(riders)
    assert all(any(rider is lane for lane in lanes) for rider in riders)
    assert sum(rider.rows for rider in riders) <= width <= widths.cap
    assert width == canonical or width in widths.sizes
    if any(rider.reproducible for rider in riders):
        assert width == canonical
    overdue = [lane for lane in lanes if lane.passed_over > PATIENCE]
    if overdue:
        assert riders[0].passed_over == max(lane.passed_over for lane in overdue)


@given(st.lists(arrival, min_size=1, max_size=24), costs)
@settings(max_examples=200, deadline=None)
def test_every_lane_ends_and_none_waits_beyond_the_bound(arrivals, seconds):
    """Lanes arrive at random ticks; ticks needed never exceed the sum of the work, one lane at a time."""
    widths = Widths((1, 2, 4, 8), tuple(seconds), 4, seconds[2])
    coming = sorted(((at, Toy(nfe, repro, rows=rows)) for at, nfe, repro, rows in arrivals), key=lambda pair: pair[0])
    everyone = [toy for _, toy in coming]
    work = sum(toy.remaining for toy in everyone)
    lanes: list[Toy] = []
    now = advanced = 0
    while coming or lanes:
        while coming and coming[0][0] <= now:
            lanes.append(coming.pop(0)[1])
        if lanes:
            riders, _ = tick(lanes, widths)
            advanced += len(riders)
        now += 1
        assert now <= 31 + work
    assert advanced == work
    assert max(toy.worst for toy in everyone) <= PATIENCE + len(everyone)


def test_a_long_lane_is_not_starved_by_an_endless_stream_of_short_ones():
    long = Toy(50)
    lanes = [long]
    ticks = 0
    while long.remaining and ticks < 10_000:
        while len(lanes) < 30:
            lanes.append(Toy(5))
        tick(lanes, CPU)
        ticks += 1
    assert long.remaining == 0
    assert long.worst <= PATIENCE + 30
