"""Clients that hang up cost the next request no more than the forward that is running."""

from __future__ import annotations

import asyncio
import statistics
import time

import pytest

from bench.server import Served, server
from tests.stress import SERVE, size
from tests.stress.traffic import connect, hang_up

pytestmark = pytest.mark.stress


async def measure(served: Served, rounds: int) -> tuple[list[float], list[float], float]:
    """Milliseconds of ten steps on the idle server and after 24 clients hung up, and of the widest forward at present.

    Calibration keeps the best of a few forwards; what a tick takes now is that many times more.
    """
    idle, after, paces = [], [], []
    async with connect(served.base) as client:

        async def ten_steps() -> float:
            began = time.perf_counter()
            (await client.post("/sample", json={"steps": 10, "seed": 1})).raise_for_status()
            return 1e3 * (time.perf_counter() - began)

        await ten_steps()
        for _ in range(rounds):
            idle.append(await ten_steps())
            await asyncio.gather(*(hang_up(served.base, {"steps": 100, "seed": seed}, 0.25) for seed in range(24)))
            after.append(await ten_steps())
            paces.append(await asyncio.to_thread(served.metric, "unstir_forward_cost_ratio"))
        model = (await client.get("/model")).json()
    return idle, after, max(1.0, statistics.median(paces)) * max(model["forward_ms"].values())


def test_the_next_request_waits_for_one_forward_at_most():
    with server(*SERVE) as served:
        idle, after, widest = asyncio.run(measure(served, size("HANG_UPS")))
    assert statistics.median(after) <= statistics.median(idle) + widest, (idle, after, widest)
