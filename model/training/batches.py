"""Where the batch of a step comes from: images, timesteps, noise and labels, all on the network's device.

Everything random in step k is drawn from the device's generator, seeded by (seed, k), and the order of the images in
epoch e by (seed, e): nothing of it has to be kept. From the same seed a CUDA device draws other numbers than a CPU, so
a run repeats on the kind of device that it began on; the order of the images is the same everywhere.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from model.data import Dataset
from model.device import to_device
from model.images import from_uint8
from model.training.recipe import Recipe


class Batch(NamedTuple):
    """What one step learns from.

    Attributes:
        x_0: float32 [B, C, H, W] in [-1, 1], channels last in memory.
        t: int64 [B] in 0..T-1.
        eps: standard normal, like ``x_0``.
        y: int64 [B], or None without classes.
    """

    x_0: Tensor
    t: Tensor
    eps: Tensor
    y: Tensor | None


class Batches:
    """The batches of a run. Asking for one never makes the host wait for a CUDA device.

    Attributes:
        resident: the images are on the device, as bytes, rather than sent there batch by batch.
    """

    def __init__(
        self, recipe: Recipe, dataset: Dataset, T: int, device: torch.device, resident: bool | None = None
    ) -> None:
        """Put the data where it will be needed.

        Args:
            T: timesteps of the schedule.
            resident: None for whatever the device has room for.
        """
        self.recipe, self.T, self.device = recipe, T, device
        self.resident = _fits(dataset.images.nbytes, device) if resident is None else resident
        images = torch.from_numpy(dataset.images)  # uint8 [N, H, W, C]
        self._images = images.to(device) if self.resident else images
        self._labels = None if dataset.labels is None else torch.from_numpy(dataset.labels).to(device)
        self._null = len(dataset.classes)

    def at(self, step: int) -> Batch:
        """The batch of this step; leaves torch's generators seeded for what else the step draws, which is dropout."""
        recipe, device = self.recipe, self.device
        torch.manual_seed(int(np.random.SeedSequence([recipe.seed, step]).generate_state(1, np.uint64)[0] >> 1))
        index = torch.from_numpy(_shuffled(recipe.seed, len(self._images), step * recipe.batch, recipe.batch))
        there = to_device(index, device)
        x_0 = from_uint8(self._gathered(index, there)).to(memory_format=torch.channels_last)
        if recipe.flip:
            x_0 = torch.where(torch.rand(len(x_0), 1, 1, 1, device=device) < 0.5, x_0.flip(-1), x_0)
        # Antithetic timesteps: every t comes with T - 1 - t, which evens out the loss between batches.
        t = torch.randint(0, self.T, ((recipe.batch + 1) // 2,), device=device)
        t = torch.cat([t, self.T - 1 - t])[: recipe.batch]
        eps = torch.randn(x_0.shape, device=device)
        if self._labels is None:
            return Batch(x_0, t, eps, None)
        dropped = torch.rand(len(there), device=device) < recipe.label_drop
        return Batch(x_0, t, eps, self._labels[there].masked_fill(dropped, self._null))

    def _gathered(self, index: Tensor, there: Tensor) -> Tensor:
        """uint8 [B, H, W, C] on the device, of the images ``index``, which is ``there``, too."""
        if self.resident:
            return self._images[there]
        shape = (len(index), *self._images.shape[1:])
        # Gathered into pinned memory: the batch alone has to be, not everything that it is taken from.
        rows = torch.empty(shape, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        return to_device(torch.index_select(self._images, 0, index, out=rows), self.device)


def _fits(size: int, device: torch.device) -> bool:
    """Whether so many bytes take at most half of what is free; the network will want the other half."""
    return device.type != "cuda" or size <= torch.cuda.mem_get_info(device)[0] / 2


def _shuffled(seed: int, n: int, first: int, count: int) -> np.ndarray:
    """Image indices ``first``..``first + count`` of an endless stream that visits all n once per epoch."""
    epochs = range(first // n, (first + count - 1) // n + 1)
    offset = first - epochs[0] * n
    return np.concatenate([_order(seed, n, epoch) for epoch in epochs])[offset : offset + count]


@lru_cache(maxsize=2)
def _order(seed: int, n: int, epoch: int) -> np.ndarray:
    """The order of one epoch, int64 [n]; many steps in a row ask for the same."""
    return np.random.default_rng([seed, epoch]).permutation(n)
