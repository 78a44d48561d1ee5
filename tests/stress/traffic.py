"""Random requests for the stress tests, and clients that misbehave."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import random
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
from PIL import Image

from model.diffusion.samplers import SAMPLERS

Request = tuple[str, dict[str, Any]]  # path and body


def draw_request(source: random.Random, image: str, steps: tuple[int, int]) -> Request:
    """A request to any endpoint: every sampler, one or several images, with and without guidance.

    Args:
        image: in base64, for /invert.
        steps: the fewest and the most.
    """
    body: dict[str, Any] = {"steps": source.randint(*steps)}
    seed = source.randrange(2**32)
    match source.randrange(6):
        case 0:
            return "/invert", {**body, "image": image, "refinements": source.randint(1, 2)}
        case 1:
            labels = [source.randrange(5), source.randrange(5)]
            return "/interpolate", {**body, "a": seed, "b": seed // 2, "frames": source.randint(2, 4), "labels": labels}
        case _:
            body |= {"sampler": source.choice(list(SAMPLERS)), "seed": seed, "n": source.choice([1, 1, 1, 2, 3])}
            body |= {"label": source.randrange(5), "guidance": source.choice([1, 1, 1, 1, 2])}
            return "/sample", body


def random_image(base: str, seed: int) -> str:
    """A PNG of noise in base64, of the size that the server's network has."""
    channels, height, width = httpx.get(f"{base}/model", trust_env=False).json()["shape"]
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels.squeeze()).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def connect(base: str) -> httpx.AsyncClient:
    """A client without limits on time or connections."""
    limits = httpx.Limits(max_connections=None)
    return httpx.AsyncClient(base_url=base, timeout=None, limits=limits, trust_env=False)


async def hang_up(base: str, body: dict[str, Any], after: float) -> None:
    """Send a request on a new connection, and close it ``after`` seconds without reading an answer."""
    address = urlsplit(base)
    content = json.dumps(body).encode()
    _, writer = await asyncio.open_connection(address.hostname, address.port)
    head = (
        f"POST /sample HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    writer.write(head.encode() + content)
    await writer.drain()
    await asyncio.sleep(after)
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()
