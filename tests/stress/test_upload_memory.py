"""Uploads of the largest allowed size, one after another: the server's memory does not grow."""

from __future__ import annotations

import io
import math

import httpx
import numpy as np
import pytest
from PIL import Image

from app.settings import Settings
from bench.server import server
from tests.stress import SERVE, resident_mib, size

pytestmark = pytest.mark.stress
SETTLED = 20  # uploads until memory has its working size


def largest_images(pixels: int, most_bytes: int) -> dict[str, bytes]:
    """A square image in each format, with all pixels allowed, in at most ``most_bytes``."""
    side = math.isqrt(pixels)
    noise = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    opaque = Image.fromarray(noise // 64 * 64)
    clear = Image.fromarray(np.where(np.arange(side)[:, None, None] % 8, np.uint8(200), noise))
    clear.putalpha(Image.fromarray(noise[..., 0] // 128 * 128).resize((side, side)))
    smooth = opaque.resize((side // 8, side // 8)).resize((side, side))
    options = {
        "image/jpeg": (opaque, [{"quality": quality} for quality in (60, 40, 20, 10, 5, 1)]),
        "image/png": (clear.quantize(16).convert("RGBA"), [{"compress_level": 6}]),
        "image/webp": (smooth, [{"quality": quality} for quality in (80, 20)]),
    }
    return {kind: save(image, kind, tries, most_bytes) for kind, (image, tries) in options.items()}


def save(image: Image.Image, kind: str, tries: list[dict], most_bytes: int) -> bytes:
    """The image with the first options that make it small enough."""
    for option in tries:
        buffer = io.BytesIO()
        image.save(buffer, kind.partition("/")[2].upper(), **option)
        if len(buffer.getvalue()) <= most_bytes:
            return buffer.getvalue()
    raise AssertionError(f"{kind} of {image.size} never fits into {most_bytes} bytes")


def test_memory_does_not_grow_with_uploads():
    settings = Settings()
    files = largest_images(settings.max_pixels, settings.max_body_bytes)
    query = {"fit": "resize", "method": "ddim", "steps": "2", "check": "false"}
    held = {}
    with server(*SERVE) as served, httpx.Client(base_url=served.base, timeout=600, trust_env=False) as client:
        for i in range(1, size("UPLOADS") + 1):
            kind = list(files)[i % len(files)]
            answer = client.post("/invert", params=query, content=files[kind], headers={"content-type": kind})
            answer.raise_for_status()
            held[i] = resident_mib(served)
    assert held[max(held)] <= 1.05 * held[SETTLED], held
