"""Requests that arrive over time: drawn from a mix of lengths, or read from a recorded trace."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from app.engine.widths import Widths

MOST_IMAGES = 64  # of one request, as the service's own limit


class SimulationError(ValueError):
    """What the user asked for cannot be simulated; the text says why."""


@dataclass(frozen=True, slots=True)
class Request:
    """One request.

    Attributes:
        at: seconds after the start.
        steps: forwards that each of its images needs.
        n: images.
        priority: -10..10.
        timeout_ms: it is dropped when it is not done that long after its arrival; None waits for ever.
    """

    at: float
    steps: int
    n: int = 1
    priority: int = 0
    timeout_ms: float | None = None

    @property
    def work(self) -> int:
        """Row-steps."""
        return self.steps * self.n


@dataclass(frozen=True, slots=True)
class Mix:
    """Lengths of requests and how often each comes.

    Attributes:
        shares: (steps, weight) pairs; weights need not sum to 1.
    """

    shares: tuple[tuple[int, float], ...]

    @classmethod
    def parse(cls, text: str) -> Mix:
        """Read ``10:0.6,20:0.3,100:0.1``."""
        pairs = pairs_of(text, "--mix")
        if any(steps != int(steps) or steps < 1 for steps, _ in pairs):
            raise SimulationError(f"--mix = {text}: steps are whole numbers from 1")
        return cls(tuple((int(steps), weight) for steps, weight in pairs))

    @property
    def mean(self) -> float:
        """Row-steps of a request."""
        return sum(steps * weight for steps, weight in self.shares) / sum(weight for _, weight in self.shares)

    def requests(self, count: int, rate: float, seed: int) -> list[Request]:
        """``count`` Poisson arrivals, ``rate`` of them a second; the same seed gives the same ones."""
        draw = random.Random(seed)
        steps, weights = zip(*self.shares, strict=True)
        now = 0.0
        requests = []
        for chosen in draw.choices(steps, weights, k=count):
            now += draw.expovariate(rate)
            requests.append(Request(now, chosen))
        return requests


def pairs_of(text: str, option: str) -> list[tuple[float, float]]:
    """Read ``a:b,c:d`` with b, d > 0, no a twice."""
    try:
        pairs = [(float(left), float(right)) for left, right in (part.split(":") for part in text.split(","))]
    except ValueError:
        raise SimulationError(f"{option} = {text}: write a:b,c:d") from None
    if not all(math.isfinite(left) and math.isfinite(right) and right > 0 for left, right in pairs):
        raise SimulationError(f"{option} = {text}: numbers are finite, and those after a colon above 0")
    if len({left for left, _ in pairs}) < len(pairs):
        raise SimulationError(f"{option} = {text}: one of them comes twice")
    return pairs


def capacity(widths: Widths, row_steps: float) -> float:
    """Requests a second that the device can do when every forward is full and a request needs ``row_steps``."""
    return 1 / (row_steps * widths.seconds_per_row)


def read_trace(path: Path) -> list[Request]:
    """Read JSON lines with ``at`` (seconds), ``steps`` and, if wanted, ``n``, ``priority`` and ``timeout_ms``.

    Times are shifted so that the first request comes at 0; lines may come in any order.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SimulationError(f"--trace = {path}: {error}") from None
    requests = [_request(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1) if line.strip()]
    if not requests:
        raise SimulationError(f"--trace = {path}: no request in it")
    requests.sort(key=lambda request: request.at)
    first = requests[0].at
    return [replace(request, at=request.at - first) for request in requests]


def stretched(requests: Sequence[Request], load: float, widths: Widths) -> list[Request]:
    """The same requests with their arrivals moved apart or together, so that they come at ``load`` of the capacity."""
    mean = sum(request.work for request in requests) / len(requests)
    lasts = requests[-1].at
    factor = len(requests) / (load * capacity(widths, mean)) / lasts if lasts else 1.0
    return [replace(request, at=request.at * factor) for request in requests]


def _request(line: str, where: str) -> Request:
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise SimulationError(f"{where}: no JSON: {error}") from None
    if not isinstance(fields, dict):
        raise SimulationError(f"{where}: no JSON object")
    for name in ("at", "steps"):
        if name not in fields:
            raise SimulationError(f"{where}: {name} is missing")
    timeout = _number(fields, "timeout_ms", where, low=0.0) if fields.get("timeout_ms") is not None else None
    return Request(
        at=_number(fields, "at", where),
        steps=_whole(fields, "steps", where, 1, 100_000),
        n=_whole(fields, "n", where, 1, MOST_IMAGES),
        priority=_whole(fields, "priority", where, -10, 10),
        timeout_ms=timeout,
    )


def _number(fields: Mapping[str, Any], name: str, where: str, low: float = -math.inf) -> float:
    value = fields[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < low:
        raise SimulationError(f"{where}: {name} = {value!r} is no number{f' from {low:g}' if low > -math.inf else ''}")
    return float(value)


def _whole(fields: Mapping[str, Any], name: str, where: str, low: int, high: int) -> int:
    value = fields.get(name, {"n": 1, "priority": 0}.get(name))
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise SimulationError(f"{where}: {name} = {value!r} is no whole number of {low}..{high}")
    return value
