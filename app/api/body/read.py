"""From the body of a request to its model: JSON, a form, a query string, or a bare image with a query string.

JSON is read strictly. What comes as text anyway (forms, queries) is read as the text that it is: ``steps=20`` is a
number, and a file becomes the image or the .npy that its first bytes say that it is; its name is never used.

Whatever is sent, reading it costs time and memory in proportion to its bytes, and never much time on the event loop.
"""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel
from starlette.requests import ClientDisconnect

from app.api.body.faults import plain, validate
from app.api.body.form import Part, parse_multipart, parse_urlencoded
from app.api.body.json_text import parse_json
from app.errors import ClientGone, InvalidField, InvalidForm, SlowRequest, UnsupportedMedia
from app.errors.wording import Unquoted
from app.operations.files import NPY_MAGIC, is_file
from app.operations.requests import file_fields, latent_fields, list_fields
from app.operations.threads import run_limited
from app.settings import Settings

M = TypeVar("M", bound=BaseModel)
T = TypeVar("T")
IMAGE_TYPES = (  # images without a form
    *("image/png", "image/apng", "image/jpeg", "image/jpg", "image/webp", "image/gif"),
    *("image/heic", "image/heif", "image/avif"),
)
OFFLOAD_BYTES = 1 << 14  # what is larger is parsed off the event loop
MAX_ITEMS = 64  # of a list in a form
MAX_FILENAME = 80  # characters of one in a message


async def read_body(
    request: Request, model: type[M], settings: Settings, on_length: Callable[[int], None] = lambda _: None
) -> M:
    """The body as ``model``; an empty one asks for all defaults.

    Args:
        settings: for how long a body may take.
        on_length: called with the bytes of the body, once they are known.

    Raises:
        UnsupportedMedia: the body is of another type, or compressed.
        InvalidJSON, InvalidForm: it does not parse.
        InvalidField: it parses, and its fields cannot be.
        SlowRequest, ClientGone: it did not arrive.
    """
    content_type = request.headers.get("content-type", "")
    media = content_type.partition(";")[0].strip().lower()
    parse = _choose_parser(request, model, media, content_type, _highest(request))
    content = await _receive(request, settings)
    on_length(len(content))
    return await offload(request, parse, content)


def read_query(request: Request, model: type[M]) -> M:
    """The query string of a GET as ``model``.

    Raises:
        InvalidField: its fields cannot be.
    """
    return _read_parts(model, _query_parts(request), _highest(request))


def _highest(request: Request) -> dict[str, int]:
    """What fields can be at most, for this service and its network."""
    lifecycle = request.app.state.lifecycle
    images = lifecycle.settings.max_images
    steps = {"steps": lifecycle.model.schedule.T} if lifecycle.model is not None else {}
    return {"n": images, "frames": images, **steps}


async def offload(request: Request, function: Callable[..., T], *arguments: object) -> T:
    """Call a function of the body: here if it is small, else off the event loop."""
    length = request.headers.get("content-length", "" if "transfer-encoding" in request.headers else "0")
    if length.isdecimal() and int(length) < OFFLOAD_BYTES:
        return function(*arguments)
    return await run_limited(request.app.state.lifecycle.get_service().parsers, function, *arguments)


async def _receive(request: Request, settings: Settings) -> bytes:
    content, seconds = bytearray(), settings.body_seconds
    try:
        async with asyncio.timeout(seconds), asyncio.timeout(settings.header_seconds) as silence:
            async for chunk in request.stream():
                content += chunk
                silence.reschedule(asyncio.get_running_loop().time() + settings.header_seconds)
    except ClientDisconnect:
        raise ClientGone("the client disconnected before its body was complete") from None
    except TimeoutError:
        pause = f"and without a pause of {settings.header_seconds:g} s"
        raise SlowRequest(f"body = {len(content)} bytes so far: send all of it in {seconds:g} s, {pause}") from None
    return bytes(content)


def _choose_parser(
    request: Request, model: type[M], media: str, content_type: str, highest: Mapping[str, int]
) -> Callable[[bytes], M]:
    coding = request.headers.get("content-encoding", "identity").strip().lower()
    if coding not in ("identity", ""):
        error = UnsupportedMedia(f"content-encoding = {coding[:40]!r}: send the body as it is, without a coding")
        error.headers["Accept-Encoding"] = "identity"
        raise error
    if media in IMAGE_TYPES and "image" in model.model_fields:
        query = [part for part in _query_parts(request) if part.name != "image"]
        return lambda content: _read_parts(model, [*query, Part("image", content, "image")], highest)
    if media == "multipart/form-data":
        _refuse_query(request)
        return lambda content: _read_parts(model, parse_multipart(content, content_type), highest)
    if media == "application/x-www-form-urlencoded":
        _refuse_query(request)

        def parse_fields(content: bytes) -> M:
            if hint := _recognize(content, model):
                raise InvalidForm(f"content-type = {media!r}: {hint}")
            return _read_parts(model, parse_urlencoded(content), highest)

        return parse_fields
    if media == "application/json" or (media.startswith("application/") and media.endswith("+json")):
        _refuse_query(request)
        return lambda content: validate(model, parse_json(content), strict=True, highest=highest)

    def parse_nothing(content: bytes) -> M:
        if content:
            images = f", or one of {', '.join(IMAGE_TYPES)}" if "image" in model.model_fields else ""
            known = f"send application/json, multipart/form-data or application/x-www-form-urlencoded{images}"
            raise UnsupportedMedia(f"content-type = {media[:80]!r}: {_recognize(content, model) or known}")
        _refuse_query(request)
        return validate(model, {}, strict=True)

    return parse_nothing


