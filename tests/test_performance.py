"""docs/performance.md shows the raw figures, and figures are pooled as their definitions say."""

from __future__ import annotations

import itertools
import json

import pytest

from app.engine.jobs import Lane
from bench import performance, report, saturation
from bench.peers import side_by_side
from bench.peers.run import pool, write
from bench.peers.side_by_side import Racer
from tests.engines import FakeDevice, ask, engine_on, plan
from tests.readme import README


def test_the_page_is_rendered_from_its_figures():
    written = (performance.FOLDER.parent / "performance.md").read_text()
    assert report.page(performance.read()) == written, "run `python -m bench.performance --render`"


def test_the_readme_shows_the_page():
    assert "docs/performance.md" in README.read_text()


@pytest.mark.parametrize(("every", "at_once"), [(5.0, 8), (0.625, 1)])
def test_a_rate_counts_from_answer_to_answer(every, at_once):
    """Eight answers of 50 steps every 5 s, at once or evenly, are 80 steps a second, whenever one stops looking."""
    for count, ran in ((21, 14.0), (40, 29.2), (400, 251.7)):
        racer = Racer((), ran, answers=[(1.0 + every * (i // at_once + 1), 50) for i in range(count)])
        assert racer.found["rate"] == pytest.approx(80.0)


def test_a_batch_that_is_just_being_answered_is_left_out():
    """Half of the third batch was answered when the server was stopped for good: nearly all of it was computed."""
    answers = [(moment, 50) for moment in (5.0, 10.0) for _ in range(8)] + [(15.0, 50)] * 4
    assert Racer((), 15.1, answers=answers).found["rate"] == pytest.approx(80.0)


def test_side_by_side_each_start_is_measured_by_its_own_bare_loop():
    """The machine was slow after the second start, and so was the server."""
    starts = [
        {"bare": bare, "servers": {"unstir": {"rate": 0.9 * bare, "answers": 9, "broken": 0, "seconds": 25.0}}}
        for bare in (100.0, 50.0)
    ]
    found = side_by_side.pool(starts)["servers"]["unstir"]
    assert found["of_bare_by_start"] == [0.9, 0.9]
    assert (found["of_bare"], found["error"], found["answers"]) == (0.9, 0.0, 18)


def test_repeats_are_pooled(tmp_path):
    """Slowdown is over bare forwards of one row, and percentiles are those of all repeats together."""
    runs = [
        {
            "server": "unstir",
            "repeat": repeat,
            "load": 0.6,
            "outcomes": {"ok": 2, "429": 0},
            "latencies": {"10": [1.0 + repeat, 3.0 + repeat]},
        }
        for repeat in range(2)
    ]
    facts = {"forward_seconds": {"1": 0.05}, "runs": runs}
    found = pool(facts)["unstir"]["0.6"]
    assert found["outcomes"] == {"ok": 4, "429": 0}
    assert found["slowdown"]["mean"] == pytest.approx(5.0)
    assert found["mean_slowdown_by_repeat"] == pytest.approx([4.0, 6.0])
    assert found["latency"]["10"]["p50"] == pytest.approx(2.5)
    assert found["slowdowns"] == pytest.approx([2, 4, 6, 8])
    write(tmp_path / "peers.json", facts)
    assert json.loads((tmp_path / "peers.json").read_text()) == facts


def test_saturation_is_taken_between_the_bare_turns_before_and_after():
    turns = [saturation.Turn(80, 10, 1.0, 0.9), saturation.Turn(80, 10, 2.0, 1.9)]
    found = saturation.pool(turns, [80.0, 120.0, 80.0])
    assert found["share"]["median"] == pytest.approx(0.6)  # 80 and 40 rows a second beside 100
    assert found["total"] == pytest.approx(160 / 3 / 90, abs=0.001)  # 90 is the harmonic mean of 80, 120 and 80
    assert found["served_rows_per_second"] == pytest.approx(160 / 3, abs=0.1)
    assert (found["rows_per_tick"], found["tick_ms"], found["outside_ticks_ms"]) == (8, 150, 10)


@pytest.mark.anyio
async def test_the_bare_loop_runs_between_turns_of_ticks():
    async with engine_on(FakeDevice()) as engine:
        calls = itertools.count()
        turns = saturation.Alternation(engine.worker, lambda: float(next(calls)))
        await ask(engine, [Lane(plan(10), seed) for seed in range(24)])
    assert len(turns.turns) >= 2
    assert all(turn.ticks == saturation.FORWARDS and turn.rows <= 8 * turn.ticks for turn in turns.turns)
    assert turns.bare[: len(turns.turns) + 1] == list(range(len(turns.turns) + 1))
