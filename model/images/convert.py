"""Between tensors, float32 [C, H, W] in [-1, 1], and pixels of 8 bits, grey (C = 1) or RGB (C = 3)."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


def to_uint8(x: Tensor) -> np.ndarray:
    """[..., C, H, W] in [-1, 1] to uint8 [..., H, W, C], rounded to nearest and clamped."""
    scaled = (x.float().clamp(-1, 1) + 1) * 127.5
    return scaled.round().to(torch.uint8).movedim(-3, -1).cpu().numpy()


def from_uint8(pixels: np.ndarray | Tensor) -> Tensor:
    """uint8 [..., H, W, C] to float32 [..., C, H, W] in [-1, 1]; 0 becomes -1 and 255 becomes 1 exactly."""
    return torch.as_tensor(pixels).movedim(-1, -3).float() / 127.5 - 1


def sheet(pixels: np.ndarray, columns: int | None = None, gap: int = 2) -> np.ndarray:
    """Images in rows on one sheet: uint8 [n, H, W, C] to [H', W', C], near-square unless ``columns`` is given."""
    n, h, w, c = pixels.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    page = np.zeros((rows * (h + gap) - gap, columns * (w + gap) - gap, c), np.uint8)
    for i, image in enumerate(pixels):
        top, left = i // columns * (h + gap), i % columns * (w + gap)
        page[top : top + h, left : left + w] = image
    return page
