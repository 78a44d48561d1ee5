"""Hundreds of unlike requests at once, then each by itself: with ``reproducible`` every byte is the same."""

from __future__ import annotations

import asyncio
import random

import httpx
import pytest

from bench.server import server
from tests.stress import SERVE, size
from tests.stress.traffic import Request, connect, draw_request, random_image

pytestmark = pytest.mark.stress


async def ask_all(client: httpx.AsyncClient, requests: list[Request], at_once: int) -> list[bytes]:
    """The answers, in float32, so that no rounding to 8 bits hides a difference."""
    room = asyncio.Semaphore(at_once)

    async def ask(path: str, body: dict) -> bytes:
        async with room:
            answer = await client.post(path, json=body, headers={"accept": "application/x-npy"})
        assert answer.status_code == 200, answer.text
        return answer.content

    return await asyncio.gather(*(ask(path, body) for path, body in requests))


async def count_differing(base: str, requests: list[Request]) -> int:
    async with connect(base) as client:
        together = await ask_all(client, requests, at_once=64)
        solo = await ask_all(client, requests, at_once=1)
    return sum(a != b for a, b in zip(together, solo, strict=True))


def test_reproducible_answers_have_the_same_bytes_under_load():
    source = random.Random(size("SEED"))
    with server(*SERVE) as served:
        image = random_image(served.base, size("SEED"))
        requests = [draw_request(source, image, (4, 12)) for _ in range(size("COMPARED"))]
        reproducible = [(path, {**body, "reproducible": True}) for path, body in requests]
        assert asyncio.run(count_differing(served.base, reproducible)) == 0
        # Control: without it some must differ, where the server uses a width whose bits do.
        model = httpx.get(f"{served.base}/model", trust_env=False).json()
        if {int(width) for width in model["forward_ms"]} > set(model["reproducible_widths"]):
            assert asyncio.run(count_differing(served.base, requests)) > 0
