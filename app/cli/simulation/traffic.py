"""Requests over time: drawn from a mix of step counts, or read from a recorded trace."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError

from app.cli.mix import Mix
from app.cli.terminal import describe
from app.engine.scheduler import PRIORITIES
from app.engine.widths import Widths

MOST_IMAGES = 64  # of one request, as the service's own limit


class SimulationError(ValueError):
    """What the user asked for cannot be simulated; the text says why."""


@dataclass(frozen=True, slots=True)
class SimulatedRequest:
    """One request, and the fields of a line of a trace.

    Attributes:
        at: seconds after the start.
        steps: forwards that each of its images needs.
        n: images.
        timeout_ms: it is dropped when it is not done that long after its arrival; None waits for ever.
    """

    at: Annotated[float, Field(allow_inf_nan=False)]
    steps: Annotated[int, Field(ge=1, le=100_000)]
    n: Annotated[int, Field(ge=1, le=MOST_IMAGES)] = 1
    priority: Annotated[int, Field(ge=PRIORITIES[0], le=PRIORITIES[-1])] = 0
    timeout_ms: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None

    @property
    def work(self) -> int:
        """Row-steps."""
        return self.steps * self.n


LINE = TypeAdapter(SimulatedRequest)


def draw_requests(mix: Mix, count: int, rate: float, seed: int) -> list[SimulatedRequest]:
    """``count`` Poisson arrivals, ``rate`` of them a second; the same seed gives the same ones."""
    source = random.Random(seed)
    now = 0.0
    requests = []
    for steps in source.choices(mix.steps, list(mix.weights.values()), k=count):
        now += source.expovariate(rate)
        requests.append(SimulatedRequest(now, steps))
    return requests


def capacity(widths: Widths, row_steps: float) -> float:
    """Requests a second that the device can do when every forward is full and a request needs ``row_steps``."""
    return 1 / (row_steps * widths.seconds_per_row)


def read_trace(path: Path) -> list[SimulatedRequest]:
    """Read JSON lines with ``at``, ``steps`` and, optionally, ``n``, ``priority`` and ``timeout_ms``.

    Times are shifted so that the first request arrives at 0; lines may come in any order.

    Raises:
        SimulationError: naming the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SimulationError(f"{path}: {error}") from None
    requests = [_request(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1) if line.strip()]
    if not requests:
        raise SimulationError(f"{path}: no request in it")
    requests.sort(key=lambda request: request.at)
    first = requests[0].at
    return [replace(request, at=request.at - first) for request in requests]


def _request(line: str, where: str) -> SimulatedRequest:
    try:
        return LINE.validate_json(line, strict=True)
    except ValidationError as error:
        raise SimulationError(f"{where}: {'; '.join(describe(error, name=str).lines)}") from None


def scale_arrivals(requests: Sequence[SimulatedRequest], load: float, widths: Widths) -> list[SimulatedRequest]:
    """The same requests with their arrivals moved apart or together, so that they come at ``load`` of the capacity."""
    mean = sum(request.work for request in requests) / len(requests)
    lasts = requests[-1].at
    factor = len(requests) / (load * capacity(widths, mean)) / lasts if lasts else 1.0
    return [replace(request, at=request.at * factor) for request in requests]
