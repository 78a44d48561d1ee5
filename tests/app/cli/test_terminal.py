"""How the command line words what is wrong, and how it names itself."""

from __future__ import annotations

import sys

import pytest

from app.cli import terminal
from app.cli.terminal import CommandError, complain, explain, fault, flag, program


def test_a_fault_names_the_flag_the_value_and_the_remedy(capsys):
    assert complain(CommandError(fault(flag("max_width"), "a b", "take one"), fault("--clip", True, "no"))) == 2
    assert capsys.readouterr().err == "unstir: --max-width = 'a b': take one\nunstir: --clip = true: no\n"


class Wrong(ValueError):
    field, value, remedy = "head_dim", 3, "take 4"


def test_errors_of_the_model_name_a_flag_only_where_there_is_one():
    with pytest.raises(CommandError, match=r"^--head-dim = 3: take 4$"), explain(Wrong, flags={"head_dim"}):
        raise Wrong("head_dim = 3: take 4")
    with pytest.raises(CommandError, match=r"^head_dim = 3: take 4$"), explain(Wrong):
        raise Wrong("head_dim = 3: take 4")
    with pytest.raises(KeyError), explain(Wrong):
        raise KeyError


@pytest.mark.parametrize(
    ("called", "on_path", "named"),
    [
        ("{venv}/bin/unstir", True, ["unstir"]),
        ("{venv}/bin/unstir", False, ["{venv}/bin/unstir"]),
        ("other/bin/unstir", True, ["other/bin/unstir"]),
        ("{root}/app/__main__.py", True, ["python3", "-m", "app"]),
        (".../pytest", True, ["unstir"]),
    ],
)
def test_the_program_is_named_as_the_reader_can_call_it(monkeypatch, tmp_path, called, on_path, named):
    script = tmp_path / "bin" / "unstir"
    script.parent.mkdir()
    script.write_text("")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(script.parent) if on_path else "/nonexistent")
    monkeypatch.setattr(sys, "argv", [called.format(venv=tmp_path, root=terminal.ROOT)])
    monkeypatch.setattr(sys, "orig_argv", ["python3", "-m", "app", "sample"])
    assert program() == [part.format(venv=tmp_path) for part in named]


def test_defaults_are_shown_as_they_are_typed():
    assert terminal.shown(terminal.ROOT / "weights" / "mine") == "weights/mine"
    assert [terminal.shown(value) for value in (1.0, 1e-3, 64 << 20, (1, 2), "~/x")] == [
        "1", "0.001", "67108864", "1,2", "~/x",
    ]  # fmt: skip
