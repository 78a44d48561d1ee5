"""`unstir train`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from app.cli.main import main
from model.checkpoint import load
from model.training.recipe import Recipe, RecipeError


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
        (["--steps", "1", "--data", "nowhere"], "--data = nowhere: no such file or folder"),
        (["--steps", "1", "--data", __file__], "is neither"),
        ([], "--minutes or --steps"),
        (["--steps", "1", "--resume"], "leave out --resume"),
        (["--steps", "1", "--device", "tpu"], "--device = tpu: choose auto, cpu, cuda or cuda:N"),
        (["--steps", "1", "--groups", "3"], "--groups = 3: must divide all channels, 8, 8"),
        (["--steps", "1", "--groups", "0"], "--groups = 0: must be an integer from 1"),
        (["--steps", "1", "--head-dim", "3"], "--head-dim = 3: must divide the channels of levels with attention, 8"),
        (["--steps", "1", "--size", "9"], "--size = 9: must be a multiple of 2"),
        (
            ["--steps", "1", "--precision", "fp8"],
            "--precision = fp8: choose one of auto, fp32, bf16",
        ),
        (["--steps", "1", "--channels", "8;8"], "--channels = '8;8': must be an integer"),
        (["--steps", "1", "--channels", "0,8"], "--channels = 0,8: must all be at least 1"),
        (["--steps", "1", "--lr", "nan"], "--lr = nan: must be a number above 0"),
        (["--steps", "1.5"], "--steps = 1.5: must be an integer from 1"),
        (["--minutes", "inf"], "--minutes = inf: must be finite"),
        (["--steps", "1", "--background", "white"], "--background = white: give a colour as #rrggbb"),
        (["--steps", "1", "--name", " "], "--name = ' ': give 1 to 100 printable characters"),
        (["--steps", "1", "--classes", "a,b"], "has the classes even, odd; those given are a, b"),
    ],
    ids=lambda value: "-".join(value[-2:]) if isinstance(value, list) else "",
)
def test_train_says_what_is_wrong(data, tmp_path, capsys, arguments, words):
    assert main(["train", "--data", str(data), "--out", str(tmp_path / "out"), *TINY, *arguments]) == 2
    assert words in capsys.readouterr().err


def test_a_resumed_run_says_what_is_no_longer_as_it_began(data, tmp_path, capsys):
    train = ["train", "--data", str(data), "--out", str(tmp_path / "net"), "--device", "cpu"]
    assert main([*train, *TINY, "--precision", "fp32", "--steps", "1"]) == 0
    assert main([*train, "--steps", "2", "--resume"]) == 0
    assert "from here on" not in capsys.readouterr().out
    assert main([*train, "--steps", "3", "--resume", "--lr", "0.5"]) == 0
    assert "lr was 0.001 until now, and is 0.5 from here on" in capsys.readouterr().out


def test_several_faults_are_said_at_once(data, tmp_path, capsys):
    train = ["train", "--data", str(data), "--out", str(tmp_path / "out")]
    assert main([*train, "--lr", "0", "--batch", "none"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "unstir: --batch = none: must be an integer from 1",
        "unstir: --lr = 0: must be a number above 0",
    ]


def test_what_must_be_given_is_said(tmp_path, capsys):
    assert main(["train", "--out", str(tmp_path)]) == 2
    assert "Missing option '--data'" in capsys.readouterr().err


def test_a_fault_of_the_recipe_is_refused_in_python_too():
    with pytest.raises(RecipeError, match=r"^lr = 0: must be above 0$") as caught:
        Recipe(lr=0)
    assert (caught.value.field, caught.value.value) == ("lr", 0)
    with pytest.raises(RecipeError, match="precision = fp8: choose one of auto, fp32, bf16"):
        Recipe(precision="fp8")
    with pytest.raises(RecipeError, match="channels = "):
        Recipe(channels=())


def test_flags_replace_only_what_was_typed(monkeypatch, data, tmp_path):
    seen = []
    monkeypatch.setattr("app.cli.train.run", lambda *given, **_: seen.append(given[2]))
    monkeypatch.setattr("app.cli.train.read_recipe", lambda _: Recipe(size=16, flip=True, channels=(32, 64), lr=0.5))
    train = ["train", "--data", str(data), "--out", str(tmp_path), "--device", "cpu"]
    assert main([*train, "--resume", "--lr", "0.25", "--no-flip"]) == 0
    assert seen == [Recipe(size=16, flip=False, channels=(32, 64), lr=0.25)]


def test_the_card_is_what_was_typed_and_stays_so(data, tmp_path, monkeypatch):
    monkeypatch.setattr("model.training.run.grid", lambda net, classes: np.zeros((2, 2, 1), np.uint8))
    train = ["train", "--data", str(data), "--out", str(tmp_path / "net"), "--device", "cpu"]
    said = ["--name", "Shapes", "--background", "#FFffff", "--classes", "odd,even", "--licence", "MIT"]
    assert main([*train, *TINY, "--precision", "fp32", "--steps", "1", *said]) == 0
    assert main([*train, "--steps", "2", "--resume", "--licence", "CC0-1.0"]) == 0
    card = load(tmp_path / "net").card
    assert (card.name, card.background, card.licence) == ("Shapes", "#FFffff", "CC0-1.0")
    assert card.classes == ("odd", "even")


def test_a_run_that_diverges_ends_with_status_1_and_one_line(data, tmp_path, capsys):
    train = ["train", "--data", str(data), "--out", str(tmp_path / "net"), "--device", "cpu", "--precision", "fp32"]
    assert main([*train, *TINY, "--steps", "9", "--lr", "1e30", "--warmup", "0"]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("unstir")]
    assert line.startswith("unstir: training diverged at step ")
    assert not (tmp_path / "net" / "card.json").exists()


def test_a_folder_that_cannot_be_written_to_is_one_line(data, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    train = ["train", "--data", str(data), "--out", str(tmp_path / "file" / "net"), "--device", "cpu"]
    assert main([*train, *TINY, "--precision", "fp32", "--steps", "1"]) == 1
    assert "Not a directory" in capsys.readouterr().err
