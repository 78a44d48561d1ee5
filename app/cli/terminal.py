"""What the command line prints, and how it words what is wrong: the flag, its value, the remedy."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ValidationError
from pydantic_core import ErrorDetails

from app.errors.wording import MUST_BE, find_bounds, word_remedy

ROOT = Path(__file__).resolve().parents[2]


def _exists(path: Path) -> Path:
    if not path.exists():
        raise ValueError("no such file or folder")
    return path


ExistingPath = Annotated[Path, AfterValidator(_exists)]


class CommandError(Exception):
    """A command that cannot be done as typed; one line for each thing that is wrong.

    Attributes:
        status: exit status of the process; 2 where the command was typed wrongly.
    """

    def __init__(self, *lines: str, status: int = 2) -> None:
        super().__init__("\n".join(lines))
        self.lines = lines
        self.status = status


def flag(name: str) -> str:
    """``max_width`` as ``--max-width``."""
    return "--" + name.replace("_", "-")


def fault(name: str, value: object, remedy: str) -> str:
    """One line of a :class:`CommandError`: the value as it would be typed."""
    return f"{name} = {typed(value)}: {remedy}"


def typed(value: object) -> str:
    """A value as one types it on a command line."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    return shlex.quote(str(value))


def shown(default: object) -> str:
    """A default for a help text; what ships with the program is named by its place in the repository."""
    if isinstance(default, Path) and default.is_relative_to(ROOT):
        return str(default.relative_to(ROOT))
    if isinstance(default, list | tuple):
        return ",".join(map(str, default))
    return f"{default:g}" if isinstance(default, float) else str(default)


def describe(
    error: ValidationError, model: type[BaseModel] | None = None, name: Callable[[str], str] = flag
) -> CommandError:
    """Everything that pydantic found, a line for each field.

    Args:
        model: of the fields, for their limits.
        name: how the user knows a field.
    """
    lines: dict[str, str] = {}
    for found in error.errors(include_url=False):
        field = str(found["loc"][0]) if found["loc"] else ""
        remedy = _remedy(found, model)
        if field in lines:  # of a union, a fault for each member
            lines[field] += "" if remedy in lines[field] else f" or {remedy.removeprefix(MUST_BE)}"
        elif not field:  # about several fields
            lines[field] = remedy
        elif found["type"] == "missing":
            lines[field] = f"{name(field)} is missing"
        else:
            lines[field] = fault(name(field), found["input"], remedy)
    return CommandError(*lines.values())


def _remedy(found: ErrorDetails, model: type[BaseModel] | None) -> str:
    place = found["loc"]
    field = model.model_fields.get(str(place[0])) if model is not None and len(place) == 1 else None
    bounds, integer = find_bounds(field, found)
    return word_remedy(found, bounds, integer=integer)


@contextmanager
def explain(*kinds: type[Exception], flags: Collection[str] = (), status: int = 2) -> Iterator[None]:
    """Turn errors of these kinds into a :class:`CommandError`. One about a field that has a flag names the flag.

    Args:
        status: of the process, where the error is not about a flag.
    """
    try:
        yield
    except kinds as error:
        field = getattr(error, "field", getattr(error, "setting", ""))
        if field in flags:
            raise CommandError(fault(flag(field), error.value, error.remedy)) from error  # type: ignore[attr-defined]
        raise CommandError(str(error), status=status) from error


def complain(error: CommandError) -> int:
    """Print what is wrong; returns the exit status."""
    for line in error.lines:
        print(f"unstir: {line}", file=sys.stderr)
    return error.status


def print_status(text: str) -> None:
    """What is being done now, for whoever watches; not part of the output."""
    print(f"{text} ...", file=sys.stderr, flush=True)


def program() -> list[str]:
    """How to call this program again: ``unstir`` only where the reader's PATH has this one."""
    called = sys.argv[0]
    if Path(called) == ROOT / "app" / "__main__.py":
        return [sys.orig_argv[0], "-m", "app"]
    found = shutil.which("unstir")
    if Path(called).name != "unstir" or (found and os.path.exists(called) and os.path.samefile(found, called)):
        return ["unstir"]
    return [called]


def accept_any_encoding() -> None:
    """Print ``?`` for characters that the terminal's encoding does not have."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
