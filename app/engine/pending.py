"""A tick that the device has been told to do, and may still be doing."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


class PendingTick:
    """Begun before the tick's first work is enqueued; on a device that is not asynchronous it is over when that is.

    Attributes:
        landing: done once, by :meth:`wait`, in this order: taking home what was copied to the host.
    """

    def __init__(self, device: torch.device) -> None:
        self.landing: list[Callable[[], None]] = []
        self._events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None
        if device.type == "cuda":
            # A thread that waits sleeps: it would keep the interpreter's other threads from their cores otherwise.
            self._events = (_event(), _event(blocking=True))
            self._events[0].record()
        self._began = time.perf_counter()
        self._seconds = 0.0

    def depart(self) -> None:
        """All its work is enqueued."""
        if self._events is not None:
            self._events[1].record()
        self._seconds = time.perf_counter() - self._began

    def wait(self) -> float:
        """Seconds that the device took, once it is done; whatever went wrong on the device is raised here."""
        if self._events is not None:
            began, ended = self._events
            ended.synchronize()
            self._seconds = began.elapsed_time(ended) / 1e3
        while self.landing:
            self.landing.pop(0)()
        return self._seconds


def _event(*, blocking: bool = False) -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True, blocking=blocking)  # type: ignore[no-untyped-call]
