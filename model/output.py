"""Files that are replaced whole or not at all, and what is printed while work goes on, to a terminal or into a file."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from types import TracebackType

from tqdm import tqdm


def write_atomically(path: Path, content: str | bytes | memoryview) -> None:
    """Write ``path``, so that a reader or a crash never sees half of it; creates the folder. Text is UTF-8.

    Raises:
        OSError: the folder cannot be written to; ``path`` is then as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(content.encode() if isinstance(content, str) else content)
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def say(text: str) -> None:
    """A line on standard output at once, above a bar if there is one."""
    tqdm.write(text)
    sys.stdout.flush()  # a pipe holds lines back


class ProgressBar:
    """On a terminal a bar, else a line now and then: in a file all states of a bar would be one line.

    Attributes:
        total, done: of anything that can be counted.
    """

    SECONDS = 60.0  # between lines

    def __init__(self, total: float, what: str = "", unit: str = "it", bar_format: str | None = None) -> None:
        self.total, self.done, self.what = total, 0.0, what
        self._begun, self._said = time.monotonic(), -self.SECONDS
        self._bar = tqdm(
            total=total,
            desc=what,
            unit=unit,
            unit_scale=True,
            bar_format=bar_format,
            mininterval=2,
            delay=1e-9,  # nothing is drawn before there is something to say
            disable=not sys.stderr.isatty(),
        )

    def update(self, done: float = 1, detail: str = "") -> None:
        """So much more is done.

        Args:
            detail: what it was.
        """
        self.done += done
        if not self._bar.disable:
            if detail:
                self._bar.set_postfix_str(detail, refresh=False)
            self._bar.update(done)
            return
        seconds = time.monotonic() - self._begun
        left = seconds * (self.total - self.done) / self.done if self.done else 0
        until = f"{left / 60:.0f} min left" if left >= 90 else f"{left:.0f} s left"
        self._say(f"{self.what}, {detail}, {until}" if detail else f"{self.what}, {until}")

    def show(self, done: float, text: str) -> None:
        """So much is done altogether, and this is what there is to say."""
        self.done = done
        if self._bar.disable:
            self._say(text)
        else:
            self._bar.n = done
            self._bar.set_description_str(text)

    def _say(self, text: str) -> None:
        now = time.monotonic()
        if now - self._said >= self.SECONDS or self.done >= self.total:
            print(f"{self.done / self.total:4.0%}  {text}", file=sys.stderr, flush=True)
            self._said = now

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._bar.close()


def counted(number: int, one: str, many: str = "") -> str:
    """``1 image``, ``2 images``.

    Args:
        many: the plural, where it is not the singular and an s.
    """
    return f"{number} {one if number == 1 else many or f'{one}s'}"
