"""Event streams: how a request fares, told while it runs.

``queued`` once, ``step`` with what is done and now and then a look at the first image, then ``completed`` with the
JSON answer, or ``error`` with the problem. An event says how things stand when the client is ready for it: one that
reads slowly gets fewer of them, and holds up nobody.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

from starlette.concurrency import run_in_threadpool

from app.api import problems
from app.api.responses import formats
from app.api.responses.formats import base64_of
from app.api.tasks import RequestTask
from app.engine.reservation import Reservation
from app.errors import UnstirError
from model import images

EVERY = 0.1  # seconds between two looks
QUIET = 15.0  # seconds without news after which a comment is sent, so that proxies do not take the stream for dead
PREVIEWS = 8


async def told(visit: RequestTask, ticket: Reservation, request_id: str) -> AsyncIterator[bytes]:
    """The events of a visit that has its place, from now on."""
    engine = visit.service.engine
    seen: tuple[int, int] | None = None
    spoke = time.monotonic()
    answer = asyncio.ensure_future(visit.reply(formats.JSON))
    try:
        queued = {"position": engine.position(ticket), "eta_ms": round(engine.seconds_left(ticket) * 1e3)}
        yield _event("queued", {"total": ticket.total, **queued, "request_id": request_id})
        while not answer.done():
            await asyncio.wait({answer}, timeout=EVERY)
            done = ticket.total - ticket.remaining
            frames = dict(ticket.job.lanes[0].snapshots) if ticket.job else {}
            latest = max(frames, default=-1)
            if seen is None or seen[0] != done:
                event: dict[str, Any] = {"done": done, "total": ticket.total}
                if latest >= 0 and (seen is None or latest != seen[1]):
                    png = await run_in_threadpool(lambda x: images.png(images.to_uint8(x)), frames[latest])
                    event["preview"] = base64_of(png)
                yield _event("step", event)
                seen, spoke = (done, latest), time.monotonic()
            elif time.monotonic() - spoke > QUIET:
                yield b": waiting\n\n"
                spoke = time.monotonic()
        try:
            reply = answer.result()
        except UnstirError as error:
            yield _event("error", problems.describe(error, request_id))
        except Exception as error:
            yield _event("error", problems.describe(problems.defect(error, request_id), request_id))
        else:
            yield b"event: completed\ndata: " + reply.content + b"\n\n"
    finally:
        answer.cancel()
        await asyncio.gather(answer, return_exceptions=True)


def _event(name: str, content: dict[str, Any]) -> bytes:
    return f"event: {name}\ndata: {json.dumps(content)}\n\n".encode()
