"""Clients of a server: open loop, where requests are sent at given times, and closed loop, one after the other.

In an open loop a request is sent at its time however many are unanswered, and its latency counts from that time: a
server that stalls cannot hide it by delaying the requests that would measure it.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

from app.cli.mix import Arrival, Mix

UNANSWERED = "unanswered"
JSON = {"content-type": "application/json"}


class LoadError(Exception):
    """The server cannot be measured at all; the message says why."""


@dataclass(frozen=True)
class Target:
    """Where requests go, and what they say.

    Attributes:
        body: (steps, seed) to the JSON of one request.
        least_bytes: shorter answers are errors, whatever their status.
        transport: in place of the network, for tests.
    """

    url: str
    body: Callable[[int, int], Any]
    accept: str = "*/*"
    least_bytes: int = 1
    transport: httpx.AsyncBaseTransport | None = None


@dataclass
class Record:
    """One request and its answer; times in seconds, from the start of the run.

    Attributes:
        arrival: when it was due.
        start: when it was sent; much later than ``arrival`` means that the client is too slow.
        latency: from ``arrival`` to the last byte of the answer, or until the client gave up.
        status: of the last answer; 0 if there was none.
        error: what went wrong where there was no answer, or not a whole one; ``unanswered`` if the client gave up.
        retry_after: seconds that a refusal asked to wait; None without one.
        retried: whether the client waited that long and sent it again; ``status`` is then of the second answer.
    """

    arrival: float
    start: float
    steps: int
    latency: float = 0.0
    status: int = 0
    error: str = ""
    retry_after: float | None = None
    retried: bool = False

    @property
    def ok(self) -> bool:
        return 200 <= self.status < 300 and not self.error

    @property
    def unanswered(self) -> bool:
        """Whether the client gave up; its latency is then a lower bound."""
        return self.error == UNANSWERED


@dataclass
class Run:
    """The records of one run, in the order of their arrivals.

    Attributes:
        seconds: from the start to the last answer.
    """

    records: list[Record] = field(default_factory=list)
    seconds: float = 0.0


class Client:
    """Sends requests to one target, over as many connections as it takes."""

    def __init__(self, target: Target, http: httpx.AsyncClient) -> None:
        self.target = target
        self.http = http
        self._began = time.perf_counter()

    @property
    def now(self) -> float:
        """Seconds since :meth:`begin`."""
        return time.perf_counter() - self._began

    def begin(self) -> None:
        self._began = time.perf_counter()

    async def ask(self, record: Record, seed: int, retry: bool = False) -> None:
        """Send one request, and fill in its record.

        Args:
            retry: after a refusal, wait as it asks and send the request once more.
        """
        content = json.dumps(self.target.body(record.steps, seed)).encode()
        record.start = self.now
        try:
            refused = await self._once(record, content)
            if refused and retry and record.retry_after is not None:
                await asyncio.sleep(record.retry_after)
                record.retried = True
                await self._once(record, content)
        except asyncio.CancelledError:
            record.status, record.error = 0, UNANSWERED
            raise
        finally:
            record.latency = self.now - record.arrival

    async def _once(self, record: Record, content: bytes) -> bool:
        """One exchange; returns whether it was refused with 429 or 503."""
        record.status, record.error = 0, ""
        try:
            answer = await self.http.post(
                self.target.url, content=content, headers={**JSON, "accept": self.target.accept}
            )
        except httpx.HTTPError as error:
            record.error = f"{type(error).__name__}: {error}".removesuffix(": ")
            return False
        record.status = answer.status_code
        if answer.is_success and len(answer.content) < self.target.least_bytes:
            record.error = f"an answer of {len(answer.content)} bytes"
        refused = answer.status_code in (429, 503)
        if refused:
            record.retry_after = _seconds(answer.headers.get("retry-after"))
        return refused

    async def require(self, steps: int, seed: int) -> float:
        """Seconds that one request takes.

        Raises:
            LoadError: it was not answered as asked; the message quotes the server.
        """
        content = json.dumps(self.target.body(steps, seed)).encode()
        began = time.perf_counter()
        try:
            answer = await self.http.post(
                self.target.url, content=content, headers={**JSON, "accept": self.target.accept}
            )
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise LoadError(f"cannot ask {self.target.url}: {error or type(error).__name__}") from error
        seconds = time.perf_counter() - began
        if not answer.is_success:
            raise LoadError(f"{self.target.url} answers {answer.status_code}: {answer.text[:300]}")
        if len(answer.content) < self.target.least_bytes:
            raise LoadError(f"{self.target.url} answers with {len(answer.content)} bytes: {answer.text[:300]}")
        return seconds


@asynccontextmanager
async def connected(target: Target) -> AsyncIterator[Client]:
    """A client of the target: no limit on time or connections, and no proxy."""
    # Servers close idle connections, some after 5 s; one that is closed while a request is on its way is an error.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=2)
    async with httpx.AsyncClient(timeout=None, limits=limits, trust_env=False, transport=target.transport) as http:
        yield Client(target, http)


async def alone(client: Client, classes: Sequence[int], times: int = 3) -> dict[int, float]:
    """Seconds of a request of each class on the idle server: the median of ``times``, one after another.

    Raises:
        LoadError: one was not answered.
    """
    await client.require(classes[0], 0)
    taken: dict[int, list[float]] = {steps: [] for steps in classes}
    for seed in range(times):
        for steps in classes:
            taken[steps].append(await client.require(steps, seed))
    return {steps: sorted(seconds)[len(seconds) // 2] for steps, seconds in taken.items()}


async def open_loop(
    client: Client, arrivals: Sequence[Arrival], *, retry: bool = False, patience: float | None = None
) -> Run:
    """Send every request at its time, then wait for all of them.

    Args:
        retry: follow Retry-After once.
        patience: seconds after the last arrival at which clients give up; None waits for ever.
    """
    tasks: list[asyncio.Task[None]] = []
    run = Run()
    client.begin()
    for arrival in arrivals:
        await asyncio.sleep(arrival.at - client.now)
        record = Record(arrival.at, arrival.at, arrival.steps)
        run.records.append(record)
        tasks.append(asyncio.create_task(client.ask(record, arrival.seed, retry)))
    await _settle(tasks, patience)
    run.seconds = client.now
    return run


async def closed_loop(
    client: Client, mix: Mix, clients: int, seconds: float, seed: int = 1, *, retry: bool = False
) -> Run:
    """So many clients, each with its next request once the last is answered, for ``seconds``; then wait for all.

    After a failure a client waits for a tenth of a second.
    """
    works = random.Random(f"works {seed}")
    run = Run()

    async def one() -> None:
        while client.now < seconds:
            record = Record(client.now, client.now, mix.draw(works))
            run.records.append(record)
            await client.ask(record, len(run.records), retry)
            if not record.ok:
                await asyncio.sleep(0.1)

    client.begin()
    await asyncio.gather(*(one() for _ in range(clients)))
    run.seconds = max((record.arrival + record.latency for record in run.records), default=0.0)
    return run


async def _settle(tasks: Sequence[asyncio.Task[None]], patience: float | None) -> None:
    if not tasks:
        return
    _, late = await asyncio.wait(tasks, timeout=patience)
    for task in late:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _seconds(text: str | None) -> float | None:
    """Of a Retry-After; dates are not read."""
    try:
        return max(0.0, float(text or ""))
    except ValueError:
        return None
