"""A request from its acceptance to its reply: the story as a task of its own, its deadline, and how it ended.

Whoever waits for it may come and go: the client of an ordinary request, several that sent the same
``Idempotency-Key``, an event stream, or nobody for now, as with an asynchronous job.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool

from app.api.responses import formats
from app.api.responses.formats import Outcome, Reply
from app.errors import Cancelled, ClientGone, TooLate, UnstirError
from app.operations import RequestContext
from app.operations.service import Service
from app.telemetry import tracing
from app.telemetry.logs import REQUEST_ID


@dataclass(frozen=True)
class Operation:
    """What lies behind one endpoint: the model of its body, its story, and what the story's answer has to show."""

    path: str
    request: type[BaseModel]
    story: Callable[..., Awaitable[Any]]
    outcome: Callable[[Service, Any], Outcome]
    answer: type[BaseModel]


class RequestTask:
    """One request under way, or done.

    Attributes:
        began: when it arrived, on the engine's clock.
        task: gives the outcome, or raises what the request is answered with.
    """

    def __init__(
        self, service: Service, operation: Operation, body: BaseModel, caller: RequestContext, began: float
    ) -> None:
        self.service = service
        self.operation = operation
        self.caller = caller
        self.began = began
        self.task = asyncio.ensure_future(self._told(body))
        self.task.add_done_callback(lambda task: task.cancelled() or task.exception())  # nobody may ever ask for it
        self.ended: float | None = None
        self._waiting = 0
        self._cancelled_by: UnstirError | None = None

    async def accepted(self) -> None:
        """Wait until it has its place in the engine.

        Raises:
            UnstirError: it was refused.
        """
        placed = asyncio.ensure_future(self.caller.placed.wait())
        self._waiting += 1
        try:
            await asyncio.wait({placed, self.task}, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            if self._waiting == 1:
                self.cancel()
            raise
        finally:
            self._waiting -= 1
            placed.cancel()
        if not self.caller.placed.is_set():
            self.task.result()

    async def reply(self, media_type: str) -> Reply:
        """Wait for the outcome and give it its form. Who is last to stop waiting ends the visit.

        Raises:
            UnstirError: it failed, or was cancelled by somebody else.
        """
        return await rendered(self.service, await self.outcome(), media_type)

    async def outcome(self) -> Outcome:
        """As :meth:`reply`, without a form."""
        self._waiting += 1
        try:
            return await asyncio.shield(self.task)
        except asyncio.CancelledError:
            if self._cancelled_by is not None:
                raise self._cancelled_by from None
            if self.task.cancelled():  # by somebody else who waited for it
                raise Cancelled("it was cancelled before it was done; ask for it anew") from None
            raise
        finally:
            self._waiting -= 1
            if not self._waiting and not self.task.done():
                self.cancel()

    def keep(self) -> None:
        """Go on although nobody waits, until it is cancelled."""
        self._waiting += 1

    def cancel(self, why: UnstirError | None = None) -> None:
        """End it; its lanes leave before the next tick."""
        self._cancelled_by = self._cancelled_by or why
        self.task.cancel()

    @property
    def problem(self) -> UnstirError | Exception | None:
        """What went wrong; None while it runs or if it went well."""
        if not self.task.done():
            return None
        if self.task.cancelled():
            return self._cancelled_by or Cancelled("it was cancelled before it was done")
        error = self.task.exception()
        return error if isinstance(error, Exception) else None

    async def _told(self, body: BaseModel) -> Outcome:
        service, metrics, path = self.service, self.service.metrics, self.operation.path
        ending = "internal"
        try:
            with tracing.span(path, REQUEST_ID.get()):
                async with in_time(self.caller.terms.deadline, self.began):
                    answer = await self.operation.story(service, body, self.caller)
                    outcome = await run_in_threadpool(self.operation.outcome, service, answer)
                spent = outcome.spent
                tracing.set_usage(
                    queue_seconds=spent.queue_seconds,
                    device_seconds=spent.device_seconds,
                    evaluations=spent.evaluations,
                )
        except UnstirError as error:
            ending = error.code
            raise
        except asyncio.CancelledError:
            ending = (self._cancelled_by or ClientGone("")).code
            raise
        else:
            ending = "ok"
            metrics.images.labels(path).inc(outcome.images)
            for name, evaluations in spent.evaluations.items():
                metrics.nfe.labels(name).inc(evaluations)
            metrics.request_nfe.observe(sum(spent.evaluations.values()))
            metrics.queue_time.labels(path).observe(spent.queue_seconds)
            metrics.first_step_time.observe(spent.started - self.began)
            return outcome
        finally:
            self.ended = time.monotonic()
            metrics.finished.labels(path, ending).inc()


@contextlib.asynccontextmanager
async def in_time(deadline: float | None, began: float) -> AsyncIterator[None]:
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


async def rendered(service: Service, outcome: Outcome, media_type: str) -> Reply:
    """The outcome in its form."""
    began = time.perf_counter()
    reply = await run_in_threadpool(formats.render, outcome, media_type)
    service.metrics.encode_time.observe(time.perf_counter() - began)
    return reply
