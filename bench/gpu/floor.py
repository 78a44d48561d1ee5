"""The least that a forward can take: its operations and bytes, over what the card was measured to do of each.

Counted are convolutions, linear layers and attention over images, in bfloat16: two operations for each multiply-add;
each weight read once a forward, each of their inputs read once and each output written once. Norms, activations,
additions and joins cost nothing here, since they could be done on the way in or out, and what timestep and class say to
the blocks is looked up. So no forward can be as fast as this, and one that is near it has little left to gain.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from model.network.config import UNetConfig
from model.network.unet import Attention, TimestepMLP, UNet

BYTES = 2  # of a number in bfloat16


@dataclass(frozen=True)
class Work:
    """What a forward must do.

    Attributes:
        row_operations: for each row.
        row_bytes: read and written for each row.
        weight_bytes: read once, however many rows there are.
    """

    row_operations: int
    row_bytes: int
    weight_bytes: int

    def operations(self, width: int) -> int:
        """Of a forward of so many rows."""
        return width * self.row_operations

    def bytes(self, width: int) -> int:
        """Of a forward of so many rows."""
        return self.weight_bytes + width * self.row_bytes

    def seconds(self, width: int, rate: float, bandwidth: float) -> float:
        """No forward of so many rows is faster.

        Args:
            rate: operations a second.
            bandwidth: bytes a second, read and written.
        """
        return max(self.operations(width) / rate, self.bytes(width) / bandwidth)


@cache
def work(config: UNetConfig) -> Work:
    """Of a network of this shape."""
    with torch.device("meta"):
        net = UNet(config).eval()
        x = torch.empty(1, config.in_channels, *config.size)
        t, y = torch.zeros(1), None if config.num_class_embeds is None else torch.zeros(1, dtype=torch.int64)
    count = _Count(net)
    with torch.inference_mode():
        net(x, t, y)
    return Work(count.operations, BYTES * count.numbers, BYTES * count.weights)


class _Count:
    """Stands at every layer, and adds up what passes."""

    def __init__(self, net: UNet) -> None:
        self.operations = self.numbers = self.weights = 0
        looked_up = {each for module in net.modules() if isinstance(module, TimestepMLP) for each in module.modules()}
        for name, module in net.named_modules():
            if isinstance(module, nn.Conv2d | nn.Linear) and module not in looked_up and "time_emb_proj" not in name:
                # The image that is doubled before a convolution can be read as it was.
                repeats = 4 if "upsamplers" in name else 1
                # q, k and v are of one image, which is read for the first of them.
                again = name.endswith(("to_k", "to_v"))
                module.register_forward_hook(self._layer(0 if again else 1 / repeats))
            elif isinstance(module, Attention):
                module.register_forward_hook(self._attention)

    def _layer(self, read: float) -> Any:
        def add(layer: nn.Conv2d | nn.Linear, inputs: tuple[Tensor], output: Tensor) -> None:
            of_one = layer.weight[0].numel()  # multiply-adds of one number of the output
            self.operations += 2 * of_one * output.numel()
            self.numbers += int(read * inputs[0].numel()) + output.numel()
            self.weights += sum(parameter.numel() for parameter in layer.parameters())

        return add

    def _attention(self, _: nn.Module, inputs: tuple[Tensor], __: Tensor) -> None:
        """Softmax(q kᵀ) v of all heads: reads q, k and v, writes their mixture."""
        batch, channels, height, width = inputs[0].shape
        self.operations += 4 * batch * channels * (height * width) ** 2
        self.numbers += 4 * inputs[0].numel()
