"""Data of any kind to one data set: images of one size, labels 0..K-1, a name for each."""

from __future__ import annotations

import zipfile
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from model.data.arrays import read_idx, read_npz, text_of
from model.data.dataset import BLACK, Colour, DataError, Dataset, NoTestImages, Source, Split, fit, listed
from model.data.folder import read_folder
from model.output import counted

# What numpy, gzip and zipfile raise for files that are damaged, encrypted, or claim to be larger than memory.
DAMAGED = (OSError, ValueError, EOFError, RuntimeError, MemoryError, OverflowError, zlib.error, zipfile.BadZipFile)
MOST_CLASSES = 1 << 20  # far more than a network could learn: a label beyond is damaged


def load(
    path: Path,
    size: int,
    channels: int | None = None,
    split: Split = "train",
    *,
    classes: Sequence[str] = (),
    background: Colour = BLACK,
) -> Dataset:
    """Read images and bring them to ``size`` x ``size``: smaller ones are padded, larger ones area-averaged.

    Args:
        path: a folder of images (its subfolders, if any, are the classes), a folder with idx ``.gz`` files or one
            such file, or an ``.npz`` with ``images`` [N, H, W(, C)] and optionally ``labels`` [N], which are numbers
            or names, and ``names``. Hidden files and folders are skipped.
        size: side of the square result.
        channels: 1 for grey, 3 for colour; a folder of images is read as either (default 3), other files must match.
        split: ``test`` reads images that are not used in training: ``test_images`` and ``test_labels`` of an ``.npz``,
            the ``t10k`` files of an idx folder.
        classes: all classes in the order of their labels. They name labels that have only numbers; where the data has
            names, they must be the same, and only their order counts.
        background: RGB of the padding, and behind transparent images of a folder.

    Raises:
        DataError: nothing readable, arrays of inconsistent shapes, labels that are no classes, or classes of which
            there is no image.
        NoTestImages: no such split.
    """
    try:
        source = _read(path, size, channels or 3, split, background)
    except DataError:
        raise
    except DAMAGED as error:
        raise DataError(f"{path}: {_describe(error)}") from error
    images = source.images
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3) or not images.size:
        raise DataError(f"{path}: expected uint8 [N, H, W, 1 or 3], found {images.dtype} {list(images.shape)}")
    if channels not in (None, images.shape[-1]):
        raise DataError(f"{path}: has {counted(images.shape[-1], 'channel')}, not {channels}")
    labels, names, named = _classify(path, source, split)
    _check_names(path, names)
    if classes:
        _check_names(path, classes)
        labels, names = _arrange(path, labels, names, named, tuple(classes))
        named = True
    return Dataset(fit(images, size, background), labels, names, named, source.notices)


def _describe(error: BaseException) -> str:
    """What is wrong with a file, and the remedy."""
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read: {error.strerror}"
    if isinstance(error, MemoryError):
        return f"needs more memory than there is{f' ({error})' if str(error) else ''}; give fewer or smaller images"
    return f"{str(error).rstrip('.')}; is it damaged? put a good copy in its place"


def _read(path: Path, size: int, channels: int, split: Split, background: Colour) -> Source:
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    if path.suffix == ".npz" and path.is_file():
        return read_npz(path, split)
    if path.name.endswith(".gz") or (path.is_dir() and any(path.glob("*images-idx3-ubyte.gz"))):
        return read_idx(path, split)
    if path.is_dir():
        if split == "test":
            raise NoTestImages(f"{path} has no test images of its own")
        return read_folder(path, size, channels, background)
    raise DataError(f"{path} is neither a folder of images, an .npz nor an idx .gz file")


def _classify(path: Path, source: Source, split: Split) -> tuple[np.ndarray | None, tuple[str, ...], bool]:
    """Labels as int64 [N], the names of their classes, and whether the data has these names."""
    labels, names, count = source.labels, source.names, len(source.images)
    if labels is None:
        if names and split == "train":
            raise DataError(f"{path}: names {counted(len(names), 'class', 'classes')}, but has no labels")
        return None, (), False
    if labels.shape != (count,):
        raise DataError(
            f"{path}: expected one label of 0 or more for each of {count} images, found {list(labels.shape)}"
        )
    if labels.dtype.kind in "SU":
        text = text_of(labels)
        names = names or tuple(np.unique(text).tolist())
        if unknown := sorted(set(text.tolist()) - set(names)):
            raise DataError(f"{path}: labels {listed(map(repr, unknown))} are not among its names: {listed(names)}")
        index = {name: k for k, name in enumerate(names)}
        numbers = np.array([index[label] for label in text.tolist()], np.int64)
    else:
        numbers = _integral(path, labels)
    most = int(numbers.max())
    if names and most >= len(names):
        raise DataError(f"{path}: label {most} has no name among {len(names)}")
    if split == "train":
        present = np.unique(numbers)
        total = len(names) or most + 1
        if len(present) < total:
            gaps = np.setdiff1d(np.arange(min(total, count + len(present) + 10)), present).tolist()
            missing = listed((f"{k} ({names[k]})" if names else k for k in gaps[:10]), 10)
            rest = total - len(present) - len(gaps[:10])
            more = f" and {rest} more" if rest else ""
            raise DataError(
                f"{path}: classes without images: {missing}{more}; number labels from 0 without gaps, "
                "and name only classes that have images"
            )
    return numbers, names or tuple(str(k) for k in range(most + 1)), bool(names)


def _integral(path: Path, labels: np.ndarray) -> np.ndarray:
    """Numbers as int64, if they are whole and not negative."""
    if labels.dtype.kind not in "biuf":
        raise DataError(f"{path}: labels are {labels.dtype}, not whole numbers or text")
    if labels.dtype.kind in "bf":
        labels = labels.astype(np.float64)
    wrong = ~((labels >= 0) & (labels < MOST_CLASSES) & (labels == np.floor(labels)))  # nan is none of it
    if wrong.any():
        k = int(wrong.argmax())
        raise DataError(f"{path}: expected one label of 0 or more, a whole number; that of image {k} is {labels[k]}")
    return labels.astype(np.int64)


def _arrange(
    path: Path, labels: np.ndarray | None, names: tuple[str, ...], named: bool, wanted: tuple[str, ...]
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Name the labels, or bring them into this order where they have names."""
    if labels is None:
        raise DataError(f"{path}: has no labels, so classes cannot be named: {listed(wanted)}")
    if not named:
        if len(names) != len(wanted):
            have = f"labels 0 to {len(names) - 1}" if len(names) > 1 else "label 0 only"
            given = f"{counted(len(wanted), 'class was', 'classes were')} given"
            raise DataError(f"{path}: has {have}, but {given}; name them all")
        return labels, wanted
    if Counter(names) != Counter(wanted):
        raise DataError(f"{path}: has the classes {listed(names)}; those given are {listed(wanted)}")
    return np.array([wanted.index(name) for name in names], np.int64)[labels], wanted


def _check_names(path: Path, names: Sequence[str]) -> None:
    """Requests name classes in any case."""
    seen: dict[str, str] = {}
    for name in names:
        if not name.strip() or not name.isprintable():
            raise DataError(f"{path}: {name!r} is no name for a class; give it printable characters")
        if (key := name.casefold()) in seen:
            raise DataError(f"{path}: classes {seen[key]!r} and {name!r} have one name, but for case; rename one")
        seen[key] = name
