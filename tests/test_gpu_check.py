"""`make gpu-check` tried without a card: the whole of it with tiny networks, and its parts."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import time
from collections import deque

import pytest
import torch

from app.engine.jobs import Lane
from app.engine.networks import Networks
from bench.gpu import beside, clock, engine, kernels, networks, numbers, page, pipelines, served, suite
from bench.gpu.__main__ import SHARES, Report, take, wrong
from bench.gpu.bench import Bench
from bench.gpu.claims import ASKED, claims
from bench.server import ROOT
from model.diffusion.inversion.registry import INVERSIONS
from model.diffusion.samplers import SAMPLERS
from tests.engines import plan


def bench_on(tmp_path, seconds=60.0):
    return Bench(torch.device("cpu"), True, tmp_path, time.monotonic() + seconds, lambda _: None)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Of the script as it is called, from end to end."""
    path = tmp_path_factory.mktemp("gpu") / "gpu.json"
    command = [sys.executable, "-m", "bench.gpu", "--device", "cpu", "--tiny", "--seconds", "240", "--out", str(path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("\n") == 1 + len(ASKED)
    assert "mean nothing" in run.stdout
    assert "MET" not in run.stdout
    return json.loads(path.read_text())


def test_the_whole_script_runs(report):
    found = report["parts"]
    assert list(found) == list(SHARES)
    for name, part in found.items():
        assert not part.keys() & {"error", "cut_short"}, (name, part)
    for name in ("cifar10-32", "celebahq-256", "avatars-32"):
        part = found[name]
        assert part["left_out"] == {}
        assert part["forward"].keys() == {str(2**k) for k in range(part["width"].bit_length())}
        assert part["saturated"]["seconds"].keys() == part["latency"]["seconds"].keys() == page.WHO.keys()
        assert part["tick"].keys() == {"1", str(part["width"])}
    assert found["numbers"]["samplers"].keys() == SAMPLERS.keys()
    assert found["numbers"]["inversions"].keys() == INVERSIONS.keys()
    assert found["bits"]["compared"] >= 5
    assert found["served"]["answered"] == found["served"]["requests"] > 0
    assert wrong(found) == []


def test_every_figure_of_the_script_finds_its_claim(report):
    """Only the tests of the CUDA path have nothing to say without a card."""
    missing = [claim.what for claim in claims(report["parts"]) if claim.measured.startswith("not measured")]
    assert missing == [ASKED[0].what]
    assert "Tiny networks: these figures mean nothing" in page.fields(report)["gpu_card"]


class Flights:
    """A runner whose ticks are done when they are waited for."""

    def __init__(self, ahead):
        self.ahead, self.out, self.most, self.ended = ahead, deque(), 0, []

    def advance(self, lanes, width, exact):
        pending = PendingTick(self)
        self.out.append(pending)
        self.most = max(self.most, len(self.out))
        for lane in lanes:
            lane.cursor += 1
        return pending

    def read_output(self, lane):
        assert not self.out
        self.ended.append(lane)
        return torch.zeros(1)


class PendingTick:
    def __init__(self, runner):
        self.runner = runner

    def wait(self):
        assert self.runner.out.popleft() is self
        return 0.0


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_as_many_ticks_fly_as_the_runner_takes(ahead):
    runner = Flights(ahead)
    lanes = [Lane(plan(steps), 0) for steps in (5, 7)]
    assert len(engine.Rides(runner).walk(lanes, 2)) == 2
    assert (runner.most, runner.ended, [lane.cursor for lane in lanes]) == (ahead + 1, lanes, [5, 7])


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


def test_parts_stay_until_they_are_found_anew_on_the_same_card(tmp_path):
    path = tmp_path / "gpu.json"
    for card, merge, kept in (("A", True, []), ("A", True, ["tests"]), ("A", False, []), ("B", True, [])):
        report = Report(path, {"circumstances": {"card": card}, "tiny": False}, merge=merge)
        assert list(report.facts["parts"]) == kept
        report.part("tests")["passed"] = 1
        report.tell("tests")
        assert json.loads(path.read_text())["parts"] == {"tests": {"passed": 1}}


def test_patience_within_patience():
    """The inner one ends first, and the outer still ends."""
    seen = []
    began = time.monotonic()

    def sleep_twice():
        try:
            with clock.within(0.1):
                time.sleep(5)
        except clock.Overrun:
            seen.append(time.monotonic() - began)
        time.sleep(5)

    with pytest.raises(clock.Overrun), clock.within(0.6):
        sleep_twice()
    assert seen[0] < 0.6 < time.monotonic() - began < 5


def test_the_first_round_warms_up_and_the_last_ends_in_time():
    calls = []
    found = clock.in_rounds({"a": lambda: calls.append("a") or 1.0, "b": lambda: calls.append("b") or 2.0}, rounds=3)
    assert found == {"a": [1.0] * 3, "b": [2.0] * 3}
    assert "".join(calls) == "abababab"
    assert clock.in_rounds({"a": lambda: time.sleep(0.05) or 1.0}, rounds=100, limit=0) == {"a": [1.0]}


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
    assert clock.seconds(work, 20, torch.device("cuda")) == pytest.approx(0.005)


def test_figures_are_summed_up():
    assert clock.ratios([2.0, 6.0, 4.0], [1.0, 2.0, 1.0]) == {"median": 3.0, "q1": 2.0, "q3": 4.0, "repeats": 3}
    assert clock.summary([5.0]) == {"median": 5.0, "q1": 5.0, "q3": 5.0, "repeats": 1}


def test_psnr_is_that_of_pixels_from_minus_one_to_one():
    a = torch.zeros(3, 8, 8)
    assert numbers.psnr(a, a + 0.2) == pytest.approx(20.0, abs=1e-4)
    assert numbers.psnr(a, a) == pytest.approx(200.0)
    assert numbers.psnr(a + 1, a + 5) == pytest.approx(200.0)  # what an image cannot show does not count


def test_served_images_stand_beside_full_forwards_of_the_same_widths():
    found = served.beside_bare({4: 10, 8: 5}, 60.0, 20.0, {4: 0.05, 8: 0.1})  # 80 rows in a second
    assert found == {"images_per_second": 3.0, "bare_images_per_second": 4.0, "share": 0.75}


def test_kernels_are_told_apart_by_their_names():
    busy = {
        "sm90_xmma_fprop_implicit_gemm_bf16": kernels.Kernel(0.5, 2),
        "void at::native::vectorized_elementwise_kernel<4>": kernels.Kernel(0.1, 1),
        "void cudnn::ops::nchwToNhwcKernel": kernels.Kernel(0.05, 1),
        "_whole": kernels.Kernel(0.15, 1),
        "pytorch_flash::flash_fwd_kernel": kernels.Kernel(0.1, 1),
    }
    found = kernels.account(busy, 1.0)
    assert found["kinds"] == {
        "convolutions and products": 0.5,
        "norms": 0.15,
        "number by number": 0.1,
        "attention": 0.1,
        "moving and laying out": 0.05,
    }
    assert found["busy_share"] == pytest.approx(0.9)
    assert [each["seconds"] for each in found["kernels"]] == [0.5, 0.15, 0.1, 0.1, 0.05]


def test_pytest_is_understood():
    line = "2 failed, 12 passed, 1 skipped, 3 warnings, 1 error in 3.21s"
    assert suite.counts(line) == {"passed": 12, "failed": 2, "errors": 1, "skipped": 1}
    assert suite.counts("no tests ran in 0.01s") == {"passed": 0, "failed": 0, "errors": 0, "skipped": 0}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    network = networks.measured(tiny=True)[0]
    bench = bench_on(folder)
    return bench, engine.load(bench, network.folder(folder, bench.device), 2)


def test_without_diffusers_the_rest_is_measured(small, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    bench, ours = small
    found = {"steps": 2, "left_out": {}}
    assert beside.contestants(bench, ours, found).keys() == {"unstir"}
    assert found["left_out"].keys() == {"diffusers", "compiled"}


def test_another_network_is_no_contestant(small):
    """The same shape with other weights would be as fast, and prove nothing."""
    _, ours = small
    pipelines.eager(ours)
    other = networks.random(networks.TINY, seed=5)
    swapped = copy.copy(ours)
    object.__setattr__(swapped, "networks", Networks(other, other))
    with pytest.raises(pipelines.LeftOut, match="not that of the same weights"):
        pipelines.eager(swapped)
