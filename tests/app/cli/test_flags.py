"""Flags are what a model declares, and values are what it makes of what was typed."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import typer
from pydantic import BaseModel, ConfigDict, Field

from app.cli.flags import as_flags, flags_of, read, with_flags
from app.cli.terminal import CommandError
from app.settings import SHIPPED


class Declared(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    kind: Literal["one", "two"] = Field("one", description="See `big_count`, or `elsewhere`.\n\nNot this.")
    big_count: int | None = Field(None, ge=1, description="How many.")
    share: float = Field(0.5, gt=0, le=1)
    sure: bool | None = None
    names: list[str | None] | None = None
    sizes: tuple[int, ...] = (1, 2)
    label: int | str | None = None
    where: Path = SHIPPED / "mine"
    needed: str = Field(description="Needed.")


@pytest.fixture
def run(capsys):
    app = typer.Typer(add_completion=False, rich_markup_mode=None, context_settings={"max_content_width": 100})
    seen: list[dict[str, Any]] = []

    @app.command()
    @with_flags(flags_of(Declared, environment="X_"))
    def command(first: str = "1", **flags: Any) -> None:
        seen.append({"first": first, **flags})

    def call(*arguments: str) -> Any:
        app(arguments, standalone_mode=False)
        return seen.pop() if seen else capsys.readouterr().out

    return call


def test_help(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    text = " ".join(run("--help").split())
    for entry in (
        "--first <str> [default: 1]",
        "--kind <one|two> See --big-count, or elsewhere. [default: one; X_KIND]",
        "--big-count <int> How many. [from 1; X_BIG_COUNT]",
        "--share <float> [default: 0.5; up to 1 and above 0; X_SHARE]",
        "--sure / --no-sure [X_SURE]",
        "--names <a,b,...> [X_NAMES]",
        "--sizes <a,b,...> [default: 1,2; X_SIZES]",
        "--label <text> [X_LABEL]",
        "--where <path> [default: weights/mine; X_WHERE]",
        "--needed <text> Needed. [X_NEEDED] [required]",
    ):
        assert entry in text
    assert "Not this" not in text


def test_what_was_not_typed_is_none_and_the_models_default(run):
    flags = run("--needed", "x")
    assert flags.pop("first") == "1"
    assert {name for name, value in flags.items() if value is not None} == {"needed"}
    assert read(Declared, flags) == Declared(needed="x")


def test_values_are_the_models(run):
    typed = "--kind two --big-count 3 --share 1 --no-sure --names a,b --sizes 4,5 --label 7 --where w --needed x"
    declared = read(Declared, run(*typed.split()))
    assert declared.model_dump() == {
        "kind": "two", "big_count": 3, "share": 1.0, "sure": False, "names": ["a", "b"], "sizes": (4, 5), "label": "7",
        "where": Path("w"), "needed": "x",
    }  # fmt: skip


def test_a_list_may_be_json(run):
    flags = run("--needed", "x", "--names", '["a, b", null]')
    assert read(Declared, flags).names == ["a, b", None]
    assert read(Declared, run("--needed", "x", "--names", "[a")).names == ["[a"]


def test_every_fault_is_named_once():
    flags = {"kind": "three", "big_count": "0", "label": None, "sizes": "1,x", "needed": "it's"}
    with pytest.raises(CommandError) as caught:
        read(Declared, flags)
    assert caught.value.lines == (
        "--kind = three: choose one of one, two",
        "--big-count = 0: must be an integer from 1",
        "--sizes = x: must be an integer",
    )
    with pytest.raises(CommandError, match=r"^NEEDED is missing$"):
        read(Declared, {}, str.upper)


def test_fields_as_they_are_typed_again(run):
    fields = {"kind": "two", "big_count": 3, "sure": False, "label": "Big star", "needed": "x"}
    again = run(*as_flags(fields))
    assert read(Declared, again).model_dump(exclude_unset=True) == fields
    assert as_flags({"sure": True}) == ["--sure"]
