"""`make gpu-check` without a card: the whole script with tiny networks, its parts, and its section of the page."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
import time
from collections import deque

import pytest
import torch

from app.engine.jobs import Lane
from app.engine.networks import Networks
from bench import report, timing
from bench.gpu import beside, engine, floor, networks, pipelines, served, suite
from bench.gpu.__main__ import SHARES, failed, take
from bench.gpu.bench import Bench
from bench.server import ROOT
from model import checkpoint
from tests.cuda.test_networks import LEAST_PSNR, least_psnr, outputs_of_a_lane
from tests.engines import plan


def bench_on(tmp_path, seconds=60.0):
    return Bench(torch.device("cpu"), True, tmp_path, time.monotonic() + seconds, lambda _: None)


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    """Of the script as it is called, from end to end."""
    path = tmp_path_factory.mktemp("gpu") / "gpu.json"
    command = [sys.executable, "-m", "bench.gpu", "--device", "cpu", "--tiny", "--seconds", "240", "--out", str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # other tests run beside it
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "mean nothing" in run.stdout
    return json.loads(path.read_text())


@pytest.mark.programs
def test_the_whole_script_runs(facts):
    found = facts["parts"]
    assert list(found) == list(SHARES)
    for name, part in found.items():
        assert not part.keys() & {"error", "cut_short"}, (name, part)
    for name in networks.networks():
        part = found[name]
        assert part["left_out"] == {}
        assert part["forward"].keys() == {str(2**k) for k in range(part["width"].bit_length())}
        assert part["saturated"]["seconds"].keys() == part["latency"]["seconds"].keys() == report.WHO.keys()
        assert part["tick"].keys() == {"1", str(part["width"])}
    assert found["served"]["answered"] == found["served"]["requests"] > 0
    assert failed(found) == []


@pytest.mark.programs
def test_every_figure_of_the_script_is_on_the_page(facts):
    """Only the tests of the CUDA path have no counts without a card."""
    assert len(list(report.gpu_summary(facts["parts"]))) == 9
    page = report.gpu_section(facts)
    for network in networks.networks().values():
        assert page.count(f"| {network.title}, ") == len(facts["parts"][network.name]["forward"]) + 2


def test_the_shipped_network_is_measured_with_its_own_weights(tmp_path):
    """Only the tiny one, which the script is tried with, has random weights."""
    shipped = networks.networks()[networks.SHIPPED_NAME]
    folder = shipped.folder(tmp_path, torch.device("cpu"))
    assert checkpoint.load(folder).net.config == shipped.config
    assert not any(tmp_path.iterdir())


class Runner:
    """Its ticks are computed when they are waited for."""

    def __init__(self, ahead):
        self.ahead, self.pending, self.most, self.read = ahead, deque(), 0, []

    def advance(self, lanes, width, exact):
        tick = Tick(self)
        self.pending.append(tick)
        self.most = max(self.most, len(self.pending))
        for lane in lanes:
            lane.cursor += 1
        return tick

    def read_output(self, lane):
        assert not self.pending
        self.read.append(lane)
        return torch.zeros(1)


class Tick:
    def __init__(self, runner):
        self.runner = runner

    def wait(self):
        assert self.runner.pending.popleft() is self
        return 0.0


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_as_many_ticks_are_pending_as_the_runner_takes(ahead):
    runner = Runner(ahead)
    lanes = [Lane(plan(steps), 0) for steps in (5, 7)]
    assert len(engine.LaneLoop(runner).run(lanes, 2)) == 2
    assert (runner.most, runner.read, [lane.cursor for lane in lanes]) == (ahead + 1, lanes, [5, 7])


def test_a_part_that_takes_too_long_keeps_what_it_found(tmp_path):
    def endless(_, found):
        found["first"] = 1
        while True:
            time.sleep(0.01)

    def broken(_, found):
        found["first"] = 1
        raise ValueError("no")

    for part, key, value in ((endless, "cut_short", True), (broken, "error", "ValueError: no")):
        found = {}
        take(part, found, bench_on(tmp_path, 0.2))
        assert (found["first"], found[key]) == (1, value)
        assert found["took_seconds"] < 5
    assert failed({"slow": {"cut_short": True}, "served": found, "tests": {"status": 1}}) == ["served", "tests"]


def test_time_limits_can_be_nested():
    """The inner one ends first, and the outer still ends."""
    seen = []
    began = time.monotonic()

    def sleep_twice():
        try:
            with timing.within(0.1):
                time.sleep(5)
        except timing.Overrun:
            seen.append(time.monotonic() - began)
        time.sleep(5)

    with pytest.raises(timing.Overrun), timing.within(0.6):
        sleep_twice()
    assert seen[0] < 0.6 < time.monotonic() - began < 5


def test_the_first_round_warms_up_and_the_last_ends_in_time():
    calls = []
    found = timing.alternate({"a": lambda: calls.append("a") or 1.0, "b": lambda: calls.append("b") or 2.0}, rounds=3)
    assert found == {"a": [1.0] * 3, "b": [2.0] * 3}
    assert "".join(calls) == "abababab"
    assert timing.alternate({"a": lambda: time.sleep(0.05) or 1.0}, rounds=100, limit=0) == {"a": [1.0]}


def test_a_card_is_timed_by_its_own_events(monkeypatch):
    """Whatever the host's clock says: 20 calls of 5 ms on a card that has been on for long."""
    now = [1000.0]

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = now[0]

        def synchronize(self):
            pass

        def elapsed_time(self, other):
            return other.at - self.at

    def work():
        now[0] += 5.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    assert timing.device_seconds(work, 20, torch.device("cuda")) == pytest.approx(0.005)


