"""The share of the bare network's speed that is left when it is served over HTTP to clients that keep it busy.

The server runs in this process, and every few ticks its device thread runs the bare loop for as many forwards of the
widest batch, while the clients wait. So both have the same network in the same memory on the same thread, within a
second of each other, whatever else the machine is doing. Ratios are taken between a turn of the server and the turns of
the bare loop before and after it. The last line is JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from app.api.server import Server, create_server
from app.engine.jobs import Lane
from app.engine.worker import Device, TickHandle, Worker
from app.settings import Settings
from bench.peers import common
from bench.peers.bare import inputs
from bench.server import ROOT, free_port
from bench.timing import summarize_ratios

CLIENTS = 16
FORWARDS = 10  # of each turn


@dataclass
class Turn:
    """A few ticks of the server in a row.

    Attributes:
        seconds: from the first to the first of the next turn.
        in_ticks: seconds spent on advancing lanes.
    """

    rows: int = 0
    ticks: int = 0
    seconds: float = 0.0
    in_ticks: float = 0.0


class Alternation:
    """Stands between worker and device, and runs the bare loop between turns of the server.

    Attributes:
        turns: of the server, finished; each between two of the bare loop.
        bare: rows a second of the bare loop in its turns, one more.
    """

    def __init__(self, worker: Worker, bare: Callable[[], float]) -> None:
        self.turns: list[Turn] = []
        self.bare: list[float] = []
        self._run_bare = bare
        self._device: Device = worker.device
        self.ahead = 0
        self._tick = worker.tick
        self._turn = Turn()
        self._began = 0.0
        worker.device = self
        worker.tick = self.tick  # type: ignore[method-assign]

    def tick(self) -> bool:
        """The worker's tick; at the end of a turn the bare loop runs first."""
        if not self.bare or self._turn.ticks == FORWARDS:
            if self.bare:
                self._turn.seconds = time.perf_counter() - self._began
                self.turns.append(self._turn)
            self.bare.append(self._run_bare())
            self._turn, self._began = Turn(), time.perf_counter()
        return self._tick()

    def advance(self, lanes: list[Lane], width: int, exact: bool) -> TickHandle:
        landing = self._device.advance(lanes, width, exact)
        self._turn.in_ticks += landing.wait()
        self._turn.ticks += 1
        self._turn.rows += sum(lane.rows for lane in lanes)
        return landing

    def check(self) -> None:
        """As the device that it stands before."""
        self._device.check()

    def read_output(self, lane: Lane) -> torch.Tensor:
        return self._device.read_output(lane)


def bare_loop(server: Server, width: int) -> Callable[[], float]:
    """Rows a second of a few forwards in a row of the network that the server has loaded."""
    net, batch = server.lifecycle.get_service().engine.worker.device.networks.fast, inputs(width)  # type: ignore[attr-defined]

    @torch.inference_mode()
    def run() -> float:
        began = time.perf_counter()
        for _ in range(FORWARDS):
            net(*batch)
        return FORWARDS * width / (time.perf_counter() - began)

    return run


@contextmanager
def running(settings: Settings) -> Iterator[Server]:
    """A ready server on another thread of this process."""
    server = create_server(settings)
    thread = threading.Thread(target=server.run)
    thread.start()
    while server.lifecycle.unready or not server.started:
        time.sleep(0.05)
    try:
        yield server
    finally:
        assert server.loop is not None
        server.loop.call_soon_threadsafe(server._close)
        thread.join()


@contextmanager
def busy(server: Server) -> Iterator[None]:
    """Clients that keep the server busy, all of them admitted."""
    url = f"http://127.0.0.1:{server.config.port}/sample"
    command = ["-m", "app", "loadtest", "--url", url, "--mix", "50:1", "--seconds", "100000", "--clients", str(CLIENTS)]
    clients = subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        while server.lifecycle.get_service().engine.requests.total() < CLIENTS:
            time.sleep(0.1)
        yield
    finally:
        clients.kill()
        clients.wait()


def measure(checkpoint: Path, turns: int) -> Alternation:
    settings = Settings(
        checkpoint=checkpoint,
        port=free_port(),
        device="cpu",
        dtype="float32",
        threads=1,
        max_width=common.CAP,
        log_level="warning",
    )
    with running(settings) as server, busy(server):
        found = Alternation(server.lifecycle.get_service().engine.worker, bare_loop(server, common.CAP))
        while len(found.turns) < turns:
            time.sleep(0.2)
    return found


def pool(turns: Sequence[Turn], bare: Sequence[float]) -> dict[str, Any]:
    """All turns together."""
    beside = [(before + after) / 2 for before, after in itertools.pairwise(bare)]
    rates = [turn.rows / turn.seconds for turn in turns]
    ticks, seconds = sum(turn.ticks for turn in turns), sum(turn.seconds for turn in turns)
    served, bare_rate = sum(turn.rows for turn in turns) / seconds, statistics.harmonic_mean(bare)
    return {
        "width": common.CAP,
        "served_rows_per_second": round(served, 1),
        "bare_rows_per_second": round(bare_rate, 1),
        "total": round(served / bare_rate, 3),
        "share": summarize_ratios(rates, beside[: len(rates)]),
        "rows_per_tick": round(sum(turn.rows for turn in turns) / ticks, 3),
        "tick_ms": round(1e3 * seconds / ticks, 2),
        "bare_ms": round(1e3 * common.CAP / bare_rate, 2),
        "outside_ticks_ms": round(1e3 * (seconds - sum(turn.in_ticks for turn in turns)) / ticks, 3),
        "load_average": round(os.getloadavg()[0], 2),
        "checkpoint": common.checkpoint().card.name,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=150)
    arguments = parser.parse_args()
    found = measure(common.CHECKPOINT, arguments.turns)
    print(json.dumps(pool(found.turns, found.bare)))


if __name__ == "__main__":
    main()
