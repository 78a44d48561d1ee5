"""Pixels to files: images and animations. Equal input gives equal bytes."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from PIL import Image, PngImagePlugin

from model.images.container import PNG_SIGNATURE, chunks, read_png

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
    one before it is merged with that one, which is shown longer. An APNG of equal frames is an animation of one.

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
            content = _save(first, "PNG", pnginfo=_chunks(text), **options)
            return content if read_png(content).animated else _animate(content, first.size, sum(times))


def _animate(content: bytes, size: tuple[int, int], milliseconds: int) -> bytes:
    """An APNG of the one frame that this PNG is; Pillow makes no animation of equal frames.

    acTL: one frame, without end. fcTL: number 0, all of the image, its time, neither disposed of nor blended.
    """
    control = struct.pack(">IIIIIHHBB", 0, *size, 0, 0, min(milliseconds, 65535), 1000, 0, 0)
    made = [(name, bytes(data)) for name, data in chunks(content)]
    first = [name for name, _ in made].index(b"IDAT")
    made[first:first] = [(b"acTL", struct.pack(">II", 1, 0)), (b"fcTL", control)]
    return PNG_SIGNATURE + b"".join(_chunk(name, data) for name, data in [*made, (b"IEND", b"")])


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


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
