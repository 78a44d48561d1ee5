"""docs/performance.md says what was measured; claims can fail; predictions are those of hand-made queues."""

from __future__ import annotations

import copy
import itertools

import pytest

from app.cli.mix import Mix, poisson
from app.engine.jobs import Lane
from bench import page, performance, prediction, saturation
from bench.claims import claims
from bench.peers import side_by_side
from bench.peers.run import RequestTask, pooled
from bench.peers.side_by_side import Racer
from bench.performance import FOLDER
from tests.engines import FakeDevice, ask, engine_on, plan
from tests.readme import README


@pytest.fixture(scope="module")
def parts():
    return performance.read()


def test_the_page_is_made_of_its_figures(parts):
    written = (FOLDER.parent / "performance.md").read_text()
    assert page.text(parts) == written, "run `python -m bench.performance --render`"


def test_every_claim_can_fail(parts):
    """With figures a thousand times worse, none is met."""
    worse = copy.deepcopy(parts)
    mine = worse["peers"]["servers"]["unstir"]
    for load in mine["loads"].values():
        load["outcomes"]["unanswered"] += 1
        for found in (load["slowdown"], *load["latency"].values()):
            found.update({key: 1000 * value for key, value in found.items()})
    for side in ("side", "side-mixed"):
        worse[side]["servers"]["unstir"]["of_bare"] /= 1000
    worse["saturation"]["total"] /= 1000
    worse["alone"]["faster"]["float32"]["median"] /= 1000
    worse["promises"]["admitted"] //= 1000
    worse["abandoned"]["abandoned"]["after_ms"] *= 1000
    worse["bytes"]["reproducible"]["differing"] = 1
    worse["chaos"]["chaos"]["gauges"]["rows_running"] = 1.0
    assert not any(claim.met for claim in claims(worse))


def test_the_comparison_cannot_pass_without_a_difference(parts):
    """The negative control: had no unlike answer differed without `reproducible`, equality would prove nothing."""
    blind = copy.deepcopy(parts)
    blind["bytes"]["control"]["differing"] = 0
    assert sum(claim.met for claim in claims(blind)) == sum(claim.met for claim in claims(parts)) - 1


