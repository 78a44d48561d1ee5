"""Saturation, side by side: all servers have as many clients as keep them busy, and one of them runs at a time.

The speed of a shared machine changes by a tenth within seconds, which is more than good servers differ by. So all are
started, all but one are stopped (SIGSTOP), and every second another one runs, in an order drawn anew for each round;
the bare network has turns like the servers. Answers are counted against the time that their server ran. All are started
several times, since processes differ by chance, too. The last line is JSON.
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
from bench.peers import bare, common
from bench.peers.process import running
from bench.peers.servers import DEEP, PEERS, versions

CLIENTS = 16
STARTS, ROUNDS, TURN_SECONDS = 5, 25, 1.0
TOGETHER = 0.5  # seconds within which the answers of one batch come


@dataclass
class Racer:
    """A server, and what it answered in its turns.

    Attributes:
        pids: of its processes.
        ran: seconds.
        broken: requests on connections that it closed when it was continued, as idle for too long; they are sent again.
        answers: (moment of the time that it ran, steps).
    """

    pids: Sequence[int]
    ran: float = 0.0
    broken: int = 0
    answers: list[tuple[float, int]] = field(default_factory=list)
    _since: float | None = None

    @property
    def clock(self) -> float:
        """Seconds that it has run by now."""
        return self.ran if self._since is None else self.ran + time.perf_counter() - self._since

    def send(self, what: signal.Signals) -> None:
        for pid in self.pids:
            os.kill(pid, what)

    async def turn(self) -> None:
        self._since = time.perf_counter()
        self.send(signal.SIGCONT)
        await asyncio.sleep(TURN_SECONDS)
        self.send(signal.SIGSTOP)
        self.ran, self._since = self.clock, None

    async def keep_busy(self, client: load.Client, works: Iterator[int]) -> None:
        """One client, which sends the next request as soon as there is an answer.

        Raises:
            LoadError: it was refused.
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
        """Steps a second from the end of the first batch to that of the last.

        So neither the filling of the first batch counts, nor work that was done and not yet answered.

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


def draw(mix: Mix) -> Iterator[int]:
    """Steps of one request after another, the same for every server."""
    source = random.Random("works")
    while True:
        yield mix.draw(source)


async def run_start(names: Sequence[str], mix: Mix, rounds: int) -> dict[str, Any]:
    """Start all servers, let them take turns, and end them.

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
            stack.callback(racers[name].send, signal.SIGKILL)  # a stopped process does not receive SIGTERM
            racers[name].send(signal.SIGSTOP)
            clients[name] = await stack.enter_async_context(load.connected(server.target))
        group = await stack.enter_async_context(asyncio.TaskGroup())
        works = {name: draw(mix) for name in racers}
        tasks = [
            group.create_task(racer.keep_busy(clients[name], works[name]))
            for name, racer in racers.items()
            for _ in range(CLIENTS)
        ]

        async def bare_turn() -> None:
            bare_rows.append(await asyncio.to_thread(bare.rows_per_second, TURN_SECONDS))

        common.network()  # loaded before the first turn
        turns, order = [bare_turn, *(racer.turn for racer in racers.values())], random.Random("side by side")
        for _ in range(rounds):
            for turn in order.sample(turns, len(turns)):
                await turn()
        for task in tasks:
            task.cancel()
    # Turns are of equal time, not of equal work, so that rates have an arithmetic mean.
    return {"bare": statistics.mean(bare_rows), "servers": {name: racer.found for name, racer in racers.items()}}


def pool(starts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """All starts together: steps a second, and the share of the bare network's rows a second."""
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
    parser.add_argument("--mix", default="50:1", help="steps of the requests, and their weights [%(default)s]")
    parser.add_argument("--peers", default=",".join(DEEP), help="which [%(default)s]")
    arguments = parser.parse_args()
    # Without a handler the process would end before it has ended its servers, and leave them stopped.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    names, mix, starts = arguments.peers.split(","), Mix.parse(arguments.mix), []
    for each in range(arguments.starts):
        print(f"start {each + 1} of {arguments.starts} …", file=sys.stderr, flush=True)
        starts.append(asyncio.run(run_start(names, mix, arguments.rounds)))
    facts = {
        "mix": str(mix),
        **pool(starts),
        "starts": arguments.starts,
        "rounds": arguments.rounds,
        "turn_seconds": TURN_SECONDS,
        "clients": CLIENTS,
        "load_average": round(os.getloadavg()[0], 2),
        "checkpoint": common.checkpoint().card.name,
        "versions": versions(names),
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
