"""The real images that a checkpoint is compared with: whether they are its own, and enough."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from model import data
from model.checkpoint import Checkpoint
from model.data import DataError, Dataset, NoTestImages, listed
from model.output import counted, say


class Reference(NamedTuple):
    """Real images.

    Attributes:
        training: those for the classifier and the floor.
        held_out: those to compare with.
        unseen: whether training saw none of the latter.
        digest: of both, to name what was computed from them.
    """

    training: Dataset
    held_out: Dataset
    unseen: bool
    digest: str


def read_reference(source: Path, loaded: Checkpoint) -> Reference:
    """The data that the checkpoint was trained on; a fifth of it is held out, if it has no test images.

    Raises:
        DataError: unreadable, of other channels or classes than the network's, or fewer than five images.
    """
    channels, side, width = loaded.shape
    if side != width:
        raise DataError(f"{source}: is read as squares, and the network's images are {width}x{side}")
    training = _match_classes(source, data.load(source, side, channels, background=loaded.background), loaded)
    for notice in training.notices:
        say(notice)
    try:
        held_out = data.load(source, side, channels, "test", background=loaded.background)
        held_out, unseen = _match_classes(source, held_out, loaded), True
    except NoTestImages as error:
        if len(training.images) < 5:
            raise DataError(
                f"{source}: has {_count(training)}; give at least 5, of which a fifth is held out"
            ) from error
        say(f"{error}; comparing with a fifth of the training images instead")
        order = np.random.default_rng(0).permutation(len(training.images))
        kept, apart = np.sort(order[len(order) // 5 :]), np.sort(order[: len(order) // 5])
        training, held_out, unseen = _part(training, kept), _part(training, apart), False
    return Reference(training, held_out, unseen, _digest(training, held_out))


def check_enough(source: Path, reference: Reference, labels: np.ndarray) -> None:
    """Before hours of sampling: are there real images to compare with?

    Args:
        labels: classes of the samples of each sampler, int64 [n]; all alike for a network without classes.

    Raises:
        DataError: too few for a distance, or too few of a class for the floor.
    """
    training, held_out = reference.training, reference.held_out
    if min(len(held_out.images), len(training.images)) < 2:
        raise DataError(
            f"{source}: has {_count(training)} of training and {_count(held_out)} held out; samplers need at least 2 "
            "of each, and hundreds for figures that mean something"
        )
    classes = int(labels.max()) + 1
    if training.labels is None or classes == 1:
        most = len(training.images)
    else:  # the samples take the classes in turn
        have = np.bincount(training.labels, minlength=classes)[:classes]
        most = int((have * classes + np.arange(classes)).min())
    if most < len(labels):
        remedy = f"give --images {most}, or more data" if most >= 2 else "give more data"
        raise DataError(
            f"{source}: {len(labels)} images of each sampler are compared with as many real ones of the same classes, "
            f"and the training images are enough for {most}; {remedy}"
        )


def _match_classes(source: Path, dataset: Dataset, loaded: Checkpoint) -> Dataset:
    """The data with the labels that its classes have in the network, whatever their order in the data.

    Raises:
        DataError: it has other classes.
    """
    embeddings, named = loaded.net.config.num_class_embeds, loaded.card.classes
    if dataset.labels is None or embeddings is None:
        return dataset
    remedy = "evaluate with the data that it was trained on"
    trained = len(named) or embeddings
    by_name = bool(named) and dataset.named
    if int(dataset.labels.max()) >= trained or (by_name and len(dataset.classes) != trained):
        have = counted(len(dataset.classes), "class", "classes")
        raise DataError(f"{source}: has {have}, the checkpoint {trained}; {remedy}")
    if not by_name or dataset.classes == named:
        return dataset
    others = [name for name in dataset.classes if name not in named]
    if others:
        lacking = listed(repr(name) for name in named if name not in dataset.classes)
        words = f"{listed(map(repr, others))} instead of {lacking}"
        raise DataError(f"{source}: has other classes than the checkpoint: {words}; {remedy}")
    label = np.array([named.index(name) for name in dataset.classes], np.int64)
    return replace(dataset, labels=label[dataset.labels], classes=named)


def _part(dataset: Dataset, index: np.ndarray) -> Dataset:
    labels = None if dataset.labels is None else dataset.labels[index]
    return Dataset(dataset.images[index], labels, dataset.classes, dataset.named)


def _digest(*parts: Dataset) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(repr((part.images.shape, part.labels is None)).encode())
        found.update(np.ascontiguousarray(part.images).data)
        if part.labels is not None:
            found.update(np.ascontiguousarray(part.labels).data)
    return found.hexdigest()[:8]


def _count(dataset: Dataset) -> str:
    return counted(len(dataset.images), "image")
