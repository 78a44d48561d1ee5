"""The scheduler: tables of decisions, and thousands of random schedules with the tick as their clock."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.engine import scheduler
from app.engine.scheduler import PATIENCE, PATIENCE_PER_LANE, Choice, choose, patience
from app.engine.widths import Forwards, Widths
from tests import reference_scheduler

SIZES = (1, 2, 4, 8)
CPU = Widths(SIZES, (0.0265, 0.044, 0.079, 0.149), (4,))  # 9 + 17.5 w ms: nearly linear
GPU = Widths(SIZES, (0.010, 0.010, 0.010, 0.0101), (4,))  # flat
LINE = Widths(SIZES, (1.0, 2.0, 4.0, 8.0), (4,))  # a row costs the same at every width
EXACT = Widths(SIZES, (0.030, 0.030, 0.030, 0.031), (4,))
TWO = Forwards(GPU, EXACT)


@dataclass(eq=False)
class Toy:
    """A lane; of a job of its own unless ``others`` says how much work the rest of it has left."""

    remaining: int
    reproducible: bool = False
    passed_over: int = 0
    rows: int = 1
    exact: bool = False
    priority: int = 0
    deadline: float | None = None
    since: float = 0.0
    others: int = 0
    worst: int = 0
    most: int = 0

    progress: object = None

    def __post_init__(self):
        self.exact = self.exact or self.reproducible
        self.total = self.work

    @property
    def work(self):
        return self.remaining * self.rows + self.others


def one(widths: Widths) -> Forwards:
    return Forwards(widths, widths)


def tick(lanes: list[Toy], forwards: Forwards, now: float = 0.0, favoured: int = 0) -> Choice[Toy]:
    """The engine around a decision: advance the batch, age the others, drop the lanes that are done."""
    choice = choose(lanes, forwards, now, favoured)
    for lane in lanes:
        lane.passed_over += 1
        lane.worst = max(lane.worst, lane.passed_over)
        lane.most = max(lane.most, len(lanes))
    for lane in choice.batch:
        lane.passed_over = 0
        lane.remaining -= 1
    lanes[:] = [lane for lane in lanes if lane.remaining]
    return choice


def remaining(batch: list[Toy]) -> list[int]:
    return [lane.remaining for lane in batch]


@pytest.mark.parametrize(
    ("lanes", "widths", "expected", "width"),
    [
        pytest.param([7], CPU, [7], 1, id="alone"),
        pytest.param([7], GPU, [7], 1, id="alone-on-a-card"),
        pytest.param([10, 100], CPU, [10], 1, id="a-long-lane-does-not-slow-a-short-one-where-width-costs"),
        pytest.param([100, 10], GPU, [10, 100], 2, id="all-lanes-advance-where-width-is-free"),
        pytest.param([50, 50, 50], GPU, [50, 50, 50], 4, id="padded-to-the-next-size"),
        pytest.param([20] * 8, CPU, [20] * 8, 8, id="equal-lanes-fill-the-width"),
        pytest.param([20] * 8, LINE, [20] * 8, 8, id="all-advance-where-a-row-costs-the-same-at-every-width"),
        pytest.param([90] * 20 + [5] * 3, GPU, [5, 5, 5] + [90] * 5, 8, id="shortest-first-up-to-the-cap"),
        pytest.param([400] * 30, CPU, [400] * 8, 8, id="a-backlog-fills-the-width"),
        pytest.param([400] * 29 + [1], CPU, [1] + [400] * 7, 8, id="and-long-lanes-fill-the-rest"),
    ],
)
def test_decisions(lanes, widths, expected, width):
    choice = choose([Toy(n) for n in lanes], one(widths))
    assert (remaining(choice.batch), choice.width, choice.exact) == (expected, width, False)


def test_equal_lanes_advance_in_order_of_arrival():
    lanes = [Toy(9) for _ in range(20)]
    assert choose(lanes, one(GPU)).batch == lanes[:8]


def test_what_counts_is_the_work_of_the_whole_job():
    crowd = [Toy(5, others=35) for _ in range(8)]
    single = Toy(20)
    assert choose([*crowd, single], one(GPU)).batch[0] is single


def test_a_job_that_was_slowed_more_goes_before_one_of_equal_work():
    """Both have ten steps left, and came at the same time; the second has had less to do in it."""
    long, short = Toy(100), Toy(10)
    long.remaining = 10
    assert choose([long, short], one(CPU), now=20.0).batch[0] is short
    fresh, stale = Toy(10, since=99.0), Toy(11, since=0.0)
    assert choose([fresh, stale], one(CPU), now=100.0).batch[0] is stale
    assert choose([fresh, Toy(11, since=99.0)], one(CPU), now=100.0).batch[0] is fresh


def test_a_clock_that_lags_behind_the_arrivals_does_no_harm():
    assert len(choose([Toy(5, since=9.0), Toy(5, since=1e9)], one(GPU), now=0.0).batch) == 2


def test_reproducible_lanes_advance_at_the_bit_identical_width_alone_or_not():
    alone = [Toy(9, reproducible=True)]
    assert choose(alone, one(CPU)) == Choice(alone, 4, True)
    crowd = [Toy(9, reproducible=True) for _ in range(11)]
    choice = choose(crowd, one(GPU))
    assert (len(choice.batch), choice.width, choice.exact) == (4, 4, True)


def test_reproducible_lanes_advance_at_any_width_of_the_same_bits():
    widths = Widths(SIZES, GPU.seconds, (2, 8))
    assert choose([Toy(9, reproducible=True)], one(widths)).width == 2
    crowd = choose([Toy(9, reproducible=True) for _ in range(5)], one(widths))
    assert (len(crowd.batch), crowd.width) == (5, 8)


def test_lanes_use_their_own_kind_of_forward_where_there_are_two():
    fast, exact, reproducible = Toy(9), Toy(9, exact=True), Toy(9, reproducible=True)
    assert choose([exact], TWO) == Choice([exact], 1, True)
    assert choose([reproducible], TWO) == Choice([reproducible], 4, True)
    assert choose([exact, fast], TWO) == Choice([fast], 1, False)  # the cheaper one
    assert choose([exact, reproducible], TWO) == Choice([exact, reproducible], 4, True)
    assert choose([fast, exact, exact, exact, exact, exact], TWO).exact  # many at once are worth more
    assert choose([fast, exact], one(GPU)) == Choice([fast, exact], 2, True)  # there they share


def test_an_overdue_lane_goes_first_whatever_it_costs():
    others = [Toy(1, priority=10, deadline=0.1) for _ in range(50)]
    lanes = [Toy(1000, passed_over=patience(51) + 1, priority=-10), *others]
    assert choose(lanes, one(CPU)).batch[0] is lanes[0]
    lanes[0].passed_over -= 1
    assert lanes[0] not in choose(lanes, one(CPU)).batch
    lanes[0].passed_over += 1
    lanes[0].exact = True
    choice = choose(lanes, TWO)
    assert (choice.batch[0], choice.exact) == (lanes[0], True)


def test_only_the_one_that_waited_longest_is_pulled_forward():
    lanes = [Toy(1000, passed_over=2000 + place) for place in range(40)] + [Toy(1) for _ in range(7)]
    choice = choose(lanes, one(GPU))
    assert choice.batch[0] is lanes[39]
    assert set(remaining(choice.batch[1:])) == {1}


@pytest.mark.parametrize("forwards", [one(CPU), one(GPU), TWO], ids=["cpu", "gpu", "two"])
@pytest.mark.parametrize("exact", [False, True])
def test_higher_priority_goes_first(forwards, exact):
    high = Toy(1000, priority=1, exact=exact)
    lanes = [*(Toy(1) for _ in range(30)), high]
    assert choose(lanes, forwards).batch[0] is high
    low = Toy(1, priority=-1)
    assert low not in choose([low, *(Toy(100) for _ in range(8))], one(GPU)).batch


def test_a_high_priority_is_not_slowed_by_many_low_ones_where_width_costs():
    lanes = [Toy(50, priority=10), *(Toy(50, priority=-10) for _ in range(2))]
    assert choose(lanes, one(CPU)) == Choice(lanes[:1], 1, False)


@pytest.mark.parametrize(
    ("deadline", "first"),
    [
        pytest.param(100.0, False, id="far-away"),
        pytest.param(2.0, True, id="close"),  # 10 steps at the full width take 1.49 s
        pytest.param(0.3, True, id="possible-only-in-narrow-forwards"),  # 0.265 s
        pytest.param(0.2, False, id="lost"),
    ],
)
def test_a_deadline_pulls_a_lane_forward_while_it_can_be_kept(deadline, first):
    due = Toy(10, deadline=1000.0 + deadline, since=1000.0)
    lanes = [*(Toy(5, since=1000.0) for _ in range(20)), due]
    choice = choose(lanes, one(CPU), now=1000.0)
    assert (choice.batch[0] is due) is first
    assert first or due not in choice.batch
    if first:  # and no wider than lets it be in time
        assert dict(zip(CPU.sizes, CPU.seconds, strict=True))[choice.width] * 10 <= deadline


def test_the_deadline_with_least_slack_goes_first_and_priority_before_it():
    later, sooner = Toy(10, deadline=2.1), Toy(10, deadline=1.9)
    assert choose([later, sooner], one(CPU)).batch[0] is sooner
    high = Toy(10, priority=1)
    assert choose([later, sooner, high], one(CPU)).batch[0] is high


def test_slack_is_what_the_rest_of_the_job_leaves_of_the_time_and_not_the_time_itself():
    """In forwards of 0.149 s, 5 steps until 0.9 leave 0.155 s, and 10 until 1.6 leave 0.11 s."""
    sooner, longer = Toy(5, deadline=0.9), Toy(10, deadline=1.6)
    assert choose([sooner, longer], one(CPU)).batch[0] is longer


def test_a_deadline_is_kept_that_shortest_first_would_miss():
    due = Toy(20, deadline=1.0)
    lanes = [due]
    now = 0.0
    while due.remaining:
        lanes += [Toy(3, since=now) for _ in range(20 - len(lanes))]
        width = tick(lanes, one(CPU), now).width
        now += CPU.pad(width)[1]
    assert now <= 1.0


def test_lost_deadlines_are_served_at_full_width_when_nothing_else_waits():
    lanes = [Toy(10, deadline=-1.0) for _ in range(8)]
    assert choose(lanes, one(CPU)).batch == lanes


def test_a_guided_lane_takes_two_rows():
    guided, plain = Toy(10, rows=2), Toy(10)
    assert choose([guided], one(CPU)) == Choice([guided], 2, False)
    # three rows; the plain one has less work left
    assert choose([guided, plain], one(GPU)) == Choice([plain, guided], 4, False)
    choice = choose([Toy(10, rows=2) for _ in range(9)], one(GPU))
    assert (len(choice.batch), choice.width) == (4, 8)
    choice = choose([Toy(10, reproducible=True, rows=2) for _ in range(9)], one(GPU))
    assert (len(choice.batch), choice.width) == (2, 4)


def test_what_no_longer_fits_lets_smaller_lanes_pass():
    lanes = [Toy(1) for _ in range(7)] + [Toy(1, rows=2), Toy(9)]
    choice = choose(lanes, one(GPU))
    assert (sum(lane.rows for lane in choice.batch), choice.width) == (8, 8)
    assert lanes[7] not in choice.batch


def test_halving_gives_up_the_widest_first_and_ends():
    assert CPU.halve().sizes == (1, 2, 4)
    assert CPU.halve().halve().halve().sizes == (1,)
    assert CPU.halve().halve().halve().halve() is None
    assert CPU.halve().bit_identical == (4,)
    assert CPU.halve().halve().bit_identical == ()
    assert one(CPU).halve().shared
    assert not TWO.halve().shared
    narrow = Widths((1,), (0.01,))
    assert Forwards(CPU, narrow).halve() is None  # lanes of either kind would be stuck
    assert Forwards(narrow, CPU).halve() is None


def test_the_page_gives_the_constants_as_they_are():
    page = (Path(__file__).parents[3] / "docs" / "scheduler.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([A-Z_]+) \| ([\d.]+) \|", page, re.MULTILINE)
    assert len(rows) == 7
    assert {name: float(value) for name, value in rows} == {name: getattr(scheduler, name) for name, _ in rows}


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


def test_lanes_of_one_job_are_ranked_together_and_as_each_alone():
    """The job's work is weighed once for its lanes; with deadlines, guidance, and two kinds of forward."""
    jobs = [object() for _ in range(6)]
    lanes = [
        Toy(5 + i % 2, i % 7 == 0, rows=1 + i % 2, exact=i % 5 == 0, priority=number % 3, since=-number, progress=job)
        for number, job in enumerate(jobs)
        for i in range(10)
    ]
    for number, lane in enumerate(lanes):
        lane.others = 100 + 7 * (number // 10) - lane.remaining * lane.rows
        lane.total = lane.work
        lane.deadline = None if number // 20 else 1.4
    for forwards in (one(CPU), TWO):
        for favoured in (0, 3):
            found = choose(lanes, forwards, 1.0, favoured)
            assert found.batch == reference_scheduler.choose(lanes, forwards, 1.0, favoured).batch


def test_a_crowd_of_the_highest_priority_leaves_a_forward_in_four_to_those_below():
    """64 requests of 8 images and 1,000 steps at u=0; an ordinary one of 10 steps is done after 4 forwards for each."""
    crowd = [Toy(1000, priority=3, others=7000) for _ in range(512)]
    ordinary, low = Toy(10), Toy(20, priority=-4)
    lanes = [*crowd, low, ordinary]
    now, favoured, ticks = 0.0, 0, 0
    while ordinary.remaining:
        choice = tick(lanes, one(CPU), now, favoured)
        favoured = choice.favoured
        now += CPU.time(choice.width)
        ticks += 1
        assert ticks <= scheduler.SHARE * 10
        assert (ordinary in choice.batch) is (ticks % scheduler.SHARE == 0)
    assert now <= scheduler.SHARE * 10 * CPU.seconds[-1]
    assert sum(1000 - lane.remaining for lane in crowd) > 0
    while low.remaining:  # the lowest has its turn when no other below the highest is left
        favoured = tick(lanes, one(CPU), now, favoured).favoured
        ticks += 1
    assert ticks <= scheduler.SHARE * 30


def test_those_below_fill_the_forward_that_one_of_them_leads():
    crowd, below = [Toy(100, priority=3) for _ in range(20)], [Toy(50) for _ in range(5)]
    assert choose([*crowd, *below], one(GPU), favoured=3).batch == [*below, *crowd[:3]]
    assert choose([*crowd, *below], one(GPU), favoured=2).batch == crowd[:8]


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
