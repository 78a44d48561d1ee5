"""Thousands of good, malformed, abandoned, late, cancelled and duplicated requests at once: nothing is left behind."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest

from bench.server import Served
from tests.stress import resident_mib, serve, size
from tests.stress.traffic import connect, draw_request, hang_up, random_image

pytestmark = pytest.mark.stress
CLIENTS = 32
GAUGES = (
    "unstir_requests_waiting",
    "unstir_requests_running",
    "unstir_images_waiting",
    "unstir_images_running",
    "unstir_estimated_wait_seconds",
)
# Results are dropped soon, and the queue is short enough that some requests are refused.
TIGHT = ("--max-queue-seconds", "4", "--job-seconds", "15", "--max-jobs", "200")
MALFORMED: list[tuple[str, Any, int]] = [
    ("/sample", {"steps": 0}, 422),
    ("/sample", {"sampler": "magic"}, 422),
    ("/sample", {"seed": -1, "nonsense": 1}, 422),
    ("/sample", {"latent": {"npy": "AAAA"}}, 422),
    ("/sample", b"{", 400),
    ("/invert", {"image": "AAAA"}, 422),
    ("/interpolate", {"a": 1}, 422),
    ("/nowhere", {}, 404),
]


class Chaos:
    """Sends requests of every kind, and collects how they ended.

    Attributes:
        ends: count of each (kind, status); 429 is a refusal that says when to come back.
        wrong: descriptions of answers that must not happen.
    """

    def __init__(self, client: httpx.AsyncClient, image: str, seed: int) -> None:
        self.client, self.image, self.source = client, image, random.Random(seed)
        self.ends: Counter[tuple[str, str]] = Counter()
        self.wrong: list[str] = []
        self.kinds: dict[str, tuple[int, Callable[[], Awaitable[str]]]] = {
            "good": (42, self.good),
            "malformed": (12, self.malformed),
            "abandoned": (10, self.abandoned),
            "late": (8, self.late),
            "cancelled": (16, self.cancelled),  # jobs of 50 steps, most of which the short queue refuses
            "asynchronous": (6, self.asynchronous),
            "duplicated": (6, self.duplicated),
        }

    async def send_one(self) -> None:
        weights = [weight for weight, _ in self.kinds.values()]
        kind = self.source.choices(list(self.kinds), weights)[0]
        try:
            end = await asyncio.wait_for(self.kinds[kind][1](), 120)
        except (TimeoutError, httpx.HTTPError) as error:
            end = type(error).__name__
            self.wrong.append(f"{kind}: {error!r}")
        self.ends[kind, end] += 1

    def draw(self) -> tuple[str, dict[str, Any]]:
        path, body = draw_request(self.source, self.image, (1, 6))
        return path, {**body, "reproducible": self.source.random() < 0.3}

    def expect(self, kind: str, answer: httpx.Response, *statuses: int) -> str:
        """The status as text; another one than these is wrong, but for a refusal with Retry-After."""
        refused = answer.status_code == 429 and int(answer.headers["retry-after"]) > 0
        if answer.status_code not in statuses and not refused:
            self.wrong.append(f"{kind}: {answer.status_code} {answer.text[:200]}")
        return str(answer.status_code)

    async def good(self) -> str:
        path, body = self.draw()
        accept = self.source.choice(["*/*", "application/json", "text/event-stream"])
        answer = await self.client.post(path, json=body, headers={"accept": accept})
        if answer.status_code == 200 and accept == "text/event-stream" and "event: completed" not in answer.text:
            self.wrong.append(f"good: a stream without its last event: {answer.text[-200:]}")
        return self.expect("good", answer, 200)

    async def malformed(self) -> str:
        path, body, status = self.source.choice(MALFORMED)
        content = {"content": body} if isinstance(body, bytes) else {"json": body}
        answer = await self.client.post(path, headers={"content-type": "application/json"}, **content)
        return self.expect("malformed", answer, status)

    async def abandoned(self) -> str:
        body = {"steps": 50, "n": self.source.randint(1, 4)}
        await hang_up(str(self.client.base_url), body, self.source.uniform(0, 0.1))
        return "closed"

    async def late(self) -> str:
        path, body = self.draw()
        headers = {"x-request-timeout-ms": str(self.source.randint(1, 200))}
        return self.expect("late", await self.client.post(path, json=body, headers=headers), 200, 504)

    async def cancelled(self) -> str:
        body = {"steps": 50, "n": self.source.randint(1, 4)}
        answer = await self.client.post("/sample", json=body, headers={"prefer": "respond-async"})
        if answer.status_code != 202:
            return self.expect("cancelled", answer, 202)
        await asyncio.sleep(self.source.uniform(0, 0.1))
        place = answer.headers["location"]
        self.expect("cancelled", await self.client.delete(place), 200)
        return self.expect("cancelled", await self.client.get(f"{place}/result"), 404, 410)

    async def asynchronous(self) -> str:
        path, body = self.draw()
        answer = await self.client.post(path, json=body, headers={"prefer": "respond-async"})
        if answer.status_code != 202:
            return self.expect("asynchronous", answer, 202)
        place = answer.headers["location"]
        while (answer := await self.client.get(f"{place}/result")).status_code == 409:
            await asyncio.sleep(0.2)
        return self.expect("asynchronous", answer, 200)

    async def duplicated(self) -> str:
        path, body = self.draw()
        headers = {"idempotency-key": str(self.source.random()), "accept": "application/x-npy"}
        answers = [await self.client.post(path, json=body, headers=headers)]
        answers += await asyncio.gather(*(self.client.post(path, json=body, headers=headers) for _ in range(2)))
        if all(each.status_code == 200 for each in answers) and len({each.content for each in answers}) != 1:
            self.wrong.append("duplicated: other bytes for the same key")
        return self.expect("duplicated", answers[-1], 200)


async def run_chaos(served: Served, count: int) -> tuple[Chaos, list[float]]:
    """Send ``count`` requests; returns them with the server's memory, in MiB, at each tenth of them."""
    async with connect(served.base) as client:
        chaos = Chaos(client, random_image(served.base, size("SEED")), size("SEED"))
        memory: list[float] = []
        left = count

        async def work() -> None:
            nonlocal left
            while left > 0:
                left -= 1
                if left % (count // 10) == 0:
                    memory.append(resident_mib(served))
                await chaos.send_one()

        await asyncio.gather(*(work() for _ in range(CLIENTS)))
    return chaos, memory


def gauges_at_rest(served: Served, seconds: float = 30) -> dict[str, float]:
    """The gauges once all are zero, or as they are after so long."""
    deadline = time.monotonic() + seconds
    while any((found := {name: served.metric(name) for name in GAUGES}).values()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return found


def test_chaos_leaves_nothing_behind():
    with serve(*TIGHT) as served:
        chaos, memory = asyncio.run(run_chaos(served, count := size("REQUESTS")))
        assert gauges_at_rest(served) == dict.fromkeys(GAUGES, 0.0)
        assert httpx.get(f"{served.base}/readyz", trust_env=False).status_code == 200
    assert chaos.wrong == []
    assert chaos.ends.total() == count
    admitted = Counter[str]()
    for (kind, end), number in chaos.ends.items():
        admitted[kind] += number if end != "429" else 0
    # Of each kind enough were admitted for the run to show anything.
    assert all(admitted[kind] >= count / 200 for kind in chaos.kinds), admitted
    assert statistics.mean(memory[-2:]) <= 1.05 * memory[1], memory
