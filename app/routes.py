"""The HTTP surface: from requests to operations, and from outcomes to answers. It knows no samplers."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable
from itertools import groupby
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Body, Depends, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from app import __version__, errors, operations, replies
from app.errors import ClientGone, InvalidField, InvalidJSON, UnstirError
from app.schemas import FieldProblem, ModelReply, Problem, SampleReply, SampleRequest, SamplerInfo, Status
from app.service import Service
from model.samplers import SAMPLERS, Sampler

log = logging.getLogger("unstir.http")
router = APIRouter()
T = TypeVar("T")


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


async def _json_only(request: Request) -> None:
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    empty = request.headers.get("content-length", "0") == "0" and "transfer-encoding" not in request.headers
    if media != "application/json" and not (media.startswith("application/") and media.endswith("+json")) and not empty:
        raise errors.UnsupportedMedia(f"content-type = {media!r}: send application/json")


PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem, "description": " / ".join(kind.title for kind in kinds)}
    for status, kinds in groupby(sorted(errors.catalogue(), key=lambda kind: kind.status), lambda kind: kind.status)
    if status not in (404, 405, 499)
}
_ANY_PICTURE = SampleRequest()  # what an empty body asks for
_BINARY = {"schema": {"type": "string", "format": "binary"}}


@router.post(
    "/sample",
    summary="Draw pictures",
    dependencies=[Depends(_json_only)],
    response_class=Response,
    responses={
        200: {
            "description": "The picture as PNG, a contact sheet when n > 1; or by Accept JSON with everything, or npy.",
            "model": SampleReply,
            "content": {replies.PNG: _BINARY, replies.NPY: _BINARY},
        },
        **PROBLEMS,
    },
)
async def sample(request: Request, body: Annotated[SampleRequest, Body()] = _ANY_PICTURE) -> Response:
    """Walk from noise to pictures.

    The same request with the same seed gives the same picture; PNG answers carry the whole request in their text chunk
    `unstir`. With `reproducible` the bytes are the same at any load.
    """
    service = _service(request)
    media_type = replies.negotiate(request.headers.get("accept"))

    async def story() -> replies.Reply:
        sampled = await operations.sample(service, body)
        reply = await run_in_threadpool(replies.render, service, sampled, media_type)
        metrics = service.metrics
        metrics.images.labels("/sample").inc(len(sampled.pictures))
        metrics.nfe.labels(sampled.walk.request.sampler).inc(sampled.walk.nfe * len(sampled.pictures))
        metrics.queue_time.labels("/sample").observe(sampled.result.queue_seconds)
        return reply

    reply = await _counted(service, "/sample", request, story)
    return Response(reply.content, media_type=reply.media_type, headers=reply.headers)


@router.get("/model", summary="What is being served", responses={503: PROBLEMS[503]})
async def model(request: Request) -> ModelReply:
    """The network, its classes and schedule, the samplers, the limits, and what a forward costs here."""
    service = _service(request)
    widths = service.engine.widths
    loaded, settings = service.checkpoint, service.settings
    return ModelReply(
        name=loaded.card.name,
        description=loaded.card.description,
        licence=loaded.card.licence,
        sha256=loaded.card.sha256,
        classes=list(loaded.card.classes),
        shape=list(loaded.shape),
        timesteps=service.schedule.T,
        schedule=loaded.scheduler_config,
        prediction=service.schedule.prediction,
        parameters=sum(p.numel() for p in loaded.net.parameters()),
        samplers=[_describe(sampler, service) for sampler in SAMPLERS.values()],
        device=str(service.device),
        dtype=str(next(loaded.net.parameters()).dtype).removeprefix("torch."),
        forward_ms={w: round(s * 1e3, 3) for w, s in zip(widths.sizes, widths.seconds, strict=True)},
        reproducible_width=widths.canonical,
        guidance=loaded.card.null_class is not None,
        limits={
            "max_pictures": settings.max_pictures,
            "max_queue_seconds": settings.max_queue_seconds,
            "max_body_bytes": settings.max_body_bytes,
        },
        version=__version__,
    )


def _describe(sampler: Sampler, service: Service) -> SamplerInfo:
    steps = sampler.default_steps or service.schedule.T
    first = service.habits.options(sampler, min(steps, service.schedule.T), service.schedule.T)["spacing"]
    return SamplerInfo(
        name=sampler.name,
        what=sampler.what,
        when=sampler.when,
        stochastic=sampler.stochastic,
        evaluations=sampler.nfe,
        good_steps=sampler.good_steps,
        default_steps=min(steps, service.schedule.T),
        options=sorted(sampler.options & SampleRequest.model_fields.keys()),
        spacings=[first, *(spacing for spacing in sampler.spacings if spacing != first)],
    )


@router.get("/healthz", summary="Is the process alive?")
async def healthz() -> Status:
    """Yes, if this is answered at all; it never looks at the queue."""
    return Status(status="alive")


@router.get("/readyz", summary="Should requests be sent here?", responses={503: {"model": Status}})
async def readyz(request: Request, response: Response) -> Status:
    """503 with the reason while loading, draining, stalled or dead."""
    unready = _service(request).unready
    if unready:
        response.status_code = 503
    return Status(status=unready or "ready")


@router.get("/metrics", summary="Metrics for Prometheus", response_class=Response)
async def metrics(request: Request) -> Response:
    """Every metric, in Prometheus' text format."""
    return Response(_service(request).metrics.exposition(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def _counted(service: Service, endpoint: str, request: Request, story: Callable[[], Awaitable[T]]) -> T:
    """Run the story unless the client hangs up first, and count how it ended."""
    outcome = "internal"
    try:
        result = await _unless_gone(request, story)
    except UnstirError as error:
        outcome = error.code
        raise
    else:
        outcome = "ok"
        return result
    finally:
        service.metrics.finished.labels(endpoint, outcome).inc()


async def _unless_gone(request: Request, story: Callable[[], Awaitable[T]]) -> T:
    """Cancel the story, and with it its lanes, as soon as the client hangs up."""

    async def hang_up() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    work = asyncio.ensure_future(story())
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


def problem(request: Request, error: UnstirError) -> JSONResponse:
    """Any error in the one shape."""
    content = Problem(
        type=f"urn:unstir:problem:{error.code}",
        title=error.title,
        status=error.status,
        detail=_encodable(error.detail),
        code=error.code,
        request_id=request.scope["state"]["request_id"],
        errors=[
            FieldProblem(field=_encodable(field)[:200], value=_plain(value), remedy=remedy)
            for field, value, remedy in error.fields[: errors.MOST_FIELDS]
        ],
    )
    return JSONResponse(
        content.model_dump(mode="json", exclude_defaults=True),
        error.status,
        headers=error.headers,
        media_type="application/problem+json",
    )


async def on_unstir_error(request: Request, error: Exception) -> Response:
    """Ours, as it is."""
    assert isinstance(error, UnstirError)
    return problem(request, error)


async def on_validation_error(request: Request, error: Exception) -> Response:
    """What FastAPI and pydantic found wrong with the body."""
    assert isinstance(error, RequestValidationError)
    faults = error.errors()
    broken = next((fault for fault in faults if fault["type"] == "json_invalid"), None)
    if broken is not None:
        reason = broken.get("ctx", {}).get("error", "")
        return problem(request, InvalidJSON(f"at character {broken['loc'][-1]}: {reason}; send one JSON object"))
    known = ", ".join(SampleRequest.model_fields)
    fields = []
    for fault in faults:
        field = ".".join(str(part) for part in fault["loc"][1:2]) or "body"
        match fault["type"]:
            case "extra_forbidden":
                remedy = f"no such field; known are {known}"
            case "model_attributes_type":
                remedy = "send one JSON object"
            case _:
                remedy = str(fault["msg"]).removeprefix("Value error, ").removeprefix("Input ")
        fields.append((field[:200], _plain(fault.get("input")), remedy))
    # A union reports one fault per member; the client sent one value.
    merged: dict[str, tuple[str, object, str]] = {}
    for field, value, remedy in fields:
        before = merged.get(field)
        merged[field] = (field, value, f"{before[2]} or {remedy}" if before else remedy)
    return problem(request, InvalidField.many(merged.values()))


async def on_http_exception(request: Request, error: Exception) -> Response:
    """What Starlette refuses by itself, and our own body limit."""
    assert isinstance(error, HTTPException)
    where = f"{request.method} {request.url.path}"
    answer: UnstirError
    match error.status_code:
        case 404:
            answer = errors.NotFound(f"{where}: see /docs for what there is")
        case 405:
            answer = errors.MethodNotAllowed(f"{where}: use {(error.headers or {}).get('Allow', 'another method')}")
        case 413:
            limit = _service(request).settings.max_body_bytes
            answer = errors.BodyTooLarge(f"body = {error.detail}: at most {limit} are read; send less")
        case _:
            answer = InvalidJSON(f"{where}: {error.detail}; send one JSON object")
    answer.headers |= dict(error.headers or {})
    return problem(request, answer)


def on_defect(request: Request, error: Exception) -> Response:
    """A bug: the client learns the request id, the log has the rest."""
    log.error("unexpected error, id=%s", request.scope["state"]["request_id"], exc_info=error)
    return problem(request, errors.Internal("the log has the details under this request id; please report it"))


def _plain(value: object) -> object:
    """What can be echoed as JSON without risk: scalars as they are, the rest by type and size."""
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, str):
        return _encodable(value if len(value) <= 200 else value[:200] + "…")
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return {"list": "an array", "dict": "an object"}.get(type(value).__name__, "something else")


def _encodable(text: str) -> str:
    """JSON may spell lone surrogates, which no encoding can send back."""
    return text.encode("utf-8", "replace").decode()
