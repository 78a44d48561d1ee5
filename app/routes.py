"""The HTTP surface: from requests to operations, and from outcomes to answers. It knows no samplers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool
from starlette.responses import StreamingResponse

from app import events, forms, operations
from app.errors import ClientGone, UnstirError
from app.operations import Onlooker
from app.problems import DECLARED
from app.replies import formats, outcomes
from app.replies.formats import FORMATS, Outcome, Reply
from app.schemas.answers import InterpolateReply, InvertReply, SampleReply
from app.schemas.requests import InterpolateRequest, InvertRequest, SampleRequest
from app.service import Service

router = APIRouter()
T = TypeVar("T")


@dataclass(frozen=True)
class Operation:
    """What lies behind one endpoint: the model of its body, its story, and what the story's answer has to show."""

    path: str
    request: type[BaseModel]
    story: Callable[..., Awaitable[Any]]
    outcome: Callable[[Service, Any], Outcome]
    answer: type[BaseModel]


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
            **DECLARED,
        },
    }


@router.post("/sample", summary="Draw pictures", **declared(SAMPLE))
async def sample(request: Request) -> Response:
    """Walk from noise to pictures.

    The same request with the same seed gives the same picture; PNG answers carry the whole request in their text chunk
    `unstir`. With `reproducible` the bytes are the same at any load. With `trajectory` the answer shows the walk: a
    strip, or an animation.
    """
    return await _answered(request, SAMPLE)


@router.post("/invert", summary="Encode a picture", **declared(INVERT))
async def invert(request: Request) -> Response:
    """Walk from a picture to the x_T that leads back to it.

    Send the picture as the file `image` of a form, in base64 in JSON, or bare, with the other fields in the query.
    `latent` and the fields of `decode` are what `/sample` needs to give the picture back.
    """
    return await _answered(request, INVERT)


@router.post("/interpolate", summary="Draw what lies between", **declared(INTERPOLATE))
async def interpolate(request: Request) -> Response:
    """Walk from the latents that lie between the given ones.

    Ends are seeds, .npy files or pictures, which are encoded first. `a` and `b` give a strip or an animation of
    `frames` pictures, `latents` with `weights` one blend, four of them with `grid` all that lies between the corners.
    """
    return await _answered(request, INTERPOLATE)


async def _answered(request: Request, operation: Operation) -> Response:
    service: Service = request.app.state.service
    accepted = formats.negotiate(request.headers.get("accept"), FORMATS[operation.path])
    engine = service.engine  # refuses while there is none, before the body is read
    body = await forms.read(request, operation.request)
    streamed = accepted == formats.EVENTS
    media_type = formats.JSON if streamed else accepted

    async def story(onlooker: Onlooker | None = None) -> Reply:
        with _counted(service, operation.path):
            answer = await operation.story(service, body, onlooker)
            outcome: Outcome = await run_in_threadpool(operation.outcome, service, answer)
            reply = await run_in_threadpool(formats.render, outcome, media_type)
            metrics = service.metrics
            metrics.images.labels(operation.path).inc(len(getattr(answer, "pictures", "1")))
            for name, evaluations in outcome.spent.evaluations.items():
                metrics.nfe.labels(name).inc(evaluations)
            metrics.queue_time.labels(operation.path).observe(outcome.spent.queue_seconds)
            return reply

    if streamed:
        opening = partial(events.opened, story, lambda: engine.wait_seconds, request.scope["state"]["request_id"])
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no", "Vary": "Accept"}
        return StreamingResponse(await _unless_gone(request, opening), media_type=formats.EVENTS, headers=headers)
    reply = await _unless_gone(request, story)
    return Response(reply.content, media_type=reply.media_type, headers=reply.headers)


@contextmanager
def _counted(service: Service, endpoint: str) -> Iterator[None]:
    """Count how the story ended."""
    outcome = "internal"
    try:
        yield
    except UnstirError as error:
        outcome = error.code
        raise
    except asyncio.CancelledError:
        outcome = ClientGone.code
        raise
    else:
        outcome = "ok"
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
