"""A run on disk: its state is read and judged here, and what a resumed run must have in common with it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from model.checkpoint import Card
from model.output import write_atomically
from model.training.recipe import Recipe, TrainingError

STATE = "state.pt"
KEYS: dict[str, type] = {
    "recipe": dict,
    "net": dict,
    "ema": dict,
    "optimizer": dict,
    "precision": str,
    "step": int,
    "seconds": float,
    "loss": float,
}
MADE = {"classes", "null_class", "training", "numbers", "sha256"}  # of a card: what a run says of itself
GIVEN = {each.name for each in fields(Card)} - MADE  # what people say of it


def read_state(path: Path) -> dict[str, Any]:
    """Everything that :meth:`model.training.trainer.Trainer.save_state` wrote, on the CPU.

    Raises:
        TrainingError: it is not there, or is no whole state.
    """
    if not path.exists():
        raise TrainingError(f"{path} does not exist; leave out --resume to start a run")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises almost anything for bytes that it did not write
        raise damaged(path) from error
    if not isinstance(state, dict) or any(not isinstance(state.get(key), kind) for key, kind in KEYS.items()):
        raise damaged(path)
    return state


def damaged(path: Path) -> TrainingError:
    """The error about a state that cannot be used."""
    return TrainingError(f"{path} is damaged; put a good copy in its place, or delete it and start again")


def read_recipe(out: Path) -> Recipe:
    """The recipe with which the run in ``out`` was last trained.

    Raises:
        TrainingError: no run is there, or a damaged one.
    """
    return recipe_of(out / STATE, read_state(out / STATE))


def recipe_of(path: Path, state: dict[str, Any]) -> Recipe:
    """The recipe of a state that was read from ``path``."""
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in state["recipe"].items()}
    try:
        return Recipe(**values)
    except TypeError as error:
        raise damaged(path) from error


def check_network(path: Path, state: dict[str, Any], recipe: Recipe, channels: int) -> None:
    """A run keeps the network that it began with.

    Args:
        channels: of the images.

    Raises:
        TrainingError: recipe and images make another one.
    """
    for key in ("size", "channels", "layers", "attention", "head_dim", "groups"):
        was, now = state["recipe"].get(key), getattr(recipe, key)
        if was != (list(now) if isinstance(now, tuple) else now):
            raise TrainingError(f"{path}: was trained with {key} = {was}, not {now}; keep it, or use another --out")
    weight = state["net"].get("conv_in.weight")
    if weight is not None and weight.shape[1] != channels:
        raise TrainingError(f"{path}: was trained on images of {weight.shape[1]} channels, these have {channels}")


def check_classes(path: Path, state: dict[str, Any], now: Sequence[str]) -> None:
    """A run keeps its classes, by name and order: a label would mean something else from here on.

    States of older versions hold no classes; their card does.

    Raises:
        TrainingError: the data has others.
    """
    was = state.get("classes")
    if was is None:
        was = _read_card(path.with_name("card.json")).get("classes")
    if was is None or list(was) == list(now):
        return
    remedy = "keep their names and order, or use another --out"
    if len(was) != len(now):
        raise TrainingError(f"{path}: was trained with {_count(was)}, the data has {_count(now)}; {remedy}")
    k = next(k for k in range(len(was)) if was[k] != now[k])
    raise TrainingError(f"{path}: was trained with other classes: {k} was {was[k]!r}, now it is {now[k]!r}; {remedy}")


def _count(classes: Sequence[str], shown: int = 10) -> str:
    if not classes:
        return "no classes"
    more = f" and {len(classes) - shown} more" if len(classes) > shown else ""
    return f"{len(classes)} class{'es' * (len(classes) > 1)} ({', '.join(classes[:shown])}{more})"


def read_facts(out: Path) -> dict[str, Any]:
    """What people said of the run in ``out``: its card without what the run itself puts there; empty without a card.

    Raises:
        TrainingError: the card cannot be read.
    """
    return {key: value for key, value in _read_card(out / "card.json").items() if key in GIVEN}


def background_of(facts: dict[str, Any]) -> tuple[int, int, int]:
    """RGB behind the images: the card's, so that images are read here as the service reads those that are uploaded.

    Raises:
        TrainingError: no colour.
    """
    text = facts.get("background", Card.background)
    if not re.fullmatch("#[0-9a-fA-F]{6}", str(text)):
        raise TrainingError(f"background {text!r} is no colour of the form #rrggbb")
    red, green, blue = bytes.fromhex(text[1:])
    return red, green, blue


def update_facts(out: Path, facts: dict[str, Any]) -> None:
    """Put new facts into the card at once: a run that is killed before its next checkpoint has them on resumption."""
    content = _read_card(out / "card.json")
    if content and facts:
        write_atomically(out / "card.json", json.dumps({**content, **facts}, indent=2, ensure_ascii=False) + "\n")


def _read_card(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (ValueError, OSError, RecursionError) as error:
        raise TrainingError(f"{path} cannot be read ({error}); mend it, or delete it") from error
    if not isinstance(content, dict):
        raise TrainingError(f"{path}: expected an object, found {type(content).__name__}; mend it, or delete it")
    return content


def plain(recipe: Recipe) -> dict[str, Any]:
    """A recipe as a state holds it, with lists for tuples."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(recipe).items()}
