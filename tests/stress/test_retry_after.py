"""At 1.5 times the capacity, who comes back when ``Retry-After`` says is admitted."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from app.cli.loadtest import load
from app.cli.mix import MIX, Mix, poisson
from tests.stress import serve, size

pytestmark = pytest.mark.stress
OVERLOAD, QUEUE_SECONDS = 1.5, "5"


async def overload(base: str, seconds: float) -> list[load.Record]:
    """Records of clients who wait once for as long as a refusal says."""
    forward_ms = httpx.get(f"{base}/model", trust_env=False).json()["forward_ms"]
    rows_per_second = max(1e3 * int(width) / ms for width, ms in forward_ms.items())
    mix = Mix.parse(MIX)
    arrivals = poisson(mix, OVERLOAD * rows_per_second / mix.mean, seconds, size("SEED"))
    target = load.Target(f"{base}/sample", lambda steps, seed: {"steps": steps, "seed": seed}, "application/x-npy")
    async with load.connected(target) as client:
        return (await load.open_loop(client, arrivals, retry=True)).records


def test_retry_after_is_kept():
    with serve("--max-queue-seconds", QUEUE_SECONDS) as served:
        records = asyncio.run(overload(served.base, size("SECONDS")))
    refused = [record for record in records if record.retried or record.status == 429]
    assert len(refused) > 0.1 * len(records)
    assert sum(record.ok for record in refused) >= 0.95 * len(refused)
    assert all(record.ok for record in records if record not in refused)
