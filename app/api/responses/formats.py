"""The formats of a response, whatever the operation was."""

from __future__ import annotations

import io
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from app.api.responses.results import OperationResult
from app.api.responses.schemas import Timing
from app.errors import NotAcceptable
from app.operations import files
from model import images

PNG, WEBP, JPEG = "image/png", "image/webp", "image/jpeg"
GIF, APNG = "image/gif", "image/apng"
JSON, NPY, ZIP = "application/json", "application/x-npy", "application/zip"
EVENTS = "text/event-stream"
STILLS, ANIMATIONS = (PNG, WEBP, JPEG), (GIF, APNG)
SUFFIXES = {PNG: "png", WEBP: "webp", JPEG: "jpg", GIF: "gif", APNG: "apng", JSON: "json", NPY: "npy", ZIP: "zip"}


@dataclass(frozen=True)
class Rendered:
    """A result in its format, ready to be sent."""

    content: bytes
    media_type: str
    headers: dict[str, str]


def render(result: OperationResult, media_type: str) -> Rendered:
    """Encode the result; takes milliseconds of processor time, so call it off the event loop.

    Raises:
        NotAcceptable: this result has no such format.
    """
    began = time.perf_counter()
    try:
        content = b"" if media_type == JSON else ENCODERS[media_type](result)
        body = result.body(Timing(queue_ms=0, device_ms=0, encode_ms=0)) if media_type == JSON else None
    except NotAcceptable as error:
        raise NotAcceptable(f"Accept = {media_type}: {error.detail}") from None
    timing = Timing(
        queue_ms=_milliseconds(result.usage.queue_seconds),
        device_ms=_milliseconds(result.usage.device_seconds),
        encode_ms=_milliseconds(time.perf_counter() - began),
    )
    if body is not None:
        content = body.model_copy(update={"timing": timing}).model_dump_json(exclude_none=True).encode()
    durations = f"queue;dur={timing.queue_ms}, device;dur={timing.device_ms}, encode;dur={timing.encode_ms}"
    headers = {
        "Server-Timing": durations,
        "Vary": "Accept",
        "Content-Disposition": f"{'attachment' if media_type in (NPY, ZIP) else 'inline'}; "
        f'filename="{result.name}.{SUFFIXES[media_type]}"',
    }
    return Rendered(content, media_type, result.headers | headers)


def _sheet(result: OperationResult) -> np.ndarray:
    still, columns = result.still()
    return images.sheet(still, columns)


def _webp(result: OperationResult) -> bytes:
    """The animation where there is one, else the still image."""
    try:
        frames = result.animation()
    except NotAcceptable:
        return images.webp(_sheet(result))
    return images.animation(frames, "webp")


def _archive(result: OperationResult) -> bytes:
    """A zip without times, so that the same files give the same bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, content in result.files().items():
            archive.writestr(zipfile.ZipInfo(name), content)
    return buffer.getvalue()


ENCODERS: dict[str, Callable[[OperationResult], bytes]] = {
    PNG: lambda result: images.png(_sheet(result), result.metadata()),
    WEBP: _webp,
    JPEG: lambda result: images.jpeg(_sheet(result)),
    GIF: lambda result: images.animation(result.animation(), "gif"),
    APNG: lambda result: images.animation(result.animation(), "apng", result.metadata()),
    NPY: lambda result: files.to_npy(result.array),
    ZIP: _archive,
}


def _milliseconds(seconds: float) -> float:
    return round(seconds * 1e3, 3)
