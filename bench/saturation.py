"""What is left of the bare network when it is served over HTTP to as many clients as keep it busy.

In turns of a few seconds, on the same cores: the bare loop at its best width in a process of its own, and the server,
whose rows are counted by its own metrics while 16 clients ask for 50 steps each. While the bare loop runs, the server
is stopped (SIGSTOP), so its load begins once only and neither has company. The last line is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch

from bench.peers import common
from bench.peers.run import bare
from bench.peers.table import QUIET, UNSTIR
from bench.server import ROOT, Served, server

CLIENTS = 16
RESUME_SECONDS = 0.5  # after which the server's turn is counted: the tick that was stopped is over


class Bare:
    """The network alone, in a process that runs it when it is told to.

    Attributes:
        width: at which it does the most rows a second.
    """

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.width = int(self._told())

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
    width = int(bare(0.5)["width"])
    print(width, flush=True)
    net = common.network()
    x, t = torch.randn(width, *common.checkpoint().shape), torch.full((width,), 500.0)
    y = common.null_class(width)
    with torch.inference_mode():
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


def measure(served: Served, alone: Bare, repeats: int, seconds: float) -> dict[str, Any]:
    turns: list[dict[str, float]] = []
    bares: list[float] = []
    with busy(served):
        for repeat in range(repeats + 1):
            os.kill(served.pid, signal.SIGSTOP)
            bares.append(alone.rows_per_second(seconds))
            os.kill(served.pid, signal.SIGCONT)
            if repeat < repeats:
                turns.append(turn(served, seconds))
    shares = [one["rows"] / statistics.mean(bares[i : i + 2]) for i, one in enumerate(turns)]
    low, middle, high = statistics.quantiles(shares, n=4)
    tick_ms = [1e3 / one["ticks"] for one in turns]
    bare_ms = 1e3 * alone.width / statistics.median(bares)
    return {
        "width": alone.width,
        "served_rows_per_second": round(statistics.median(one["rows"] for one in turns), 1),
        "bare_rows_per_second": round(statistics.median(bares), 1),
        "share": {"median": round(middle, 3), "q1": round(low, 3), "q3": round(high, 3), "repeats": repeats},
        "rows_per_tick": round(statistics.median(one["rows"] / one["ticks"] for one in turns), 3),
        "tick_ms": round(statistics.median(tick_ms), 2),
        "bare_ms": round(bare_ms, 2),
        "outside_ticks_ms": round(
            statistics.median(ms * (1 - one["in_ticks"]) for ms, one in zip(tick_ms, turns, strict=True)), 3
        ),
        "shares": [round(share, 3) for share in shares],
        "load_average": round(os.getloadavg()[0], 2),
        "checkpoint": common.checkpoint().card.name,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each turn")
    parser.add_argument("--bare", action="store_true", help="be the bare loop, told on the input how long to run")
    arguments = parser.parse_args()
    if arguments.bare:
        be_bare()
        return
    with server(*UNSTIR, UNSTIR_CHECKPOINT=str(common.CHECKPOINT), **QUIET) as served, bare_process() as alone:
        print(json.dumps(measure(served, alone, arguments.repeats, arguments.seconds)))


if __name__ == "__main__":
    main()