@pytest.mark.parametrize(("every", "at_once"), [(5.0, 8), (0.625, 1)])
def test_a_rate_counts_from_answer_to_answer(every, at_once):
    """Eight answers of 50 steps every 5 s, at once or evenly, are 80 steps a second, whenever one stops looking."""
    for count, ran in ((21, 14.0), (40, 29.2), (400, 251.7)):
        racer = Racer((), ran, answers=[(1.0 + every * (i // at_once + 1), 50) for i in range(count)])
        assert racer.found["rate"] == pytest.approx(80.0)


def test_a_batch_that_is_just_being_answered_is_left_out():
    """Half of the third batch was answered when the server was stopped for good: all of it was done, nearly."""
    answers = [(moment, 50) for moment in (5.0, 10.0) for _ in range(8)] + [(15.0, 50)] * 4
    assert Racer((), 15.1, answers=answers).found["rate"] == pytest.approx(80.0)


def test_side_by_side_each_start_is_measured_by_its_own_bare_loop():
    """The machine was slow after the second start, and so was the server."""
    starts = [
        {"bare": bare, "servers": {"unstir": {"rate": 0.9 * bare, "answers": 9, "broken": 0, "seconds": 25.0}}}
        for bare in (100.0, 50.0)
    ]
    found = side_by_side.summary(starts)["servers"]["unstir"]
    assert found["of_bare_by_start"] == [0.9, 0.9]
    assert (found["of_bare"], found["error"], found["answers"]) == (0.9, 0.0, 18)


def comparison(name, mix="1:1", seconds=(1.0, 1.0)):
    """What prediction reads of a comparison, of two repeats at one load."""
    visits = [{"server": name, "repeat": repeat, "open": {"0.5": {}}} for repeat in range(2)]
    return {
        "settings": {"mix": mix, "loads": [0.5], "seconds": [20.0]},
        "requests_per_second": [1.0, 1.0],
        "bare": {"in_turn_seconds": {str(width + 1): each for width, each in enumerate(seconds)}},
        "visits": visits,
    }


def fifo(arrivals, steps_seconds):
    """Latencies of one server that serves one after another."""
    free = 0.0
    for arrival in arrivals:
        free = max(free, arrival.at) + arrival.steps * steps_seconds
        yield free - arrival.at


def test_a_lock_is_a_queue():
    """Lindley's recursion, over the same arrivals, with the time of its own network."""
    facts = comparison("lock_diffusers", "1:1,3:1", (0.3, 0.6))
    facts["servers"] = {"lock_diffusers": {"alone": {"1": 0.6, "3": 1.5}}}
    found = prediction.latencies("lock_diffusers", 0.5, facts)
    expected = []
    for repeat in range(2):
        arrivals = poisson(Mix.parse("1:1,3:1"), 0.5, 20.0, 1000 * repeat + 50)
        expected += zip((str(arrival.steps) for arrival in arrivals), fifo(arrivals, 0.5), strict=True)
    for steps, these in found.items():
        assert these == pytest.approx([latency for each, latency in expected if each == steps])


@pytest.mark.parametrize("name", ["mosec", "litserve_request", "bentoml", "ray"])
def test_a_batch_is_answered_when_its_last_row_is_done(name, monkeypatch):
    """2 and 5 steps come while 4 run; the two then share forwards, and both end with the longer."""
    requests = [prediction.SimulatedRequest(at, steps) for at, steps in ((0.0, 4), (1.0, 2), (1.5, 5), (30.0, 1))]
    monkeypatch.setattr(prediction, "arrivals", lambda *_: requests)
    facts = comparison(name)
    facts["visits"] = facts["visits"][:1]
    assert prediction.latencies(name, 0.5, facts) == {"4": [4.0], "2": [9.0 - 1.0], "5": [9.0 - 1.5], "1": [1.0]}


def test_steps_are_answered_as_they_end(monkeypatch):
    requests = [prediction.SimulatedRequest(at, steps) for at, steps in ((0.0, 4), (0.5, 2))]
    monkeypatch.setattr(prediction, "arrivals", lambda *_: requests)
    facts = comparison("litserve_loop")
    facts["visits"] = facts["visits"][:1]
    assert prediction.latencies("litserve_loop", 0.5, facts) == {"4": [4.0], "2": [2.5]}


def test_what_is_offered_is_what_arrives():
    facts = comparison("mosec", "2:1")
    came = sum(len(prediction.arrivals(facts["settings"], 0.5, repeat, 1.0)) for repeat in range(2))
    assert prediction.offered(0.5, facts) == pytest.approx(came / 40)


def test_other_mixes_are_served_as_the_simulator_says():
    """Nobody waits for long at a hundredth of capacity, and where all are alike, neither policy can do much better."""
    facts = comparison("unstir", seconds=(0.01, 0.012, 0.014, 0.016))
    assert prediction.elsewhere("5:1", 0.01, facts) == pytest.approx((1, 1), abs=0.02)
    ours, theirs = prediction.elsewhere("5:1,50:1", 0.8, facts)
    assert 1 < ours < theirs


def test_turns_are_pooled():
    """Slowdown is over bare forwards, and percentiles are those of all turns together."""
    visits = [
        RequestTask(
            "unstir",
            repeat,
            0.1,
            alone={"10": 1.0 + repeat},
            open={"0.6": {"outcomes": {"ok": 2, "429": 0}, "latencies": {"10": [1.0 + repeat, 3.0 + repeat]}}},
            closed={"row_steps_per_second": 90.0 + repeat, "bare_rows_per_second": [100.0, 110.0]},
        )
        for repeat in range(2)
    ]
    found = pooled(visits, forward_seconds=0.05)["unstir"]
    assert found["alone"] == {"10": 1.5}
    assert found["loads"]["0.6"]["outcomes"] == {"ok": 4, "429": 0}
    assert found["loads"]["0.6"]["slowdown"]["mean"] == pytest.approx(5.0)
    assert found["loads"]["0.6"]["mean_slowdown_by_repeat"] == [4.0, 6.0]
    assert found["loads"]["0.6"]["latency"]["10"]["p50"] == pytest.approx(2.5)
    assert found["saturated"]["row_steps_per_second"] == 90.5
    assert found["saturated"]["of_bare"] == pytest.approx((90 + 91) / 2 / 105, abs=1e-4)
    # Two turns of 100 and 110: a standard error of 5 in 105, and that of the server's turns, which last twice as long.
    assert found["saturated"]["error"] == pytest.approx(5 / 105 * 1.5**0.5 / 2**0.5, abs=1e-4)


def test_the_readme_shows_the_page():
    assert "docs/performance.md" in README.read_text()


def test_saturation_is_taken_between_the_bare_turns_before_and_after():
    turns = [saturation.Turn(80, 10, 1.0, 0.9), saturation.Turn(80, 10, 2.0, 1.9)]
    found = saturation.summary(turns, [80.0, 120.0, 80.0])
    assert found["share"]["median"] == pytest.approx(0.6)  # 80 and 40 rows a second beside 100
    assert found["total"] == pytest.approx(160 / 3 / 90, abs=0.001)  # 90 is the harmonic mean of 80, 120 and 80
    assert found["served_rows_per_second"] == pytest.approx(160 / 3, abs=0.1)
    assert (found["rows_per_tick"], found["tick_ms"], found["outside_ticks_ms"]) == (8, 150, 10)


@pytest.mark.anyio
async def test_the_bare_loop_goes_between_turns_of_ticks():
    async with engine_on(FakeDevice()) as engine:
        calls = itertools.count()
        turns = saturation.InTurns(engine.worker, lambda: float(next(calls)))
        await ask(engine, [Lane(plan(10), seed) for seed in range(24)])
    assert len(turns.turns) >= 2
    assert all(turn.ticks == saturation.FORWARDS and turn.rows <= 8 * turn.ticks for turn in turns.turns)
    assert turns.bare[: len(turns.turns) + 1] == list(range(len(turns.turns) + 1))
