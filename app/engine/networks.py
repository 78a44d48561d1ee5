"""The forms in which the engine uses a network: one that is fast, and one in float32 whose bits can be had again."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from model.checkpoint import Checkpoint
from model.diffusion.machine import Kernels
from model.network.cuda_graphs import Arithmetic, Graphed
from model.network.inference import InferenceUNet
from model.network.inference_layers import Layout

Dtype = Literal["float32", "tf32", "bfloat16"]


class InferenceNet(Protocol):
    """A network that can be told of timesteps and classes apart from its images."""

    def told(self, t: Tensor, y: Tensor | None = None) -> Tensor:
        """[B, S] on the device, of timesteps and classes on the host."""

    def forward(self, x: Tensor, told: Tensor) -> Tensor:
        """[B, C or 2C, H, W] of images [B, C, H, W]; the next forward may overwrite it."""

    def __call__(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Both at once, to keep."""


@dataclass(frozen=True)
class Networks:
    """The two forms; where one will do, both are the same object.

    Attributes:
        updates: do the row machine's part, where the device has kernels.
    """

    fast: InferenceNet
    exact: InferenceNet
    updates: Kernels | None = None


def form(checkpoint: Checkpoint, device: torch.device, layout: Layout, dtype: Dtype, *, exact: bool) -> InferenceNet:
    """One form.

    Args:
        dtype: of weights and activations; ``tf32`` is float32 that is multiplied so, on a CUDA device.
        exact: whether a row must have the same bits in every process.
    """
    folded = InferenceUNet(
        checkpoint.net, checkpoint.schedule.T, torch.bfloat16 if dtype == "bfloat16" else torch.float32, layout
    )
    if device.type != "cuda":
        return folded
    return Graphed(folded, Arithmetic(tf32=dtype == "tf32", chosen_by_clock=not exact))


def capture(form: InferenceNet, widths: Iterable[int]) -> None:
    """Make forwards of these widths ready, where that has to be done beforehand.

    Raises:
        torch.OutOfMemoryError: one does not fit.
    """
    if isinstance(form, Graphed):
        form.capture(widths)
