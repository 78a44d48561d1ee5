"""The command line as a whole: its help, its exit status, and how it says what is wrong."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from app import __version__
from app.cli.main import COMMANDS, main
from app.operations.requests import InterpolateRequest, InvertRequest, SampleRequest
from app.settings import SHIPPED, Settings
from model.diffusion.samplers import SAMPLERS
from tests.readme import README

FLAGS = {"sample": SampleRequest, "invert": InvertRequest, "interpolate": InterpolateRequest, "serve": Settings}
ARGUMENTS = {"image", "a", "b", "latents"}
LIGHT = ("serve", "loadtest", "simulate")  # commands whose help must not wait for torch


def unstir(*arguments: str, python: tuple[str, ...] = (), **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, *python, "-m", "app", *arguments],
        cwd=README.parent,
        env={**os.environ, **environment},
        capture_output=True,
        check=False,
    )


@pytest.fixture
def help_of(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: str) -> str:
        assert main([*arguments, "--help"]) == 0
        return capsys.readouterr().out

    return run


def test_the_list_of_commands(help_of, capsys):
    text = help_of()
    for name, (_, summary) in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(summary)}$", text, re.MULTILINE)
    assert main([]) == 2  # a command is missing
    assert capsys.readouterr().out == text


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"unstir {__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_for_any_machine(help_of, command):
    text = help_of(command)
    assert str(README.parent) not in text
    assert str(Path.home()) not in text
    assert "`" not in text  # no Markdown
    if command not in ("call", "serve", "loadtest"):
        assert not re.search(r"(?<![\w.])/(model|sample|invert|interpolate|jobs)\b|\bserve", text)  # there is no server


@pytest.mark.parametrize(("command", "model"), FLAGS.items())
def test_help_has_a_flag_for_every_field_with_its_choices_and_default(help_of, command, model):
    text = help_of(command)
    schema = model.model_json_schema()["properties"]
    for name, field in model.model_fields.items():
        if command != "serve" and name in ARGUMENTS:
            continue
        (entry,) = re.findall(rf"^  --{name.replace('_', '-')}(?![\w-]).*(?:\n {{6,}}.*)*", text, re.MULTILINE)
        for choice in schema[name].get("enum", []):
            assert re.search(rf"[<|]{choice}[|>]", entry)
        if field.default not in (None, True, False, ""):
            shown = "weights/avatars-32" if field.default == SHIPPED / "avatars-32" else f"{field.default}"
            assert f"default: {shown.removesuffix('.0')}" in entry
        if command == "serve":
            assert f"UNSTIR_{name.upper()}]" in entry


def test_help_says_ranges(help_of):
    assert "[1 to 3]" in help_of("sample")
    assert "[default: 0.001; above 0]" in help_of("train")
    assert "[default: 0; from 0 and below 1]" in help_of("train")
    assert "--check / --no-check" in help_of("invert")
    assert f"<{'|'.join(SAMPLERS)}>" in help_of("interpolate")


@pytest.mark.parametrize("command", [(), *((each,) for each in LIGHT)], ids=["list", *LIGHT])
def test_help_does_not_wait_for_torch(command):
    done = unstir(*command, "--help", python=("-X", "importtime"))
    assert done.returncode == 0
    assert b"| typer" in done.stderr
    assert not re.search(rb"\| +(torch|uvicorn)$", done.stderr, re.MULTILINE)


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "utf-8"])
def test_help_is_printed_in_any_encoding(encoding):
    done = unstir("serve", "--help", PYTHONIOENCODING=encoding)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"--port" in done.stdout


def complete(line: str) -> list[str]:
    """What bash would be offered at the end of a line."""
    words = line.split(" ")
    done = unstir(COMP_WORDS=line, COMP_CWORD=str(len(words) - 1), _UNSTIR_COMPLETE="complete_bash")
    return done.stdout.decode().split()


def test_completion_of_commands_flags_and_choices():
    assert complete("unstir s") == ["serve", "sample", "simulate"]
    assert complete("unstir serve --lo") == ["--log-level", "--log-format"]
    assert complete("unstir serve --log-format ") == ["text", "json"]
    assert complete("unstir serve --dtype t") == ["tf32"]


@pytest.mark.parametrize(
    ("arguments", "lines"),
    [
        (["serv"], [r"No such command 'serv'. Did you mean 'serve'\?", "see unstir --help"]),
        (["paint"], ["No such command 'paint'.*", "see unstir --help"]),
        (
            ["simulate", "--tracee"],
            [r"No such option: --tracee \(Possible options: --trace\)", "see unstir simulate --help"],
        ),
        (["call", "GET"], ["Missing argument 'path'.*", "see unstir call --help"]),
        (["serve", "--port"], ["Option '--port' requires an argument.", "see unstir --help"]),
    ],
    ids=["typo", "command", "flag", "argument", "value"],
)
def test_what_cannot_be_parsed_is_said(capsys, arguments, lines):
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert len(said.err.splitlines()) == len(lines)
    for line, words in zip(said.err.splitlines(), lines, strict=True):
        assert re.fullmatch(f"unstir: {words}", line)


def test_a_command_that_is_interrupted(monkeypatch):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("app.cli.simulation.command.parse_widths", interrupt)
    assert main(["simulate"]) == 130
