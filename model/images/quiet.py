"""Pillow's warnings, ignored while it decodes.

It warns of each corrupt EXIF entry, with numbers from the file: a log line for each of thousands of entries, and Python
keeps every such text in memory. The error of the request says what is wrong with a file.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_MODULES = r"PIL\."
_lock = threading.Lock()
_users = 0


@contextmanager
def ignore_pillow_warnings() -> Iterator[None]:
    """Ignore Pillow's warnings until all threads have left.

    Filters belong to the process, and several threads decode at once: the first adds the filter, the last removes it.
    ``warnings.catch_warnings`` is not thread-safe; it would restore the filters that other threads had by chance.
    """
    global _users  # noqa: PLW0603 - the filters are global, too
    with _lock:
        if not _users:
            warnings.filterwarnings("ignore", module=_MODULES)
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if not _users:
                _remove_filter()


def _remove_filter() -> None:
    for entry in warnings.filters:
        if entry[0] == "ignore" and getattr(entry[3], "pattern", None) == _MODULES:
            warnings.filters.remove(entry)  # type: ignore[attr-defined]  # typeshed calls the list a sequence
            return
