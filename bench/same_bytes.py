"""The same request, the same bytes: unlike requests by the hundred at once, and then each by itself.

Every answer at saturation must equal the solo one byte for byte with ``reproducible``; answers are float32, so that no
rounding hides a difference. Without it some must not, or the comparison could not fail. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import random
import sys
from typing import Any

import httpx

from bench.endings import QUIET, Chaos
from bench.server import server

SAMPLERS = ("ddim", "ddpm", "dpmpp_2m", "dpmpp_2m_sde", "unipc", "heun", "pndm", "obelm")


def drawn(count: int, image: str, seed: int, *, reproducible: bool) -> list[tuple[str, dict[str, Any]]]:
    """Requests of every endpoint and sampler, of 1 to 12 steps."""
    choice = random.Random(seed)
    found: list[tuple[str, dict[str, Any]]] = []
    for number in range(count):
        fields = {"steps": choice.randint(4, 12), "label": choice.randrange(5), "reproducible": reproducible}
        match choice.randrange(6):
            case 0:
                found.append(("/invert", {**fields, "image": image, "refinements": choice.randint(1, 2)}))
            case 1:
                labels = [choice.randrange(5) for _ in range(2)]
                ends = {"a": number, "b": number + 1, "frames": choice.randint(2, 4), "labels": labels}
                found.append(("/interpolate", {**fields, **ends} | {"label": None}))
            case _:
                walk = {"sampler": choice.choice(SAMPLERS), "seed": number, "n": choice.randint(1, 2)}
                if choice.random() < 0.2:
                    walk["guidance"] = 2.0
                found.append(("/sample", {**fields, **walk}))
    return [(path, {name: value for name, value in body.items() if value is not None}) for path, body in found]


async def digests(
    client: httpx.AsyncClient, requests: list[tuple[str, dict[str, Any]]], at_once: int
) -> list[tuple[int, str]]:
    """Status and digest of each answer, so many of them under way at once."""
    room = asyncio.Semaphore(at_once)

    async def ask(path: str, body: dict[str, Any]) -> tuple[int, str]:
        async with room:
            answer = await client.post(path, json=body, headers={"accept": "application/x-npy"})
        return answer.status_code, hashlib.sha256(answer.content).hexdigest()

    return await asyncio.gather(*(ask(path, body) for path, body in requests))


async def compared(base: str, count: int, seed: int) -> dict[str, Any]:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=base, timeout=None, limits=limits) as client:
        shape = tuple((await client.get("/model")).json()["shape"])
        image = Chaos(base, client, shape, seed).image
        facts: dict[str, Any] = {}
        for name, number, reproducible in (("reproducible", count, True), ("control", max(20, count // 10), False)):
            requests = drawn(number, image, seed, reproducible=reproducible)
            together = await digests(client, requests, at_once=64)
            solo = await digests(client, requests, at_once=1)
            facts[name] = {
                "requests": number,
                "answered": sum(status == 200 for status, _ in solo),
                "differing": sum(a != b for a, b in zip(together, solo, strict=True)),
            }
            print(name, facts[name], flush=True)
        return facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="weights/fashion-mnist-32")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    with server("--checkpoint", arguments.checkpoint, *QUIET) as served:
        facts = asyncio.run(compared(served.base, arguments.requests, arguments.seed))
    print(json.dumps({**facts, "load_average": round(os.getloadavg()[0], 2)}))
    same, control = facts["reproducible"], facts["control"]
    sys.exit(same["differing"] > 0 or same["answered"] < same["requests"] or control["differing"] == 0)


if __name__ == "__main__":
    main()
