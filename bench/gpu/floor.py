"""The least time that a forward can take: its operations and bytes, over what the card was measured to do of each.

Counted are convolutions, linear layers and attention, in bfloat16: two operations for each multiply-add; each weight
read once a forward, each input read once and each output written once. Norms, activations, additions and concatenations
cost nothing here, since they can be fused into the reads and writes, and the conditioning of the blocks is looked up.
So no forward is faster than this floor.
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
    """Of a forward; operations and bytes of activations are for each row, weights are read once for all rows."""

    row_operations: int
    row_bytes: int
    weight_bytes: int

    def operations(self, width: int) -> int:
        return width * self.row_operations

    def bytes(self, width: int) -> int:
        return self.weight_bytes + width * self.row_bytes

    def seconds(self, width: int, rate: float, bandwidth: float) -> float:
        """The floor, for ``rate`` operations and ``bandwidth`` bytes a second."""
        return max(self.operations(width) / rate, self.bytes(width) / bandwidth)


@cache
def work(config: UNetConfig) -> Work:
    with torch.device("meta"):
        net = UNet(config).eval()
        x = torch.empty(1, config.in_channels, *config.size)
        t, y = torch.zeros(1), None if config.num_class_embeds is None else torch.zeros(1, dtype=torch.int64)
    count = _Count(net)
    with torch.inference_mode():
        net(x, t, y)
    return Work(count.operations, BYTES * count.numbers, BYTES * count.weights)


class _Count:
    """Adds up what passes through every layer, by forward hooks."""

    def __init__(self, net: UNet) -> None:
        self.operations = self.numbers = self.weights = 0
        looked_up = {each for module in net.modules() if isinstance(module, TimestepMLP) for each in module.modules()}
        for name, module in net.named_modules():
            if isinstance(module, nn.Conv2d | nn.Linear) and module not in looked_up and "time_emb_proj" not in name:
                # An input that is upsampled before a convolution can be read at its own size.
                repeats = 4 if "upsamplers" in name else 1
                # q, k and v have the same input, which is read for q.
                again = name.endswith(("to_k", "to_v"))
                module.register_forward_hook(self._layer(0 if again else 1 / repeats))
            elif isinstance(module, Attention):
                module.register_forward_hook(self._attention)

    def _layer(self, read: float) -> Any:
        def add(layer: nn.Conv2d | nn.Linear, inputs: tuple[Tensor], output: Tensor) -> None:
            self.operations += 2 * layer.weight[0].numel() * output.numel()
            self.numbers += int(read * inputs[0].numel()) + output.numel()
            self.weights += sum(parameter.numel() for parameter in layer.parameters())

        return add

    def _attention(self, _: nn.Module, inputs: tuple[Tensor], __: Tensor) -> None:
        """softmax(q kᵀ) v of all heads: reads q, k and v, writes one output."""
        batch, channels, height, width = inputs[0].shape
        self.operations += 4 * batch * channels * (height * width) ** 2
        self.numbers += 4 * inputs[0].numel()
