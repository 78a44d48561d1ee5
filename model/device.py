"""Between host and device, without waiting: a CUDA device copies by itself to and from memory that is pinned."""

from __future__ import annotations

import re

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


class DeviceError(ValueError):
    """A device that this machine does not have, or that cannot do what is asked for.

    Attributes:
        setting, value: what asks for it.
    """

    def __init__(self, setting: str, value: object, remedy: str) -> None:
        super().__init__(f"{setting} = {value}: {remedy}")
        self.setting, self.value, self.remedy = setting, value, remedy


def select_device(name: str) -> torch.device:
    """``auto`` is the CUDA device where there is one, else the CPU.

    Raises:
        DeviceError: no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name != "cpu" and not re.fullmatch(r"cuda(:\d+)?", name):
        raise DeviceError("device", name, "choose auto, cpu, cuda or cuda:N")
    if name != "cpu" and int(name.partition(":")[2] or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise DeviceError("device", name, f"{count} CUDA devices are available here; use auto or cpu")
    return torch.device(name)
