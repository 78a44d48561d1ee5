"""The comparison: every server gets the same requests at the same times, at shares of the bare network's capacity.

Servers alternate within a repeat, each repeat begins with another one, and figures are pooled over repeats, so that
other load on the machine affects all. Slowdown is latency over the time of as many bare forwards of one row as the
request has steps: the same yardstick for every server. The file is written after every run of a server, and
``--resume`` continues a comparison that was stopped.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from app.cli.loadtest import load
from app.cli.loadtest.report import outcomes, spread
from app.cli.mix import MIX, Mix, poisson
from bench.peers import bare, common
from bench.peers.process import running
from bench.peers.servers import DEEP, PEERS, versions
from bench.server import ROOT
from model.output import write_atomically

OUT = ROOT / "docs" / "performance" / "peers.json"
# Seconds at each share of the capacity; more of the first, whose tails are compared, and long requests are few.
SECONDS = {"0.6": 120.0, "0.9": 60.0, "1.2": 60.0}
CALM = "0.6"  # the load that every server gets; above it, those that batch whole requests need minutes to recover
PATIENCE = 60.0  # seconds that a client waits after the last request was sent
CAPACITY_SECONDS = 30.0  # measured before each repeat: the speed of a shared machine changes within hours


async def measure(target: load.Target, share: str, repeat: int, capacity: float) -> dict[str, Any]:
    """What a server made of one load; ``capacity`` is in requests a second."""
    arrivals = poisson(
        Mix.parse(MIX), float(share) * capacity, SECONDS[share], 1000 * repeat + round(100 * float(share))
    )
    async with load.connected(target) as client:
        records = (await load.open_loop(client, arrivals, patience=PATIENCE)).records
    latencies: dict[str, list[float]] = {}
    for record in sorted(records, key=lambda record: record.steps):
        if record.ok or record.unanswered:
            latencies.setdefault(str(record.steps), []).append(round(record.latency, 4))
    return {
        "outcomes": outcomes(records),
        "latest_send": round(max((record.start - record.arrival for record in records), default=0.0), 4),
        "latencies": latencies,
    }


def pool(facts: dict[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """All repeats of a server under a load together: by server, then by load."""
    grouped: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for run in facts["runs"]:
        grouped.setdefault(run["server"], {}).setdefault(str(run["load"]), []).append(run)
    forward = facts["forward_seconds"]["1"]
    return {
        name: {each: _pool(runs, forward) for each, runs in sorted(loads.items())} for name, loads in grouped.items()
    }


def _pool(runs: Sequence[dict[str, Any]], forward: float) -> dict[str, Any]:
    classes = sorted({steps for run in runs for steps in run["latencies"]}, key=int)
    latencies = {steps: [each for run in runs for each in run["latencies"].get(steps, [])] for steps in classes}
    of_runs = [slowdowns(run["latencies"], forward) for run in runs]
    return {
        "outcomes": {name: sum(run["outcomes"][name] for run in runs) for name in runs[0]["outcomes"]},
        "slowdown": spread(slowdowns(latencies, forward)),
        "mean_slowdown_by_repeat": [statistics.mean(each) for each in of_runs if each],
        "latency": {steps: spread(each) for steps, each in latencies.items()},
        "slowdowns": sorted(slowdowns(latencies, forward)),
    }


def slowdowns(latencies: dict[str, list[float]], forward: float) -> list[float]:
    """Of requests whose latencies are known by their steps; ``forward`` is the seconds of one row."""
    return [each / (int(steps) * forward) for steps, these in latencies.items() for each in these]


def write(path: Path, facts: dict[str, Any]) -> None:
    """Each run takes one line."""
    head = json.dumps({name: value for name, value in facts.items() if name != "runs"}, indent=1)
    runs = ",\n".join(f"  {json.dumps(run)}" for run in facts["runs"])
    write_atomically(path, f'{head[:-2]},\n "runs": [\n{runs}\n ]\n}}\n')


def compare(names: Sequence[str], repeats: int, out: Path, resume: bool) -> None:
    """Measure everything that ``out`` does not hold yet.

    Raises:
        SystemExit: ``out`` was measured with other settings.
    """
    settings = {"mix": MIX, "checkpoint": common.checkpoint().card.name, "seconds": SECONDS}
    if resume and out.exists():
        facts = json.loads(out.read_text(encoding="utf-8"))
        if any(facts[name] != value for name, value in settings.items()):
            raise SystemExit(f"{out} was measured with other settings")
    else:
        facts = {**settings, "requests_per_second": [], "forward_seconds": bare.forward_seconds()}
        facts |= {"versions": versions(names), "cores": os.cpu_count(), "runs": []}
    capacities: list[float] = facts["requests_per_second"]
    for repeat in range(repeats):
        if len(capacities) <= repeat:
            capacities.append(bare.rows_per_second(CAPACITY_SECONDS) / Mix.parse(MIX).mean)
        first = repeat % len(names)
        for share in SECONDS:
            for name in [*names[first:], *names[:first]]:
                run = {"server": name, "repeat": repeat, "load": float(share)}
                if any(run.items() <= each.items() for each in facts["runs"]) or (share != CALM and name not in DEEP):
                    continue
                print(f"{name} at {share}, repeat {repeat + 1} of {repeats} …", file=sys.stderr, flush=True)
                run["load_average"] = round(os.getloadavg()[0], 2)
                with running(PEERS[name]) as server:
                    run |= asyncio.run(measure(server.target, share, repeat, capacities[repeat]))
                facts["runs"].append(run)
                write(out, facts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peers", default=",".join(PEERS), help="which, and in which order [all]")
    parser.add_argument("--out", type=Path, default=OUT, help="[docs/performance/peers.json]")
    parser.add_argument("--resume", action="store_true", help="continue what --out holds")
    arguments = parser.parse_args()
    # Without a handler the process would end before it has ended its servers.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    names = arguments.peers.split(",")
    if unknown := sorted(set(names) - PEERS.keys()):
        parser.error(f"--peers: no {', '.join(unknown)}; there are {', '.join(PEERS)}")
    compare(names, arguments.repeats, arguments.out, arguments.resume)


if __name__ == "__main__":
    main()
