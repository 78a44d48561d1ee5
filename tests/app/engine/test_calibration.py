"""What is found about the machine: each choice from made-up times, and what is measured on a tiny network."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

from app.engine import calibration
from app.engine.calibration import Calibration, CalibrationOptions, _choose_fastest, build_networks, calibrate
from app.engine.probe import Probe, TooSmallError
from model.checkpoint import load

CPU = torch.device("cpu")
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
        ({1: 1.0, 2: 2.1, 4: 4.2, 8: 8.4, 16: 16.8}, (1, 2, 4)),  # the canonical width is kept in any case
    ],
    ids=["nearly-as-good", "falls", "flat", "never-pays"],
)
def test_the_cap_is_the_widest_of_the_best_throughput(tiny_ckpt, monkeypatch, seconds, expected):
    probe = Probe(tiny_ckpt, CPU)
    monkeypatch.setattr(probe, "time_forward", lambda net, width, forwards=3: seconds[width])
    assert tuple(probe.time_widths(tiny_ckpt.net, 16, 4)) == expected


def test_on_a_card_widths_are_tried_until_it_is_saturated_and_halfway_ones_filled_in(tiny_ckpt, monkeypatch):
    """Floor 1, and a row 1/32: from 64 rows on, twice the rows take nearly twice as long."""
    probe, tried = Probe(tiny_ckpt, torch.device("cuda")), []

    def seconds(form, width, forwards=3):
        tried.append(width)
        return max(1.0, width / 32) / 100

    monkeypatch.setattr(probe, "time_forward", seconds)
    assert list(probe.time_widths(tiny_ckpt.net, 256, 4)) == [1, 2, 4, 8, 12, 16, 24, 32, 48, 64]
    assert max(tried) == 64
    monkeypatch.setattr(probe, "time_forward", lambda form, width, forwards=3: 0.05 * width)
    assert list(probe.time_widths(tiny_ckpt.net, 256, 4)) == [1, 2, 4, 8]  # one row fills the card
    monkeypatch.setattr(probe, "time_forward", lambda form, width, forwards=3: 0.1 + 0.02 * width)
    assert max(probe.time_widths(tiny_ckpt.net, 256, 4)) == 8  # 0.26 s: nobody wants to wait for wider ones


def test_no_room_for_the_canonical_width(tiny_ckpt, monkeypatch):
    def seconds(net, width, forwards=3):
        if width > 2:
            raise torch.OutOfMemoryError("no room")
        return 1.0

    probe = Probe(tiny_ckpt, CPU)
    monkeypatch.setattr(probe, "time_forward", seconds)
    assert tuple(probe.time_widths(tiny_ckpt.net, 16, 2)) == (1, 2)
    with pytest.raises(TooSmallError, match="forward of 4 rows"):
        probe.time_widths(tiny_ckpt.net, 16, 4)


@torch.inference_mode()
def test_widths_of_other_bits_are_told_apart(tiny_ckpt):
    def moody(x, t, y):
        """A network whose rows differ in the last bit where there are eight of them."""
        return x * (1 + 2e-7 * (len(x) == 8))

    probe = Probe(tiny_ckpt, CPU)
    assert probe.find_bit_identical(moody, 4, [1, 2, 4, 8]) == (1, 2, 4)


@torch.inference_mode()
@pytest.mark.parametrize(
    ("moody", "found"),
    [
        (lambda x: torch.cat([x[:2], x[2:] * (1 + 2e-7)]), (1, 2)),  # the third slot on
        (lambda x: x * (1 + 0.01 * x.mean() * (len(x) > 2)), (1, 2)),  # company
        (lambda x: x.flip(0).cumsum(0).flip(0), (1,)),
        (lambda x: x, (1, 2, 4)),
    ],
    ids=["slots", "company", "both", "steady"],
)
def test_where_slots_or_company_matter_a_narrower_width_is_canonical(tiny_ckpt, moody, found):
    assert Probe(tiny_ckpt, CPU).find_bit_identical(lambda x, t, y: moody(x), 4, [1, 2, 4]) == found


@torch.inference_mode()
def test_the_error_of_a_form_is_relative_and_that_of_the_worst_row(tiny_ckpt):
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
    forms = build_networks(tiny_ckpt, CPU, found)
    assert (forms.fast is forms.exact) == (dtype == "float32")
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


def test_what_was_found_is_kept_for_the_same_circumstances_alone(tiny_ckpt, tmp_path, monkeypatch):
    measured = []
    monkeypatch.setattr(calibration, "_measure", lambda *arguments: measured.append(arguments) or FOUND)
    folder = tmp_path / "deep" / "cache"
    for wanted in (CalibrationOptions(8, 4), CalibrationOptions(8, 4), CalibrationOptions(16, 4)):
        assert calibrate(tiny_ckpt, CPU, wanted, folder) == FOUND
    assert len(measured) == 2
    assert len(list(folder.iterdir())) == 2


def test_a_broken_file_is_left_aside(tiny_ckpt, tmp_path, monkeypatch):
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
