"""What ``unstir replay`` finds in a PNG: the request that it was made by, the files that it names, and what differs."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from app.api.responses import formats
from app.cli.terminal import CommandError, fault
from model.images import ImageError, frames, is_animated, text_of

CHUNK = "unstir"


@dataclass(frozen=True)
class Made:
    """How a PNG was made.

    Attributes:
        facts: all that its text chunk says.
        accept: its media type.
        sha256: of the network's weights.
    """

    facts: dict[str, Any]
    operation: str
    request: dict[str, Any]
    sha256: str
    accept: str


def read(path: Path, content: bytes) -> Made:
    """What the PNG says.

    Raises:
        CommandError: it says nothing, or is no PNG.
    """
    try:
        facts = json.loads(text_of(content)[CHUNK])
        accept = formats.APNG if is_animated(content) else formats.PNG
        return Made(facts, facts["operation"], dict(facts["request"]), facts["sha256"], accept)
    except ImageError as error:
        raise CommandError(f"{path}: {error}") from error
    except (KeyError, TypeError, ValueError):
        unsaid = "it does not say how it was made; PNGs that Unstir makes do, unless embed was none"
        raise CommandError(f"{path}: {unsaid}") from None


def put_files(path: Path, request: dict[str, Any], files: Mapping[Path, bytes]) -> tuple[dict[str, Any], int]:
    """The request with files in the place of their hashes, and how many bytes that adds at most.

    Args:
        files: that were given, by their paths.

    Raises:
        CommandError: a line for each file that is named and not given, or for each that was given in its place.
    """
    digests = {file: hashlib.sha256(content).hexdigest() for file, content in files.items()}
    given = {digest: files[file] for file, digest in digests.items()}
    named = dict(_references(request))
    missing = [
        f"{field}, {reference.get('bytes')} bytes with sha256 {reference['sha256']}"
        for field, reference in named.items()
        if reference["sha256"] not in given
    ]
    if missing:
        wanted = {reference["sha256"] for reference in named.values()}
        told = f"{path} was made of {'; '.join(missing)}; give that"
        wrong = [
            fault("--file", file, f"it has {len(files[file])} bytes and sha256 {digest}; {told}")
            for file, digest in digests.items()
            if digest not in wanted
        ]
        unsaid = (f"{path}: it was made of a file that is not in it: {each}; give it with --file" for each in missing)
        raise CommandError(*(wrong or unsaid))
    size = 2 * sum(len(given[reference["sha256"]]) for reference in named.values())
    return dict(_replace(request, given)), size


def describe_difference(before: bytes, after: bytes) -> str:
    """What is other in a PNG that was made again; empty if it is the same to the byte."""
    if before == after:
        return ""
    told = _describe_facts(text_of(before), text_of(after))
    shown = _describe_pixels(frames(before), frames(after))
    if shown:
        return f"{shown}: another device, dtype, version or number of threads{f'; {told}' if told else ''}"
    return f"the same pixels; {told or 'encoded by another version of Pillow or zlib'}"


def _is_reference(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("sha256"), str)


def _references(value: Any, field: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Each file that is named by its hash, by its field."""
    if _is_reference(value):
        yield field, value
    elif isinstance(value, dict | list):
        for name, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _references(item, f"{field}.{name}".removeprefix("."))


def _replace(value: Any, given: Mapping[str, bytes]) -> Any:
    if _is_reference(value):
        return base64.b64encode(given[value["sha256"]]).decode()
    if isinstance(value, dict):
        return {name: _replace(item, given) for name, item in value.items()}
    return [_replace(item, given) for item in value] if isinstance(value, list) else value


def _describe_facts(before: Mapping[str, str], after: Mapping[str, str]) -> str:
    """Facts that the text says otherwise, such as the version."""
    one, other = (_flat(json.loads(texts.get(CHUNK, "{}"))) for texts in (before, after))
    changed = [name for name in {**one, **other} if one.get(name) != other.get(name)]
    return ", ".join(f"{name} was {_short(one.get(name))}, is {_short(other.get(name))}" for name in changed)


def _flat(facts: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in facts.items() if name != "request"} | dict(facts.get("request", {}))


def _short(value: Any) -> str:
    text = "not said" if value is None else json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _describe_pixels(before: Sequence[np.ndarray], after: Sequence[np.ndarray]) -> str:
    """How far the images are apart; empty if every pixel is the same."""
    sizes = [f"{len(each)} of {each[0].shape[1]}x{each[0].shape[0]}" for each in (before, after)]
    if sizes[0] != sizes[1]:
        return f"other images, {sizes[1]} instead of {sizes[0]}"
    levels = np.abs(np.stack(before).astype(np.int16) - np.stack(after)).max(-1)
    return f"{np.count_nonzero(levels)} of {levels.size} pixels differ, by up to {levels.max()}" if levels.any() else ""
