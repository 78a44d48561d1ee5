"""At 1.5 times the capacity, who comes back when ``Retry-After`` says is admitted."""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict

import httpx
import pytest

from app.cli.loadtest import load
from app.cli.mix import MIX, Mix, poisson
from tests.stress import serve, size

pytestmark = pytest.mark.stress
OVERLOAD, QUEUE_SECONDS = 1.5, "5"


async def overload(base: str, seconds: float) -> dict[int, list[httpx.Response]]:
    """The answers to each client, who waits once for as long as a refusal says."""
    forward_ms = httpx.get(f"{base}/model", trust_env=False).json()["forward_ms"]
    rows_per_second = max(1e3 * int(width) / ms for width, ms in forward_ms.items())
    mix = Mix.parse(MIX)
    arrivals = poisson(mix, OVERLOAD * rows_per_second / mix.mean, seconds, size("SEED"))
    target = load.Target(f"{base}/sample", lambda steps, seed: {"steps": steps, "seed": seed}, "application/x-npy")
    answers: dict[int, list[httpx.Response]] = defaultdict(list)

    async def keep(answer: httpx.Response) -> None:
        await answer.aread()
        answers[json.loads(answer.request.content)["seed"]].append(answer)

    async with load.connected(target) as client:
        client.http.event_hooks["response"] = [keep]
        await load.open_loop(client, arrivals, retry=True)
    return answers


def test_retry_after_is_kept():
    """All clients have one address here, which may hold so many promises; a refusal says whether it is one."""
    with serve("--max-queue-seconds", QUEUE_SECONDS) as served:
        answers = asyncio.run(overload(served.base, size("SECONDS")))
    refused = [each for each in answers.values() if each[0].status_code == 429]
    promised = [each for each in refused if "there is a place for this request" in each[0].json()["detail"]]
    assert len(refused) > 0.1 * len(answers)
    assert len(promised) > 0.8 * len(refused)
    assert all(again.status_code == 200 for _, again in promised)
    assert all("no place can be kept" in each[0].json()["detail"] for each in refused if each not in promised)
    assert {each[0].status_code for each in answers.values() if each not in refused} == {200}
