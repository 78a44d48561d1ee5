"""`unstir evaluate`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from app.cli.main import main
from model.diffusion.schedule import ScheduleError
from model.evaluation.scope import Scope


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "noise.npz"
    source = np.random.default_rng(0)
    images, test = (source.integers(0, 256, (count, 8, 8, 1), np.uint8) for count in (40, 20))
    labels = np.arange(40) % 3
    np.savez(path, images=images, labels=labels, test_images=test, test_labels=labels[:20])
    return path


@pytest.fixture
def evaluate(tiny, data, tmp_path):
    folders = ["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    return ["evaluate", "--checkpoint", str(tiny), "--data", str(data), *folders, "--device", "cpu"]


def test_evaluate_writes_its_page_and_prints_it(evaluate, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("app.cli.evaluate.QUICK", Scope(4, (5,), None, 2, (4,), 20))
    assert main([*evaluate, "--quick"]) == 0
    first = capsys.readouterr().out
    assert first.strip() == (tmp_path / "out" / "quality.md").read_text().strip()
    assert "| dpmpp_2m |" in first
    assert "| fixed_point, 3 refinements | 4 | 16 | 4 |" in first
    assert main([*evaluate, "--quick"]) == 0  # everything is there already
    assert capsys.readouterr().out == first


def test_the_page_names_the_command_that_repeats_it(evaluate, tiny, monkeypatch):
    seen = {}
    monkeypatch.setattr("app.cli.evaluate.run", lambda *given, **named: seen.update(named, scope=given[4]) or "")
    assert main([*evaluate, "--images", "7", "--part", "inversion"]) == 0
    assert seen["command"] == f"unstir evaluate --checkpoint weights/{tiny.name} --data noise.npz --images 7"
    assert seen["scope"] == Scope(images=7)
    assert seen["parts"] == ("inversion",)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data", "nowhere"], "--data = nowhere: no such file or folder"),
        (["--checkpoint", "nowhere"], "--checkpoint = nowhere: no such file or folder"),
        (["--data", __file__], "is neither"),
        (["--device", "tpu"], "--device = tpu: choose auto, cpu, cuda or cuda:N"),
        (["--images", "1"], "--images = 1: must be an integer from 2"),
        (["--part", "speed"], "--part = speed: choose one of samplers, inversion"),
    ],
    ids=["data", "checkpoint", "kind", "device", "images", "part"],
)
def test_evaluate_says_what_is_wrong(evaluate, capsys, arguments, words):
    assert main([*evaluate, *arguments]) == 2
    assert words in capsys.readouterr().err


def test_a_schedule_that_cannot_be_is_said_without_a_traceback(evaluate, capsys, monkeypatch):
    def refuse(*_, **__):
        raise ScheduleError("beta_schedule", "jagged", "choose linear")

    monkeypatch.setattr("app.cli.evaluate.run", refuse)
    assert main(evaluate) == 2
    assert capsys.readouterr().err == "unstir: beta_schedule = 'jagged': choose linear\n"


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"count": 1}, "has 1 image; give at least 5, of which a fifth is held out"),
        ({"count": 8}, "has 7 images of training and 1 image held out; samplers need at least 2 of each"),
        ({"count": 40}, "100 images of each sampler are compared with as many real ones of the same classes"),
        ({"count": 40, "channels": 3}, "has 3 channels, not 1"),
        ({"count": 40, "classes": 5}, "has 5 classes, the checkpoint 3; evaluate with the data that it was trained on"),
        (
            {"count": 40, "names": ["circle", "triangle", "star"]},
            "'triangle', 'star' instead of 'square', 'Big star'; evaluate",
        ),
    ],
    ids=["one", "eight", "few", "colour", "more-classes", "other-classes"],
)
def test_data_that_a_checkpoint_cannot_be_compared_with(evaluate, tmp_path, capsys, arrays, words):
    count, channels, names = arrays["count"], arrays.get("channels", 1), arrays.get("names", [])
    content = {"images": np.zeros((count, 8, 8, channels), np.uint8)}
    if count > 8:
        content["labels"] = np.arange(count) % arrays.get("classes", 3)
    if names:
        content["names"] = np.array(names)
    np.savez(tmp_path / "other.npz", **content)
    assert main([*evaluate, "--quick", "--data", str(tmp_path / "other.npz")]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("unstir")]
    assert words in line
    assert not (tmp_path / "work").exists()  # it was seen before anything was computed


def test_a_page_that_cannot_be_written_is_one_line(evaluate, capsys, monkeypatch):
    def full(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr("app.cli.evaluate.run", full)
    assert main(evaluate) == 1
    assert capsys.readouterr().err == "unstir: No space left on device\n"
