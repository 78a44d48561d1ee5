"""Arrays in files: an ``.npz``, or idx files as MNIST's."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np

from model.data.dataset import DataError, NoTestImages, Source, Split


def read_npz(path: Path, split: Split) -> Source:
    """``images`` [N, H, W(, C)] and optionally ``labels`` [N] and ``names``; ``test_images`` and ``test_labels``.

    Raises:
        DataError: no such arrays.
        NoTestImages: of the test split.
    """
    prefix = "" if split == "train" else "test_"
    file = np.load(path, allow_pickle=False)
    if not isinstance(file, np.lib.npyio.NpzFile):
        raise DataError(f"{path}: is a single array; save it with np.savez(path, images=...)")
    with file:
        if f"{prefix}images" not in file:
            kind = DataError if split == "train" else NoTestImages
            raise kind(f"{path}: has {', '.join(file) or 'nothing'}, but no '{prefix}images'")
        images = _array(path, file, f"{prefix}images")
        labels = _array(path, file, f"{prefix}labels") if f"{prefix}labels" in file else None
        names = _names(path, _array(path, file, "names")) if "names" in file else ()
        if not names and split == "test" and "labels" in file:
            # Text labels get their numbers from those of training, also where the test half has not all of them.
            known = _array(path, file, "labels")
            names = tuple(np.unique(text_of(known)).tolist()) if known.dtype.kind in "SU" else ()
    return Source(images if images.ndim == 4 else images[..., None], labels, names)


def _array(path: Path, file: np.lib.npyio.NpzFile, key: str) -> np.ndarray:
    try:
        array = file[key]
    except ValueError as error:
        if "pickle" not in str(error):
            raise
        remedy = "numbers, or text as np.array(names, dtype=str)"
        raise DataError(f"{path}: '{key}' is an array of Python objects; save {remedy}") from error
    if not isinstance(array, np.ndarray):
        raise DataError(f"{path}: '{key}' is no array")
    return array


def _names(path: Path, names: np.ndarray) -> tuple[str, ...]:
    if names.ndim != 1 or names.dtype.kind not in "SUiu":
        raise DataError(f"{path}: expected 'names' as text [K], found {names.dtype} {list(names.shape)}")
    return tuple(str(name) for name in text_of(names))


def text_of(array: np.ndarray) -> np.ndarray:
    """Bytes as the text that they are in UTF-8; other arrays as they are."""
    return np.char.decode(array, "utf-8") if array.dtype.kind == "S" else array


def read_idx(path: Path, split: Split) -> Source:
    """MNIST's files: those of a folder, or one of images with its labels beside it.

    Raises:
        DataError: not of this format.
        NoTestImages: of the test split.
    """
    if path.is_dir():
        wanted = "train" if split == "train" else "t10k"
        found = sorted(path.glob("*images-idx3-ubyte.gz"), key=lambda p: (wanted not in p.name, p.name))
        path = found[0]
    if split == "test" and "t10k" not in path.name:
        raise NoTestImages(f"{path} has no test images (t10k-images-idx3-ubyte.gz) beside it")
    images = _read_idx(path, 3)[..., None]
    labels_path = path.with_name(path.name.replace("images-idx3", "labels-idx1"))
    labels = _read_idx(labels_path, 1) if labels_path != path and labels_path.exists() else None
    return Source(images, labels, ())


def _read_idx(path: Path, ndim: int) -> np.ndarray:
    """The idx format: magic 0 0 8 ndim, the shape as big-endian int32, then bytes."""
    with gzip.open(path, "rb") as file:
        raw = file.read()
    if raw[:4] != bytes([0, 0, 8, ndim]):
        raise DataError(f"{path}: is no idx file of {ndim}-dimensional bytes")
    shape = np.frombuffer(raw, ">i4", ndim, 4)
    return np.frombuffer(raw, np.uint8, int(shape.prod(dtype=np.int64)), 4 + 4 * ndim).reshape(shape)
