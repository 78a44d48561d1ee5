"""One request, from its headers to its response: parse, admit, run, render, send."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from fastapi import Request, Response
from fastapi.responses import JSONResponse
from fastapi.sse import EventSourceResponse
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool

from app.api import sse
from app.api.body import offload, read_body
from app.api.headers import RequestHeaders, digest_request
from app.api.job_store import JobStore, StoredJob
from app.api.operation import Operation
from app.api.responses import formats
from app.api.responses.formats import EVENTS, JSON, Rendered, negotiate
from app.api.responses.results import OperationResult
from app.api.tasks import RequestTask
from app.errors import ClientGone, TooLate, UnstirError
from app.operations.context import RequestContext
from app.operations.service import Service
from app.settings import Settings
from app.telemetry import tracing
from app.telemetry.logs import REQUEST_ID
from app.telemetry.metrics import Metrics

T = TypeVar("T")


@dataclass(frozen=True)
class ParsedRequest:
    """A request that is well formed.

    Attributes:
        began: when it arrived, on the engine's clock; the deadline is on the same.
        digest: the same for the same body and path.
    """

    body: BaseModel
    headers: RequestHeaders
    media_type: str
    began: float
    deadline: float | None
    digest: str


async def respond(request: Request, operation: Operation) -> Response:
    """Parse, admit, run, render, send.

    Raises:
        UnstirError: whatever the request is refused with, or failed of.
    """
    service, store = request.app.state.lifecycle.get_service(), request.app.state.job_store
    parsed = await parse(request, operation, service.settings)
    job, replayed = admit(request, service, store, operation, parsed)
    headers = {"Idempotent-Replayed": "true"} if replayed else {}
    if parsed.headers.respond_async:
        return await accept(service, store, job, headers)
    if parsed.media_type == EVENTS:
        return await until_disconnect(request, stream(service, job, request.state.request_id))
    # A replayed request waits for the task of another; its deadline is its own.
    async with time_limit(parsed.deadline if replayed else None, parsed.began):
        return send(await until_disconnect(request, render(service, job.task, parsed.media_type)), headers)


async def parse(request: Request, operation: Operation, settings: Settings) -> ParsedRequest:
    """Read headers and body, within the deadline that the headers set."""
    began = time.monotonic()
    media_type = negotiate(request.headers.get("accept"), operation.formats)
    headers = RequestHeaders.parse(request.headers)
    deadline = headers.deadline(began, settings.max_request_seconds)
    async with time_limit(deadline, began):
        body = await read_body(request, operation.request, settings.max_body_bytes)
        digest = await offload(request, digest_request, operation.path, body)
    request.state.sampler = getattr(body, "sampler", None) or getattr(body, "method", "")
    return ParsedRequest(body, headers, media_type, began, deadline, digest)


def admit(
    request: Request, service: Service, store: JobStore, operation: Operation, parsed: ParsedRequest
) -> tuple[StoredJob, bool]:
    """Find the job with the request's key, or start one; whether it was found. Kept if somebody may ask for it."""
    key = parsed.headers.idempotency_key
    if key and (found := store.find(key, parsed.digest)):
        return found, True
    options = parsed.headers.submit_options(request, parsed.deadline, parsed.digest)
    context = RequestContext(options, previews=sse.PREVIEWS if parsed.media_type == EVENTS else 0)
    with tracing.join_trace(request.headers):
        on_end = partial(record, service.metrics, operation, parsed.began)
        task = RequestTask(run(service, operation, parsed, context), context, on_end)
    job = StoredJob(task, operation, request.state.request_id, parsed.digest, key, parsed.headers.respond_async)
    if key or job.asynchronous:
        store.add(job)
    return job, False


async def run(
    service: Service, operation: Operation, parsed: ParsedRequest, context: RequestContext
) -> OperationResult:
    """Compute, within the deadline."""
    with tracing.span(operation.path, REQUEST_ID.get()):
        async with time_limit(parsed.deadline, parsed.began):
            output = await operation.run(service, parsed.body, context)
        result = operation.result(output, service.model.checkpoint.card)
        usage = result.usage
        tracing.set_usage(usage.queue_seconds, usage.device_seconds, usage.evaluations)
    return result


async def render(service: Service, task: RequestTask, media_type: str) -> Rendered:
    """Wait for the result and encode it, off the event loop."""
    result = await task.wait()
    began = time.perf_counter()
    rendered = await run_in_threadpool(formats.render, result, media_type)
    service.metrics.encode_time.observe(time.perf_counter() - began)  # nothing was encoded where this is not reached
    return rendered


def send(rendered: Rendered, headers: dict[str, str] | None = None) -> Response:
    return Response(rendered.content, media_type=rendered.media_type, headers=rendered.headers | (headers or {}))


async def accept(service: Service, store: JobStore, job: StoredJob, headers: dict[str, str]) -> Response:
    """202, once the engine has admitted it."""
    job.asynchronous = True
    try:
        await job.task.wait_admitted()
    except (UnstirError, asyncio.CancelledError):
        store.forget(job)
        raise
    job.task.keep()
    headers = {"Location": f"/jobs/{job.id}", "Preference-Applied": "respond-async", **headers}
    return JSONResponse(job.status(service).model_dump(mode="json", exclude_none=True), 202, headers=headers)


async def stream(service: Service, job: StoredJob, request_id: str) -> Response:
    """The events of a job, once the engine has admitted it."""
    await job.task.wait_admitted()
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no", "Vary": "Accept"}
    complete = partial(render, service, job.task, JSON)
    events = sse.events(service.engine, job.task.context, complete, request_id)
    return EventSourceResponse(events, headers=headers)


def record(metrics: Metrics, operation: Operation, began: float, task: RequestTask) -> None:
    """Count how the task ended and what it took."""
    error = ClientGone("") if task.cancelled and task.cancelled_by is None else task.error
    outcome = "ok" if error is None else getattr(error, "code", "internal")
    metrics.finished.labels(operation.path, outcome).inc()
    if (result := task.result) is not None:
        metrics.images.labels(operation.path).inc(result.image_count)
        metrics.record_usage(operation.path, result.usage.evaluations, result.usage.queue_seconds)
        metrics.first_step_time.observe(result.usage.started - began)


async def until_disconnect(request: Request, response: Awaitable[T]) -> T:
    """Stop waiting for the response when the client disconnects; if nobody else waits, its lanes are released."""

    async def disconnected() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    work = asyncio.ensure_future(response)
    gone = asyncio.ensure_future(disconnected())
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            return work.result()
        raise ClientGone("the client disconnected before its response was ready")
    finally:
        gone.cancel()
        work.cancel()
        await asyncio.gather(gone, work, return_exceptions=True)


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
