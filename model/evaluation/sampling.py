"""Images by every walk, and what they are worth; a walk is kept in a file as it grows, and never drawn twice."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from model import images
from model.checkpoint import Checkpoint
from model.data import Dataset
from model.diffusion import machine
from model.evaluation.classifier import Classifier, classify
from model.evaluation.frechet import frechet_distance
from model.evaluation.imagenet import Features
from model.evaluation.scope import Cell
from model.files import write_atomically

CHUNK = 50


def labels_of(checkpoint: Checkpoint, first: int, count: int) -> np.ndarray:
    """The class of each image: all in turn; the null class, where there are no others."""
    index = np.arange(first, first + count)
    card = checkpoint.card
    return index % len(card.classes) if card.classes else np.full(count, card.null_class or 0)


@torch.inference_mode()
def draw(checkpoint: Checkpoint, todo: Sequence[Cell], count: int, folder: Path, device: torch.device) -> None:
    """See that ``folder`` holds ``count`` images of each walk, uint8 [n, H, W, C]."""
    conditional = checkpoint.net.config.num_class_embeds is not None
    missing = {cell: range(len(_have(folder, cell)), count, CHUNK) for cell in todo}
    total = sum(cell.plan.nfe * (count - firsts.start) for cell, firsts in missing.items() if firsts)
    with tqdm(total=total, desc="images", unit="NFE", unit_scale=True, mininterval=2) as bar:
        for cell, firsts in missing.items():
            bar.set_postfix_str(f"{cell.walk}, {cell.plan.nfe} evaluations")
            for first in firsts:
                size = min(CHUNK, count - first)
                y = torch.from_numpy(labels_of(checkpoint, first, size)).to(device) if conditional else None
                x_0 = machine.sample(checkpoint.net, cell.plan, range(first, first + size), checkpoint.shape, y)
                new = images.to_uint8(x_0)
                np.save(buffer := io.BytesIO(), np.concatenate([_have(folder, cell), new]) if first else new)
                write_atomically(_path(folder, cell), buffer.getbuffer())
                bar.update(cell.plan.nfe * size)


@dataclass(frozen=True)
class Judge:
    """What images are compared with, and by whom.

    Attributes:
        reference: real images that training never saw, uint8 [m, H, W, C].
        classifier, efficientnet: each an opinion; None where it could not be had.
    """

    reference: np.ndarray
    classifier: Classifier | None
    efficientnet: Features | None
    device: torch.device

    def moments(self) -> dict[str, np.ndarray]:
        """Features of the reference, by opinion."""
        return self.features(self.reference)[0]

    def features(self, images: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
        """Features of some images by opinion, and the classifier's decisions."""
        found: dict[str, np.ndarray] = {}
        decisions = None
        if self.classifier is not None:
            found["classifier"], decisions = classify(self.classifier, images, self.device)
        if self.efficientnet is not None:
            found["efficientnet"] = self.efficientnet(images)
        return found, decisions


def judge(
    checkpoint: Checkpoint, todo: Sequence[Cell], count: int, folder: Path, real: Dataset, by: Judge
) -> dict[str, Any]:
    """Fréchet distances and class accuracy of every walk, and the floor that real images set.

    Args:
        real: training images; disjoint draws of ``count`` of them, with as many of each class as the walks have, make
            the floor.
    """
    reference = by.moments()

    def distances(features: dict[str, np.ndarray]) -> dict[str, float]:
        return {name: round(frechet_distance(inner, reference[name]), 4) for name, inner in features.items()}

    labels = labels_of(checkpoint, 0, count)
    draws = alike(real, labels if checkpoint.card.classes else None, count)
    floors = [distances(by.features(real.images[index])[0]) for index in draws]
    rows = []
    for cell in tqdm(todo, desc="features", unit="walk"):
        images = _have(folder, cell)[:count]
        features, decisions = by.features(images)
        row: dict[str, Any] = {
            "walk": cell.walk,
            "sampler": cell.sampler,
            "budget": cell.budget,
            "steps": cell.steps,
            "nfe": cell.plan.nfe,
            "plan": cell.plan.digest,
            "frechet": distances(features),
        }
        if decisions is not None:
            row["accuracy"] = round(float((decisions == labels).mean()), 4)
        rows.append(row)
    floor = {
        name: {"mean": round(float(np.mean(values)), 4), "spread": round(float(np.ptp(values)), 4)}
        for name in reference
        for values in [[f[name] for f in floors]]
    }
    answer: dict[str, Any] = {"images": count, "reference": len(by.reference), "floor": floor, "walks": rows}
    if by.classifier is not None and real.labels is not None:
        _, decisions = classify(by.classifier, real.images[draws[0]], by.device)
        answer["training_accuracy"] = round(float((decisions == real.labels[draws[0]]).mean()), 4)
    return answer


def alike(real: Dataset, labels: np.ndarray | None, count: int, most: int = 4) -> list[np.ndarray]:
    """Disjoint draws of ``count`` images whose classes are balanced as those of ``labels``; at random without them.

    The balance matters: with 200 images of ten classes, one left to chance is by itself as far off as a good sampler.
    """
    order = np.random.default_rng(0).permutation(len(real.images))
    if labels is None or real.labels is None:
        draws = [order[i * count : (i + 1) * count] for i in range(most)]
    else:
        draws = [np.empty(0, np.int64)] * most
        for label, need in enumerate(np.bincount(labels)):
            pile = order[real.labels[order] == label]
            draws = [np.append(drawn, pile[i * need : (i + 1) * need]) for i, drawn in enumerate(draws)]
    return [np.sort(index) for index in draws if len(index) == count]


def _path(folder: Path, cell: Cell) -> Path:
    return folder / f"{cell.plan.digest}.npy"


def _have(folder: Path, cell: Cell) -> np.ndarray:
    path = _path(folder, cell)
    return np.load(path) if path.exists() else np.zeros(0, np.uint8)
