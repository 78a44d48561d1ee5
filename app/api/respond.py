"""One request, from its headers to its response: receive, parse, admit, run, render, send."""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass
from functools import partial

from fastapi import Request, Response
from fastapi.responses import JSONResponse
from fastapi.sse import EventSourceResponse
from pydantic import BaseModel

from app.api import sse
from app.api.body.read import offload, read_body, read_query
from app.api.headers import RequestHeaders, digest_request, identify_caller
from app.api.job_store import JobStore, StoredJob
from app.api.lifespan import Lifecycle
from app.api.negotiation import make_etag, matches_etag, negotiate
from app.api.operation import Formats, Operation
from app.api.responses import formats
from app.api.responses.formats import EVENTS, JSON, Rendered
from app.api.responses.results import OperationResult
from app.api.tasks import RequestTask
from app.api.uploads import Upload, Uploads
from app.api.waiting import time_limit, unless, until_disconnect
from app.errors import ClientGone, UnstirError
from app.operations.context import RequestContext
from app.operations.service import Service
from app.operations.threads import run_limited
from app.telemetry import tracing
from app.telemetry.logs import REQUEST_ID
from app.telemetry.metrics import Metrics


@dataclass(frozen=True)
class ParsedRequest:
    """A request that is well formed.

    Attributes:
        began: when it arrived, on the engine's clock; the deadline is on the same.
        digest: the same for the same body and path.
        cache_headers: ``Cache-Control``, and the ``ETag`` of a response that is always the same.
    """

    body: BaseModel
    headers: RequestHeaders
    formats: Formats
    media_type: str
    began: float
    deadline: float | None
    digest: str
    cache_headers: dict[str, str]


async def respond(request: Request, operation: Operation) -> Response:
    """Parse, admit, run, render, send.

    Raises:
        UnstirError: whatever the request is refused with, or failed of.
    """
    lifecycle, store = request.app.state.lifecycle, request.app.state.job_store
    service, began = lifecycle.get_service(), time.monotonic()
    negotiate(request.headers.getlist("accept"), operation.formats)  # before a byte is read
    settings = service.settings
    headers = RequestHeaders.parse(request.headers)
    deadline = headers.deadline(began, settings.max_request_seconds)
    with contextlib.ExitStack() as stack:
        async with time_limit(deadline, began):
            receiving = receive(request, operation, service, lifecycle.uploads, stack)
            body, upload, digest = await unless(lifecycle.refusing, receiving)
        parsed = parse(request, operation, service, headers, body, digest, began, deadline)
        etag = parsed.cache_headers.get("ETag")
        if etag and matches_etag(request.headers.getlist("if-none-match"), etag):
            return Response(status_code=304, headers={"Vary": "Accept", **parsed.cache_headers})
        job, replayed = admit(request, service, store, operation, parsed, upload)
        if not replayed:
            stack.pop_all()  # the task releases it at its end
    extra = {"Idempotent-Replayed": "true"} if replayed else {}
    if parsed.headers.respond_async:
        return await accept(request, service, store, job, extra)
    if parsed.media_type == EVENTS:
        events = stream(service, lifecycle, job, request.state.request_id)
        return await until_disconnect(request, events, lifecycle.stopped)
    # The task keeps its own deadline; who waits for the task of another keeps to that of this request.
    async with time_limit(parsed.deadline if replayed else None, parsed.began):
        rendering = render(service, lifecycle, job.task, parsed.media_type, parsed.deadline, parsed.began)
        rendered = await until_disconnect(request, rendering, lifecycle.stopped)
    return send(rendered, parsed.cache_headers | extra)


async def receive(
    request: Request, operation: Operation, service: Service, uploads: Uploads, stack: contextlib.ExitStack
) -> tuple[BaseModel, Upload, str]:
    """The request's model, the room that it takes (which the stack gives back), and its digest."""
    settings, caller = service.settings, identify_caller(request)
    upload = await uploads.reserve(request.headers, settings.max_body_bytes, settings.body_seconds, caller)
    stack.callback(upload.release)
    if request.method == "GET":
        body: BaseModel = read_query(request, operation.request)
    else:
        body = await read_body(request, operation.request, settings, upload.shrink)
    return body, upload, await offload(request, digest_request, operation.path, body)


def parse(
    request: Request,
    operation: Operation,
    service: Service,
    headers: RequestHeaders,
    body: BaseModel,
    digest: str,
    began: float,
    deadline: float | None,
) -> ParsedRequest:
    """The request, with the formats that it can have."""
    formats = operation.list_formats(body)
    media_type = formats.choose(request.headers.getlist("accept"))
    request.state.sampler = getattr(body, "sampler", None) or getattr(body, "method", "")
    caching = cache_headers(operation, body, digest, media_type, service)
    return ParsedRequest(body, headers, formats, media_type, began, deadline, digest, caching)


