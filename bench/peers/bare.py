"""The bare network: forwards in a loop, in a process that does nothing else. Every server is measured beside it.

The process idles until it is told to run, so that it can take turns with a server that is stopped meanwhile.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from bench.peers import common
from bench.peers.table import QUIET
from bench.server import ROOT
from model.diffusion.machine import Net

Rows = tuple[Tensor, Tensor, Tensor | None]


class Bare:
    """That process."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._told()  # that it is ready

    def line(self, seconds: float = 0.3) -> dict[str, Any]:
        """:func:`line`, with so long for each width."""
        found: dict[str, Any] = self._ask("line", seconds)
        return found

    def rows_per_second(self, seconds: float) -> float:
        """Of the widest forwards, over so many seconds from now."""
        return float(self._ask("widest", seconds))

    def _ask(self, what: str, seconds: float) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([what, seconds]) + "\n")
        self._process.stdin.flush()
        return self._told()

    def _told(self) -> Any:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())


@contextmanager
def bare() -> Iterator[Bare]:
    """Start it, and end it."""
    with subprocess.Popen(
        [sys.executable, "-m", "bench.peers.bare"],
        cwd=ROOT,
        env=os.environ | QUIET,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield Bare(process)
        finally:
            process.kill()


def rows(width: int) -> Rows:
    """What a forward of so many rows takes."""
    return torch.randn(width, *common.checkpoint().shape), torch.full((width,), 500.0), common.null_class(width)


@torch.inference_mode()
def line(net: Net, seconds: float) -> dict[str, Any]:
    """The median forward of each width, and the best rows a second.

    Once many of a width in a row, whose best is the capacity; and once each width in turn, as in a server that makes
    forwards of all kinds and whose cache holds what the last one left there. Those are the yardstick, since no slow
    moment can weigh on one width alone, and what the simulator is given.
    """
    inputs = {width: rows(width) for width in range(1, common.CAP + 1)}
    in_a_row: dict[int, list[float]] = {width: [] for width in inputs}
    in_turn: dict[int, list[float]] = {width: [] for width in inputs}
    for width, times in in_a_row.items():
        began = time.perf_counter()
        while len(times) < 5 or time.perf_counter() - began < seconds:
            times.append(_timed(net, inputs[width]))
    for _ in range(15):
        for width, times in in_turn.items():
            times.append(_timed(net, inputs[width]))
    forward_seconds = {width: statistics.median(times[2:]) for width, times in in_a_row.items()}
    best = max(forward_seconds, key=lambda width: width / forward_seconds[width])
    return {
        "forward_seconds": forward_seconds,
        "in_turn_seconds": {width: statistics.median(times) for width, times in in_turn.items()},
        "rows_per_second": best / forward_seconds[best],
        "width": best,
    }


@torch.inference_mode()
def widest(net: Net, seconds: float) -> float:
    """Rows a second of the widest forwards, in a row."""
    inputs, count, began = rows(common.CAP), 0, time.perf_counter()
    while (lasted := time.perf_counter() - began) < seconds:
        net(*inputs)
        count += 1
    return common.CAP * count / lasted


def _timed(net: Net, inputs: Rows) -> float:
    began = time.perf_counter()
    net(*inputs)
    return time.perf_counter() - began


def main() -> None:
    net = common.network()
    widest(net, 0.5)
    print(json.dumps("ready"), flush=True)
    for text in sys.stdin:
        what, seconds = json.loads(text)
        print(json.dumps({"line": line, "widest": widest}[what](net, seconds)), flush=True)


if __name__ == "__main__":
    main()
