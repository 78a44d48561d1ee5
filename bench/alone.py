"""One image and no other load: Unstir beside a diffusers loop, each over HTTP, in float32 and in bfloat16.

The loop is that of diffusers' DDIMPipeline with its UNet2DModel and DDIMScheduler; the pipeline itself knows no
classes. All servers stay up, on one thread each, and alternate; ratios are taken within a round. The last line is JSON.
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
from bench.peers.process import running
from bench.peers.servers import PEERS, Peer
from bench.timing import summarize_ratios

DTYPES = ("float32", "bfloat16")


def contestants() -> dict[str, Peer]:
    ours, theirs = PEERS["unstir"], PEERS["lock_diffusers"]
    found = {}
    for dtype in DTYPES:
        command = tuple(dtype if part == "float32" else part for part in ours.command)
        found[f"unstir, {dtype}"] = replace(ours, command=command)
        found[f"diffusers, {dtype}"] = replace(theirs, command=(*theirs.command, "--dtype", dtype))
    return found


async def measure(targets: dict[str, load.Target], steps: int, repeats: int) -> dict[str, list[float]]:
    """Seconds of an image, by server; the first round warms up."""
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
        "faster": {
            dtype: summarize_ratios(seconds[f"diffusers, {dtype}"], seconds[f"unstir, {dtype}"]) for dtype in DTYPES
        },
        "load_average": round(os.getloadavg()[0], 2),
        "checkpoint": common.checkpoint().card.name,
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
