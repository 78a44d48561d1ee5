"""Pictures and tensors: the one home of Pillow.

A picture inside is float32 [C, H, W] in [-1, 1]; outside it is 8 bits a channel, grey (C = 1) or RGB (C = 3).
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor


def to_uint8(x: Tensor) -> np.ndarray:
    """[..., C, H, W] in [-1, 1] to uint8 [..., H, W, C], rounded to nearest; what lies outside is clamped."""
    scaled = (x.float().clamp(-1, 1) + 1) * 127.5
    return scaled.round().to(torch.uint8).movedim(-3, -1).cpu().numpy()


def from_uint8(pixels: np.ndarray) -> Tensor:
    """uint8 [..., H, W, C] to float32 [..., C, H, W] in [-1, 1]; 0 becomes -1 and 255 becomes 1 exactly."""
    return torch.from_numpy(pixels).movedim(-1, -3).float() / 127.5 - 1


def sheet(pixels: np.ndarray, columns: int | None = None, gap: int = 2) -> np.ndarray:
    """Lay pictures out in rows: uint8 [n, H, W, C] to [H', W', C], near-square unless ``columns`` is given."""
    n, h, w, c = pixels.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    page = np.zeros((rows * (h + gap) - gap, columns * (w + gap) - gap, c), np.uint8)
    for i, picture in enumerate(pixels):
        top, left = i // columns * (h + gap), i % columns * (w + gap)
        page[top : top + h, left : left + w] = picture
    return page


def png(pixels: np.ndarray, text: Mapping[str, str] | None = None, scale: int = 1) -> bytes:
    """Encode uint8 [H, W, C] as PNG, with ``text`` in its text chunks; the same input always gives the same bytes."""
    info = PngImagePlugin.PngInfo()
    for key, value in (text or {}).items():
        info.add_itxt(key, value)
    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    if scale != 1:
        image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def read(path: Path, channels: int) -> np.ndarray:
    """Decode a picture file to uint8 [H, W, C], grey or RGB."""
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    return pixels[..., None] if pixels.ndim == 2 else pixels
