"""How messages word what is wrong with a field: its name, its value, the remedy."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

MUST_BE = "must be "
MAX_NAME = 100  # characters of a name that is compared with others
MAX_KNOWN = 64  # names that one is compared with, which takes 4 ms of the event loop; of 1,000 classes it would take 65


class Unquoted(str):
    """Stands for a value that is not echoed, by what it is: ``300 bytes``, ``an array``."""

    __slots__ = ()


MISSING = Unquoted("missing")


def word_fault(field: str, value: object, remedy: str) -> str:
    """One fault in a line."""
    if value is MISSING:
        return f"{field} is missing: {remedy}"
    if isinstance(value, Unquoted):
        return f"{field} ({value}): {remedy}"
    return f"{field} = {_short(value)}: {remedy}"


def closest(name: object, known: Iterable[str]) -> str | None:
    """The one of these names that is most like this one, in whatever case; None where none is much like it."""
    if not isinstance(name, str) or len(name) > MAX_NAME:
        return None
    names, sought = {each.casefold(): each for each in known}, name.casefold()
    if len(names) > MAX_KNOWN:
        return None
    swapped = [each for each in names if sorted(each) == sorted(sought)]
    similar = swapped or get_close_matches(sought, names, 1)
    return names[similar[0]] if similar else None


def suggest(name: object, known: Iterable[str]) -> str:
    """``did you mean steps? `` where such a name exists; else nothing."""
    found = closest(name, known)
    return f"did you mean {found}? " if found else ""


def choose(name: object, known: Sequence[str]) -> str:
    """The remedy for what is none of these names."""
    return f"{suggest(name, known)}choose one of {', '.join(known)}"


NOUNS = {
    "int": "an integer",
    "float": "a number",
    "greater": "a number",
    "less": "a number",
    "finite": "a finite number",
    "bool": "true or false",
    "string": "a string",
    "list": "a list",
    "too": "a list",
    "bytes": "a file in base64",
    "model": 'a seed, {"npy": …} or {"image": …}',
}
NUMBERS = ("an integer", "a number", "a finite number")


def word_limits(kind: str, bounds: Mapping[str, Any], *, integer: bool) -> str | None:
    """What a field takes, to be put after "must be"; None for other faults than these.

    Args:
        kind: pydantic's name of the fault, as int_parsing or greater_than_equal.
        bounds: ge, gt, le, lt, min_length and max_length of the field, as far as it has them.
        integer: whether it is one.
    """
    noun = NOUNS.get(kind.partition("_")[0])
    if noun in NUMBERS:
        noun = "an integer" if integer else str(noun)
        if "ge" in bounds and "le" in bounds:
            return f"{noun} of {_plain(bounds['ge'])} to {_plain(bounds['le'])}"
        words = {"ge": "from", "gt": "above", "le": "up to", "lt": "below"}
        return " ".join([noun, *(f"{word} {_plain(bounds[name])}" for name, word in words.items() if name in bounds)])
    if noun == "a list":
        low, high = bounds.get("min_length"), bounds.get("max_length")
        return noun if low is None or high is None else f"a list of {low}" + (f" to {high}" if high > low else "")
    return noun


BOUNDS = ("ge", "gt", "le", "lt", "min_length", "max_length")


def find_bounds(field: FieldInfo | None, fault: ErrorDetails) -> tuple[dict[str, Any], bool]:
    """The limits of a field, as :func:`word_limits` takes them, and whether it is an integer.

    Args:
        field: None where it is not known, as for an item of a list; then the fault tells the limit that was passed.
    """
    if field is None:
        broken = {name: limit for name, limit in fault.get("ctx", {}).items() if name in BOUNDS}
        return broken, fault["type"].startswith("int") or type(fault["input"]) is int
    found = {name: getattr(each, name) for each in field.metadata for name in BOUNDS if hasattr(each, name)}
    return found, "int" in str(field.annotation)


def word_remedy(fault: ErrorDetails, bounds: Mapping[str, Any], *, integer: bool) -> str:
    """The remedy for a fault of one field, with bounds and integer as :func:`find_bounds` gives them."""
    if fault["type"] == "literal_error":  # pydantic lists the choices in quotes
        return choose(fault["input"], re.findall(r"'([^']*)'", fault["ctx"]["expected"]))
    if limits := word_limits(fault["type"], bounds, integer=integer):
        return f"{MUST_BE}{limits}"
    return fault["msg"].removeprefix("Value error, ").removeprefix("Input ").partition(", unable to parse")[0]


def _plain(limit: float) -> str:
    return str(limit) if isinstance(limit, int) else f"{limit:g}"


def _short(value: object) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
