"""One result in the form that the client asked for: PNG, contact sheet, JSON or npy."""

from __future__ import annotations

import base64
import io
import json
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from app import __version__
from app.errors import NotAcceptable
from app.operations import Sampled
from app.schemas import SampleReply, Timing
from app.service import Service
from model import latents, pictures

PNG, JSON, NPY = "image/png", "application/json", "application/x-npy"
FORMATS = (PNG, JSON, NPY)  # the first is what a client gets that does not care


@dataclass(frozen=True)
class Reply:
    """An answer ready to be sent."""

    content: bytes
    media_type: str
    headers: dict[str, str]


def negotiate(accept: str | None) -> str:
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

    best = max(FORMATS, key=weight)
    if weight(best) <= 0:
        raise NotAcceptable(f"Accept = {accept!r}: choose one of {', '.join(FORMATS)}")
    return best


def render(service: Service, sampled: Sampled, media_type: str) -> Reply:
    """Encode; takes milliseconds of processor time, so call it off the event loop."""
    began = time.perf_counter()
    walk, result = sampled.walk, sampled.result
    if media_type == NPY:
        content = _npy(sampled.pictures)
    elif media_type == PNG:
        sheet = pictures.sheet(pictures.to_uint8(sampled.pictures))
        content = pictures.png(sheet, _provenance(service, sampled))
    else:
        content = b""
        images = [
            pictures.png(pixels, _provenance(service, sampled, i))
            for i, pixels in enumerate(pictures.to_uint8(sampled.pictures))
        ]
        noise = [_npy(latents.draw(latents.generator(seed), service.checkpoint.shape)) for seed in walk.seeds]
    timing = Timing(
        queue_ms=_ms(result.queue_seconds),
        device_ms=_ms(result.device_seconds),
        encode_ms=_ms(time.perf_counter() - began),
    )
    if media_type == JSON:
        request = walk.request.model_dump(exclude={"n", "seed"})
        content = (
            SampleReply(
                images=[_base64(image) for image in images],
                seeds=walk.seeds,
                latents=[_base64(npy) for npy in noise],
                nfe=walk.nfe,
                plan=walk.plan.digest,
                model=service.checkpoint.card.name,
                sha256=service.checkpoint.card.sha256,
                timing=timing,
                **request,
            )
            .model_dump_json(exclude_none=True)
            .encode()
        )
    headers = {
        "X-Seed": str(walk.seeds[0]),
        "X-NFE": str(walk.nfe),
        "Server-Timing": f"queue;dur={timing.queue_ms}, device;dur={timing.device_ms}, encode;dur={timing.encode_ms}",
        "Vary": "Accept",
    }
    return Reply(content, media_type, headers)


def _provenance(service: Service, sampled: Sampled, picture: int | None = None) -> dict[str, str]:
    """What a picture must carry so that it can be made again: the request, and the network that answered it."""
    request: dict[str, Any] = sampled.walk.request.model_dump(exclude_none=True)
    if picture is not None:
        request |= {"n": 1, "seed": sampled.walk.seeds[picture]}
    facts = {
        "operation": "/sample",
        "request": request,
        "nfe": sampled.walk.nfe,
        "plan": sampled.walk.plan.digest,
        "model": service.checkpoint.card.name,
        "sha256": service.checkpoint.card.sha256,
        "version": __version__,
    }
    return {"unstir": json.dumps(facts, ensure_ascii=False)}


def _npy(x: Tensor) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, x.numpy())
    return buffer.getvalue()


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 3)
