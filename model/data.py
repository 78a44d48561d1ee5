"""Training images, read into memory from a folder, an ``.npz``, or idx files as MNIST's."""

from __future__ import annotations

import gzip
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from model.images import read as read_image

_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif"}


class DataError(ValueError):
    """Training data that cannot be read; the message names the path and what was expected there."""


@dataclass(frozen=True)
class Dataset:
    """Images of one size, and their classes if they have any.

    Attributes:
        images: uint8 [N, size, size, C].
        labels: int64 [N], or None when the images have no classes.
        classes: one name per label value; empty without labels.
    """

    images: np.ndarray
    labels: np.ndarray | None
    classes: tuple[str, ...]


Split = Literal["train", "test"]


def load(path: Path, size: int, channels: int | None = None, split: Split = "train") -> Dataset:
    """Read images and bring them to ``size`` x ``size``: smaller ones are padded with black, larger ones area-averaged.

    Args:
        path: a folder of images (its subfolders, if any, are the classes), a folder with idx ``.gz`` files or one
            such file, or an ``.npz`` with ``images`` [N, H, W(, C)] and optionally ``labels`` [N] and ``names``.
        size: side of the square result.
        channels: 1 for grey, 3 for colour; a folder of images is read as either (default 3), other files must match.
        split: ``test`` reads images that are not used in training: ``test_images`` and ``test_labels`` of an ``.npz``,
            the ``t10k`` files of an idx folder.

    Raises:
        DataError: nothing readable, no such split, or arrays of inconsistent shapes.
    """
    try:
        images, labels, classes = _read(path, size, channels or 3, split)
    except DataError:
        raise
    except (OSError, ValueError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: {error}") from error
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3) or not len(images):
        raise DataError(f"{path}: expected uint8 [N, H, W, 1 or 3], found {images.dtype} {list(images.shape)}")
    if channels not in (None, images.shape[-1]):
        raise DataError(f"{path}: has {images.shape[-1]} channels, not {channels}")
    if labels is not None:
        labels = labels.astype(np.int64)
        if labels.shape != (len(images),) or labels.min() < 0:
            raise DataError(f"{path}: expected one label of 0 or more for each of {len(images)} images")
        classes = classes or tuple(str(k) for k in range(int(labels.max()) + 1))
        if labels.max() >= len(classes):
            raise DataError(f"{path}: label {labels.max()} has no name among {len(classes)}")
    return Dataset(fit(images, size), labels, classes)


def _read(path: Path, size: int, channels: int, split: Split) -> _Parts:
    if path.suffix == ".npz":
        return _npz(path, "" if split == "train" else "test_")
    if path.name.endswith(".gz") or (path.is_dir() and any(path.glob("*images-idx3-ubyte.gz"))):
        return _idx(path, split)
    if split == "test":
        raise DataError(f"{path} has no test images of its own")
    if path.is_dir():
        return _folder(path, size, channels)
    raise DataError(f"{path} is neither a folder of images, an .npz nor an idx .gz file")


def fit(images: np.ndarray, size: int) -> np.ndarray:
    """uint8 [N, H, W, C] to [N, size, size, C], each image whole and centred on black."""
    _, h, w, _ = images.shape
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
    return np.pad(images, ((0, 0), (top, size - h - top), (left, size - w - left), (0, 0)))


_Parts = tuple[np.ndarray, np.ndarray | None, tuple[str, ...]]


def _npz(path: Path, prefix: str) -> _Parts:
    with np.load(path, allow_pickle=False) as file:
        if f"{prefix}images" not in file:
            raise DataError(f"{path}: has {', '.join(file) or 'nothing'}, but no '{prefix}images'")
        images = file[f"{prefix}images"]
        labels = file.get(f"{prefix}labels")
        classes = tuple(str(name) for name in file["names"]) if "names" in file else ()
    return images if images.ndim == 4 else images[..., None], labels, classes


def _idx(path: Path, split: Split) -> _Parts:
    if path.is_dir():
        wanted = "train" if split == "train" else "t10k"
        found = sorted(path.glob("*images-idx3-ubyte.gz"), key=lambda p: (wanted not in p.name, p.name))
        path = found[0]
    if split == "test" and "t10k" not in path.name:
        raise DataError(f"{path} has no test images (t10k-images-idx3-ubyte.gz) beside it")
    images = _read_idx(path, 3)[..., None]
    labels_path = path.with_name(path.name.replace("images-idx3", "labels-idx1"))
    labels = _read_idx(labels_path, 1) if labels_path != path and labels_path.exists() else None
    return images, labels, ()


def _read_idx(path: Path, ndim: int) -> np.ndarray:
    """The idx format of MNIST: magic 0 0 8 ndim, the shape as big-endian int32, then bytes."""
    with gzip.open(path, "rb") as file:
        raw = file.read()
    if raw[:4] != bytes([0, 0, 8, ndim]):
        raise DataError(f"{path}: is no idx file of {ndim}-dimensional bytes")
    shape = np.frombuffer(raw, ">i4", ndim, 4)
    return np.frombuffer(raw, np.uint8, int(shape.prod()), 4 + 4 * ndim).reshape(shape)


def _folder(path: Path, size: int, channels: int) -> _Parts:
    folders = sorted(p for p in path.iterdir() if p.is_dir())
    images, labels = [], []
    for label, folder in enumerate(folders or [path]):
        files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in _SUFFIXES)
        for file in files:
            images.append(fit(read_image(file, channels)[None], size)[0])
            labels.append(label)
    if folders and any(p.suffix.lower() in _SUFFIXES for p in path.iterdir()):
        raise DataError(f"{path}: has images beside its class folders; move each into a class")
    if not images:
        raise DataError(f"{path}: holds no images ({', '.join(sorted(_SUFFIXES))})")
    return np.stack(images), np.array(labels) if folders else None, tuple(folder.name for folder in folders)
