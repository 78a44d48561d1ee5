"""Devices: which one to use, and copies to and from it that do not synchronize.

A CUDA device copies asynchronously only to and from pinned memory.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor


class DeviceError(ValueError):
    """A setting that needs a device that this machine does not have, or that the device does not support.

    Attributes:
        setting: its name.
        value: its value.
        remedy: values that work.
    """

    def __init__(self, setting: str, value: object, remedy: str) -> None:
        super().__init__(f"{setting} = {value}: {remedy}")
        self.setting, self.value, self.remedy = setting, value, remedy


def select_device(name: str) -> torch.device:
    """``cpu``, ``cuda``, ``cuda:N``, or ``auto``: a CUDA device where there is one, else the CPU.

    Raises:
        DeviceError: no such device on this machine.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name != "cpu" and not re.fullmatch(r"cuda(:\d+)?", name):
        raise DeviceError("device", name, "choose auto, cpu, cuda or cuda:N")
    count = torch.cuda.device_count()
    if name != "cpu" and int(name.partition(":")[2] or 0) >= count:
        raise DeviceError("device", name, f"{count} CUDA devices are available here; use auto or cpu")
    return torch.device(name)


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Copy from the host to ``device``, for work that is enqueued there after this call."""
    if device.type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def to_host(values: Tensor) -> Tensor:
    """Copy to the host; from a CUDA device complete when an event recorded after this call is.

    Pinned memory is scarce and returns to a pool with the tensor: copy what is kept for long.
    """
    if values.device.type != "cuda":
        return values.cpu()
    copy = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    return copy.copy_(values, non_blocking=True)
