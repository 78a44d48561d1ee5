"""What is left of the bare network when it is served over HTTP to as many clients as keep it busy.

In turns, on the same cores: the bare loop at its best width in a process of its own, and the server, whose rows are
counted by its own metrics while 16 clients ask for 50 steps each. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time

import httpx
import torch

from bench.peers import common
from bench.peers.run import bare
from bench.peers.table import PEERS, QUIET, ROOT, running

ROWS = re.compile(r"^unstir_rows_total (\S+)", re.MULTILINE)
TICKS = re.compile(r"^unstir_forward_duration_seconds_sum (\S+)", re.MULTILINE)


def bare_rows(width: int, seconds: float) -> float:
    """Rows a second of the network alone, in this process."""
    net = common.network()
    x, t = torch.randn(width, *common.checkpoint().shape), torch.full((width,), 500.0)
    y = common.null_class(width)
    with torch.inference_mode():
        for _ in range(3):
            net(x, t, y)
        count, began = 0, time.perf_counter()
        while time.perf_counter() - began < seconds:
            net(x, t, y)
            count += 1
        return width * count / (time.perf_counter() - began)


def apart(*arguments: str) -> str:
    """This module in a process of its own; what it prints."""
    command = [sys.executable, "-m", "bench.saturation", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | QUIET, check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def served_rows(client: httpx.Client, url: str, seconds: float) -> tuple[float, float]:
    """Rows a second of the busy server, and the share of the time that it spent in ticks."""
    command = ["-m", "app", "bench", "--url", url, "--mix", "50:1", "--clients", "16", "--seconds", str(seconds + 3)]
    load = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(4.5)  # it starts, and asks for one picture alone
    before, began = client.get("/metrics").text, time.perf_counter()
    time.sleep(seconds - 2.5)
    after, lasted = client.get("/metrics").text, time.perf_counter() - began
    load.wait()

    def rate(pattern: re.Pattern[str]) -> float:
        return (float(pattern.findall(after)[0]) - float(pattern.findall(before)[0])) / lasted

    return rate(ROWS), rate(TICKS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each turn of the server")
    parser.add_argument("--bare", type=int, help="only run the bare loop at this width, in this process")
    arguments = parser.parse_args()
    if arguments.bare:
        print(bare_rows(arguments.bare, arguments.seconds / 2))
        return
    width = int(bare(0.5)["width"])
    shares, rates, ticks = [], [], []
    with running(PEERS["unstir"]) as target, httpx.Client(base_url=target.url.removesuffix("/sample")) as client:
        for _ in range(arguments.repeats):
            alone = [float(apart("--bare", str(width), "--seconds", str(arguments.seconds)))]
            rows, busy = served_rows(client, target.url, arguments.seconds)
            alone.append(float(apart("--bare", str(width), "--seconds", str(arguments.seconds))))
            shares.append(rows / statistics.mean(alone))
            rates.append((rows, *alone))
            ticks.append(busy)
            print(f"served {rows:.1f} rows/s, bare {alone[0]:.1f} and {alone[1]:.1f}: {shares[-1]:.3f}", flush=True)
    low, middle, high = statistics.quantiles(shares, n=4)
    facts = {
        "width": width,
        "share": {"median": round(middle, 3), "q1": round(low, 3), "q3": round(high, 3)},
        "in_ticks": round(statistics.median(ticks), 4),
        "rows_per_second": [[round(each, 1) for each in three] for three in rates],
        "load_average": round(os.getloadavg()[0], 2),
        "checkpoint": common.checkpoint().card.name,
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
