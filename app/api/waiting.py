"""Waiting for a request or its response: until the client leaves, the process stops, or the time is over."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable
from typing import TypeVar

from fastapi import Request

from app.errors import ClientGone, Draining, TooLate

T = TypeVar("T")


async def unless(refusing: asyncio.Event, work: Awaitable[T]) -> T:
    """Wait for work that nobody counts yet, unless nothing more is accepted.

    Raises:
        Draining: nothing is.
    """
    working, waiting = asyncio.ensure_future(work), asyncio.ensure_future(refusing.wait())
    try:
        await asyncio.wait({working, waiting}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise Draining("the process is stopping and takes nothing new; ask another replica", retry_after=5)
    finally:
        for task in (working, waiting):
            task.cancel()
        await asyncio.gather(working, waiting, return_exceptions=True)


async def until_disconnect(request: Request, response: Awaitable[T], stopped: asyncio.Event) -> T:
    """Stop waiting for the response when the client disconnects; if nobody else waits, its lanes are released.

    Args:
        stopped: set when the process ends without finishing its work.

    Raises:
        ClientGone, Draining: what came before the response.
    """

    async def disconnected() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    work = asyncio.ensure_future(response)
    gone, stopping = asyncio.ensure_future(disconnected()), asyncio.ensure_future(stopped.wait())
    try:
        await asyncio.wait({work, gone, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            return work.result()
        if stopping.done():
            raise Draining("the process was stopped before the response was ready; ask another replica", retry_after=5)
        if (error := gone.exception()) is not None:  # such as a body that nobody reads, and that is too large
            raise error
        raise ClientGone("the client disconnected before its response was ready")
    finally:
        for task in (gone, stopping, work):
            task.cancel()
        await asyncio.gather(gone, stopping, work, return_exceptions=True)


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
