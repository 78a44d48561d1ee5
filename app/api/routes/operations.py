"""The endpoints that compute. One row each; a new one is a request model, a function, a result, and a row here."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import APIRouter, Request, Response

from app.api import responses
from app.api.openapi import result_response
from app.api.operation import Operation
from app.api.problems import DECLARED
from app.api.respond import respond
from app.api.responses.formats import APNG, EVENTS, GIF, JPEG, JSON, NPY, PNG, WEBP, ZIP
from app.api.responses.interpolate import InterpolateResponse, InterpolateResult
from app.api.responses.invert import InvertResponse, InvertResult
from app.api.responses.sample import SampleResponse, SampleResult
from app.api.responses.schemas import JobStatus
from app.operations.interpolate import interpolate
from app.operations.invert import invert
from app.operations.requests import InterpolateRequest, InvertRequest, SampleRequest
from app.operations.sample import sample

OPERATIONS = (
    Operation(
        "sample",
        "Sample images",
        "From noise to images.\n\n"
        "The same request with the same seed gives the same image; PNG responses carry the whole request in their text "
        "chunk `unstir`. With `reproducible` the bytes are the same at any load. With `trajectory` the response shows "
        "how the image forms: a strip, or an animation.",
        SampleRequest,
        sample,
        SampleResult,
        SampleResponse,
        (PNG, WEBP, JPEG, GIF, APNG, JSON, NPY, ZIP, EVENTS),
        repeatable=responses.sample.is_repeatable,
        no_animation=responses.sample.no_animation,
    ),
    Operation(
        "invert",
        "Encode an image",
        "From an image to the x_T that leads back to it.\n\n"
        "Send the image as the file `image` of a form, in base64 in JSON, or bare, with the other fields in the query. "
        "`latent` and the fields of `decode` are what `/sample` needs to give the image back.",
        InvertRequest,
        invert,
        InvertResult,
        InvertResponse,
        (JSON, NPY, PNG, WEBP, GIF, APNG, EVENTS),
        repeatable=lambda request: request.reproducible,
        no_animation=responses.invert.no_animation,
        no_image=responses.invert.no_image,
    ),
    Operation(
        "interpolate",
        "Interpolate between latents",
        "From two or more latents to the images between them.\n\n"
        "Latents are seeds, .npy files or images, which are encoded first. `a` and `b` give a strip or an animation of "
        "`frames` images, `latents` with `weights` one blend, four of them with `grid` all between the corners.",
        InterpolateRequest,
        interpolate,
        InterpolateResult,
        InterpolateResponse,
        (PNG, GIF, WEBP, APNG, JPEG, JSON, NPY, ZIP, EVENTS),
        repeatable=lambda request: request.reproducible,
        no_animation=responses.interpolate.no_animation,
    ),
)
router = APIRouter(tags=["images"])


def _responses(operation: Operation) -> dict[int | str, dict[str, Any]]:
    """What OpenAPI says of the endpoint's responses."""
    first, *others = operation.formats
    return {
        200: result_response([operation], f"By default {first}; by Accept also {', '.join(others)}."),
        304: {"description": "The client has this response already: its `If-None-Match` names the present `ETag`."},
        202: {"model": JobStatus, "description": "With `Prefer: respond-async`: where to ask, in `Location`."},
        **DECLARED,
    }


def _endpoint(operation: Operation) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        return await respond(request, operation)

    return endpoint


for _operation in OPERATIONS:
    for _method in ("POST", "GET")[: 1 + _operation.gettable]:
        router.add_api_route(
            _operation.path,
            _endpoint(_operation),
            methods=[_method],
            name=_operation.name if _method == "POST" else f"get_{_operation.name}",
            summary=_operation.summary if _method == "POST" else f"{_operation.summary}, by a query string",
            description=_operation.description,
            response_class=Response,
            responses=_responses(_operation),
        )
