"""Calibration: each choice from given times, and measurements of a tiny network."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from app.engine import calibration
from app.engine.calibration import Calibration, CalibrationOptions, _choose_fastest, build_networks, calibrate
from app.engine.probe import Probe, TooSmallError
from app.engine.widths import Widths
from model.checkpoint import load

CPU, CARD, OLD_CARD = torch.device("cpu"), torch.device("cuda", 0), torch.device("cuda", 1)
FOUND = Calibration(1, "channels_last", "bfloat16", 0.004, {1: 0.01}, {1: 0.02, 4: 0.04}, (1, 4))


@pytest.fixture(scope="module")
def tiny_ckpt(tiny):
    return load(tiny)


@pytest.fixture(autouse=True)
def one_thread():
    yield
    torch.set_num_threads(1)


def test_a_choice_must_be_clearly_faster_than_the_usual_one():
    times = {"usual": 1.04, "other": 1.0}
    assert _choose_fastest({key: lambda key=key: times[key] for key in times}) == "usual"
    times["usual"] = 1.06
    assert _choose_fastest({key: lambda key=key: times[key] for key in times}) == "other"


def test_one_slow_moment_does_not_decide():
    slow = itertools.chain([1.0, 9.0, 1.0], itertools.repeat(1.0))
    assert _choose_fastest({"usual": lambda: next(slow), "other": lambda: 1.0}) == "usual"


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ({1: 1.0, 2: 1.5, 4: 2.5, 8: 4.0, 16: 8.05}, (1, 2, 4, 8, 16)),  # 16 loses less than 1 % a row
        ({1: 1.0, 2: 1.5, 4: 2.5, 8: 4.0, 16: 8.2}, (1, 2, 4, 8)),
        ({1: 1.0, 2: 1.0, 4: 1.0, 8: 1.0, 16: 1.0}, (1, 2, 4, 8, 16)),
        ({1: 1.0, 2: 2.1, 4: 4.2, 8: 8.4, 16: 16.8}, (1, 2, 4)),  # the reproducible width is always kept
        ({1: 1.0, 2: 1.5, 4: 2.5, 8: 6.3}, (1, 2, 4)),  # a fifth less than the best rows/s: 16 is not tried
    ],
    ids=["nearly-as-good", "falls", "flat", "never-pays", "saturated"],
)
def test_the_cap_is_the_widest_of_the_best_throughput(tiny_ckpt, monkeypatch, seconds, expected):
    probe = Probe(tiny_ckpt, CPU)
    monkeypatch.setattr(probe, "time_forward", lambda net, width, forwards=3: seconds[width])
    assert tuple(probe.time_widths(tiny_ckpt.net, 16, 4)) == expected


def test_on_a_card_widths_are_tried_until_it_is_saturated_and_halfway_ones_filled_in(tiny_ckpt, monkeypatch):
    """Floor 1, and a row 1/32: from 64 rows on, twice the rows take nearly twice as long."""
    probe, tried = Probe(tiny_ckpt, torch.device("cuda")), []

    def seconds(net, width, forwards=3):
        tried.append(width)
        return max(1.0, width / 32) / 100

    monkeypatch.setattr(probe, "time_forward", seconds)
    assert list(probe.time_widths(tiny_ckpt.net, 256, 4)) == [1, 2, 4, 8, 12, 16, 24, 32, 48, 64]
    assert max(tried) == 64
    monkeypatch.setattr(probe, "time_forward", lambda net, width, forwards=3: 0.05 * width)
    assert list(probe.time_widths(tiny_ckpt.net, 256, 4)) == [1, 2, 4, 8]  # one row fills the card
    monkeypatch.setattr(probe, "time_forward", lambda net, width, forwards=3: 0.1 + 0.02 * width)
    assert max(probe.time_widths(tiny_ckpt.net, 256, 4)) == 8  # 0.26 s: wider ones would add too much latency


def test_no_room_for_the_reproducible_width(tiny_ckpt, monkeypatch):
    def seconds(net, width, forwards=3):
        if width > 2:
            raise torch.OutOfMemoryError("no room")
        return 1.0

    probe = Probe(tiny_ckpt, CPU)
    monkeypatch.setattr(probe, "time_forward", seconds)
    assert tuple(probe.time_widths(tiny_ckpt.net, 16, 2)) == (1, 2)
    with pytest.raises(TooSmallError, match="forward of 4 rows"):
        probe.time_widths(tiny_ckpt.net, 16, 4)


def test_forwards_on_a_card_are_timed_by_its_own_clock_but_for_the_first(tiny_ckpt, monkeypatch):
    class Event:
        now = 0.0

        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = Event.now

        def synchronize(self):
            assert self.at == Event.now, "not the last event"

        def elapsed_time(self, other):
            return other.at - self.at

    class Net:
        def __init__(self):
            self.milliseconds = iter([0.5, 3.0, 1.0, 2.0])

        def conditioning(self, t, y):
            return t

        def forward(self, x, conditioning):
            Event.now += next(self.milliseconds)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    assert Probe._time_on_card(Net(), torch.zeros(1), torch.zeros(1), 3) == pytest.approx([0.003, 0.001, 0.002])
    probe = Probe(tiny_ckpt, CARD)
    monkeypatch.setattr(probe, "inputs", lambda width: (torch.zeros(width), torch.zeros(width), None))
    assert probe.time_forward(Net(), 2) == pytest.approx(0.001)


def test_probes_have_rows_of_every_noise_level(tiny_ckpt):
    """One in each eighth of the timesteps; the rows of a narrower forward are the first of a wider one."""
    probe = Probe(tiny_ckpt, CPU)
    _, t, _ = wide = probe.inputs(8)
    assert sorted((8 * t / tiny_ckpt.schedule.T).int().tolist()) == list(range(8))
    for narrow, first in zip(probe.inputs(3), wide, strict=True):
        assert torch.equal(narrow, first[:3])


@torch.inference_mode()
def test_widths_with_other_bits_are_found(tiny_ckpt):
    def net(x, t, y):
        """A network whose rows differ in the last bit where there are eight of them."""
        return x * (1 + 2e-7 * (len(x) == 8))

    probe = Probe(tiny_ckpt, CPU)
    assert probe.find_bit_identical(net, 4, [1, 2, 4, 8]) == (1, 2, 4)


@torch.inference_mode()
@pytest.mark.parametrize(
    ("net", "found"),
    [
        (lambda x: torch.cat([x[:2], x[2:] * (1 + 2e-7)]), (1, 2)),  # the third slot on
        (lambda x: x * (1 + 0.01 * x.mean() * (len(x) > 2)), (1, 2)),  # the other rows
        (lambda x: x.flip(0).cumsum(0).flip(0), (1,)),
        (lambda x: torch.cat([x[:2], x[2:] * (1 + 2e-7)]) * (1 + 2e-7 * (len(x) == 1)), (2,)),
        (lambda x: x, (1, 2, 4)),
    ],
    ids=["slots", "batch", "both", "slots-and-one-row", "invariant"],
)
def test_where_slots_or_the_batch_change_bits_a_narrower_width_takes_its_place(tiny_ckpt, net, found):
    assert Probe(tiny_ckpt, CPU).find_bit_identical(lambda x, t, y: net(x), 4, [1, 2, 4]) == found


@torch.inference_mode()
@pytest.mark.parametrize("slot", range(7))
def test_every_row_of_a_width_is_compared_in_forwards_of_the_reproducible_width(tiny_ckpt, slot):
    """Also where that is no multiple: the last rows are then compared in a forward that overlaps the one before."""
    seen = set()

    def net(x, t, y):
        seen.add(len(x))
        x = x.clone()
        x[slot:][:1] *= 1 + 2e-7 * (len(x) == 6)
        return x

    assert Probe(tiny_ckpt, CPU).find_bit_identical(net, 4, [4, 6]) == ((4, 6) if slot == 6 else (4,))
    assert seen == {4, 6}


@torch.inference_mode()
def test_the_error_of_a_network_is_relative_and_that_of_the_worst_row(tiny_ckpt):
    probe = Probe(tiny_ckpt, CPU)

    def off(x, t, y):
        return x * torch.where(t == probe.inputs(4)[1][3], 1.25, 1.0)[:, None, None, None]

    assert probe.relative_error(off, lambda x, t, y: x) == pytest.approx(0.25, rel=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_measure_on_a_tiny_network(tiny_ckpt, dtype):
    found = calibrate(tiny_ckpt, CPU, CalibrationOptions(8, 4, threads=1, dtype=dtype), None)
    assert (found.threads, found.dtype) == (1, dtype)
    assert 4 in found.exact
    assert 4 in found.bit_identical
    assert set(found.bit_identical) <= set(found.exact)
    networks = build_networks(tiny_ckpt, CPU, found)
    assert (networks.fast is networks.exact) == (dtype == "float32")
    assert (found.error is None) == (dtype == "float32")
    assert any("same bits at widths" in line for line in found.log_lines)


def test_bfloat16_must_be_native_near_and_faster(tiny_ckpt, monkeypatch):
    wanted = CalibrationOptions(4, 2, threads=1)
    monkeypatch.setattr(calibration, "bfloat16_is_native", lambda: False)
    assert calibrate(tiny_ckpt, CPU, wanted, None).dtype == "float32"
    monkeypatch.setattr(calibration, "bfloat16_is_native", lambda: True)
    curves = itertools.cycle([{1: 1.0, 2: 1.8}, {1: 0.5, 2: 0.9}])
    monkeypatch.setattr(Probe, "time_widths", lambda *_: next(curves))
    monkeypatch.setattr(Probe, "relative_error", lambda *_: 0.009)
    assert calibrate(tiny_ckpt, CPU, wanted, None).dtype == "bfloat16"
    monkeypatch.setattr(Probe, "relative_error", lambda *_: 0.011)
    assert calibrate(tiny_ckpt, CPU, wanted, None).dtype == "float32"
    monkeypatch.setattr(Probe, "relative_error", lambda *_: 0.001)
    curves = itertools.cycle([{1: 1.0, 2: 1.8}, {1: 0.99, 2: 1.79}])
    assert calibrate(tiny_ckpt, CPU, wanted, None).dtype == "float32"
    # What counts is the best time of a row, at any width.
    curves = itertools.cycle([{1: 1.0, 2: 1.0}, {1: 0.5, 2: 1.0}])
    assert calibrate(tiny_ckpt, CPU, wanted, None).dtype == "float32"
    curves = itertools.cycle([{1: 1.0, 2: 1.0}, {1: 1.0, 2: 0.9}])
    assert calibrate(tiny_ckpt, CPU, wanted, None).dtype == "bfloat16"


@pytest.mark.parametrize(
    ("threads", "others", "expected"),
    [
        (None, (), ("packed", 2)),
        (None, (("packed", 2),), ("packed", 4)),  # the fastest, but its bits are not those of the usual choice
        (None, (("packed", 2), ("packed", 4)), ("channels_last", 2)),
        (4, (), ("packed", 4)),
    ],
    ids=["fastest", "other-bits", "other-layout", "threads-given"],
)
def test_layout_and_threads_are_the_fastest_with_the_usual_bits(tiny_ckpt, monkeypatch, threads, others, expected):
    seconds = {("channels_last", 4): 1.0, ("packed", 4): 0.8, ("channels_last", 2): 0.9, ("packed", 2): 0.5}
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(calibration, "build_network", lambda checkpoint, device, layout, dtype, exact: layout)
    probe = Probe(tiny_ckpt, CPU)
    monkeypatch.setattr(probe, "compute", lambda net, width, threads: torch.tensor((net, threads) in others))
    monkeypatch.setattr(probe, "time_forward", lambda net, width: seconds[net, torch.get_num_threads()])
    torch.set_num_threads(4)
    options = CalibrationOptions(8, 4, threads)
    assert calibration._choose_layout_on_cpu(tiny_ckpt, CPU, options, probe) == expected
    assert torch.get_num_threads() == expected[1]


def test_a_calibration_gives_each_kind_of_forward_its_own_widths():
    assert FOUND.widths(exact=False) == Widths((1,), (0.01,))
    assert FOUND.widths(exact=True) == Widths((1, 4), (0.02, 0.04), (1, 4))


@pytest.mark.parametrize(
    ("device", "asked", "expected"),
    [
        (CARD, None, ["bfloat16", "tf32"]),
        (CARD, "tf32", ["tf32"]),
        (CARD, "float32", []),
        (OLD_CARD, None, []),
        (OLD_CARD, "bfloat16", ["bfloat16"]),
        (CPU, None, ["bfloat16"]),
        (CPU, "float32", []),
    ],
    ids=str,
)
def test_dtypes_that_are_tried(monkeypatch, device, asked, expected):
    """Cards have bfloat16 and TF32 from compute capability 8.0 on; this processor is taken to have bfloat16."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0) if device == CARD else (7, 5))
    monkeypatch.setattr(calibration, "bfloat16_is_native", lambda: True)
    assert calibration._candidate_dtypes(device, asked) == expected


