"""Between host and device, without waiting: a CUDA device copies by itself to and from memory that is pinned."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on ``device``, for whatever is enqueued there from now on."""
    if device.type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def to_host(values: Tensor) -> Tensor:
    """A tensor of the device on the host; from a CUDA device it is there once an event recorded from now on is over.

    Pinned memory is short and goes back to a pool with the tensor, so whoever keeps it for long should take a copy.
    """
    if values.device.type != "cuda":
        return values.cpu()
    there = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    return there.copy_(values, non_blocking=True)
