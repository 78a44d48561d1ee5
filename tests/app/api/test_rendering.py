"""Encoding is a part of the work: draining waits for it, deadlines end it, stopping cuts it off with an answer."""

from __future__ import annotations

import asyncio
import threading

import pytest

from app.api.app import create_app
from app.api.responses import formats
from tests.app.api.test_bad_input import assert_problem
from tests.conftest import serving
from tests.engines import until

pytestmark = pytest.mark.anyio


@pytest.fixture
async def encoding(settings, monkeypatch):
    """(client, lifecycle, whether an encoding has begun, lets it end)."""
    begun, go, render = threading.Event(), threading.Event(), formats.render

    def slow(*arguments):
        begun.set()
        assert go.wait(30)
        return render(*arguments)

    monkeypatch.setattr(formats, "render", slow)
    app = create_app(settings)
    async with serving(app) as client:
        yield client, app.state.lifecycle, begun, go
        go.set()


async def test_draining_waits_until_answers_are_encoded(encoding):
    client, lifecycle, begun, go = encoding
    answer = asyncio.create_task(client.post("/sample", json={"steps": 2}))
    await until(begun.is_set)
    draining = asyncio.create_task(lifecycle.drain())
    await asyncio.sleep(0.2)
    assert not draining.done()
    go.set()
    assert (await answer).status_code == 200
    await draining


async def test_draining_waits_no_longer_than_it_may(settings, encoding):
    client, lifecycle, begun, _ = encoding
    lifecycle.settings = settings.model_copy(update={"drain_seconds": 0.2})
    answer = asyncio.create_task(client.post("/sample", json={"steps": 2}))
    await until(begun.is_set)
    await asyncio.wait_for(lifecycle.drain(), 5)
    lifecycle.close()
    assert_problem(await answer, 503, "draining", "stopped before the response was ready")


async def test_the_deadline_covers_encoding(encoding):
    client, _, begun, go = encoding
    late = await client.post("/sample", json={"steps": 2}, headers={"x-request-timeout-ms": "500"})
    assert begun.is_set()
    assert_problem(late, 504, "too_late", "500 ms were allowed and are over")
    go.set()
    assert (await client.post("/sample", json={"steps": 2})).status_code == 200


async def test_few_answers_are_encoded_at_once(encoding):
    """And those of clients that have left count until their thread ends."""
    client, lifecycle, begun, go = encoding
    limiter = lifecycle.get_service().encoders
    leaving = asyncio.create_task(client.post("/sample", json={"steps": 2}, headers={"x-request-timeout-ms": "500"}))
    await until(begun.is_set)
    assert (await leaving).status_code == 504
    assert limiter.borrowed_tokens == 1
    go.set()
    await until(lambda: limiter.borrowed_tokens == 0)