@pytest.mark.parametrize(
    ("usable", "error", "expected"),
    [
        (True, 1e-6, "fused"),
        (True, 2e-4, "channels_last"),
        (True, None, "channels_last"),
        (False, 0.0, "channels_last"),
    ],
    ids=["right", "wrong", "fails", "missing"],
)
def test_the_fused_layout_is_chosen_where_its_kernels_are_right(tiny_ckpt, monkeypatch, usable, error, expected):
    def relative_error(self, net, exact):
        assert (net, exact) == ("fused", "channels_last")
        if error is None:
            raise RuntimeError("a compiler's error")
        return error

    monkeypatch.setattr(calibration.kernels, "usable", lambda device: usable)
    monkeypatch.setattr(calibration, "build_network", lambda checkpoint, device, layout, dtype, exact: layout)
    monkeypatch.setattr(Probe, "relative_error", relative_error)
    assert calibration._choose_layout_on_card(tiny_ckpt, CARD, Probe(tiny_ckpt, CARD)) == expected


def test_the_update_has_kernels_on_a_card_with_the_fused_layout_alone():
    machine_triton = pytest.importorskip("model.diffusion.machine_triton")
    found = [calibration._update_kernels(*each) for each in ((CARD, "fused"), (CARD, "channels_last"), (CPU, "fused"))]
    assert found == [machine_triton, None, None]


