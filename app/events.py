"""Event streams: how a request fares, told while it runs.

``queued`` once, ``step`` with what is done and now and then a look at the first picture, then ``completed`` with the
JSON answer, or ``error`` with the problem. An event says how things stand when the client is ready for it: one that
reads slowly gets fewer of them, and holds up nobody.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from starlette.concurrency import run_in_threadpool

from app import problems
from app.engine.ticket import Ticket
from app.errors import UnstirError
from app.operations import Onlooker
from app.replies.formats import Reply, base64_of
from model import pictures

EVERY = 0.1  # seconds between two looks
PREVIEWS = 8


async def opened(
    story: Callable[[Onlooker], Awaitable[Reply]], wait_seconds: Callable[[], float], request_id: str
) -> AsyncIterator[bytes]:
    """Start the story, and wait until it has its place in the engine; then give the stream of its events.

    Raises:
        UnstirError: it was refused before, so that the status can still say so.
    """
    onlooker = Onlooker(previews=PREVIEWS)
    ahead = wait_seconds()
    task = asyncio.ensure_future(story(onlooker))
    try:
        while onlooker.ticket is None and not task.done():
            await asyncio.wait({task}, timeout=EVERY / 10)
    except asyncio.CancelledError:
        task.cancel()
        raise
    if onlooker.ticket is None:
        task.result()
    assert onlooker.ticket is not None, "This is a bug: a story without a place in the engine."
    return _told(task, onlooker.ticket, ahead, request_id)


async def _told(task: asyncio.Future[Reply], ticket: Ticket, ahead: float, request_id: str) -> AsyncIterator[bytes]:
    told: tuple[int, int] | None = None
    try:
        yield _event("queued", {"total": ticket.total, "wait_ms": round(ahead * 1e3), "request_id": request_id})
        while not task.done():
            await asyncio.wait({task}, timeout=EVERY)
            done = ticket.total - ticket.remaining
            frames = dict(ticket.job.lanes[0].frames) if ticket.job else {}
            seen = max(frames, default=-1)
            if told is None or told[0] != done:
                event: dict[str, Any] = {"done": done, "total": ticket.total}
                if seen >= 0 and (told is None or seen != told[1]):
                    png = await run_in_threadpool(lambda x: pictures.png(pictures.to_uint8(x)), frames[seen])
                    event["preview"] = base64_of(png)
                yield _event("step", event)
                told = done, seen
        try:
            reply = task.result()
        except UnstirError as error:
            yield _event("error", problems.describe(error, request_id))
        except Exception as error:
            yield _event("error", problems.describe(problems.defect(error, request_id), request_id))
        else:
            yield b"event: completed\ndata: " + reply.content + b"\n\n"
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def _event(name: str, content: dict[str, Any]) -> bytes:
    return f"event: {name}\ndata: {json.dumps(content)}\n\n".encode()
