"""Pixels to files: images and animations. Equal input gives equal bytes."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from PIL import Image, PngImagePlugin

Animation = Literal["gif", "webp", "apng"]
ANIMATIONS: tuple[Animation, ...] = ("gif", "webp", "apng")
FRAME_MS, PAUSE_MS = 100, 900  # of each frame; of the first and the last


def png(pixels: np.ndarray, text: Mapping[str, str] | None = None, scale: int = 1) -> bytes:
    """Encode uint8 [H, W, C] as PNG, with ``text`` in its text chunks, each pixel as ``scale`` x ``scale``."""
    image = _image(pixels)
    if scale != 1:
        image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    return _save(image, "PNG", pnginfo=_chunks(text))


def webp(pixels: np.ndarray) -> bytes:
    """Encode uint8 [H, W, C] as lossless WebP."""
    return _save(_image(pixels), "WEBP", lossless=True)


def jpeg(pixels: np.ndarray) -> bytes:
    """Encode uint8 [H, W, C] as JPEG of quality 95, without chroma subsampling."""
    return _save(_image(pixels), "JPEG", quality=95, subsampling=0)


def animation(frames: np.ndarray, kind: Animation, text: Mapping[str, str] | None = None) -> bytes:
    """Encode uint8 [k, H, W, C] as an endless animation that pauses at its first and last frame.

    WebP and APNG are lossless, and a grey GIF; a GIF of colours has at most 256 of them a frame. A frame equal to the
    one before it is merged with that one, which is shown longer.

    Args:
        text: in the text chunks of an APNG; the others have none.
    """
    first, *rest = [_image(frame) for frame in frames]
    times = [FRAME_MS] * len(frames)
    times[0] = times[-1] = PAUSE_MS
    options: dict[str, Any] = {"save_all": True, "append_images": rest, "duration": times, "loop": 0}
    match kind:
        case "gif":
            return _save(first, "GIF", optimize=False, **options)
        case "webp":
            return _save(first, "WEBP", lossless=True, **options)
        case "apng":
            return _save(first, "PNG", pnginfo=_chunks(text), **options)


def _image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def _chunks(text: Mapping[str, str] | None) -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    for key, value in (text or {}).items():
        info.add_itxt(key, value)
    return info


def _save(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()