def test_a_card_is_measured_again_when_its_kernels_can_be_used(tiny_ckpt, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    keys = []
    for usable in (False, True, True):
        monkeypatch.setattr(calibration.kernels, "usable", lambda device, usable=usable: usable)
        keys.append(calibration._cache_key(tiny_ckpt, CARD, CalibrationOptions(8, 4)))
    assert keys[0] != keys[1] == keys[2]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "another card")
    assert calibration._cache_key(tiny_ckpt, CARD, CalibrationOptions(8, 4)) not in keys


def test_a_calibration_is_kept_for_the_same_circumstances_alone(tiny_ckpt, tmp_path, monkeypatch):
    measured = []
    monkeypatch.setattr(calibration, "_measure", lambda *arguments: measured.append(arguments) or FOUND)
    folder = tmp_path / "deep" / "cache"
    for wanted in (CalibrationOptions(8, 4), CalibrationOptions(8, 4), CalibrationOptions(16, 4)):
        assert calibrate(tiny_ckpt, CPU, wanted, folder) == FOUND
    assert len(measured) == 2
    assert len(list(folder.iterdir())) == 2


def test_a_broken_file_is_ignored(tiny_ckpt, tmp_path, monkeypatch):
    monkeypatch.setattr(calibration, "_measure", lambda *_: FOUND)
    calibrate(tiny_ckpt, CPU, CalibrationOptions(8, 4), tmp_path)
    [file] = tmp_path.iterdir()
    for content in ("", "{", "[]", json.dumps({"fast": 1}), json.dumps({"threads": 1})):
        file.write_text(content)
        assert calibrate(tiny_ckpt, CPU, CalibrationOptions(8, 4), tmp_path) == FOUND


