"""CheckpointError, and Facts: a JSON file of a checkpoint, each of whose values is read with its type and its range."""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

MAX_BYTES = 16 * 2**20  # of a JSON file; 100,000 trained betas take 2 MB
LAYOUT = (
    "a checkpoint is a folder with model_index.json, unet/ and scheduler/, as diffusers saves it, or with config.json, "
    "scheduler_config.json and the weights side by side"
)
LFS = b"version https://git-lfs"  # begins what git leaves in the place of a large file that it did not fetch
_ABSENT = object()


class CheckpointError(ValueError):
    """A folder without a usable checkpoint; the message is one line with all that follows.

    Attributes:
        file: what is wrong is in it.
        remedy: what is expected there.
        key: in the file; None if it is the file as a whole.
        value: of the key.
    """

    def __init__(self, file: Path, remedy: str, key: str | None = None, value: object = _ABSENT) -> None:
        what = str(file) if key is None else f"{file}: {key}"
        if value is not _ABSENT:
            what += f" = {_short(value)}"
        reads_on = value is _ABSENT and remedy.partition(" ")[0] in ("is", "has", "lacks", "cannot")
        super().__init__(" ".join(f"{what}{'' if reads_on else ':'} {remedy}".split()))
        self.file = file
        self.remedy = remedy
        self.key = key
        self.value = None if value is _ABSENT else value


class Facts:
    """The object in a JSON file.

    Attributes:
        file: its path.
        content: the object.
    """

    def __init__(self, file: Path, content: dict[str, Any]) -> None:
        self.file = file
        self.content = content

    @classmethod
    def read(cls, file: Path) -> Facts:
        """Parse a file, with or without a byte order mark.

        Raises:
            CheckpointError: it is missing, unreadable, too large, no JSON, or no object.
        """
        try:
            with file.open("rb") as stream:
                raw = stream.read(MAX_BYTES + 1)
        except FileNotFoundError:
            raise CheckpointError(file, f"is missing; {LAYOUT}") from None
        except OSError as error:
            raise CheckpointError(file, f"cannot be read: {error.strerror}") from error
        if len(raw) > MAX_BYTES:
            raise CheckpointError(file, f"has more than {MAX_BYTES >> 20} MiB; is this the right file?")
        try:
            content = json.loads(raw.decode("utf-8-sig"))
        except RecursionError:
            raise CheckpointError(file, "is nested too deeply; expected an object of a few values") from None
        except ValueError as error:
            raise CheckpointError(file, f"is no JSON in UTF-8: {_describe(raw, error)}") from error
        if not isinstance(content, dict):
            raise CheckpointError(file, f"expected an object, found {type(content).__name__}; {ANEW}")
        return cls(file, content)

    def given(self, key: str) -> bool:
        """Whether the file has a value for a key; null is none."""
        return self.content.get(key) is not None

    def fault(self, key: str, remedy: str) -> CheckpointError:
        """The error for what the file says, or does not say, about a key."""
        return CheckpointError(self.file, remedy, key, self.content.get(key, _ABSENT))

    def as_whole(self, remedy: str) -> CheckpointError:
        """The error for what the file says altogether."""
        return CheckpointError(self.file, remedy)

    def integer(self, key: str, default: Any, low: int, high: int, *, null: bool = False) -> Any:
        """An integer in low..high; ``default`` where there is none.

        Args:
            null: stands for the default.

        Raises:
            CheckpointError: another type, or out of range.
        """
        value = self._value(key, default, null)
        if value is not default and not (_is_integer(value) and low <= value <= high):
            raise self.fault(key, f"must be an integer of {low} to {high}" + " or null" * null)
        return value

    def number(self, key: str, default: float, low: float, high: float, *, above: bool = False) -> float:
        """A finite number in [low, high], or in (low, high] if it must lie ``above`` low.

        Raises:
            CheckpointError: another type, or out of range.
        """
        value = self._value(key, default, False)
        if not (_is_number(value) and low <= value <= high and not (above and value == low)):
            raise self.fault(
                key,
                f"must be a number {'above' if above else 'of'} {low:g} {'and at most' if above else 'to'} {high:g}",
            )
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """true or false.

        Raises:
            CheckpointError: another type.
        """
        value = self._value(key, default, False)
        if not isinstance(value, bool):
            raise self.fault(key, "must be true or false")
        return value

    def choice(self, key: str, default: str, choices: Collection[str], *, null: bool = False) -> str:
        """One of a few strings.

        Args:
            null: stands for the default.

        Raises:
            CheckpointError: none of them.
        """
        value = self._value(key, default, null)
        if not isinstance(value, str) or value not in choices:
            raise self.fault(key, f"choose one of {', '.join(choices)}")
        return value

    def text(self, key: str, default: str | None, *, line: bool = False) -> str:
        """A string that can be printed.

        Args:
            default: None if the key must be there.
            line: it goes into logs, so it is one line, not empty, of at most 200 characters.

        Raises:
            CheckpointError: another type, or characters that cannot be printed.
        """
        value = self._value(key, default, False)
        if value is None and key not in self.content:
            raise self.fault(key, "is missing")
        if not isinstance(value, str):
            raise self.fault(key, "must be a string")
        if line and not is_line(value):
            raise self.fault(key, LINE)
        if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
            raise self.fault(key, "has half of a surrogate pair; write characters as such")
        return value

    def _value(self, key: str, default: Any, null: bool) -> Any:
        value = self.content.get(key, default)
        return default if value is None and null else value


LINE = "must be 1 to 200 printable characters"
ANEW = "mend it, or copy the file anew from where the checkpoint comes from"
FETCH = "it is a pointer of Git LFS, not the file itself; fetch that with git lfs pull"


def _describe(raw: bytes, error: ValueError) -> str:
    """Why bytes are no JSON, and the remedy."""
    if raw.startswith(LFS):
        return FETCH
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start} is {error.object[error.start]:#04x}; save it as UTF-8, or copy the file anew"
    return f"{'the file is empty' if not raw.strip() else error}; {ANEW}"


def is_line(text: str) -> bool:
    """Whether a name can stand in logs, headers and lists."""
    return 1 <= len(text) <= 200 and text.isprintable()


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and (isinstance(value, int) or math.isfinite(value))
    )


def _short(value: object) -> str:
    try:
        text = json.dumps(value, ensure_ascii=True)
    except (TypeError, ValueError, RecursionError):
        text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
