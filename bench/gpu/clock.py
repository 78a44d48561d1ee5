"""Time on the device: by its own events where it has them, in turns, and with an end to patience."""

from __future__ import annotations

import contextlib
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

AGAIN = 5.0  # seconds until a block that did not stop is told once more


class Overrun(BaseException):
    """A block took longer than it may. No Exception, so that nothing on the way takes it for an error of its own."""


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raise :class:`Overrun` in the block once it has taken so long.

    Only on the main thread. Blocks may stand within one another: the one that ends first counts, and the outer goes on
    being counted down.
    """

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
    """Wait until the device has done all that it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work: Callable[[], object], times: int, device: torch.device) -> float:
    """What the device takes for one call, from so many in a row: what waits for the host counts, too."""
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


def elapsed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds on the wall from the call until the device has done all of it."""
    synchronize(device)
    began = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - began


def in_rounds(
    contestants: Mapping[str, Callable[[], float]], rounds: int, limit: float = float("inf")
) -> dict[str, list[float]]:
    """What each measures, all of them once a round, so that whatever else the machine does weighs on all.

    The first round warms up and is left out; after that there is at least one, and no other begins that would end
    beyond the limit.

    Args:
        limit: seconds.
    """
    found: dict[str, list[float]] = {name: [] for name in contestants}
    began = time.monotonic()
    for done in range(rounds + 1):
        last = time.monotonic()
        for name, measure in contestants.items():
            value = measure()
            if done:
                found[name].append(value)
        now = time.monotonic()
        if done and now + (now - last) > began + limit:
            break
    return found


def summary(values: list[float]) -> dict[str, Any]:
    """Median and quartiles, to six digits."""
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    found = {name: float(f"{each:.6g}") for name, each in (("median", middle), ("q1", low), ("q3", high))}
    return {**found, "repeats": len(values)}


def ratios(above: list[float], below: list[float]) -> dict[str, Any]:
    """Of what was measured in the same round."""
    return summary([a / b for a, b in zip(above, below, strict=True)])
