"""The networks of an engine: one as fast as the device allows, one in float32 whose bits are reproducible."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from model.checkpoint import Checkpoint
from model.diffusion.machine import Kernels
from model.network.cuda_graphs import Arithmetic, GraphedUNet
from model.network.inference import InferenceUNet
from model.network.inference_layers import Layout

Dtype = Literal["float32", "tf32", "bfloat16"]


class InferenceNet(Protocol):
    """A network that computes what depends on timesteps and classes apart from what depends on images."""

    def conditioning(self, t: Tensor, y: Tensor | None = None) -> Tensor:
        """[B, S] on the device, from timesteps and classes on the host."""

    def forward(self, x: Tensor, conditioning: Tensor) -> Tensor:
        """[B, C or 2C, H, W] from images [B, C, H, W]; the next forward may overwrite it."""

    def __call__(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Both at once; the result is not overwritten."""


@dataclass(frozen=True)
class Networks:
    """The two networks; the same object where float32 is the fastest, too.

    Attributes:
        kernels: for the row machine's update, where the device has them.
    """

    fast: InferenceNet
    exact: InferenceNet
    kernels: Kernels | None = None


def build_network(
    checkpoint: Checkpoint, device: torch.device, layout: Layout, dtype: Dtype, *, exact: bool
) -> InferenceNet:
    """A network for inference.

    Args:
        dtype: of weights and activations; ``tf32`` is float32 with products in TF32, on a CUDA device.
        exact: whether a row must have the same bits in every process.
    """
    net = InferenceUNet(
        checkpoint.net, checkpoint.schedule.T, torch.bfloat16 if dtype == "bfloat16" else torch.float32, layout
    )
    if device.type != "cuda":
        return net
    return GraphedUNet(net, Arithmetic(tf32=dtype == "tf32", benchmark=not exact))


def capture(net: InferenceNet, widths: Iterable[int]) -> None:
    """Capture CUDA graphs for forwards of these widths, where the network uses them.

    Raises:
        torch.OutOfMemoryError: one does not fit.
    """
    if isinstance(net, GraphedUNet):
        net.capture(widths)
