"""What a request holds is free once it ends, however it ends, without a garbage collection."""

from __future__ import annotations

import asyncio
import functools
import gc
import threading
import tracemalloc

import httpx
import numpy as np
import pytest

from app.api.app import create_app
from app.engine.runner import Runner
from model import images
from tests.app.api.test_jobs import ASYNC
from tests.conftest import serving
from tests.engines import until

pytestmark = pytest.mark.anyio
COUNT, SIDE = 6, 500  # uploads, of 750 kB each
ALLOWED = 750_000  # bytes that may stay in all: less than one in four of them


class Device:
    """How the device does while it is held, and afterwards."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.broken = False


@pytest.fixture
async def held(settings, monkeypatch):
    device, advance = Device(), Runner.advance

    def gated(self, *arguments):
        assert device.go.wait(30)
        if device.broken:
            raise IndexError("index out of range")
        return advance(self, *arguments)

    monkeypatch.setattr(Runner, "advance", gated)
    roomy = settings.model_copy(update={"max_body_bytes": 8 << 20, "drain_seconds": 0, "max_lanes": COUNT})
    async with serving(create_app(roomy)) as client:
        yield client, device
        device.go.set()


@functools.cache
def noise() -> bytearray:
    return bytearray(images.png(np.random.default_rng(1).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)))


class Answer:
    """What an upload was answered with."""

    status_code = 0
    location = ""


async def upload(client: httpx.AsyncClient, content: bytes | None = None, **headers: str) -> Answer:
    """Straight to the application: a client in this process would hold bodies of its own."""
    bodies = [bytes(noise()) if content is None else content]
    answer, gone = Answer(), asyncio.Event()
    given = {"content-type": "image/png", "content-length": str(len(bodies[0])), **headers}

    async def receive() -> dict:
        if bodies:
            return {"type": "http.request", "body": bodies.pop(), "more_body": False}
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict) -> None:
        if message["type"] == "http.response.start":
            answer.status_code = message["status"]
            answer.location = dict(message["headers"]).get(b"location", b"").decode()

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": "/invert",
        "raw_path": b"/invert",
        "root_path": "",
        "query_string": b"fit=resize&steps=4&check=false",
        "headers": [(name.encode(), value.encode()) for name, value in given.items()],
        "client": ("127.0.0.1", 1),
        "server": ("test", 80),
    }
    await client._transport.app(scope, receive, send)
    return answer


async def succeed(client, device):
    device.go.set()
    for _ in range(COUNT):
        assert (await upload(client)).status_code == 200


async def refuse_what_is_no_image(client, _):
    for _ in range(COUNT):
        assert (await upload(client, bytes(noise()[:-100]))).status_code == 422


async def refuse_for_want_of_room(client, device):
    waiting = [await upload(client, **ASYNC) for _ in range(COUNT)]
    for _ in range(COUNT):
        assert (await upload(client)).status_code == 429
    await cancel(client, waiting)


async def cancel(client, answers):
    for answer in answers:
        assert answer.status_code == 202
        assert (await client.delete(answer.location)).json()["state"] == "cancelled"


async def cancel_jobs(client, device):
    await cancel(client, [await upload(client, **ASYNC) for _ in range(COUNT)])


async def fail_jobs(client, device):
    places = [(await upload(client, **ASYNC)).location for _ in range(COUNT)]
    device.broken = True
    device.go.set()
    for place in places:
        async with asyncio.timeout(30):
            while (found := (await client.get(place)).json())["state"] in ("waiting", "running"):
                await asyncio.sleep(0.01)
        assert (found["state"], found["error"]["code"]) == ("failed", "step_failed")


async def run_out_of_time(client, device):
    for _ in range(COUNT):
        answer = await upload(client, **{"x-request-timeout-ms": "150"})
        assert answer.status_code == 504


@pytest.mark.parametrize(
    "ending", [succeed, refuse_what_is_no_image, refuse_for_want_of_room, cancel_jobs, fail_jobs, run_out_of_time]
)
async def test_uploads_are_free_when_their_requests_end(held, ending):
    client, device = held
    engine = client._transport.app.state.lifecycle.engine
    await upload(client, b"\x89PNG")  # what is loaded once
    noise()
    gc.collect()
    gc.disable()
    tracemalloc.start()
    try:
        await ending(client, device)
        device.go.set()
        await until(lambda: not engine.worker.jobs)
        await asyncio.sleep(0.05)  # for the last messages
        kept, _ = tracemalloc.get_traced_memory()
        largest = tracemalloc.take_snapshot().statistics("lineno")[:3]
    finally:
        tracemalloc.stop()
        gc.enable()
    assert kept < ALLOWED, largest
