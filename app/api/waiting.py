"""Waiting for a request or its response: until the client leaves, the process stops, or the time is over."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable
from typing import TypeVar

from fastapi import Request

from app.errors import ClientGone, Draining, TooLate, UnstirError

T = TypeVar("T")


async def unless(refusing: asyncio.Event, work: Awaitable[T]) -> T:
    """Wait for work that nobody counts yet, unless nothing more is accepted.

    Raises:
        Draining: nothing is.
    """
    detail = "the process is stopping and takes nothing new; ask another replica"
    return await _wait(work, _when(refusing, Draining(detail, retry_after=5)))


async def until_disconnect(request: Request, response: Awaitable[T], stopped: asyncio.Event) -> T:
    """Stop waiting for the response when the client disconnects; if nobody else waits, its lanes are released.

    Args:
        stopped: set when the process ends without finishing its work.

    Raises:
        ClientGone, Draining: what came before the response.
    """
    detail = "the process was stopped before the response was ready; ask another replica"
    return await _wait(response, _when(stopped, Draining(detail, retry_after=5)), _when_disconnected(request))


async def _wait(work: Awaitable[T], *interruptions: Awaitable[UnstirError]) -> T:
    """Wait for work, or raise the error of what comes before; the other tasks are cancelled."""
    working, others = asyncio.ensure_future(work), [asyncio.ensure_future(other) for other in interruptions]
    try:
        await asyncio.wait([working, *others], return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise next(other for other in others if other.done()).result()
    finally:
        for task in (working, *others):
            task.cancel()
        await asyncio.gather(working, *others, return_exceptions=True)


async def _when(event: asyncio.Event, error: UnstirError) -> UnstirError:
    await event.wait()
    return error


async def _when_disconnected(request: Request) -> UnstirError:
    """Reads what is left of the body; it raises what that is refused with, such as a body that is too large."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    return ClientGone("the client disconnected before its response was ready")


@contextlib.asynccontextmanager
async def time_limit(deadline: float | None, began: float) -> AsyncIterator[None]:
    """Both on the event loop's clock, which is time.monotonic.

    Raises:
        TooLate: the deadline has passed.
    """
    try:
        async with asyncio.timeout_at(deadline):
            yield
    except TimeoutError:
        allowed = 0.0 if deadline is None else deadline - began
        raise TooLate(
            f"{allowed * 1e3:.0f} ms were allowed and are over; "
            "allow more in X-Request-Timeout-Ms, or ask for fewer steps"
        ) from None
