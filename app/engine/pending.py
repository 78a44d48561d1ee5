"""A tick whose work is enqueued on the device, and may still be running."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


class PendingTick:
    """Created before the tick's first work is enqueued. On the CPU, the tick is over once :meth:`record` is called.

    Attributes:
        on_complete: callbacks that :meth:`wait` calls once, in this order, such as reading what was copied to the host.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_complete: list[Callable[[], None]] = []
        self._events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None
        if device.type == "cuda":
            # A blocking event lets the waiting thread sleep; a spinning one would hold a core that others need.
            self._events = (_event(), _event(blocking=True))
            self._events[0].record()
        self._began = time.perf_counter()
        self._seconds = 0.0

    def record(self) -> None:
        """Mark the end of the tick's work; call it when all of it is enqueued."""
        if self._events is not None:
            self._events[1].record()
        self._seconds = time.perf_counter() - self._began

    def wait(self) -> float:
        """Wait for the device; returns the seconds that it took, and raises the errors that happened on it."""
        if self._events is not None:
            began, ended = self._events
            ended.synchronize()
            self._seconds = began.elapsed_time(ended) / 1e3
        while self.on_complete:
            self.on_complete.pop(0)()
        return self._seconds


def _event(*, blocking: bool = False) -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True, blocking=blocking)  # type: ignore[no-untyped-call]
