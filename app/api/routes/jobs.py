"""Asynchronous jobs: their state, their results, and how to cancel them."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

from app.api.openapi import result_response
from app.api.problems import DECLARED
from app.api.respond import render, send, stream
from app.api.responses.formats import EVENTS
from app.api.responses.schemas import JobStatus, Problem
from app.api.routes.operations import OPERATIONS
from app.api.waiting import until_disconnect
from app.errors import Cancelled, NoSuchJob, NotDone

router = APIRouter(tags=["jobs"])
UNKNOWN: dict[int | str, dict[str, Any]] = {404: {"model": Problem, "description": NoSuchJob.title}}
PROBLEMS = {status: DECLARED[status] for status in (403, 500, 503)} | UNKNOWN


@router.get(
    "/jobs/{identifier}",
    name="get_job",
    summary="The state of a job",
    response_model_exclude_none=True,
    responses=PROBLEMS,
)
async def job(request: Request, identifier: str) -> JobStatus:
    """Its state, its position in the queue, its progress, and about how long it will take."""
    return request.app.state.job_store.get(identifier).status(request.app.state.lifecycle.get_service())  # type: ignore[no-any-return]


@router.get(
    "/jobs/{identifier}/result",
    name="get_job_result",
    summary="The result of a job",
    response_class=Response,
    responses={
        200: result_response(OPERATIONS, "As the operation itself responds: by default an image, of /invert JSON."),
        **DECLARED,
        **UNKNOWN,
    },
)
async def result(request: Request, identifier: str) -> Response:
    """In the format that `Accept` asks for, as the operation itself responds; as often as it is asked for."""
    found, service = request.app.state.job_store.get(identifier), request.app.state.lifecycle.get_service()
    lifecycle = request.app.state.lifecycle
    media_type = found.formats.choose(request.headers.getlist("accept"))
    if media_type == EVENTS:
        return await until_disconnect(request, stream(service, lifecycle, found, found.request_id), lifecycle.stopped)
    if not found.task.done:
        left = found.status(service).seconds_left
        raise NotDone(f"job = {found.id}: it is {found.state}; ask again in {left:.1f} s", retry_after=left)
    if found.state == "cancelled":
        raise Cancelled(f"job = {found.id}: it was cancelled before it was done; send the request again")
    rendering = render(service, lifecycle, found.task, media_type)
    return send(await until_disconnect(request, rendering, lifecycle.stopped), {"Cache-Control": "no-store"})


@router.delete(
    "/jobs/{identifier}",
    name="cancel_job",
    summary="Cancel a job",
    response_model_exclude_none=True,
    responses=PROBLEMS,
)
async def cancel(request: Request, identifier: str) -> JobStatus:
    """Its rows are free before the next forward. Of a job that is done, the result is dropped."""
    store = request.app.state.job_store
    found, service = store.get(identifier), request.app.state.lifecycle.get_service()
    if found.task.done:
        store.forget(found)
    else:
        error = Cancelled(f"job = {found.id}: it was cancelled before it was done; send the request again")
        found.task.cancel(error)
        await found.task.wait_ended()
    return found.status(service)  # type: ignore[no-any-return]
