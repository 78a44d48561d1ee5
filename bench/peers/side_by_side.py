"""Saturated, side by side: servers that all have as many clients as keep them busy, and of which one runs at a time.

A shared machine's pace changes by a tenth within seconds, which is more than good servers differ by. So all are
started, all but one are stopped, and every second it is another one's turn, in an order drawn anew for each round;
the bare network has turns like everybody. Answers are counted against the time that their server ran. All are started
several times over, since processes differ by luck, too. The last line is JSON.
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

from app.cli.loadtest import load
from app.cli.loadtest.load import LoadError, Record
from app.cli.mix import Mix
from bench.peers import common
from bench.peers.bare import bare
from bench.peers.run import CLIENTS, DEEP, STEPS, versions
from bench.peers.table import PEERS, running

STARTS, ROUNDS, TURN_SECONDS = 5, 25, 1.0
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
    """

    pids: Sequence[int]
    ran: float = 0.0
    broken: int = 0
    answers: list[tuple[float, int]] = field(default_factory=list)
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

    @property
    def found(self) -> dict[str, float]:
        """Steps a second from the end of the first batch to that of the last, so that filling up is not counted, nor
        anything missed that was done but not yet answered.

        Raises:
            LoadError: there were too few answers.
        """
        began = self._end_of_batch(self.answers[0][0]) if self.answers else self.ran
        last = max((moment for moment, _ in self.answers if moment <= self.ran - TOGETHER), default=0.0)
        if last <= began:
            raise LoadError(f"{len(self.answers)} answers in {self.ran:.0f} s that a server ran")
        ended = self._end_of_batch(last)
        rate = sum(steps for moment, steps in self.answers if began < moment <= ended) / (ended - began)
        return {"rate": rate, "answers": len(self.answers), "broken": self.broken, "seconds": self.ran}

    def _end_of_batch(self, moment: float) -> float:
        """The last answer that comes together with the one of this moment."""
        return max(each for each, _ in self.answers if each <= moment + TOGETHER)


def drawn(mix: Mix) -> Iterator[int]:
    """What clients ask for one after another, the same for every server."""
    source = random.Random("works")
    while True:
        yield mix.draw(source)


async def one_start(names: Sequence[str], mix: Mix, rounds: int) -> dict[str, Any]:
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
            stack.callback(racers[name].send, signal.SIGKILL)  # who is stopped would not hear that it should end
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
        for _ in range(rounds):
            for turn in order.sample(turns, len(turns)):
                await turn()
        for task in tasks:
            task.cancel()
    # Turns are of equal time, not of equal work, so that rates have an arithmetic mean.
    return {"bare": statistics.mean(bare_rows), "servers": {name: racer.found for name, racer in racers.items()}}


def summary(starts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What all starts come to: steps a second, and of the bare network, whose rows are steps, too."""
    servers = {}
    for name in starts[0]["servers"]:
        found = [each["servers"][name] for each in starts]
        shares = [each["servers"][name]["rate"] / each["bare"] for each in starts]
        servers[name] = {
            "row_steps_per_second": round(statistics.mean(each["rate"] for each in found), 2),
            "of_bare": round(statistics.mean(shares), 4),
            "of_bare_by_start": [round(share, 4) for share in shares],
            "error": round(statistics.stdev(shares) / math.sqrt(len(shares)), 4) if len(shares) > 1 else None,
            **{key: sum(each[key] for each in found) for key in ("answers", "broken")},
            "seconds": round(sum(each["seconds"] for each in found), 1),
        }
    return {"servers": servers, "bare_rows_per_second": round(statistics.mean(each["bare"] for each in starts), 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", type=int, default=STARTS, help="of all servers [%(default)s]")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="after each start; at least 20 [%(default)s]")
    parser.add_argument("--mix", default=f"{STEPS}:1", help="steps of the requests, and their weights [%(default)s]")
    parser.add_argument("--peers", default=",".join(DEEP), help="which [%(default)s]")
    arguments = parser.parse_args()
    # Without a handler the process would be gone before it has ended its servers, and leave them stopped.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    names, mix, starts = arguments.peers.split(","), Mix.parse(arguments.mix), []
    for each in range(arguments.starts):
        print(f"start {each + 1} of {arguments.starts} …", file=sys.stderr, flush=True)
        starts.append(asyncio.run(one_start(names, mix, arguments.rounds)))
    facts = {
        "mix": str(mix),
        **summary(starts),
        "starts": arguments.starts,
        "rounds": arguments.rounds,
        "turn_seconds": TURN_SECONDS,
        "clients": CLIENTS,
        "load_average": round(os.getloadavg()[0], 2),
        "checkpoint": common.checkpoint().card.name,
        "versions": versions([PEERS[name] for name in names]),
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
