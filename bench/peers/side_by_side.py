"""Saturated, side by side: servers that all have as many clients as keep them busy, and of which one runs at a time.

A shared machine's pace changes by a tenth within seconds, which is more than good servers differ by. So all are
started, all but one are stopped, and every second it is another one's turn, in an order drawn anew for each round;
the bare network has turns like everybody. Answers are counted against the time that their server ran. The last line is
JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import random
import signal
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

from app.bench import load
from app.bench.load import LoadError, Record
from app.bench.mix import Mix
from bench.peers import common
from bench.peers.bare import bare
from bench.peers.run import CLIENTS, DEEP, STEPS, versions
from bench.peers.table import PEERS, running

TURN_SECONDS, ROUNDS = 1.0, 100
BLOCKS = 6  # of rounds; how much these differ says what the whole may be off by
TOGETHER = 0.5  # seconds within which the answers of one batch come


@dataclass
class Racer:
    """A server, and what it has done in its turns.

    Attributes:
        pids: of its processes.
        ran: seconds.
        broken: requests on connections that it closed when it woke up, since by the clock they had been idle for long;
            they are sent again.
        answers: at which moments of this time, and how many steps each was of.
        ends: of each round, ``ran`` after it.
    """

    pids: Sequence[int]
    ran: float = 0.0
    broken: int = 0
    answers: list[tuple[float, int]] = field(default_factory=list)
    ends: list[float] = field(default_factory=list)
    _since: float | None = None

    @property
    def clock(self) -> float:
        """Seconds that it has run, by now."""
        return self.ran if self._since is None else self.ran + time.perf_counter() - self._since

    def send(self, what: signal.Signals) -> None:
        """To all its processes, of which there will be no others."""
        for pid in self.pids:
            os.kill(pid, what)

    async def turn(self) -> None:
        """Let it run for a while."""
        self._since = time.perf_counter()
        self.send(signal.SIGCONT)
        await asyncio.sleep(TURN_SECONDS)
        self.send(signal.SIGSTOP)
        self.ran, self._since = self.clock, None
        self.ends.append(self.ran)

    async def keep_busy(self, client: load.Client, works: Iterator[int]) -> None:
        """One client, who asks for the next of these works as soon as there is an answer.

        Raises:
            LoadError: it was a refusal.
        """
        steps = next(works)
        while True:
            record = Record(0.0, 0.0, steps)
            await client.ask(record, seed=len(self.answers))
            if record.ok:
                self.answers.append((self.clock, steps))
                steps = next(works)
            elif record.status:
                raise LoadError(f"{client.target.url}: {record.status} {record.error}")
            else:
                self.broken += 1

    def rate(self, since: float, until: float) -> float:
        """Steps a second between two moments of the time that it ran: from the last answer before the one to that
        before the other, so that nothing begun is counted, nor anything missed that was done but not yet answered."""
        before = max((moment for moment, _ in self.answers if moment <= since), default=0.0)
        within = [each for each in self.answers if before < each[0] <= until]
        if not within:
            raise LoadError(f"no answer in {until - since:.0f} s that a server ran")
        return sum(steps for _, steps in within) / (max(within)[0] - before)


def drawn(mix: Mix) -> Iterator[int]:
    """What clients ask for one after another, the same for every server."""
    source = random.Random("works")
    while True:
        yield mix.draw(source)


async def measure(names: Sequence[str], mix: Mix, rounds: int) -> dict[str, Any]:
    """Start all, take turns, and see what came of it.

    Raises:
        LoadError: a server refused or failed.
    """
    async with AsyncExitStack() as stack:
        racers: dict[str, Racer] = {}
        clients: dict[str, load.Client] = {}
        bare_rows: list[float] = []
        for name in names:
            server = stack.enter_context(running(PEERS[name]))
            racers[name] = Racer(server.pids)
            racers[name].send(signal.SIGSTOP)
            clients[name] = await stack.enter_async_context(load.connected(server.target))
        alone = stack.enter_context(bare())
        group = await stack.enter_async_context(asyncio.TaskGroup())
        works = {name: drawn(mix) for name in racers}
        tasks = [
            group.create_task(racer.keep_busy(clients[name], works[name]))
            for name, racer in racers.items()
            for _ in range(CLIENTS)
        ]

        async def bare_turn() -> None:
            bare_rows.append(await asyncio.to_thread(alone.rows_per_second, TURN_SECONDS))

        turns, order = [bare_turn, *(racer.turn for racer in racers.values())], random.Random("side by side")
        for each in range(rounds):
            for turn in order.sample(turns, len(turns)):
                await turn()
            if each % 10 == 9:
                print(f"{each + 1} of {rounds} rounds", file=sys.stderr, flush=True)
        for task in tasks:
            task.cancel()
    return {"mix": str(mix), **summary(racers, bare_rows)}


def summary(racers: dict[str, Racer], bare_rows: Sequence[float]) -> dict[str, Any]:
    """What all turns come to: steps a second, and of the bare network, whose rows are steps, too.

    Turns are of equal time, not of equal work, so that rates have an arithmetic mean.
    """
    capacity = statistics.mean(bare_rows)
    bounds = [len(bare_rows) * block // BLOCKS for block in range(BLOCKS + 1)]
    servers = {}
    for name, racer in racers.items():
        first = racer.answers[0][0] + TOGETHER  # the first batch is cut off: filling up is not what is asked about
        ends = [first, *(racer.ends[bound - 1] for bound in bounds[1:])]
        shares = [
            racer.rate(ends[block], ends[block + 1]) / statistics.mean(bare_rows[bounds[block] : bounds[block + 1]])
            for block in range(BLOCKS)
        ]
        rate = racer.rate(first, racer.ran)
        servers[name] = {
            "row_steps_per_second": round(rate, 2),
            "of_bare": round(rate / capacity, 4),
            "of_bare_by_block": [round(share, 4) for share in shares],
            "error": round(statistics.stdev(shares) / math.sqrt(BLOCKS), 4),
            "answers": len(racer.answers),
            "broken": racer.broken,
            "seconds": round(racer.ran, 1),
        }
    return {
        "servers": servers,
        "bare_rows_per_second": round(capacity, 2),
        "rounds": len(bare_rows),
        "turn_seconds": TURN_SECONDS,
        "clients": CLIENTS,
        "load_average": round(os.getloadavg()[0], 2),
        "checkpoint": common.checkpoint().card.name,
        "versions": versions([PEERS[name] for name in racers]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="at least 60 [%(default)s]")
    parser.add_argument("--mix", default=f"{STEPS}:1", help="steps of the requests, and their weights [%(default)s]")
    parser.add_argument("--peers", default=",".join(DEEP), help="which [%(default)s]")
    arguments = parser.parse_args()
    # Without a handler the process would be gone before it has ended its servers, and leave them stopped.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    print(json.dumps(asyncio.run(measure(arguments.peers.split(","), Mix.parse(arguments.mix), arguments.rounds))))


if __name__ == "__main__":
    main()
