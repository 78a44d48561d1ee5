"""From the body of a request to its model: JSON, a form with files, or a bare image with a query string.

JSON is read strictly. What comes as text anyway (forms, queries) is read as the text that it is: ``steps=20`` is a
number, and a file becomes the image or the .npy that its first bytes say that it is; its name is never used.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException

from app.errors import InvalidField, InvalidForm, InvalidJSON, UnsupportedMedia
from app.operations.files import NPY_MAGIC
from app.operations.requests import MAX_SEED, latent_fields, list_fields

M = TypeVar("M", bound=BaseModel)
T = TypeVar("T")
MAX_FILES, MAX_FIELDS = 16, 64  # of a form
IMAGE_TYPES = ("image/png", "image/apng", "image/jpeg", "image/jpg", "image/webp", "image/gif")  # images without a form
OFFLOAD_BYTES = 1 << 16  # bytes; what is larger is parsed off the event loop


async def read_body(request: Request, model: type[M], max_bytes: int) -> M:
    """The body as ``model``; an empty one asks for all defaults.

    Raises:
        UnsupportedMedia: the body is of another type.
        InvalidJSON, InvalidForm: it does not parse.
        InvalidField: it parses, and its fields cannot be.
    """
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media == "multipart/form-data":
        _refuse_query(request)
        return await _read_form(request, model, max_bytes)
    content = await request.body()
    if media in IMAGE_TYPES and "image" in model.model_fields:
        return _validate(model, {**request.query_params, "image": content}, strict=False)
    if content and media != "application/json" and not (media.startswith("application/") and media.endswith("+json")):
        images = f", or one of {', '.join(IMAGE_TYPES)}" if "image" in model.model_fields else ""
        raise UnsupportedMedia(f"content-type = {media!r}: send application/json or multipart/form-data{images}")
    _refuse_query(request)
    return await offload(request, _parse_json, model, content)


async def offload(request: Request, function: Callable[..., T], *arguments: object) -> T:
    """Call a function of the body: here if it is small, else off the event loop."""
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) < OFFLOAD_BYTES:
        return function(*arguments)
    return await run_in_threadpool(function, *arguments)


def _parse_json(model: type[M], content: bytes) -> M:
    try:
        fields = json.loads(content or b"{}", parse_float=_parse_number)
    except json.JSONDecodeError as error:
        raise InvalidJSON(f"at character {error.pos}: {error.msg}; send one JSON object") from error
    except UnicodeDecodeError as error:
        raise InvalidJSON(f"at byte {error.start}: it is no UTF-8; send one JSON object") from error
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, brackets in thousands
        raise InvalidJSON(f"{error}; send one JSON object") from error
    if not isinstance(fields, dict):
        raise InvalidField("body", plain(fields), "send one JSON object")
    return _validate(model, fields, strict=True)


def _parse_number(text: str) -> float | int:
    """A number of JSON with a fraction or an exponent. JSON schema takes 20.0 for an integer, and so do we.

    Beyond 2^53 a float does not say which integer it is, and stays one.
    """
    value = float(text)
    return int(value) if value.is_integer() and abs(value) <= MAX_SEED else value


async def _read_form(request: Request, model: type[M], max_bytes: int) -> M:
    try:
        async with request.form(max_files=MAX_FILES, max_fields=MAX_FIELDS, max_part_size=max_bytes) as form:
            fields = {name: await _read_field(name, form, model) for name in form}
    except HTTPException as error:
        if error.status_code != 400:
            raise
        raise InvalidForm(f"{error.detail}; send multipart/form-data, as curl -F does") from error
    return _validate(model, fields, strict=False)


async def _read_field(name: str, form: FormData, model: type[BaseModel]) -> Any:
    given: list[UploadFile | str] = form.getlist(name)
    if name not in model.model_fields:
        return "a file" if isinstance(given[0], UploadFile) else given[0]
    several = name in list_fields(model)
    if several and len(given) == 1 and isinstance(given[0], str):
        given = _split_list(name, given[0])
    values = [await _read_value(name, value, latent=name in latent_fields(model)) for value in given]
    if several:
        return values
    if len(values) > 1:
        raise InvalidField(name, f"{len(values)} values", "send it once")
    return values[0]


def _split_list(name: str, text: str) -> list[Any]:
    """1,2,3 or [1, 2, 3]"""
    try:
        return list(json.loads(text)) if text.startswith("[") else list(text.split(","))
    except ValueError as error:
        raise InvalidField(name, plain(text), "send it several times, or as 1,2,3") from error


async def _read_value(name: str, value: Any, *, latent: bool) -> Any:
    if not isinstance(value, UploadFile):
        if not latent or not isinstance(value, str):
            return value
        if not value.strip().lstrip("-").isdecimal():
            raise InvalidField(name, plain(value), f"a number is a seed; send a file as -F {name}=@{plain(value)}")
        return {"seed": value}
    filename = value.filename or ""
    if any(mark in filename for mark in ("/", "\\", "\0")) or filename in (".", ".."):
        raise InvalidField(name, f"a file called {filename}", "a file's name has no path here; send a plain name")
    content = await value.read()
    if latent:
        return {"npy" if content.startswith(NPY_MAGIC) else "image": content}
    if name == "image":
        return content
    raise InvalidField(name, "a file", f"send it as text, as -F {name}=…")


def _refuse_query(request: Request) -> None:
    if request.query_params:
        raise InvalidField(
            "query", request.url.query[:200], "fields go into the body; only a bare image/* takes them in the query"
        )


def _validate(model: type[M], fields: dict[str, Any], strict: bool) -> M:
    try:
        return model.model_validate(fields, strict=strict)
    except ValidationError as error:
        raise InvalidField.many(_faults(error, model)) from error


def _faults(error: ValidationError, model: type[BaseModel]) -> Iterable[tuple[str, object, str]]:
    """One (field, value, remedy) for each field; a union reports a fault for each member, though one value was sent."""
    merged: dict[str, tuple[str, object, str]] = {}
    for fault in error.errors(include_url=False, include_context=False):
        # Of a nested field both names count; what follows are pydantic's names of a union's members.
        place = [part for part in fault["loc"] if not (isinstance(part, str) and part in ("int", "str"))]
        field = ".".join(map(str, place))[:200] or "body"
        remedy = str(fault["msg"]).removeprefix("Value error, ").removeprefix("Input ").partition(", unable")[0]
        if fault["type"] == "extra_forbidden":
            known = ", ".join(model.model_fields) if len(place) == 1 else "seed, npy, image"
            remedy = f"no such field; known are {known}"
        elif fault["type"] == "missing":
            remedy = "it is missing; send it"
        before = merged.get(field)
        value = None if fault["type"] == "missing" else plain(fault.get("input"))
        merged[field] = (field, value, f"{before[2]} or {remedy}" if before else remedy)
    return merged.values()


def plain(value: object) -> object:
    """What can be echoed as JSON without risk: scalars as they are, the rest by type and size."""
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, str):
        return encodable(value if len(value) <= 200 else f"{value[:40]}… ({len(value)} characters)")
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    return {"list": "an array", "dict": "an object"}.get(type(value).__name__, "something else")


def encodable(text: str) -> str:
    """JSON may spell lone surrogates, which no encoding can send back."""
    return text.encode("utf-8", "replace").decode()
