"""Images of one size with their classes, and what is wrong with those that cannot be had."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

Split = Literal["train", "test"]
Colour = tuple[int, int, int]
BLACK: Colour = (0, 0, 0)


class DataError(ValueError):
    """Training data that cannot be read; the message names the path and what was expected there."""


class NoTestImages(DataError):
    """Data without images that are kept apart from training."""


@dataclass(frozen=True)
class Dataset:
    """Images of one size, and their classes if they have any.

    Attributes:
        images: uint8 [N, size, size, C].
        labels: int64 [N], or None when the images have no classes.
        classes: one name per label value; empty without labels.
        named: whether the names come with the data; if not, they are the numbers of the labels.
        notices: what was left out, in sentences.
    """

    images: np.ndarray
    labels: np.ndarray | None
    classes: tuple[str, ...]
    named: bool = True
    notices: tuple[str, ...] = ()


class Source(NamedTuple):
    """What a reader found.

    Attributes:
        images: [N, H, W, C], of any shape and type until it is checked.
        labels: numbers, or names of classes; None without.
        names: by label; empty where the data has none.
        notices: what was left out, in sentences.
    """

    images: np.ndarray
    labels: np.ndarray | None
    names: tuple[str, ...]
    notices: tuple[str, ...] = ()


def fit(images: np.ndarray, size: int, background: Colour = BLACK) -> np.ndarray:
    """uint8 [N, H, W, C] to [N, size, size, C], each image whole and centred on the background."""
    _, h, w, c = images.shape
    if (h, w) == (size, size):
        return images
    if max(h, w) > size:
        shape = (max(1, round(h * size / max(h, w))), max(1, round(w * size / max(h, w))))
        shrunk = [
            F.interpolate(torch.from_numpy(part.copy()).movedim(-1, 1).float(), shape, mode="area")
            .round()
            .byte()
            .movedim(1, -1)
            for part in np.array_split(images, max(1, len(images) // 4096))
        ]
        images = torch.cat(shrunk).numpy()
        h, w = shape
    top, left = (size - h) // 2, (size - w) // 2
    page = np.empty((len(images), size, size, c), np.uint8)
    page[:] = background if c == 3 else _luma(background)
    page[:, top : top + h, left : left + w] = images
    return page


def _luma(colour: Colour) -> int:
    """Grey of a colour by ITU-R 601, rounded as Pillow does, so that a page is of the grey that images become."""
    red, green, blue = colour
    return (19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16


def listed(items: Iterable[object], shown: int = 10) -> str:
    """``a, b, c and 7 more``; what cannot be printed is escaped."""
    every = [text if (text := str(item)).isprintable() else ascii(text) for item in items]
    more = f" and {len(every) - shown} more" if len(every) > shown else ""
    return ", ".join(every[:shown]) + more
