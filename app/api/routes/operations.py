"""The HTTP surface: from requests to operations, and from outcomes to answers. It knows no samplers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from datetime import UTC, datetime
from typing import Any, TypeVar

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from starlette.responses import StreamingResponse

from app import operations
from app.api import body as forms
from app.api import problems
from app.api import sse as events
from app.api.headers import RequestHeaders, digest_of
from app.api.job_store import JobStore, StoredJob
from app.api.problems import DECLARED
from app.api.responses import formats
from app.api.responses import results as outcomes
from app.api.responses.formats import FORMATS, Reply
from app.api.responses.schemas import InterpolateReply, InvertReply, JobReply, Problem, SampleReply
from app.api.tasks import Operation, RequestTask, in_time
from app.errors import Cancelled, ClientGone, Internal, NotDone, UnstirError
from app.operations import RequestContext
from app.operations.requests import InterpolateRequest, InvertRequest, SampleRequest
from app.operations.service import Service
from app.telemetry import tracing

router = APIRouter()
T = TypeVar("T")


SAMPLE = Operation("/sample", SampleRequest, operations.sample, outcomes.sampled, SampleReply)
INVERT = Operation("/invert", InvertRequest, operations.invert, outcomes.inverted, InvertReply)
INTERPOLATE = Operation(
    "/interpolate", InterpolateRequest, operations.interpolate, outcomes.interpolated, InterpolateReply
)


def declared(operation: Operation) -> dict[str, Any]:
    """What OpenAPI says of an endpoint's answers."""
    binary = {"schema": {"type": "string", "format": "binary"}}
    first, *others = FORMATS[operation.path]
    return {
        "response_class": Response,
        "responses": {
            200: {
                "description": f"By default {first}; by Accept also {', '.join(others)}.",
                "model": operation.answer,
                "content": {form: binary for form in (first, *others) if form != formats.JSON},
            },
            202: {"model": JobReply, "description": "With `Prefer: respond-async`: where to ask, in `Location`."},
            **DECLARED,
        },
    }


@router.post("/sample", summary="Draw images", **declared(SAMPLE))
async def sample(request: Request) -> Response:
    """Walk from noise to images.

    The same request with the same seed gives the same image; PNG answers carry the whole request in their text chunk
    `unstir`. With `reproducible` the bytes are the same at any load. With `trajectory` the answer shows the walk: a
    strip, or an animation.
    """
    return await _answered(request, SAMPLE)


@router.post("/invert", summary="Encode an image", **declared(INVERT))
async def invert(request: Request) -> Response:
    """Walk from an image to the x_T that leads back to it.

    Send the image as the file `image` of a form, in base64 in JSON, or bare, with the other fields in the query.
    `latent` and the fields of `decode` are what `/sample` needs to give the image back.
    """
    return await _answered(request, INVERT)


@router.post("/interpolate", summary="Draw what lies between", **declared(INTERPOLATE))
async def interpolate(request: Request) -> Response:
    """Walk from the latents that lie between the given ones.

    Ends are seeds, .npy files or images, which are encoded first. `a` and `b` give a strip or an animation of
    `frames` images, `latents` with `weights` one blend, four of them with `grid` all that lies between the corners.
    """
    return await _answered(request, INTERPOLATE)


async def _answered(request: Request, operation: Operation) -> Response:
    service: Service = request.app.state.service
    jobs: JobStore = request.app.state.jobs
    scope = request.scope["state"]
    began, request_id = time.monotonic(), scope["request_id"]
    media_type = formats.negotiate(request.headers.get("accept"), FORMATS[operation.path])
    wishes = RequestHeaders.read(request.headers)
    _ = service.engine  # refuses while there is none, before the body is read
    with tracing.joined(request.headers):
        deadline = wishes.deadline(began, service.settings.max_request_seconds)
        async with in_time(deadline, began):  # a body may come slowly
            body = await forms.read(request, operation.request)
        scope["sampler"] = getattr(body, "sampler", None) or getattr(body, "method", "")
        digest = digest_of(operation.path, body)
        job = jobs.under(wishes.key, digest) if wishes.key else None
        terms = wishes.terms(request, deadline, digest)
        if job is not None:
            visit, again = job.visit, {"Idempotent-Replayed": "true"}
        else:
            caller = RequestContext(terms, previews=events.PREVIEWS if media_type == formats.EVENTS else 0)
            visit, again = RequestTask(service, operation, body, caller, began), {}
    if job is None and (wishes.key or wishes.asynchronous):
        job = StoredJob(visit, request_id, digest, wishes.key, wishes.asynchronous)
        try:
            jobs.add(job)
        except UnstirError:
            visit.cancel()
            raise
    if job is not None and wishes.asynchronous:
        return await _promised(service, jobs, job, again)
    if media_type == formats.EVENTS:
        return await _unless_gone(request, _streamed(visit, request_id))
    # Whoever waits for a visit that is another's has a deadline of his own.
    async with in_time(deadline if again else None, began):
        return _sent(await _unless_gone(request, visit.reply(media_type)), again)