def cache_headers(
    operation: Operation, body: BaseModel, digest: str, media_type: str, service: Service
) -> dict[str, str]:
    """A response that is a function of its request has a tag, with which a cache can ask again; others are not kept."""
    if media_type == EVENTS or not operation.repeatable(body):
        return {"Cache-Control": "no-store"}
    etag = make_etag(digest, media_type, service.fingerprint, weak=media_type == JSON)
    return {"Cache-Control": "no-cache", "ETag": etag}


def admit(
    request: Request,
    service: Service,
    store: JobStore,
    operation: Operation,
    parsed: ParsedRequest,
    upload: Upload,
) -> tuple[StoredJob, bool]:
    """Find the job with the request's key, or start one; whether it was found. Kept if somebody may ask for it."""
    caller = identify_caller(request)
    key = parsed.headers.idempotency_key and f"{caller} {parsed.headers.idempotency_key}"
    if key and (found := store.find(key, parsed.digest)):
        return found, True
    options = parsed.headers.submit_options(request, parsed.deadline, parsed.digest)
    context = RequestContext(options, previews=sse.PREVIEWS if parsed.media_type == EVENTS else 0)
    with tracing.join_trace(request.headers):
        on_end = partial(end, service.metrics, operation, parsed.began, upload)
        task = RequestTask(run(service, operation, parsed, context), context, on_end)
    job = StoredJob(
        task,
        operation,
        parsed.formats,
        request.state.request_id,
        parsed.digest,
        caller,
        key,
        parsed.headers.respond_async,
    )
    if key or job.asynchronous:
        store.add(job, partial(_seconds_left, service))
    return job, False


def _seconds_left(service: Service, job: StoredJob) -> float:
    reservation = job.task.context.reservation
    return 0.0 if job.task.done or reservation is None else service.engine.seconds_left(reservation)


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


async def render(
    service: Service,
    lifecycle: Lifecycle,
    task: RequestTask,
    media_type: str,
    deadline: float | None = None,
    arrived: float = 0.0,
) -> Rendered:
    """Wait for the result and encode it, off the event loop and within the deadline; a process that stops waits for it.

    Args:
        arrived: when the request did, for the error.
    """
    with lifecycle.responding():
        result = await task.wait()
        began = time.perf_counter()
        async with time_limit(deadline, arrived):
            rendered = await run_limited(service.encoders, formats.render, result, media_type)
    service.metrics.encode_time.observe(time.perf_counter() - began)  # nothing was encoded where this is not reached
    return rendered


def send(rendered: Rendered, headers: dict[str, str] | None = None) -> Response:
    return Response(rendered.content, media_type=rendered.media_type, headers=rendered.headers | (headers or {}))


async def accept(
    request: Request, service: Service, store: JobStore, job: StoredJob, headers: dict[str, str]
) -> Response:
    """202, once the engine has admitted it."""
    job.asynchronous = True
    try:
        await job.task.wait_admitted()
    except (UnstirError, asyncio.CancelledError):
        store.forget(job)
        raise
    job.task.keep()
    location = f"{request.scope['root_path']}/jobs/{job.id}"
    headers = {"Location": location, "Preference-Applied": "respond-async", **headers}
    return JSONResponse(job.status(service).model_dump(mode="json", exclude_none=True), 202, headers=headers)


async def stream(service: Service, lifecycle: Lifecycle, job: StoredJob, request_id: str) -> Response:
    """The events of a job, once the engine has admitted it."""
    await job.task.wait_admitted()
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no", "Vary": "Accept"}
    complete = partial(render, service, lifecycle, job.task, JSON)
    events = sse.events(service.engine, job.task.context, complete, request_id)
    return EventSourceResponse(events, headers=headers)


def end(metrics: Metrics, operation: Operation, began: float, upload: Upload, task: RequestTask) -> None:
    """Free the room of its files, and count how the task ended and what it took."""
    upload.release()
    error = ClientGone("") if task.cancelled and task.cancelled_by is None else task.error
    outcome = "ok" if error is None else getattr(error, "code", "internal")
    metrics.finished.labels(operation.path, outcome).inc()
    if (result := task.result) is not None:
        metrics.images.labels(operation.path).inc(result.image_count)
        metrics.record_usage(operation.path, result.usage.evaluations, result.usage.queue_seconds)
        metrics.first_step_time.observe(result.usage.started - began)
