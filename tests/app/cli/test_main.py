"""The command line, as one types it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from app.__main__ import main
from app.settings import Settings
from model.checkpoint import load
from model.evaluation.scope import Scope


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "shapes.npz"
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 1), np.uint8)
    np.savez(path, images=images, labels=np.arange(40) % 2, names=np.array(["even", "odd"]))
    return path


TINY = ["--size", "8", "--channels", "8,8", "--attention", "4", "--groups", "4", "--head-dim", "4", "--batch", "4"]


def test_train_then_resume_then_load(data, tmp_path, capsys):
    out = tmp_path / "net"
    train = ["train", "--data", str(data), "--out", str(out), "--device", "cpu", "--precision", "fp32", *TINY]
    assert main([*train, "--steps", "2", "--licence", "CC0-1.0", "--description", "Noise."]) == 0
    assert main(["train", "--data", str(data), "--out", str(out), "--device", "cpu", "--steps", "4", "--resume"]) == 0
    card = load(out).card
    assert (card.classes, card.null_class, card.training["steps"]) == (("even", "odd"), 2, 4)
    assert card.training["channels"] == [8, 8]
    assert len(list((out / "samples").iterdir())) == 2
    assert main([*train, "--steps", "4"]) == 2
    assert "continue that run with --resume" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--steps", "1", "--data", "nowhere"], "nowhere is neither"),
        ([], "--minutes or --steps"),
        (["--steps", "1", "--resume"], "leave out --resume"),
        (["--steps", "1", "--device", "tpu"], "device = tpu"),
        (["--steps", "1", "--groups", "3"], "groups = 3: must be at least 1, and divide all channels, 8, 8"),
        (["--steps", "1", "--head-dim", "3"], "head_dim = 3: must be at least 1, and divide the channels"),
        (["--steps", "1", "--size", "9"], "size = 9: must be a multiple of 2"),
        (["--steps", "1", "--precision", "fp8"], "precision = fp8"),
    ],
    ids=["data", "bound", "resume", "device", "groups", "head-dim", "size", "precision"],
)
def test_train_says_what_is_wrong(data, tmp_path, capsys, arguments, words):
    assert main(["train", "--data", str(data), "--out", str(tmp_path / "out"), *TINY, *arguments]) == 2
    assert words in capsys.readouterr().err


def test_train_says_how_channels_are_written(data, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["train", "--data", str(data), "--out", str(tmp_path / "out"), "--channels", "8;8"])
    assert "argument --channels: '8;8': numbers with commas between them, as 32,64,128" in capsys.readouterr().err


def test_a_resumed_run_says_what_is_no_longer_as_it_began(data, tmp_path, capsys):
    train = ["train", "--data", str(data), "--out", str(tmp_path / "net"), "--device", "cpu"]
    assert main([*train, *TINY, "--precision", "fp32", "--steps", "1"]) == 0
    assert main([*train, "--steps", "2", "--resume"]) == 0
    assert "from here on" not in capsys.readouterr().out
    assert main([*train, "--steps", "3", "--resume", "--lr", "0.5"]) == 0
    assert "lr was 0.001 until now, and is 0.5 from here on" in capsys.readouterr().out


def test_help_names_every_setting(capsys):
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    text = capsys.readouterr().out
    for name in Settings.model_fields:
        assert "--" + name.replace("_", "-") in text
        assert f"UNSTIR_{name.upper()}" in text.replace("\n", "").replace(" ", "")


def test_an_unknown_command_is_refused(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["paint"])
    assert stopped.value.code == 2
    assert "serve" in capsys.readouterr().err


def test_a_setting_from_the_environment_and_a_flag_that_overrides_it(monkeypatch, tiny):
    seen: list[Settings] = []
    monkeypatch.setattr("app.__main__.serve", lambda settings: seen.append(settings) or 0)
    monkeypatch.setenv("UNSTIR_PORT", "9001")
    monkeypatch.setenv("UNSTIR_MAX_IMAGES", "3")
    assert main(["serve", "--checkpoint", str(tiny), "--port", "9002"]) == 0
    assert (seen[0].port, seen[0].max_images, seen[0].checkpoint) == (9002, 3, tiny)


def test_evaluate_writes_its_page_and_prints_it(tiny, tmp_path, capsys, monkeypatch):
    test = np.random.default_rng(1).integers(0, 256, (20, 8, 8, 1), np.uint8)
    labels = np.arange(40) % 3
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 1), np.uint8)
    np.savez(tmp_path / "noise.npz", images=images, labels=labels, test_images=test, test_labels=labels[:20])
    monkeypatch.setattr("app.__main__.QUICK", Scope(4, (5,), None, 2, (4,), 20))
    evaluate = ["evaluate", "--checkpoint", str(tiny), "--data", str(tmp_path / "noise.npz"), "--device", "cpu"]
    evaluate += ["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work"), "--quick"]
    assert main(evaluate) == 0
    first = capsys.readouterr().out
    assert first.strip() == (tmp_path / "out" / "quality.md").read_text().strip()
    assert "| dpmpp_2m |" in first
    assert "| fixed_point, 3 refinements | 4 | 16 | 4 |" in first
    assert main(evaluate) == 0  # everything is there already
    assert capsys.readouterr().out == first
    assert main([*evaluate, "--images", "1"]) == 2
    assert "--images = 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data", "nowhere"], "nowhere is neither"),
        (["--checkpoint", "nowhere"], "nowhere"),
        (["--device", "tpu"], "device = tpu"),
    ],
    ids=["data", "checkpoint", "device"],
)
def test_evaluate_says_what_is_wrong(data, tiny, tmp_path, capsys, arguments, words):
    given = ["--data", str(data), "--checkpoint", str(tiny), "--out", str(tmp_path), "--work", str(tmp_path)]
    assert main(["evaluate", *given, *arguments]) == 2
    assert words in capsys.readouterr().err
