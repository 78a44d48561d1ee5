"""Event streams: the progress of a job.

``queued`` once, ``step`` whenever steps were done, some with a preview, then ``completed`` with the JSON response, or
``error`` with the problem. An event has the state at the moment that the client is ready for it: one that reads
slowly gets fewer of them, and delays nobody.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

from fastapi.sse import format_sse_event
from starlette.concurrency import run_in_threadpool
from torch import Tensor

from app.api import problems
from app.api.responses.formats import Rendered
from app.api.responses.results import to_base64
from app.engine.engine import Engine
from app.errors import Internal
from app.operations.context import RequestContext
from model.images import png, to_uint8

POLL_SECONDS = 0.1
KEEP_ALIVE_SECONDS = 15.0  # after so long without an event a comment is sent, so that proxies keep the connection
PREVIEWS = 8


async def events(
    engine: Engine, context: RequestContext, complete: Callable[[], Coroutine[Any, Any, Rendered]], request_id: str
) -> AsyncIterator[bytes]:
    """The events of an admitted request, from now on; ``complete`` gives its JSON response."""
    reservation = context.reservation
    if reservation is None:
        raise Internal("an event stream without a reservation")
    response = asyncio.ensure_future(complete())
    try:
        position, seconds = engine.position(reservation), engine.seconds_left(reservation)
        queued = {"total": reservation.total, "position": position, "eta_ms": round(seconds * 1e3)}
        yield _event("queued", {**queued, "request_id": request_id})
        done, shown, sent = -1, -1, time.monotonic()
        while not response.done():
            await asyncio.wait({response}, timeout=POLL_SECONDS)
            if done != (done := reservation.total - reservation.remaining):
                event: dict[str, Any] = {"done": done, "total": reservation.total}
                step, frame = context.latest_preview()
                if frame is not None and step != shown:
                    event["preview"] = await run_in_threadpool(_encode_preview, frame)
                    shown = step
                yield _event("step", event)
                sent = time.monotonic()
            elif time.monotonic() - sent > KEEP_ALIVE_SECONDS:
                yield format_sse_event(comment="waiting")
                sent = time.monotonic()
        yield _completion_event(response, request_id)
    finally:
        response.cancel()
        await asyncio.gather(response, return_exceptions=True)


def _completion_event(response: asyncio.Future[Rendered], request_id: str) -> bytes:
    try:
        rendered = response.result()
    except Exception as error:
        return _event("error", problems.describe(problems.to_unstir_error(error, request_id), request_id))
    return format_sse_event(event="completed", data_str=rendered.content.decode())


def _encode_preview(frame: Tensor) -> str:
    return to_base64(png(to_uint8(frame)))


def _event(name: str, content: dict[str, Any]) -> bytes:
    return format_sse_event(event=name, data_str=json.dumps(content))
