"""Errors as responses, all in the shape of RFC 9457."""

from __future__ import annotations

import logging
from itertools import groupby
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.routing import Match, Route

from app import errors
from app.api.body.faults import encodable, plain
from app.api.responses.schemas import FieldProblem, Problem
from app.errors import InvalidJSON, UnstirError
from app.errors.frames import forget_frames
from app.errors.wording import MISSING, Unquoted, closest

log = logging.getLogger("unstir.http")
DECLARED: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem, "description": " / ".join(kind.title for kind in kinds)}
    for status, kinds in groupby(sorted(errors.catalogue(), key=lambda kind: kind.status), lambda kind: kind.status)
    if status not in (404, 405, 499)
}


def describe(error: UnstirError, request_id: str) -> dict[str, Any]:
    """The problem details of an error."""
    content = Problem(
        type=f"urn:unstir:problem:{error.code}",
        title=error.title,
        status=error.status,
        detail=encodable(error.detail),
        code=error.code,
        request_id=request_id,
        errors=[
            FieldProblem(field=encodable(field)[:200], **_describe_value(value), remedy=encodable(remedy))
            for field, value, remedy in error.fields[: errors.MAX_FAULTS]
        ]
        or None,
    )
    return content.model_dump(mode="json", exclude_defaults=True)


def _describe_value(value: object) -> dict[str, Any]:
    """What a field's fault says of what was sent."""
    value = plain(value)
    if not isinstance(value, Unquoted):
        return {"value": value}
    return {} if value is MISSING else {"given": encodable(value)}


def respond_problem(request: Request, error: UnstirError) -> JSONResponse:
    if isinstance(error, errors.REJECTIONS):
        request.app.state.lifecycle.metrics.rejections.labels(error.code).inc()
    forget_frames(error)  # which hold the body
    content = describe(error, request.state.request_id)
    forget_frames(error)
    headers = {"Cache-Control": "no-store", **error.headers}
    return JSONResponse(content, error.status, headers=headers, media_type="application/problem+json")


async def on_unstir_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, UnstirError)
    return respond_problem(request, error)


async def on_http_exception(request: Request, error: Exception) -> Response:
    """What Starlette refuses by itself, and our own body limit."""
    assert isinstance(error, HTTPException)
    where = f"{request.method} {request.url.path[:200]}"
    prefix = request.scope.get("root_path", "")
    headers = dict(error.headers or {})
    problem: UnstirError
    match error.status_code:
        case 404:
            routes = [route for router in request.app.state.routers for route in router.routes]
            paths = [route.path for route in routes if route.include_in_schema]
            similar = closest(request.url.path.removeprefix(prefix), paths)
            hint = f"did you mean {prefix}{similar}? " if similar else ""
            problem = errors.NotFound(f"{where}: {hint}see {prefix}/docs for what there is")
        case 405:
            headers["Allow"] = allowed = _list_methods(request)
            if request.method == "OPTIONS":
                return Response(status_code=204, headers=headers)
            problem = errors.MethodNotAllowed(f"{where}: use {allowed}")
        case 413:
            lifecycle = request.app.state.lifecycle
            limit, model = lifecycle.settings.max_body_bytes, lifecycle.model
            seen = f", of which the network sees {_size(model.checkpoint.shape)}" if model is not None else ""
            remedy = f"at most {limit} are read (UNSTIR_MAX_BODY_BYTES); send smaller images{seen}"
            problem = errors.BodyTooLarge(f"body ({error.detail}): {remedy}")
        case _:
            problem = InvalidJSON(f"{where}: {error.detail}; send one JSON object")
    problem.headers |= headers
    return respond_problem(request, problem)


def _size(shape: tuple[int, int, int]) -> str:
    return f"{shape[2]}x{shape[1]}"


def _list_methods(request: Request) -> str:
    """The methods of all routes with this path, as ``Allow`` has them."""
    found = {"OPTIONS"}
    routes = [*request.app.routes, *(route for router in request.app.state.routers for route in router.routes)]
    for route in routes:
        if isinstance(route, Route | APIRoute) and route.matches(request.scope)[0] != Match.NONE:
            found |= route.methods or set()
    return ", ".join(sorted(found | {"HEAD"} if "GET" in found else found))


def on_unexpected_error(request: Request, error: Exception) -> Response:
    """A bug: the client gets the request id, the log has the rest."""
    return respond_problem(request, to_unstir_error(error, request.state.request_id))


def to_unstir_error(error: Exception, request_id: str) -> UnstirError:
    """The error itself if it is ours; anything else is a bug, which is logged."""
    if isinstance(error, UnstirError):
        return error
    log.error("unexpected error, id=%s", request_id, exc_info=error)
    return errors.Internal("the log has the details under this request id; please report it")