def test_a_folder_that_cannot_be_written_does_no_harm(tiny_ckpt, tmp_path, monkeypatch):
    monkeypatch.setattr(calibration, "_measure", lambda *_: FOUND)
    (tmp_path / "file").write_text("")
    assert calibrate(tiny_ckpt, CPU, CalibrationOptions(8, 4), tmp_path / "file" / "cache") == FOUND
    assert calibrate(tiny_ckpt, CPU, CalibrationOptions(8, 4), Path("/proc/nowhere")) == FOUND


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"fast": {}}, id="no-widths"),
        pytest.param({"exact": {}}, id="no-exact-widths"),
        pytest.param({"fast": {"1": 0.0}}, id="no-time"),
        pytest.param({"fast": {"1": float("nan")}}, id="nan"),
        pytest.param({"exact": {"4": 0.04, "1": 0.02}}, id="falling"),
        pytest.param({"fast": {"-1": 0.1}}, id="negative"),
        pytest.param({"threads": 0}, id="no-threads"),
        pytest.param({"threads": "two"}, id="threads-in-words"),
        pytest.param({"bit_identical": [3]}, id="a-width-that-is-not-there"),
        pytest.param({"bit_identical": []}, id="no-bit-identical-width"),
        pytest.param({"layout": "diagonal"}, id="layout"),
        pytest.param({"dtype": "int8"}, id="dtype"),
        pytest.param({"share": None}, id="no-share"),
        pytest.param({"share": "all"}, id="share-in-words"),
    ],
)
def test_a_senseless_file_is_measured_again_with_a_warning(tiny_ckpt, tmp_path, monkeypatch, caplog, change):
    monkeypatch.setattr(calibration, "_measure", lambda *_: FOUND)
    options = CalibrationOptions(4, 4)
    calibrate(tiny_ckpt, CPU, options, tmp_path)
    (file,) = tmp_path.iterdir()
    sound = file.read_text()
    file.write_text(json.dumps(json.loads(sound) | change))
    assert calibrate(tiny_ckpt, CPU, options, tmp_path) == FOUND
    assert f"{file} is ignored" in caplog.text
    assert calibration._read(file) == FOUND