def _query_parts(request: Request) -> list[Part]:
    return [Part(name, value.encode()) for name, value in request.query_params.multi_items()]


def _recognize(content: bytes, model: type[BaseModel]) -> str:
    """What is to be said of a body that is of another type than its header says; empty where it is not known."""
    if content[:256].lstrip(b"\xef\xbb\xbf \t\r\n").startswith((b"{", b"[")):
        return "this looks like JSON; send it with content-type: application/json"
    if is_file(content):
        field = next(iter(file_fields(model)))
        bare = f", or with its content-type, one of {', '.join(IMAGE_TYPES)}" if field == "image" else ""
        return f"this looks like a file; send it as multipart/form-data, as curl -F {field}=@file does{bare}"
    if content.startswith(b"--") and b"form-data" in content[:4096]:
        return "this looks like multipart/form-data; send its content-type, with the boundary"
    return ""


def _read_parts(model: type[M], parts: Sequence[Part], highest: Mapping[str, int]) -> M:
    """The model of a form's parts; a field that was left empty is absent, as browsers send untouched ones."""
    given: Mapping[str, list[Part]] = defaultdict(list)
    for part in parts:
        if part.content or part.filename or part.name not in model.model_fields:
            given[part.name].append(part)
    fields = {name: _read_field(name, values, model) for name, values in given.items()}
    return validate(model, fields, strict=False, highest=highest)


def _read_field(name: str, parts: Sequence[Part], model: type[BaseModel]) -> Any:
    if name not in model.model_fields:
        return Unquoted("a file") if parts[0].filename is not None else _text(name, parts[0])
    latent = name in latent_fields(model)
    if len(parts) > MAX_ITEMS:
        raise InvalidField(name, Unquoted(f"{len(parts)} values"), f"send at most {MAX_ITEMS}")
    if name in list_fields(model):
        if len(parts) == 1 and parts[0].filename is None and not is_file(parts[0].content):
            parts = [Part(name, item) for item in _split_list(name, _text(name, parts[0]))]
        return [_read_value(name, part, latent=latent) for part in parts]
    if len(parts) > 1:
        raise InvalidField(name, Unquoted(f"{len(parts)} values"), "send it once")
    return _read_value(name, parts[0], latent=latent)


def _split_list(name: str, text: str) -> list[bytes]:
    """1,2,3 or [1, 2, 3]"""
    remedy = "send it several times, or as 1,2,3"
    if text.count(",") >= MAX_ITEMS:
        raise InvalidField(name, Unquoted(f"more than {MAX_ITEMS} items"), "send fewer")
    if not text.startswith("["):
        return [item.encode() for item in text.split(",")]
    try:
        items = json.loads(text) if text.count("[") == 1 else None
    except ValueError:
        items = None
    if not isinstance(items, list) or not all(isinstance(item, str | int | float) for item in items):
        raise InvalidField(name, plain(text), remedy)
    return [str(item).encode() for item in items]


def _read_value(name: str, part: Part, *, latent: bool) -> Any:
    wanted = latent or name == "image"
    filename = part.filename or ""
    if any(mark in filename for mark in ("/", "\\", "\0")) or filename in (".", ".."):
        called = Unquoted(f"a file called {filename[:MAX_FILENAME]}")
        raise InvalidField(name, called, "a file's name has no path here; send a plain name")
    if part.filename is None and not (wanted and is_file(part.content)):
        text = _text(name, part)
        if not latent:
            return text
        if not text.strip().lstrip("-").isdecimal():
            raise InvalidField(name, plain(text), f"a number is a seed; send a file as -F {name}=@{plain(text)}")
        return {"seed": text}
    if latent:
        return {"npy" if part.content.startswith(NPY_MAGIC) else "image": part.content}
    if wanted:
        return part.content
    raise InvalidField(name, Unquoted("a file"), f"send it as text, as -F {name}=…")


def _text(name: str, part: Part) -> str:
    try:
        return part.content.decode()
    except UnicodeDecodeError as error:
        size = Unquoted(f"{len(part.content)} bytes")
        raise InvalidField(name, size, f"byte {error.start} is no UTF-8; send text") from None


def _refuse_query(request: Request) -> None:
    if request.query_params:
        raise InvalidField(
            "query", request.url.query[:200], "fields go into the body; only a bare image/* takes them in the query"
        )
