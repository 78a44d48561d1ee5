"""The scheduler: tables of decisions."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from app.engine import scheduler
from app.engine.scheduler import Choice, choose, patience
from app.engine.widths import Widths
from tests import reference_scheduler
from tests.lanes import CPU, GPU, LINE, SIZES, TWO, Toy, one, remaining, tick


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


def test_the_page_gives_the_constants_as_they_are():
    page = (Path(__file__).parents[3] / "docs" / "scheduler.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([A-Z_]+) \| ([\d.]+) \|", page, re.MULTILINE)
    assert len(rows) == 7
    assert {name: float(value) for name, value in rows} == {name: getattr(scheduler, name) for name, _ in rows}


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
