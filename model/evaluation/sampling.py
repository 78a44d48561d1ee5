"""Images of every cell, and their Fréchet distances. Images are stored, so that an evaluation can be resumed."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model import images
from model.checkpoint import Checkpoint
from model.data import Dataset
from model.diffusion import machine
from model.evaluation.classifier import Classifier, classify
from model.evaluation.frechet import frechet_distance
from model.evaluation.imagenet import FeatureExtractor
from model.evaluation.scope import Cell
from model.output import ProgressBar, write_atomically

CHUNK = 50


def labels_of(checkpoint: Checkpoint, first: int, count: int) -> np.ndarray:
    """The class of each image: all classes, one after another; the null class if there are no others."""
    index = np.arange(first, first + count)
    card = checkpoint.card
    return index % len(card.classes) if card.classes else np.full(count, card.null_class or 0)


@torch.inference_mode()
def draw(checkpoint: Checkpoint, todo: Sequence[Cell], count: int, folder: Path, device: torch.device) -> None:
    """Sample until ``folder`` has ``count`` images of each cell, uint8 [n, H, W, C]."""
    conditional = checkpoint.net.config.num_class_embeds is not None
    missing = {cell: range(len(_have(folder, cell)), count, CHUNK) for cell in todo}
    total = sum(cell.plan.nfe * (count - firsts.start) for cell, firsts in missing.items() if firsts)
    with ProgressBar(total, "images", "NFE") as bar:
        for cell, firsts in missing.items():
            for first in firsts:
                size = min(CHUNK, count - first)
                y = torch.from_numpy(labels_of(checkpoint, first, size)).to(device) if conditional else None
                x_0 = machine.sample(checkpoint.net, cell.plan, range(first, first + size), checkpoint.shape, y)
                new = images.to_uint8(x_0)
                np.save(buffer := io.BytesIO(), np.concatenate([_have(folder, cell), new]) if first else new)
                write_atomically(_path(folder, cell), buffer.getbuffer())
                bar.update(cell.plan.nfe * size, f"{cell.variant}, {cell.plan.nfe} evaluations")


@dataclass(frozen=True)
class Comparison:
    """Real images to compare with, and the networks whose features are compared.

    Attributes:
        reference: held-out images, uint8 [m, H, W, C].
        classifier: None without labels.
        efficientnet: None without its packages.
    """

    reference: np.ndarray
    classifier: Classifier | None
    efficientnet: FeatureExtractor | None
    device: torch.device

    def features(self, images: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
        """Features by network, and the classifier's decisions."""
        found: dict[str, np.ndarray] = {}
        decisions = None
        if self.classifier is not None:
            found["classifier"], decisions = classify(self.classifier, images, self.device)
        if self.efficientnet is not None:
            found["efficientnet"] = self.efficientnet(images)
        return found, decisions


def compare(
    checkpoint: Checkpoint, todo: Sequence[Cell], count: int, folder: Path, real: Dataset, comparison: Comparison
) -> dict[str, Any]:
    """Fréchet distances and class accuracy of every cell, and the floor: the distances of real images.

    Args:
        real: training images; disjoint draws of ``count`` of them, with as many of each class as in the cells, give
            the floor.
    """
    reference, _ = comparison.features(comparison.reference)

    def distances(features: dict[str, np.ndarray]) -> dict[str, float]:
        return {name: round(frechet_distance(inner, reference[name]), 4) for name, inner in features.items()}

    labels = labels_of(checkpoint, 0, count)
    draws = balanced_draws(real, labels if checkpoint.card.classes else None, count)
    floors = [distances(comparison.features(real.images[index])[0]) for index in draws]
    rows = []
    with ProgressBar(len(todo), "features", "cell") as bar:
        for cell in todo:
            images = _have(folder, cell)[:count]
            features, decisions = comparison.features(images)
            row: dict[str, Any] = {
                "variant": cell.variant,
                "sampler": cell.sampler,
                "budget": cell.budget,
                "steps": cell.steps,
                "nfe": cell.plan.nfe,
                "plan": cell.plan.digest,
                "frechet": distances(features),
            }
            if decisions is not None and checkpoint.card.classes:  # a network without classes was asked for none
                row["accuracy"] = round(float((decisions == labels).mean()), 4)
            rows.append(row)
            bar.update(1, cell.variant)
    floor = {
        name: {"mean": round(float(np.mean(values)), 4), "spread": round(float(np.ptp(values)), 4)}
        for name in reference
        for values in [[f[name] for f in floors]]
    }
    found: dict[str, Any] = {"images": count, "reference": len(comparison.reference), "floor": floor, "cells": rows}
    if comparison.classifier is not None and real.labels is not None:
        _, decisions = classify(comparison.classifier, real.images[draws[0]], comparison.device)
        found["training_accuracy"] = round(float((decisions == real.labels[draws[0]]).mean()), 4)
    return found


def balanced_draws(real: Dataset, labels: np.ndarray | None, count: int, most: int = 4) -> list[np.ndarray]:
    """Up to ``most`` disjoint draws of ``count`` images, with as many of each class as in ``labels`` if there are any.

    For 200 images of ten classes, a random balance alone makes a distance as large as that of a good sampler.
    """
    order = np.random.default_rng(0).permutation(len(real.images))
    if labels is None or real.labels is None:
        draws = [order[i * count : (i + 1) * count] for i in range(most)]
    else:
        draws = [np.empty(0, np.int64)] * most
        for label, need in enumerate(np.bincount(labels)):
            members = order[real.labels[order] == label]
            draws = [np.append(drawn, members[i * need : (i + 1) * need]) for i, drawn in enumerate(draws)]
    return [np.sort(index) for index in draws if len(index) == count]


def _path(folder: Path, cell: Cell) -> Path:
    return folder / f"{cell.plan.digest}.npy"


def _have(folder: Path, cell: Cell) -> np.ndarray:
    path = _path(folder, cell)
    return np.load(path) if path.exists() else np.zeros(0, np.uint8)
