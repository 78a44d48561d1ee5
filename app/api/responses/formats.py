"""The forms that an answer comes in, whatever the operation was."""

from __future__ import annotations

import base64
import io
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from pydantic import BaseModel
from torch import Tensor

from app.api.responses.schemas import Timing
from app.errors import NotAcceptable
from app.operations import files as uploads
from app.operations.resolve import Usage
from model import images
from model.images import ANIMATIONS

PNG, WEBP, JPEG = "image/png", "image/webp", "image/jpeg"
GIF, APNG = "image/gif", "image/apng"
JSON, NPY, ZIP = "application/json", "application/x-npy", "application/zip"
EVENTS = "text/event-stream"
FORMATS = {  # the first is what a client gets that does not care
    "/sample": (PNG, WEBP, JPEG, GIF, APNG, JSON, NPY, ZIP, EVENTS),
    "/invert": (JSON, NPY, PNG, WEBP, GIF, APNG, EVENTS),
    "/interpolate": (PNG, GIF, WEBP, APNG, JPEG, JSON, NPY, ZIP, EVENTS),
}


@dataclass(frozen=True)
class Reply:
    """An answer ready to be sent."""

    content: bytes
    media_type: str
    headers: dict[str, str]


@dataclass(frozen=True)
class Outcome:
    """An answer that has not yet taken form.

    Attributes:
        still: uint8 [n, H, W, C], to be laid out in ``columns``.
        moving: uint8 [k, H, W, C], the frames of the animation; or why there is none.
        array: float32, unrounded.
        body: makes the JSON form, given the timing.
        provenance: text chunks of the still image and the APNG: what makes it again.
        files: names and contents of the archive.
        images: how many were asked for.
    """

    still: np.ndarray | str
    columns: int | None
    moving: np.ndarray | str
    array: Tensor
    body: Callable[[Timing], BaseModel]
    provenance: dict[str, str]
    spent: Usage
    headers: dict[str, str]
    files: Callable[[], dict[str, bytes]] = field(default=dict)
    images: int = 1

    @property
    def size(self) -> int:
        """About how many bytes it takes to keep: its arrays, and as much again for what its forms are made of."""
        arrays = [part for part in (self.still, self.moving) if not isinstance(part, str)]
        return 2 * (self.array.nbytes + sum(part.nbytes for part in arrays)) + sum(map(len, self.provenance.values()))


def negotiate(accept: str | None, formats: Sequence[str]) -> str:
    """The format that the Accept header likes best (RFC 9110, section 12.5.1), preferring our order where it is equal.

    Raises:
        NotAcceptable: none of ours is accepted.
    """
    weights: dict[str, float] = {}
    for part in (accept or "*/*").split(","):
        media, *parameters = (piece.strip().lower() for piece in part.split(";"))
        quality = next((p[2:] for p in parameters if p.startswith("q=")), "1")
        try:
            weights[media] = float(quality)
        except ValueError:
            weights[media] = 0.0

    def weight(media: str) -> float:
        family = f"{media.partition('/')[0]}/*"
        return next((weights[name] for name in (media, family, "*/*") if name in weights), 0.0)

    best = max(formats, key=weight)
    if weight(best) <= 0:
        raise NotAcceptable(f"Accept = {accept!r}: choose one of {', '.join(formats)}")
    return best


def render(outcome: Outcome, media_type: str) -> Reply:
    """Encode; takes milliseconds of processor time, so call it off the event loop.

    Raises:
        NotAcceptable: this outcome has no such form.
    """
    began = time.perf_counter()
    content = b""
    body = None
    kind = media_type.partition("/")[2]
    if media_type == NPY:
        content = uploads.npy(outcome.array)
    elif media_type == ZIP:
        content = _archive(outcome.files())
    elif media_type == JSON:
        body = outcome.body(Timing(queue_ms=0, device_ms=0, encode_ms=0))
    elif kind in ANIMATIONS and not (media_type == WEBP and isinstance(outcome.moving, str)):
        if isinstance(outcome.moving, str):
            raise NotAcceptable(f"Accept = {media_type}: {outcome.moving}")
        text = outcome.provenance if media_type == APNG else None
        content = images.animation(outcome.moving, kind, text)
    else:
        if isinstance(outcome.still, str):
            raise NotAcceptable(f"Accept = {media_type}: {outcome.still}")
        page = images.sheet(outcome.still, outcome.columns)
        match media_type:
            case "image/webp":
                content = images.webp(page)
            case "image/jpeg":
                content = images.jpeg(page)
            case _:
                content = images.png(page, outcome.provenance)
    timing = Timing(
        queue_ms=_ms(outcome.spent.queue_seconds),
        device_ms=_ms(outcome.spent.device_seconds),
        encode_ms=_ms(time.perf_counter() - began),
    )
    if body is not None:
        content = body.model_copy(update={"timing": timing}).model_dump_json(exclude_none=True).encode()
    told = f"queue;dur={timing.queue_ms}, device;dur={timing.device_ms}, encode;dur={timing.encode_ms}"
    return Reply(content, media_type, {**outcome.headers, "Server-Timing": told, "Vary": "Accept"})


def base64_of(content: bytes) -> str:
    """As JSON carries it."""
    return base64.b64encode(content).decode()


def _archive(files: dict[str, bytes]) -> bytes:
    """A zip without times, so that the same files give the same bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    return buffer.getvalue()


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 3)
