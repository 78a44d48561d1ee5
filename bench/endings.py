"""How requests end when things go wrong: clients that hang up, and ten thousand requests of every kind at once.

``--abandoned``: 24 clients each ask for 100 steps and hang up; how long does the next 10-step request take, beside one
on the idle server? ``--chaos N``: good, malformed, abandoned, late, cancelled and duplicated requests, together; then
every accepted one must have been answered, nothing be held, and memory be as it was. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import io
import json
import os
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
from PIL import Image

from bench.server import Served, server
from bench.uploads import resident

GAUGES = ("requests_waiting", "requests_running", "rows_waiting", "rows_running", "estimated_wait_seconds")
QUIET = ("--log-level", "warning")
ROOM_SECONDS = "8"
MANY = 200  # of so many requests, one at least must have been let in of each kind, or the run would prove little
BROKEN: list[tuple[str, Any, int]] = [
    ("/sample", {"steps": 0}, 422),
    ("/sample", {"sampler": "magic"}, 422),
    ("/sample", {"seed": -1, "nonsense": 1}, 422),
    ("/sample", {"latent": {"npy": "AAAA"}}, 422),
    ("/sample", b"{", 400),
    ("/invert", {"image": "AAAA"}, 422),
    ("/interpolate", {"a": 1}, 422),
    ("/nowhere", {}, 404),
]


def settled(served: Served, seconds: float = 30) -> dict[str, float]:
    """The gauges that must end at zero, once they are, or as they still are after so long."""
    deadline = time.monotonic() + seconds
    while any((found := {name: served.metric(name) for name in GAUGES}).values()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return found


async def hang_up(base: str, body: dict[str, Any], after: float) -> None:
    """Send a request over a socket of its own, and close it unanswered."""
    address = urlsplit(base)
    content = json.dumps(body).encode()
    _, writer = await asyncio.open_connection(address.hostname, address.port)
    head = (
        f"POST /sample HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    writer.write(head.encode() + content)
    await writer.drain()
    await asyncio.sleep(after)
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


async def abandoned(base: str, repeats: int) -> dict[str, Any]:
    """Milliseconds of ten steps on the idle server, and right after 24 clients have hung up, in turns."""
    idle, after = [], []
    async with httpx.AsyncClient(base_url=base, timeout=60) as client:

        async def ten_steps() -> float:
            began = time.perf_counter()
            (await client.post("/sample", json={"steps": 10, "seed": 1})).raise_for_status()
            return 1e3 * (time.perf_counter() - began)

        await ten_steps()
        for _ in range(repeats):
            idle.append(await ten_steps())
            await asyncio.gather(*(hang_up(base, {"steps": 100, "seed": i}, 0.25) for i in range(24)))
            after.append(await ten_steps())
        model = (await client.get("/model")).json()
    widest = max(model["forward_ms"].values())
    return {
        "idle_ms": round(statistics.median(idle), 1),
        "after_ms": round(statistics.median(after), 1),
        "widest_forward_ms": widest,
        "held": statistics.median(after) <= statistics.median(idle) + widest,
        "repeats": repeats,
    }


class Chaos:
    """Requests of every kind, and what came of them."""

    def __init__(self, base: str, client: httpx.AsyncClient, shape: tuple[int, int, int], seed: int) -> None:
        self.base, self.client = base, client
        self.random = random.Random(seed)
        self.ends: Counter[tuple[str, str]] = Counter()
        self.wrong: list[str] = []
        image = np.random.default_rng(seed).integers(0, 255, (shape[1], shape[2], shape[0]), np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(image.squeeze()).save(buffer, "PNG")
        self.image = base64.b64encode(buffer.getvalue()).decode()
        self.kinds: dict[str, tuple[int, Callable[[], Awaitable[str]]]] = {
            "good": (50, self.good),
            "malformed": (12, self.malformed),
            "abandoned": (10, self.abandoned),
            "late": (8, self.late),
            "cancelled": (8, self.cancelled),
            "asynchronous": (6, self.asynchronous),
            "duplicated": (6, self.duplicated),
        }

    async def one(self) -> None:
        """A request of some kind."""
        weights = [weight for weight, _ in self.kinds.values()]
        kind = self.random.choices(list(self.kinds), weights)[0]
        try:
            end = await asyncio.wait_for(self.kinds[kind][1](), 120)
        except TimeoutError:
            end = "hanging"
            self.wrong.append(f"{kind}: no answer within 120 s")
        except httpx.HTTPError as error:
            end = "broken"
            self.wrong.append(f"{kind}: {error!r}")
        self.ends[kind, end] += 1

    def work(self) -> tuple[str, dict[str, Any]]:
        seed, steps = self.random.randrange(2**32), self.random.randint(1, 6)
        common = {"steps": steps, "reproducible": self.random.random() < 0.3}
        match self.random.randrange(8):
            case 0:
                return "/invert", {**common, "image": self.image, "refinements": 1}
            case 1:
                return "/interpolate", {**common, "a": seed, "b": seed // 2, "frames": self.random.randint(2, 4)}
            case 2:
                return "/sample", {**common, "seed": seed, "n": self.random.randint(2, 6)}
            case _:
                sampler = self.random.choice(["ddim", "ddpm", "dpmpp_2m", "unipc", "heun"])
                return "/sample", {**common, "seed": seed, "sampler": sampler}

    def expect(self, kind: str, answer: httpx.Response, *statuses: int) -> str:
        """The status as text, after noting it if it is none of these; refusals that say when to come back are fine."""
        fine = answer.status_code in statuses or (answer.status_code == 429 and int(answer.headers["retry-after"]) > 0)
        if not fine:
            self.wrong.append(f"{kind}: {answer.status_code} {answer.text[:200]}")
        return str(answer.status_code)

    async def good(self) -> str:
        path, body = self.work()
        accept = self.random.choice(["*/*", "application/json", "text/event-stream"])
        answer = await self.client.post(path, json=body, headers={"accept": accept})
        if answer.status_code == 200 and accept == "text/event-stream" and "event: completed" not in answer.text:
            self.wrong.append(f"good: a stream without an end: {answer.text[-200:]}")
        return self.expect("good", answer, 200)

    async def malformed(self) -> str:
        path, body, status = self.random.choice(BROKEN)
        content = {"content": body} if isinstance(body, bytes) else {"json": body}
        answer = await self.client.post(path, headers={"content-type": "application/json"}, **content)
        return self.expect("malformed", answer, status)

    async def abandoned(self) -> str:
        await hang_up(self.base, {"steps": 50, "n": self.random.randint(1, 4)}, self.random.uniform(0, 0.1))
        return "gone"

    async def late(self) -> str:
        path, body = self.work()
        limit = str(self.random.randint(1, 200))
        return self.expect(
            "late", await self.client.post(path, json=body, headers={"x-request-timeout-ms": limit}), 200, 504
        )

    async def cancelled(self) -> str:
        body = {"steps": 50, "n": self.random.randint(1, 4)}
        answer = await self.client.post("/sample", json=body, headers={"prefer": "respond-async"})
        if answer.status_code != 202:
            return self.expect("cancelled", answer, 202)
        await asyncio.sleep(self.random.uniform(0, 0.1))
        place = answer.headers["location"]
        self.expect("cancelled", await self.client.delete(place), 200)
        return self.expect("cancelled", await self.client.get(f"{place}/result"), 404, 410)

    async def asynchronous(self) -> str:
        path, body = self.work()
        answer = await self.client.post(path, json=body, headers={"prefer": "respond-async"})
        if answer.status_code != 202:
            return self.expect("asynchronous", answer, 202)
        place = answer.headers["location"]
        while (answer := await self.client.get(f"{place}/result")).status_code == 409:
            await asyncio.sleep(0.2)
        return self.expect("asynchronous", answer, 200)

    async def duplicated(self) -> str:
        path, body = self.work()
        headers = {"idempotency-key": str(self.random.random()), "accept": "application/x-npy"}
        twice = [await self.client.post(path, json=body, headers=headers)]
        twice += await asyncio.gather(*(self.client.post(path, json=body, headers=headers) for _ in range(2)))
        if all(each.status_code == 200 for each in twice) and len({each.content for each in twice}) != 1:
            self.wrong.append("duplicated: other bytes for the same key")
        return self.expect("duplicated", twice[-1], 200)


async def chaos(served: Served, count: int, seed: int) -> dict[str, Any]:
    """``count`` requests from 32 clients; what came of them, and what is left."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=served.base, timeout=None, limits=limits) as client:
        shape = tuple((await client.get("/model")).json()["shape"])
        run = Chaos(served.base, client, shape, seed)
        memory: list[float] = []
        left = count

        async def worker() -> None:
            nonlocal left
            while left > 0:
                left -= 1
                if left % (count // 10) == 0:
                    memory.append(resident(served.pid))
                    print(f"{count - left} requests, {memory[-1]:.0f} MiB, {len(run.wrong)} wrong", flush=True)
                await run.one()

        await asyncio.gather(*(worker() for _ in range(32)))
    zero = settled(served)
    ready = httpx.get(f"{served.base}/readyz").status_code == 200
    kinds: dict[str, dict[str, int]] = {}
    for (kind, end), number in sorted(run.ends.items()):
        kinds.setdefault(kind, {})[end] = number
    early, late = memory[1], statistics.mean(memory[-2:])
    let_in = {kind: sum(number for end, number in found.items() if end != "429") for kind, found in kinds.items()}
    rare = [kind for kind in run.kinds if let_in.get(kind, 0) < count / MANY]
    held = not run.wrong and not rare and ready and not any(zero.values()) and late <= 1.05 * early
    return {
        "requests": sum(run.ends.values()),
        "ends": kinds,
        "wrong": run.wrong[:20],
        "rare": rare,
        "gauges": zero,
        "ready": ready,
        "memory_mb": [round(each) for each in memory],
        "held": held,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="weights/fashion-mnist-32")
    parser.add_argument("--abandoned", action="store_true", help="only this")
    parser.add_argument("--chaos", type=int, metavar="N", help="only this, with so many requests")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    everything = not arguments.abandoned and not arguments.chaos
    facts: dict[str, Any] = {}
    if everything or arguments.abandoned:
        with server("--checkpoint", arguments.checkpoint, *QUIET) as served:
            facts["abandoned"] = asyncio.run(abandoned(served.base, arguments.repeats))
    if everything or arguments.chaos:
        # Results are forgotten soon, and room is scarce enough that some are refused, too.
        tight = ("--max-queue-seconds", ROOM_SECONDS, "--job-seconds", "5", "--max-jobs", "200")
        with server("--checkpoint", arguments.checkpoint, "--threads", "1", *QUIET, *tight) as served:
            facts["chaos"] = asyncio.run(chaos(served, arguments.chaos or 10_000, arguments.seed))
    print(json.dumps({**facts, "load_average": round(os.getloadavg()[0], 2)}))
    sys.exit(not all(part["held"] for part in facts.values()))


if __name__ == "__main__":
    main()