def test_figures_are_summarized():
    found = timing.summarize_ratios([2.0, 6.0, 4.0], [1.0, 2.0, 1.0])
    assert found == {"median": 3.0, "q1": 2.0, "q3": 4.0, "repeats": 3}
    assert timing.summarize([5.0]) == {"median": 5.0, "q1": 5.0, "q3": 5.0, "repeats": 1}


def test_served_images_are_compared_with_full_forwards_of_the_same_widths():
    found = served.compare({4: 10, 8: 5}, 60.0, 20.0, {4: 0.05, 8: 0.1})  # 80 rows in a second
    assert found == {"images_per_second": 3.0, "bare_images_per_second": 4.0, "share": 0.75}


def test_pytest_is_understood():
    line = "2 failed, 12 passed, 1 skipped, 3 warnings, 1 error in 3.21s"
    assert suite.counts(line) == {"passed": 12, "failed": 2, "errors": 1, "skipped": 1}
    assert suite.counts("no tests ran in 0.01s") == {"passed": 0, "failed": 0, "errors": 0, "skipped": 0}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    bench = bench_on(tmp_path_factory.mktemp("small"))
    return bench, engine.load(bench, networks.networks(tiny=True)[networks.MAIN], max_width=4)


def test_without_diffusers_the_rest_is_measured(small, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    bench, ours = small
    found = {"steps": 2, "left_out": {}}
    assert beside.contestants(bench, ours, found).keys() == {"unstir"}
    assert found["left_out"].keys() == {"diffusers", "compiled"}


def test_another_network_is_no_contestant(small):
    """The same shape with other weights would be as fast, and show nothing."""
    _, ours = small
    pipelines.eager(ours)
    other = networks.random(networks.TINY, seed=5)
    swapped = copy.copy(ours)
    object.__setattr__(swapped, "nets", Networks(other, other))
    with pytest.raises(pipelines.LeftOut, match="not that of the same weights"):
        pipelines.eager(swapped)


def test_the_checks_of_real_networks_pass_on_a_cpu(small):
    bench, ours = small
    outputs = outputs_of_a_lane(ours, 3)
    first = outputs["alone, width 4"]
    assert len(outputs) == 4 * len(ours.calibration.bit_identical)
    assert all(torch.equal(output, first) for output in outputs.values())
    shipped = engine.load(bench, networks.networks(tiny=True)[networks.SHIPPED_NAME])
    assert least_psnr(shipped, 2, 5) >= LEAST_PSNR


def of(median):
    return {"median": median, "q1": 0.9 * median, "q3": 1.1 * median, "repeats": 9}


def test_the_section_of_a_card_shows_its_figures():
    work = floor.work(networks.CIFAR)
    network = {
        "title": "DDPM for CIFAR-10",
        "parameters": 35_746_307,
        "row_operations": work.row_operations,
        "row_bytes": work.row_bytes,
        "weight_bytes": work.weight_bytes,
        "width": 512,
        "forward": {"1": of(4e-4), "512": of(work.operations(512) / (0.5 * 700e12))},
        "tick": {"1": {"overhead": of(1e-4)}},
        "left_out": {"compiled": "not compiled within 60 s"},
        "latency": {
            "width": 1,
            "seconds": {"unstir": of(0.025), "diffusers": of(0.5)},
            "times_faster": {"diffusers": of(20.0)},
        },
        "took_seconds": 30.0,
        "cut_short": True,
    }
    parts = {
        "ceilings": {"operations_per_second": of(700e12), "bytes_per_second": of(4e12), "took_seconds": 8.0},
        networks.MAIN: network,
        "served": {"error": "RuntimeError: no", "took_seconds": 2.0},
    }
    page = report.gpu_section(
        {"circumstances": {"device": "cuda", "card": "A Card", "torch": "2.13.0"}, "parts": parts}
    )
    assert "A Card, torch 2.13.0" in page
    assert "| seconds of the check | 40 |\n| cut short | cifar10-32 |" in page
    # 88.7 MB over 4e12 are 22 µs.
    assert "35.7M | 1 | 0.022 | 0.400 | 4 % | 6 % | 100 (90 to 110) |" in page
    # 6368 G over 700e12 a second are 9.10 ms, and 11.9 GB over 4e12 less; the forward takes twice that.
    assert re.search(r"35\.7M \| 512 \| 9\.097 \| 18\.195 \| 50 % \| 16 % \|  \|", page)
    assert "| 1 | 25.0 ms | 500.0 ms (20.00 times as long) | not compiled within 60 s |" in page
    assert page.endswith("served: RuntimeError: no")
    assert "Not measured" in report.gpu_section(None)
