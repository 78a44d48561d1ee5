"""Card: what the weights do not say, as it is in ``card.json``."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from model.checkpoint.facts import LINE, CheckpointError, Facts, is_line
from model.output import counted

CARD = "card.json"


@dataclass(frozen=True)
class Card:
    """What the weights do not say.

    Attributes:
        classes: names of the labels, in the order of their indices; different in more than case.
        null_class: index of "no label", or None if none was trained.
        background: "#rrggbb", behind uploaded images that are transparent or too small.
        training: the recipe, and what came of it.
        numbers: measurements.
        sha256: of the weights file; checked when it is loaded.
    """

    name: str
    description: str = ""
    licence: str = "unknown"
    data: str = ""
    classes: tuple[str, ...] = ()
    null_class: int | None = None
    background: str = "#000000"
    training: dict[str, Any] = field(default_factory=dict)
    numbers: dict[str, Any] = field(default_factory=dict)
    sha256: str = ""


def read_card(folder: Path, sha256: str, embeddings: int | None) -> Card:
    """The card of a checkpoint, or one that says the little that is known without.

    Args:
        sha256: of the weights.
        embeddings: ``num_class_embeds`` of the network, None if it is not class-conditional.

    Raises:
        CheckpointError: the card is not of its form, or of another network.
    """
    if not (folder / CARD).is_file():
        name = folder.resolve().name
        if embeddings is None:
            return Card(name, sha256=sha256)
        return Card(name, f"No {CARD}: {UNKNOWN}", classes=_numbered(embeddings), sha256=sha256)
    facts = Facts.read(folder / CARD)
    known = [each.name for each in fields(Card)]
    if unknown := sorted(facts.content.keys() - set(known)):
        raise facts.fault(unknown[0], f"no such key; a card has {', '.join(known)}")
    names = _read_classes(facts)
    if embeddings is None:
        null = None
        if names:
            raise facts.fault("classes", "names classes, but the network is not class-conditional; leave them out")
        if facts.given("null_class"):
            raise facts.fault("null_class", "the network is not class-conditional; leave it out")
    else:
        null = facts.integer("null_class", None, 0, embeddings - 1, null=True)
        names = names or _numbered(embeddings - (null == embeddings - 1))
        _check_count(facts, names, null, embeddings)
    background = facts.content.get("background", "#000000")
    if not isinstance(background, str) or not re.fullmatch("#[0-9a-fA-F]{6}", background):
        raise facts.fault("background", "is no colour of the form #rrggbb")
    if facts.text("sha256", "") not in ("", sha256):
        raise facts.fault("sha256", f"the weights' sha256 is {sha256}; take the weights that belong to the card")
    return Card(
        facts.text("name", None, line=True),
        facts.text("description", ""),
        facts.text("licence", "unknown"),
        facts.text("data", ""),
        names,
        null,
        background,
        _read_object(facts, "training"),
        _read_object(facts, "numbers"),
        sha256,
    )


UNKNOWN = "class names and the null class are unknown, so that labels are indices and there is no guidance."


def sha256_on_card(folder: Path) -> str:
    """The hash of the weights, as far as the card says; "" if it does not."""
    try:
        return Facts.read(folder / CARD).text("sha256", "")
    except CheckpointError:
        return ""


def _numbered(count: int) -> tuple[str, ...]:
    return tuple(map(str, range(count)))


def _read_classes(facts: Facts) -> tuple[str, ...]:
    names = facts.content.get("classes", [])
    if not isinstance(names, list):
        raise facts.fault("classes", "must be a list of strings")
    seen: dict[str, str] = {}
    for i, name in enumerate(names):
        if not isinstance(name, str):
            raise CheckpointError(facts.file, "must be a string", f"classes[{i}]", name)
        if not is_line(name):
            raise CheckpointError(facts.file, LINE, f"classes[{i}]", name)
        if (former := seen.setdefault(name.casefold(), name)) is not name or names.index(name) != i:
            same = json.dumps(former, ensure_ascii=True)
            remedy = f"another class is {same}, and labels are compared without case; rename one"
            raise CheckpointError(facts.file, remedy, f"classes[{i}]", name)
    return tuple(names)


def _check_count(facts: Facts, names: tuple[str, ...], null: int | None, embeddings: int) -> None:
    """Each embedding has a name; the null class may go without if it is the last."""
    last = embeddings - 1
    if len(names) == embeddings or (null == last and len(names) == last):
        return
    what = f"names {counted(len(names), 'class', 'classes')}, and the network has {embeddings} (num_class_embeds)"
    raise facts.fault("classes", f"{what}; name them all, or all but the last where null_class is {last}")


def _read_object(facts: Facts, key: str) -> dict[str, Any]:
    value = facts.content.get(key, {})
    if not isinstance(value, dict):
        raise facts.fault(key, "must be an object")
    return value
