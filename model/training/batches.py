"""The batch of each training step: images, timesteps, noise and labels, on the network's device.

Everything random in step k is drawn from the device's generator, seeded with (seed, k), and the order of the images in
epoch e is drawn with (seed, e), so no random state has to be saved. A CUDA device draws other numbers than a CPU from
the same seed: a run is reproducible on one kind of device. The order of the images is the same on all.
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
    """The data of one step.

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
    """The batches of a run, made without synchronizing with a CUDA device.

    Attributes:
        resident: whether all images are on the device, as bytes, or copied there batch by batch.
    """

    def __init__(
        self, recipe: Recipe, dataset: Dataset, T: int, device: torch.device, resident: bool | None = None
    ) -> None:
        """Copy labels, and images if resident, to the device.

        Args:
            T: timesteps of the schedule.
            resident: None decides by the device's free memory.
        """
        self.recipe, self.T, self.device = recipe, T, device
        self.resident = _fits(dataset.images.nbytes, device) if resident is None else resident
        images = torch.from_numpy(dataset.images)  # uint8 [N, H, W, C]
        self._images = images.to(device) if self.resident else images
        self._labels = None if dataset.labels is None else torch.from_numpy(dataset.labels).to(device)
        self._null = len(dataset.classes)

    def at(self, step: int) -> Batch:
        """The batch of this step; also seeds torch's generators for the step's dropout."""
        recipe, device = self.recipe, self.device
        torch.manual_seed(int(np.random.SeedSequence([recipe.seed, step]).generate_state(1, np.uint64)[0] >> 1))
        index = torch.from_numpy(_shuffled_indices(recipe.seed, len(self._images), step * recipe.batch, recipe.batch))
        device_index = to_device(index, device)
        x_0 = from_uint8(self._gather(index, device_index)).to(memory_format=torch.channels_last)
        if recipe.flip:
            x_0 = torch.where(torch.rand(len(x_0), 1, 1, 1, device=device) < 0.5, x_0.flip(-1), x_0)
        # Antithetic timesteps: each t is paired with T - 1 - t, which reduces the variance of the loss.
        t = torch.randint(0, self.T, ((recipe.batch + 1) // 2,), device=device)
        t = torch.cat([t, self.T - 1 - t])[: recipe.batch]
        eps = torch.randn(x_0.shape, device=device)
        if self._labels is None:
            return Batch(x_0, t, eps, None)
        dropped = torch.rand(len(index), device=device) < recipe.label_drop
        return Batch(x_0, t, eps, self._labels[device_index].masked_fill(dropped, self._null))

    def _gather(self, index: Tensor, device_index: Tensor) -> Tensor:
        """The images ``index``, uint8 [B, H, W, C] on the device."""
        if self.resident:
            return self._images[device_index]
        shape = (len(index), *self._images.shape[1:])
        # Gathered into pinned memory, so that only the batch has to be pinned, not the whole data set.
        rows = torch.empty(shape, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        return to_device(torch.index_select(self._images, 0, index, out=rows), self.device)


def _fits(size: int, device: torch.device) -> bool:
    """Whether ``size`` bytes are at most half of the free memory; the other half is the network's."""
    return device.type != "cuda" or size <= torch.cuda.mem_get_info(device)[0] / 2


def _shuffled_indices(seed: int, n: int, first: int, count: int) -> np.ndarray:
    """Items ``first``..``first + count`` of an endless stream of image indices, each of the n once per epoch."""
    epochs = range(first // n, (first + count - 1) // n + 1)
    offset = first - epochs[0] * n
    return np.concatenate([_order(seed, n, epoch) for epoch in epochs])[offset : offset + count]


@lru_cache(maxsize=2)
def _order(seed: int, n: int, epoch: int) -> np.ndarray:
    """The order of one epoch, int64 [n]; cached for its steps."""
    return np.random.default_rng([seed, epoch]).permutation(n)
