"""Classifier-free guidance (Ho & Salimans 2022, eq. 6): o = o_null + w (o_y - o_null)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from model.device import to_device


class Guidance:
    """Guidance of the rows of one forward, each with its own w.

    A row with w ≠ 1 takes two rows of the forward: its own, and a copy without the class behind all other rows. A
    learned variance is not guided.

    Attributes:
        guided: the rows with w ≠ 1, in the order of their copies.
    """

    def __init__(self, scale: Sequence[float], device: torch.device) -> None:
        """``scale``: w of each row, which is the paper's plus 1."""
        self.guided = [i for i, w in enumerate(scale) if w != 1]
        if self.guided:
            self._w = to_device(torch.tensor([scale[i] for i in self.guided])[:, None, None, None], device)
            self._index = to_device(torch.tensor(self.guided), device)

    def append_copies(self, rows: Tensor) -> Tensor:
        """``rows`` [B, …] and the copies of the guided ones behind them, [B + G, …]."""
        return torch.cat([rows, rows.index_select(0, self._index)]) if self.guided else rows

    def combine(self, output: Tensor, channels: int) -> Tensor:
        """The guided output [B, …] from the network's, [B + G, …]; the first ``channels`` channels are o."""
        if not self.guided:
            return output
        output, null = output[: -len(self.guided)], output[-len(self.guided) :, :channels]
        conditional = output.index_select(0, self._index)[:, :channels]
        output = output.clone()
        output[self._index, :channels] = null + self._w.to(output.dtype) * (conditional - null)
        return output
