"""One image and nobody else: Unstir beside a diffusers loop, each over HTTP, in float32 and in bfloat16.

The loop is that of diffusers' DDIMPipeline with its own UNet2DModel and DDIMScheduler; the pipeline itself knows no
classes, and the network does. All servers stay up, on one thread each, and are asked in turns; ratios are taken within
a turn. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import statistics
from dataclasses import replace

from app.cli.loadtest import load
from bench.peers import common
from bench.peers.table import PEERS, Peer, running

DTYPES = ("float32", "bfloat16")


def contestants() -> dict[str, Peer]:
    ours, theirs = PEERS["unstir"], PEERS["lock_diffusers"]
    found = {}
    for dtype in DTYPES:
        own = [dtype if part == "float32" else part for part in ours.command]
        found[f"unstir, {dtype}"] = replace(ours, command=tuple(own))
        found[f"diffusers, {dtype}"] = replace(theirs, command=(*theirs.command, "--dtype", dtype))
    return found


async def measure(targets: dict[str, load.Target], steps: int, repeats: int) -> dict[str, list[float]]:
    """Seconds of an image, by server; the first turn warms up."""
    async with contextlib.AsyncExitStack() as stack:
        clients = {name: await stack.enter_async_context(load.connected(target)) for name, target in targets.items()}
        seconds: dict[str, list[float]] = {name: [] for name in clients}
        for seed in range(repeats + 1):
            for name, client in clients.items():
                seconds[name].append(await client.require(steps, seed))
    return {name: times[1:] for name, times in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=21)
    arguments = parser.parse_args()
    with contextlib.ExitStack() as stack:
        targets = {name: stack.enter_context(running(peer)).target for name, peer in contestants().items()}
        seconds = asyncio.run(measure(targets, arguments.steps, arguments.repeats))
    facts = {
        "steps": arguments.steps,
        "repeats": arguments.repeats,
        "seconds": {name: round(statistics.median(times), 4) for name, times in seconds.items()},
        "faster": {},
        "load_average": round(os.getloadavg()[0], 2),
        "checkpoint": common.checkpoint().card.name,
    }
    for dtype in DTYPES:
        pairs = zip(seconds[f"diffusers, {dtype}"], seconds[f"unstir, {dtype}"], strict=True)
        low, middle, high = statistics.quantiles([theirs / ours for theirs, ours in pairs], n=4)
        facts["faster"][dtype] = {"median": round(middle, 3), "q1": round(low, 3), "q3": round(high, 3)}
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
