"""Event streams: the progress of a request, sent while it runs."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import threading

import numpy as np
import pytest
from PIL import Image

from app.api.app import create_app
from app.engine.runner import Runner
from app.settings import Settings
from model import images
from tests.app.api.test_bad_input import assert_problem
from tests.conftest import save_tiny, serving
from tests.metrics import metric
from tests.process import server, wait_for

pytestmark = pytest.mark.anyio
EVENTS, JSON = {"accept": "text/event-stream"}, {"accept": "application/json"}
PNG = base64.b64encode(images.png(np.zeros((8, 8, 1), np.uint8))).decode()


def events(text: str) -> list[tuple[str, dict]]:
    found = []
    for block in text.strip().split("\n\n"):
        name, data = block.split("\n")
        found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/sample", {"seed": 1, "n": 2, "steps": 150, "sampler": "ddpm"}),
        ("/invert", {"image": PNG, "steps": 40}),
        ("/interpolate", {"a": {"image": PNG}, "b": 2, "steps": 40, "frames": 3}),
    ],
)
async def test_events_come_in_order(client, path, body):
    response = await client.post(path, json=body | {"reproducible": True}, headers=EVENTS)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["x-accel-buffering"] == "no"  # or nginx would hold the events back
    assert response.headers["cache-control"] == "no-cache"
    names, payloads = zip(*events(response.text), strict=True)
    assert names == ("queued", *["step"] * (len(names) - 2), "completed")
    assert payloads[0]["request_id"] == response.headers["x-request-id"]
    steps = payloads[1:-1]
    done = [step["done"] for step in steps]
    assert done == sorted(set(done))
    assert done[-1] == payloads[0]["total"]
    previews = [step["preview"] for step in steps if "preview" in step]
    assert all(Image.open(io.BytesIO(base64.b64decode(preview))).size == (8, 8) for preview in previews)
    plain = (await client.post(path, json=body | {"reproducible": True}, headers=JSON)).json()
    for answer in (payloads[-1], plain):
        del answer["timing"]
    assert payloads[-1] == plain
    assert await metric(client, "unstir_requests_finished_total", endpoint=path, outcome="ok") == 2


async def test_previews_are_shown_on_the_way(client):
    response = await client.post("/sample", json={"sampler": "ddpm", "seed": 1}, headers=EVENTS)
    previews = [payloads["preview"] for name, payloads in events(response.text) if "preview" in payloads]
    assert 1 <= len(previews) <= 8
    assert len(set(previews)) == len(previews)


async def test_a_replayed_stream_has_the_id_of_its_own_request(client):
    body, key = {"seed": 1, "steps": 2}, {"idempotency-key": "k"}
    await client.post("/sample", json=body, headers={**key, "x-request-id": "first"})
    response = await client.post("/sample", json=body, headers={**key, **EVENTS, "x-request-id": "second"})
    (name, queued), *_ = events(response.text)
    assert (name, queued["request_id"], response.headers["x-request-id"]) == ("queued", "second", "second")


async def test_what_is_refused_is_refused_by_status(client):
    assert_problem(await client.post("/sample", json={"steps": 0}, headers=EVENTS), 422, "invalid_field", "steps")
    assert_problem(await client.post("/invert", json={"image": "aaaa"}, headers=EVENTS), 422, "invalid_field", "image")


async def test_a_failure_on_the_way_is_an_event(tmp_path):
    settings = Settings(checkpoint=save_tiny(tmp_path), device="cpu", threads=1, max_width=4)
    app = create_app(settings)
    async with serving(app) as client:
        for parameter in app.state.lifecycle.get_service().model.checkpoint.net.parameters():
            parameter.fill_(float("nan"))
        response = await client.post("/sample", json={"steps": 200}, headers=EVENTS)
        *_, (name, payloads) = events(response.text)
        assert (response.status_code, name, payloads["code"]) == (200, "error", "not_finite")
        assert payloads["request_id"] == response.headers["x-request-id"]
        assert await metric(client, "unstir_requests_finished_total", outcome="not_finite") == 1


def test_hanging_up_in_mid_stream_frees_the_lanes(tiny):
    with server(tiny) as (_, client, lines):
        body = {"sampler": "ddpm", "n": 32}
        with client.stream("POST", "/sample", json=body, headers=EVENTS) as response:
            next(line for line in response.iter_lines() if line == "event: step")
        wait_for(lambda: metric(client, "unstir_requests_finished_total", outcome="client_gone") == 1, lines)
        for state in ("waiting", "running"):
            assert metric(client, f"unstir_requests_{state}") == metric(client, f"unstir_images_{state}") == 0


async def test_a_quiet_stream_shows_that_it_lives(tiny, settings, monkeypatch):
    monkeypatch.setattr("app.api.sse.KEEP_ALIVE_SECONDS", 0.05)
    go, advance = threading.Event(), Runner.advance

    def gated(self, *arguments):
        assert go.wait(10)
        return advance(self, *arguments)

    monkeypatch.setattr(Runner, "advance", gated)
    async with serving(create_app(settings)) as client:
        asking = asyncio.create_task(client.post("/sample", json={"steps": 2}, headers=EVENTS))
        await asyncio.sleep(0.5)
        go.set()
        text = (await asking).text
    assert "\n\n: waiting\n\n" in text
    assert "event: completed" in text
