"""A folder of images, whose subfolders are the classes."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from model.data.dataset import Colour, DataError, Source, fit, listed
from model.images import ImageError
from model.images import read as read_image
from model.output import counted

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif"}
# Folders that programs and systems leave behind; others have names that begin with a dot.
LEFTOVERS = {"__MACOSX", "__pycache__", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found"}


LINK, LINKS = "link to a folder", "links to folders"
HIDDEN = ("hidden file or folder", "hidden files and folders")


class _Files:
    """The images of a folder, and what is beside them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.folders: list[Path] = []
        self.images: dict[Path, list[Path]] = {path: []}  # by class folder, or by the folder itself
        self.others: dict[Path, Counter[str]] = {path: Counter()}  # files of other types, by suffix
        self.hidden: list[Path] = []
        for entry in sorted(path.iterdir(), key=_name):
            if not _is_hidden(entry) and entry.is_dir():
                self.folders.append(entry)
                self.images[entry], self.others[entry] = [], Counter()
                for file in self._below(entry):
                    self._sort(entry, file)
            elif _is_hidden(entry):
                self.hidden.append(entry)
            else:
                self._sort(path, entry)

    def _below(self, folder: Path) -> Iterator[Path]:
        """The files of a folder and its subfolders, without those that are hidden."""
        for entry in sorted(folder.iterdir()):
            if _is_hidden(entry):
                self.hidden.append(entry)
            elif entry.is_dir() and not entry.is_symlink():  # a link could lead around in a circle
                yield from self._below(entry)
            else:
                yield entry

    def _sort(self, group: Path, file: Path) -> None:
        if file.is_dir():
            self.others[group][LINK] += 1
        elif file.suffix.lower() in SUFFIXES:
            self.images[group].append(file)
        else:
            self.others[group][file.suffix.lower() or "no suffix"] += 1

    def notices(self) -> Iterator[str]:
        """What was left out."""
        if self.hidden:
            names = listed(sorted({entry.name for entry in self.hidden}), 5)
            yield f"{self.path}: skipped {counted(len(self.hidden), *HIDDEN)}: {names}"
        if others := _types(sum(self.others.values(), Counter())):
            yield f"{self.path}: skipped files that are not {listed(sorted(SUFFIXES))}: {others}"


def read_folder(path: Path, size: int, channels: int, background: Colour) -> Source:
    """Read every image, brought to ``size``.

    Raises:
        DataError: no images, a class without any, images that belong to no class, or files that cannot be read.
    """
    found = _Files(path)
    beside = found.images[path]
    if found.folders and beside:
        raise DataError(
            f"{path}: has images beside its class folders, such as {beside[0].name}; move each into a class"
        )
    groups = found.folders or [path]
    if not any(found.images[group] for group in groups):
        skipped = "; ".join(found.notices())
        raise DataError(f"{path}: holds no images ({', '.join(sorted(SUFFIXES))}){skipped and '; '}{skipped}")
    empty = [
        folder.name + (f" ({_types(found.others[folder])})" if found.others[folder] else "")
        for folder in found.folders
        if not found.images[folder]
    ]
    if empty:
        raise DataError(f"{path}: class folders without images: {listed(empty)}; fill or remove them")
    images, labels, broken = [], [], []
    for label, group in enumerate(groups):
        for file in found.images[group]:
            try:
                images.append(fit(read_image(file, channels, background)[None], size, background)[0])
                labels.append(label)
            except ImageError as error:
                reason = str(error).removeprefix(f"{file}: ").replace(str(file), file.name)
                broken.append(f"{file.relative_to(path)} ({reason})")
    if broken:
        total = len(images) + len(broken)
        which = f"{len(broken)} of {total} images" if total > 1 else "its only image"
        raise DataError(f"{path}: {which} cannot be read; mend or remove {listed(broken)}")
    names = tuple(_name(folder) for folder in found.folders)
    return Source(np.stack(images), np.array(labels) if names else None, names, tuple(found.notices()))


def _is_hidden(entry: Path) -> bool:
    return entry.name.startswith(".") or entry.name in LEFTOVERS


def _name(entry: Path) -> str:
    """Composed, as most systems type it: macOS may store ``é`` as two characters."""
    return unicodedata.normalize("NFC", entry.name)


def _types(counts: Counter[str]) -> str:
    found = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return listed(counted(count, LINK, LINKS) if kind == LINK else f"{count} {kind}" for kind, count in found)
