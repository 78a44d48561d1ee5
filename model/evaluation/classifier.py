"""A small classifier of the data: its features for Fréchet distances, its decisions for class accuracy."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from torch import Tensor, nn

from model.data import Dataset
from model.images import from_uint8
from model.output import ProgressBar, write_atomically

BATCH = 250


class Classifier(nn.Module):
    """Four convolutions and a linear layer, whose 64 inputs are the features."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        widths = (channels, 16, 32, 48, 64)
        layers: list[nn.Module] = []
        for i, (inside, outside) in enumerate(pairwise(widths)):
            layers += [
                nn.Conv2d(inside, outside, 3, stride=1 if i == 0 else 2, padding=1, bias=False),
                nn.BatchNorm2d(outside),
                nn.ReLU(),
            ]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(64, classes)

    def features(self, x: Tensor) -> Tensor:
        """[B, C, H, W] in [-1, 1] to [B, 64]."""
        features: Tensor = self.body(x).mean(dim=(2, 3))
        return features

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] in [-1, 1] to logits [B, classes]."""
        logits: Tensor = self.head(self.features(x))
        return logits


def load_or_train(path: Path, dataset: Dataset, device: torch.device, epochs: int = 4) -> Classifier:
    """The classifier at ``path``; if there is none, it is trained on ``dataset`` and saved."""
    assert dataset.labels is not None, "This is a bug: a classifier without labels."
    torch.manual_seed(0)
    net = Classifier(dataset.images.shape[-1], len(dataset.classes)).to(device)
    if path.exists():
        net.load_state_dict(load_file(path))
        return net.eval()
    labels = torch.from_numpy(dataset.labels)
    per_epoch = max(1, len(labels) // BATCH)
    steps = epochs * per_epoch
    optimizer = torch.optim.AdamW(net.parameters(), 4e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda k: min(1.0, (k + 1) / 50) * (1 + math.cos(math.pi * k / steps)) / 2
    )
    with ProgressBar(steps, "classifier", "step") as bar:
        for epoch in range(epochs):
            order = np.random.default_rng(epoch).permutation(len(labels))
            for k in range(per_epoch):
                index = order[k * BATCH : (k + 1) * BATCH]
                x = from_uint8(dataset.images[index]).to(device)
                loss = F.cross_entropy(net(x), labels[index].to(device), label_smoothing=0.05)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
                bar.update()
    write_atomically(path, save({key: value.contiguous() for key, value in net.state_dict().items()}))
    return net.eval()


@torch.inference_mode()
def classify(net: Classifier, images: np.ndarray, device: torch.device) -> tuple[np.ndarray, np.ndarray]:
    """Features [n, 64] and decisions [n] for uint8 images [n, H, W, C]."""
    features, decisions = [], []
    for x in batches(images, device):
        inner = net.features(x)
        features.append(inner.double().cpu().numpy())
        decisions.append(net.head(inner).argmax(dim=1).cpu().numpy())
    return np.concatenate(features), np.concatenate(decisions)


def batches(images: np.ndarray, device: torch.device) -> Iterator[Tensor]:
    """uint8 [n, H, W, C] in batches of float32 [B, C, H, W] in [-1, 1]."""
    for first in range(0, len(images), BATCH):
        yield from_uint8(images[first : first + BATCH]).to(device)