def _sent(reply: Reply, headers: dict[str, str] | None = None) -> Response:
    return Response(reply.content, media_type=reply.media_type, headers=reply.headers | (headers or {}))


async def _streamed(visit: RequestTask, request_id: str) -> Response:
    await visit.accepted()
    ticket = visit.caller.ticket
    if ticket is None:  # it was refused, or is over
        await visit.outcome()
        raise Internal("a story without a place in the engine")
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no", "Vary": "Accept"}
    return StreamingResponse(events.told(visit, ticket, request_id), media_type=formats.EVENTS, headers=headers)


async def _promised(service: Service, jobs: JobStore, job: StoredJob, headers: dict[str, str]) -> Response:
    """202, once it has its place."""
    if not job.asynchronous:
        job.asynchronous = True
    try:
        await job.visit.accepted()
    except (UnstirError, asyncio.CancelledError):
        jobs.forget(job)
        raise
    job.visit.keep()
    headers = {"Location": f"/jobs/{job.id}", "Preference-Applied": "respond-async", **headers}
    return JSONResponse(_described(service, job).model_dump(mode="json", exclude_none=True), 202, headers=headers)


@router.get("/jobs/{identifier}", summary="How an asynchronous job fares", responses={404: {"model": Problem}})
async def job(request: Request, identifier: str) -> JobReply:
    """Its state, its place in line, what is done of it, and about how long it will take."""
    return _described(request.app.state.service, request.app.state.jobs.get(identifier))


@router.get(
    "/jobs/{identifier}/result",
    summary="What an asynchronous job came to",
    response_class=Response,
    responses={status: {"model": Problem} for status in (404, 406, 409, 410)},
)
async def result(request: Request, identifier: str) -> Response:
    """In the form that `Accept` asks for, as the operation itself answers; as often as it is asked for."""
    service: Service = request.app.state.service
    found: StoredJob = request.app.state.jobs.get(identifier)
    media_type = formats.negotiate(request.headers.get("accept"), FORMATS[found.visit.operation.path])
    if media_type == formats.EVENTS:
        return await _unless_gone(request, _streamed(found.visit, found.request_id))
    if not found.visit.task.done():
        left = _described(service, found).seconds_left
        raise NotDone(f"job = {found.id}: it is {found.state}; ask again in {left:.1f} s", retry_after=left)
    if found.state == "cancelled":
        raise Cancelled(f"job = {found.id}: it was cancelled before it was done; ask for it anew")
    return _sent(await found.visit.reply(media_type))


@router.delete("/jobs/{identifier}", summary="Cancel an asynchronous job", responses={404: {"model": Problem}})
async def cancel(request: Request, identifier: str) -> JobReply:
    """Its rows are free before the next forward. Of a job that is done, the result is forgotten."""
    jobs: JobStore = request.app.state.jobs
    found = jobs.get(identifier)
    if found.visit.task.done():
        jobs.forget(found)
    else:
        found.visit.cancel(Cancelled(f"job = {found.id}: it was cancelled before it was done; ask for it anew"))
        await asyncio.wait({found.visit.task})
    return _described(request.app.state.service, found)


def _described(service: Service, job: StoredJob) -> JobReply:
    ticket, error = job.visit.caller.ticket, job.visit.problem
    total = ticket.total if ticket else 0
    done = total - ticket.remaining if ticket else 0
    under_way = ticket is not None and job.state in ("waiting", "running")
    problem = None
    if isinstance(error, UnstirError):
        problem = Problem(**problems.describe(error, job.request_id))
    elif error is not None:
        problem = Problem(**problems.describe(problems.defect(error, job.request_id), job.request_id))
    return JobReply(
        id=job.id,
        operation=job.visit.operation.path,
        state=job.state,
        position=service.engine.position(ticket) if ticket and under_way else 0,
        done=done,
        total=total,
        progress=round(done / total, 4) if total else 0.0,
        seconds_left=round(service.engine.seconds_left(ticket), 3) if ticket and under_way else 0.0,
        created=datetime.fromtimestamp(job.created, UTC).isoformat(timespec="milliseconds"),
        request_id=job.request_id,
        result=f"/jobs/{job.id}/result" if job.state == "done" else None,
        error=problem,
    )


async def _unless_gone(request: Request, answer: Awaitable[T]) -> T:
    """Stop waiting for the answer as soon as the client hangs up; if nobody else does, its lanes are let go."""

    async def hang_up() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    work = asyncio.ensure_future(answer)
    gone = asyncio.ensure_future(hang_up())
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            return work.result()
        raise ClientGone("the client hung up before its answer was ready")
    finally:
        gone.cancel()
        work.cancel()
        await asyncio.gather(gone, work, return_exceptions=True)
