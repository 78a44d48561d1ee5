"""Whether Retry-After holds: half as much again as the server can do, and clients who wait as they are told.

A client that is refused sleeps for exactly the seconds that it was told, asks once more, and must then be let in. The
last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from typing import Any

from app.cli.loadtest import load
from app.cli.mix import MIX, Mix, poisson
from bench.peers import common
from bench.peers.bare import bare
from bench.peers.table import PEERS, QUIET, UNSTIR
from bench.server import server


async def measure(target: load.Target, rate: float, seconds: float, seed: int) -> dict[str, Any]:
    async with load.connected(target) as client:
        records = (await load.open_loop(client, poisson(Mix.parse(MIX), rate, seconds, seed), retry=True)).records
    retried = [record for record in records if record.retried]
    waits = sorted(record.retry_after for record in retried if record.retry_after is not None)
    return {
        "requests": len(records),
        "refused": sum(record.retried or record.status == 429 for record in records),
        "admitted": sum(record.ok for record in retried),
        "told_to_wait": {"shortest": waits[0], "median": waits[len(waits) // 2], "longest": waits[-1]} if waits else {},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load", type=float, default=1.5, help="of what the bare network can do")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--room", type=float, default=5.0, help="seconds of work that may wait")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    with bare() as process:
        rate = arguments.load * process.line()["rows_per_second"] / Mix.parse(MIX).mean
    room = ("--max-queue-seconds", str(arguments.room))
    peer = PEERS["unstir"]
    environment: dict[str, Any] = {"UNSTIR_CHECKPOINT": str(common.CHECKPOINT), **QUIET}
    with server(*UNSTIR, *room, **environment) as served:
        target = load.Target(f"{served.base}{peer.path}", peer.body, peer.accept)
        facts = asyncio.run(measure(target, rate, arguments.seconds, arguments.seed))
    facts |= {"load": arguments.load, "room_seconds": arguments.room, "load_average": round(os.getloadavg()[0], 2)}
    print(json.dumps(facts))
    sys.exit(facts["refused"] == 0 or facts["admitted"] < 0.95 * facts["refused"])


if __name__ == "__main__":
    main()
