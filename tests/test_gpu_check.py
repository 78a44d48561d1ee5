"""`make gpu-check` tried without a card: the whole of it with tiny networks, its floors, its claims and its page."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
import time
from collections import deque

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from app.engine.forms import Nets
from app.engine.lane import Lane
from bench.gpu import beside, clock, engine, floor, kernels, networks, numbers, page, pipelines, served, suite
from bench.gpu.__main__ import SHARES, Report, take, wrong
from bench.gpu.bench import Bench
from bench.gpu.claims import ASKED, NOT_YET, claims
from bench.server import ROOT
from model.methods import METHODS
from model.samplers import SAMPLERS
from model.unet import UNet
from model.unet_config import UNetConfig
from tests.engines import plan

CONFIGS = {
    "cifar": networks.CIFAR,
    "celebahq": networks.CELEBAHQ,
    "shipped": networks.shipped_config(),
    "tiny": networks.TINY,
}


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
    assert found["numbers"]["inversions"].keys() == METHODS.keys()
    assert found["bits"]["compared"] >= 5
    assert found["served"]["answered"] == found["served"]["requests"] > 0
    assert wrong(found) == []


def test_every_figure_of_the_script_finds_its_claim(report):
    """Only the tests of the CUDA path have nothing to say without a card."""
    missing = [claim.what for claim in claims(report["parts"]) if claim.measured.startswith("not measured")]
    assert missing == [ASKED[0].what]
    assert "Tiny networks: these figures mean nothing" in page.fields(report)["gpu_card"]


@pytest.mark.parametrize(("config", "count"), [(networks.CIFAR, 35_746_307), (networks.CELEBAHQ, 113_673_219)])
def test_networks_have_the_size_of_the_papers(config, count):
    assert networks.parameters(config) == count


def test_random_weights_say_something_of_unit_size():
    net = networks.random(networks.TINY, seed=0)
    x = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    assert 0.5 < float(net(x, torch.full((16,), 300.0)).std()) < 2
    assert sum(p.numel() for p in net.parameters()) == networks.parameters(networks.TINY) < 100_000


@pytest.mark.parametrize("name", CONFIGS)
def test_operations_are_those_that_torch_counts(name):
    """All of UNet's but what timestep and class say to the blocks, which is looked up."""
    config, rows = CONFIGS[name], 2
    with torch.device("meta"):
        net = UNet(config)
        x, t = torch.empty(rows, config.in_channels, *config.size), torch.zeros(rows)
        y = None if config.num_class_embeds is None else torch.zeros(rows, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        net(x, t, y)
    told = [module for name, module in net.named_modules() if name.endswith(("time_emb_proj", "linear_1", "linear_2"))]
    assert counter.get_total_flops() == floor.work(config).operations(rows) + sum(
        2 * rows * m.weight.numel() for m in told
    )


def test_bytes_are_those_of_a_network_counted_by_hand():
    """One level of four channels on 8x8: conv_in, three blocks of four channels, two of eight to four, conv_out."""
    config = UNetConfig(
        sample_size=8,
        block_out_channels=(4,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        layers_per_block=1,
        norm_num_groups=2,
        add_attention=False,
    )
    channels = (3 + 4) + 3 * 2 * (4 + 4) + 2 * ((8 + 4) + (4 + 4) + (8 + 4)) + (4 + 3)
    weights = 4 * (27 + 1) + (6 + 2) * 4 * (36 + 1) + 2 * 4 * (72 + 1) + 2 * 4 * (8 + 1) + 3 * (36 + 1)
    work = floor.work(config)
    assert (work.row_bytes, work.weight_bytes) == (2 * 64 * channels, 2 * weights)
    assert work.bytes(3) == 2 * (weights + 3 * 64 * channels)


def test_what_is_doubled_or_projected_thrice_is_read_once():
    """With a level above, and attention: by differences to the same network without them."""
    base = UNetConfig(
        sample_size=8,
        block_out_channels=(4, 4),
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=2,
        add_attention=False,
    )
    tokens = 16 * 4  # 4x4 pixels of four channels, in the middle
    with_attention = UNetConfig(**{**base.__dict__, "add_attention": True, "attention_head_dim": 2})
    # x to q, k and v; those to their mixture; that to the output.
    assert floor.work(with_attention).row_bytes - floor.work(base).row_bytes == 2 * tokens * (
        (1 + 3) + (3 + 1) + (1 + 1)
    )
    one_level = floor.work(UNetConfig(**{**base.__dict__, "sample_size": 4, "block_out_channels": (4,),
        "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}))  # fmt: skip
    # On 8x8 the same blocks but the middle's, once; besides, a picture is halved, and one is doubled.
    ends = 2 * tokens * 4 * ((3 + 4) + (4 + 3)) / 4
    small = one_level.row_bytes - 2 * 16 * ((3 + 4) + (4 + 3))
    middle = 2 * tokens * 4 * 2
    large = 4 * (small - middle)
    assert floor.work(base).row_bytes == small + large + ends + 2 * (256 + tokens) + 2 * (tokens + 256)


def test_the_floor_is_the_slower_of_operations_and_bytes():
    work = floor.Work(row_operations=100, row_bytes=10, weight_bytes=1000)
    assert work.seconds(1, rate=100, bandwidth=10) == pytest.approx(101)
    assert work.seconds(1000, rate=100, bandwidth=1000) == pytest.approx(1000)


class Flights:
    """A runner whose ticks are done when they are waited for."""

    def __init__(self, ahead):
        self.ahead, self.out, self.most, self.ended = ahead, deque(), 0, []

    def advance(self, lanes, width, exact):
        flight = Flight(self)
        self.out.append(flight)
        self.most = max(self.most, len(self.out))
        for lane in lanes:
            lane.cursor += 1
        return flight

    def end(self, lane):
        assert not self.out
        self.ended.append(lane)
        return torch.zeros(1)


class Flight:
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
    assert numbers.psnr(a + 1, a + 5) == pytest.approx(200.0)  # what a picture cannot show does not count


def test_served_pictures_stand_beside_full_forwards_of_the_same_widths():
    found = served.beside_bare({4: 10, 8: 5}, 60.0, 20.0, {4: 0.05, 8: 0.1})  # 80 rows in a second
    assert found == {"pictures_per_second": 3.0, "bare_pictures_per_second": 4.0, "share": 0.75}


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
    object.__setattr__(swapped, "nets", Nets(other, other))
    with pytest.raises(pipelines.LeftOut, match="not that of the same weights"):
        pipelines.eager(swapped)


def of(median):
    return {"median": median, "q1": 0.9 * median, "q3": 1.1 * median, "repeats": 9}


@pytest.fixture
def figures():
    """What a card might be found to do, that meets everything."""
    work = floor.work(networks.CIFAR)
    forward = {"1": of(4e-4), "512": of(work.operations(512) / (0.5 * 700e12))}
    tick = {
        "1": {"tick": of(5e-4), "forward": of(4e-4), "overhead": of(1e-4), "share": of(0.25), "width": 1},
        "512": {"tick": of(1.85e-2), "forward": of(1.82e-2), "overhead": of(3e-4), "share": of(0.016), "width": 512},
    }
    cifar = {
        "parameters": 35_746_307,
        "row_operations": work.row_operations,
        "row_bytes": work.row_bytes,
        "weight_bytes": work.weight_bytes,
        "steps": 50,
        "width": 512,
        "forward": forward,
        "tick": tick,
        "left_out": {},
        "latency": {
            "seconds": {"unstir": of(0.025), "diffusers": of(0.5), "compiled": of(0.05)},
            "times_faster": {"diffusers": of(20.0), "compiled": of(2.0)},
        },
        "saturated": {
            "seconds": {"unstir": of(1.0), "diffusers": of(3.0), "compiled": of(1.4)},
            "times_faster": {"diffusers": of(3.0), "compiled": of(1.4)},
        },
    }
    walk = {"steps": 20, "error": 1e-5, "bound": 1e-4, "largest": 1.0, "within": True}
    parts = {
        "tests": {"passed": 40, "failed": 0, "errors": 0, "skipped": 1, "status": 0},
        "ceilings": {
            "matmul": {"side": 8192, "operations_per_second": of(700e12)},
            "copy": {"bytes": 1 << 32, "bytes_per_second": of(4e12)},
        },
        "cifar10-32": cifar,
        "numbers": {
            "samplers": {name: dict(walk) for name in SAMPLERS},
            "inversions": {name: dict(walk) for name in METHODS},
            "pictures": {"dtype": "bfloat16", "fast": {"least": 40.0}, "exact": {"least": 110.0}},
        },
        "bits": {"compared": 9, "differing": [], "control": True},
        "start": {"first_seconds": 41.0, "again_seconds": 17.0},
        "served": {
            "share": 0.95,
            "clients": 64,
            "pictures_of_a_request": 16,
            "mix": "10:1",
            "seconds": 12.0,
            "pictures_per_second": 950.0,
            "bare_pictures_per_second": 1000.0,
            "requests": 500,
            "answered": 500,
        },
        "kernels": kernels.account({"gemm": kernels.Kernel(0.01, 40.0)}, 0.018) | {"width": 512},
        "inductor": {
            "1": {"compiled": of(6e-4), "by_hand": of(4e-4), "times_as_long": of(1.5), "compile_seconds": 9.0}
        },
    }
    for part in parts.values():
        part["took_seconds"] = 30.0
    card = {"device": "cuda", "card": "A Card", "torch": "2.13.0", "driver": "1.2"}
    return {"circumstances": card, "tiny": False, "seconds": 480, "parts": parts}


def test_claims_can_be_met(figures):
    assert [claim.what for claim in claims(figures["parts"]) if not claim.met] == []
    assert wrong(figures["parts"]) == []


WORSE = (
    lambda parts: parts["tests"].update(failed=1),
    lambda parts: parts["numbers"]["samplers"]["heun"].update(within=False, error=1e-3),
    lambda parts: parts["numbers"]["pictures"]["fast"].update(least=34.9),
    lambda parts: parts["bits"]["differing"].append("in company, width 8"),
    lambda parts: parts["cifar10-32"]["latency"]["times_faster"].update(diffusers=of(4.9)),
    lambda parts: parts["cifar10-32"]["latency"]["times_faster"].update(compiled=of(1.0)),
    lambda parts: parts["cifar10-32"]["saturated"]["times_faster"].update(diffusers=of(1.9)),
    lambda parts: parts["ceilings"]["matmul"].update(operations_per_second=of(800e12)),
    lambda parts: parts["cifar10-32"]["tick"]["512"].update(share=of(0.05)),
    lambda parts: parts["cifar10-32"]["tick"]["1"].update(overhead=of(1.5e-4)),
    lambda parts: parts["served"].update(share=0.89),
    lambda parts: parts["start"].update(first_seconds=60.0),
    lambda parts: parts["served"].update(took_seconds=400.0),
)


@pytest.mark.parametrize("number", range(len(ASKED)))
def test_every_claim_can_fail(figures, number):
    """Each by its own figure, and no other with it; or for want of that figure."""
    WORSE[number](figures["parts"])
    assert [i for i, claim in enumerate(claims(figures["parts"])) if not claim.met] == [number]


@pytest.mark.parametrize(
    ("worse", "number"),
    [
        (lambda parts: parts["tests"].update(passed=0), 0),
        (lambda parts: parts["numbers"]["samplers"].pop("unipc"), 1),
        (lambda parts: parts["numbers"]["inversions"].pop("ddim"), 1),
        (lambda parts: parts["numbers"]["pictures"].update(dtype="float32"), 2),
        (lambda parts: parts["bits"].update(compared=1), 3),
        (lambda parts: parts["bits"].update(control=False), 3),
        (lambda parts: parts["cifar10-32"]["latency"]["times_faster"].pop("compiled"), 5),
        (lambda parts: parts["served"].update(answered=499), 10),
        (lambda parts: parts["kernels"].update(cut_short=True), 12),
    ],
)
def test_nothing_is_met_for_want_of_figures(figures, worse, number):
    worse(figures["parts"])
    assert [i for i, claim in enumerate(claims(figures["parts"])) if not claim.met] == [number]


def test_without_a_card_nothing_is_claimed():
    assert all(claim.measured == NOT_YET and not claim.met for claim in claims(None))
    assert all(claim.measured.startswith("not measured") and not claim.met for claim in claims({}))


def test_wrong_numbers_end_the_check_with_an_error(figures):
    parts = figures["parts"]
    parts["tests"]["status"] = 1
    parts["numbers"]["inversions"]["obelm"]["within"] = False
    parts["numbers"]["pictures"]["fast"]["least"] = 30.0
    parts["bits"]["differing"].append("again")
    parts["served"]["error"] = "RuntimeError: no"
    assert wrong(parts) == ["served", "tests", "numbers: float32", "numbers: pictures", "bits"]


def test_the_page_shows_what_was_measured(figures):
    fields = page.fields(figures)
    assert "A Card" in fields["gpu_card"]
    assert "700e12 operations" in fields["gpu_card"]
    assert NOT_YET not in fields["gpu_claims"]
    assert "**not met**" not in fields["gpu_claims"]
    # 6368 G over 700e12 a second are 9.10 ms, and 11.9 GB over 4e12 less; the forward takes twice that.
    assert re.search(
        r"35\.7M \| 512 \| 6,368\.2 \| 11,888\.0 \| 9\.097 \| 18\.195 \| 50\.0 % \|", fields["gpu_forwards"]
    )
    # 88.7 MB over 4e12 are 22 µs, fifty times of which are 1.1 ms.
    assert re.search(r"one, ms \| 1 \| 1\.109 \| 25\.000 \| 500\.000 \| 50\.000 \|", fields["gpu_pictures"])
    assert re.search(r"a second \| 512 \| 1,125\.6 \| 512\.0 \| 170\.7 \| 365\.7 \|", fields["gpu_pictures"])
    assert "64 clients" in fields["gpu_more"]
    assert "| `gemm` | 40 | 10.000 | 55.6 % |" in fields["gpu_more"]
    assert "| 1 | 0.600 | 0.400 | 1.50 (quartiles 1.35 to 1.65) |" in fields["gpu_more"]


def test_the_page_says_what_is_not_measured_yet(figures):
    fields = page.fields(None)
    assert fields["gpu_claims"].count(NOT_YET) == len(ASKED)
    assert " met " not in fields["gpu_claims"]
    assert "| 12.4 | 88.7 |" in fields["gpu_forwards"]
    assert fields["gpu_more"] == ""
    del figures["parts"]["cifar10-32"]["saturated"]
    figures["parts"]["cifar10-32"]["left_out"]["compiled"] = "not compiled within 60 s"
    assert "left out: not compiled within 60 s" in page.fields(figures)["gpu_pictures"]
