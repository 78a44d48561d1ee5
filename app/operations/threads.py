"""Work off the event loop, a bounded amount at once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

import anyio

T = TypeVar("T")


async def run_limited(limiter: anyio.CapacityLimiter, function: Callable[..., T], *arguments: object) -> T:
    """Call it on a thread. A thread cannot be stopped: if the caller is cancelled, its place is taken until it ends."""
    holder = object()
    await limiter.acquire_on_behalf_of(holder)
    running = asyncio.ensure_future(anyio.to_thread.run_sync(function, *arguments))

    def release(done: asyncio.Future[T]) -> None:
        limiter.release_on_behalf_of(holder)
        _ = done.cancelled() or done.exception()  # nobody may be left to retrieve it

    running.add_done_callback(release)
    return await asyncio.shield(running)
