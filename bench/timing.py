"""Clocks and summaries: device time, measurements in alternation, time limits, medians with quartiles."""

from __future__ import annotations

import contextlib
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

AGAIN = 5.0  # seconds until a block that did not stop is interrupted once more


class Overrun(BaseException):
    """A block took longer than it may. Not an Exception, so that nothing in the block handles it as an error."""


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raise :class:`Overrun` in the block after so many seconds; on the main thread only. Blocks may be nested."""

    def stop(*_: object) -> None:
        raise Overrun

    began, left = time.monotonic(), signal.getitimer(signal.ITIMER_REAL)[0]
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(1e-3, min(seconds, left or seconds)), AGAIN)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if left:
            signal.setitimer(signal.ITIMER_REAL, max(1e-3, left - (time.monotonic() - began)), AGAIN)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_seconds(work: Callable[[], object], times: int, device: torch.device) -> float:
    """Seconds of one call on the device, from ``times`` calls in a row; waiting for the host is included."""
    synchronize(device)
    if device.type != "cuda":
        began = time.perf_counter()
        for _ in range(times):
            work()
        return (time.perf_counter() - began) / times
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    first.record()
    for _ in range(times):
        work()
    last.record()
    last.synchronize()
    return float(first.elapsed_time(last)) / 1e3 / times


def wall_seconds(work: Callable[[], object], device: torch.device) -> float:
    """Seconds from the call until the device has finished."""
    synchronize(device)
    began = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - began


def alternate(
    measures: Mapping[str, Callable[[], float]], rounds: int, limit: float = float("inf")
) -> dict[str, list[float]]:
    """Values of each measure, all of them once a round, so that other load on the machine affects all alike.

    The first round warms up and is dropped. At least one more follows, and none that would end after ``limit`` seconds.
    """
    found: dict[str, list[float]] = {name: [] for name in measures}
    began = time.monotonic()
    for done in range(rounds + 1):
        last = time.monotonic()
        for name, measure in measures.items():
            value = measure()
            if done:
                found[name].append(value)
        now = time.monotonic()
        if done and now + (now - last) > began + limit:
            break
    return found


def summarize(values: list[float]) -> dict[str, Any]:
    """Median and quartiles, to six digits."""
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    found = {name: float(f"{each:.6g}") for name, each in (("median", middle), ("q1", low), ("q3", high))}
    return {**found, "repeats": len(values)}


def summarize_ratios(above: list[float], below: list[float]) -> dict[str, Any]:
    """Of values that were measured in the same round."""
    return summarize([a / b for a, b in zip(above, below, strict=True)])