class Machine:
    """Its clocks: what is measured takes 10 s; other load leaves a thread ``share`` of a core."""

    def __init__(self, monkeypatch):
        self.share, self.measured, self.now, self.busy = 1.0, 0, 0.0, 0.0
        monkeypatch.setattr(calibration, "MIN_SHARE", 0.9)
        monkeypatch.setattr(calibration, "_measure", self.measure)
        monkeypatch.setattr(calibration, "_look_for_load", lambda: self.share)
        monkeypatch.setattr(calibration.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(calibration.time, "thread_time", lambda: self.busy)

    def measure(self, *_):
        self.measured += 1
        self.now += 10
        self.busy += 10 * self.share
        return replace(FOUND, error=float(self.measured))


def test_a_calibration_beside_other_load_is_used_until_there_is_none(tiny_ckpt, tmp_path, monkeypatch, caplog):
    machine = Machine(monkeypatch)
    warned, errors = [], []
    for share in (0.5, 0.89, 0.95, 0.5, 1.0):
        machine.share = share
        caplog.clear()
        errors.append(calibrate(tiny_ckpt, CPU, CalibrationOptions(4, 4), tmp_path).error)
        warned.append(f"with {100 * share:.0f} % of a core" in caplog.text)
    assert errors == [1, 1, 2, 2, 2]  # measured at the first start, and once the load is gone
    assert warned == [True, False, False, False, False]


def test_the_better_of_two_calibrations_beside_other_load_is_kept(tiny_ckpt, tmp_path, monkeypatch):
    machine = Machine(monkeypatch)
    monkeypatch.setattr(calibration, "_look_for_load", lambda: 1.0)  # the load comes back
    for share, kept in ((0.5, 1), (0.4, 1), (0.7, 3), (0.95, 4), (0.1, 4)):
        machine.share = share
        assert calibrate(tiny_ckpt, CPU, CalibrationOptions(4, 4), tmp_path).error == kept


def test_other_load_is_seen(monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(calibration.time, "perf_counter", lambda: 0.01 * next(clock))
    monkeypatch.setattr(calibration.time, "thread_time", itertools.count(0, 0.06).__next__)
    assert calibration._look_for_load() == pytest.approx(0.06 / 0.12)  # began, until, ten looks, and the end
