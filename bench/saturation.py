"""What is left of the bare network when it is served over HTTP to as many clients as keep it busy.

In turns of a few seconds, on the same cores: the bare loop at the most rows that a forward takes here, in a process of
its own, and the server, whose rows are counted by its own metrics while 16 clients ask for 50 steps each. While the
bare loop runs, the server is stopped (SIGSTOP), so its load begins once only and neither has company. Both are started
afresh several times, since how a process happens to lie in memory makes it a tenth faster or slower. The last line is
JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bench.peers import common
from bench.peers.table import QUIET, UNSTIR
from bench.server import ROOT, Served, server

CLIENTS = 16
RESUME_SECONDS = 0.5  # after which the server's turn is counted: the tick that was stopped is over


class Bare:
    """The network alone, in a process that runs it when it is told to."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._told()  # that it is ready

    def rows_per_second(self, seconds: float) -> float:
        """Over so many seconds from now."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{seconds}\n")
        self._process.stdin.flush()
        return float(self._told())

    def _told(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()


@contextlib.contextmanager
def bare_process() -> Iterator[Bare]:
    command = [sys.executable, "-m", "bench.saturation", "--bare"]
    with subprocess.Popen(
        command, cwd=ROOT, env=os.environ | QUIET, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            yield Bare(process)
        finally:
            process.kill()


def be_bare() -> None:
    """Time the network for as long as each line of the input says."""
    net, width = common.network(), common.CAP
    x, t = torch.randn(width, *common.checkpoint().shape), torch.full((width,), 500.0)
    y = common.null_class(width)
    with torch.inference_mode():
        for _ in range(10):
            net(x, t, y)
        print("ready", flush=True)
        for line in sys.stdin:
            count, began = 0, time.perf_counter()
            while (lasted := time.perf_counter() - began) < float(line):
                net(x, t, y)
                count += 1
            print(width * count / lasted, flush=True)


@contextlib.contextmanager
def busy(served: Served) -> Iterator[None]:
    """Clients that keep the server busy, from when all of them have been let in."""
    command = ["-m", "app", "bench", "--url", f"{served.base}/sample", "--mix", "50:1", "--seconds", "100000"]
    load = subprocess.Popen(
        [sys.executable, *command, "--clients", str(CLIENTS)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while served.metric("requests_waiting") + served.metric("requests_running") < CLIENTS:
            time.sleep(0.1)
        yield
    finally:
        load.kill()
        load.wait()


def turn(served: Served, seconds: float) -> dict[str, float]:
    """Rows a second of the busy server, ticks a second, and the share of the time that it spent in ticks."""
    time.sleep(RESUME_SECONDS)
    names = {"rows": "rows_total", "ticks": "forwards_total", "in_ticks": "forward_duration_seconds_sum"}
    before, began = {name: served.metric(metric) for name, metric in names.items()}, time.perf_counter()
    time.sleep(seconds)
    after, lasted = {name: served.metric(metric) for name, metric in names.items()}, time.perf_counter() - began
    return {name: (after[name] - before[name]) / lasted for name in names}


@dataclass(frozen=True)
class Turn:
    """Of the server, between two of the bare loop.

    Attributes:
        bare: rows a second of those two, on average.
    """

    rows: float
    ticks: float
    in_ticks: float
    bare: float


def turns(repeats: int, seconds: float) -> Iterator[Turn]:
    """Of one server and one bare loop."""
    checkpoint = str(common.CHECKPOINT)
    with server(*UNSTIR, UNSTIR_CHECKPOINT=checkpoint, **QUIET) as served, bare_process() as alone, busy(served):
        served.stop()
        before = alone.rows_per_second(seconds)
        for _ in range(repeats):
            served.go_on()
            mine = turn(served, seconds)
            served.stop()
            after = alone.rows_per_second(seconds)
            yield Turn(**mine, bare=(before + after) / 2)
            before = after


def summary(found: Sequence[Turn], starts: int) -> dict[str, Any]:
    """What the turns of all starts come to."""
    shares = [each.rows / each.bare for each in found]
    low, middle, high = statistics.quantiles(shares, n=4)

    def median(figure: Callable[[Turn], float], digits: int) -> float:
        return round(statistics.median(map(figure, found)), digits)

    return {
        "width": common.CAP,
        "starts": starts,
        "served_rows_per_second": median(lambda each: each.rows, 1),
        "bare_rows_per_second": median(lambda each: each.bare, 1),
        "share": {"median": round(middle, 3), "q1": round(low, 3), "q3": round(high, 3), "repeats": len(found)},
        "rows_per_tick": median(lambda each: each.rows / each.ticks, 3),
        "tick_ms": median(lambda each: 1e3 / each.ticks, 2),
        "bare_ms": median(lambda each: 1e3 * common.CAP / each.bare, 2),
        "outside_ticks_ms": median(lambda each: 1e3 * (1 - each.in_ticks) / each.ticks, 3),
        "shares": [round(share, 3) for share in shares],
        "load_average": round(os.getloadavg()[0], 2),
        "checkpoint": common.checkpoint().card.name,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", type=int, default=9, help="of server and bare loop")
    parser.add_argument("--repeats", type=int, default=3, help="turns after each start")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each turn")
    parser.add_argument("--bare", action="store_true", help="be the bare loop, told on the input how long to run")
    arguments = parser.parse_args()
    if arguments.bare:
        be_bare()
        return
    found = [each for _ in range(arguments.starts) for each in turns(arguments.repeats, arguments.seconds)]
    print(json.dumps(summary(found, arguments.starts)))


if __name__ == "__main__":
    main()
