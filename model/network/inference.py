"""The function of :class:`model.network.unet.UNet`, prepared for inference: what never changes is computed once.

What timestep and class add to each residual block takes few values, so it is looked up; the three projections of an
attention are one; convolutions may keep their weights in the order in which oneDNN reads them, and on a CUDA device
what lies between them is fused (``folds.py``). ``unet.py`` stays the text to read, and the two agree to rounding.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from model.device import to_device
from model.network import inference_layers as folds
from model.network.inference_layers import Layout
from model.network.unet import Block, ResnetBlock, UNet, timestep_embedding

LARGEST_TABLE = 128 << 20  # bytes; a network that needs more computes its classes' share at each step


class InferenceUNet:
    """A :class:`model.diffusion.machine.Net`. It copies the weights; the UNet that it was made from can be thrown away.

    A row's answer has the same bits in any company of the same width: which way its timestep and class take is its own
    affair, and what cannot be looked up is computed row by row.

    Attributes:
        layout: ``plain`` images are [B, C, H, W] in memory, ``channels_last`` [B, H, W, C]; ``packed`` is that with
            weights reordered for oneDNN, ``fused`` that with kernels that need a CUDA device.
    """

    def __init__(
        self, net: UNet, timesteps: int, dtype: torch.dtype = torch.float32, layout: Layout = "channels_last"
    ) -> None:
        """Fold.

        Args:
            timesteps: T of the schedule; integers in 0..T-1 are looked up.
            dtype: of weights and activations; what comes in and goes out is float32.
        """
        self.config = net.config
        self.device = net.conv_in.weight.device
        self.dtype = dtype
        self.layout: Layout = layout
        self._net = net
        self._order = [module for module in net.modules() if isinstance(module, ResnetBlock)]
        self._project = torch.cat([block.time_emb_proj.weight for block in self._order])  # [S, E]
        self._shift = torch.cat([self._told_at_rest(block) for block in self._order])  # [S]
        self._table = self._tabulated(timesteps)
        self._resnets = {block: folds.resnet(block, dtype, layout) for block in self._order}
        self._others = {
            module: fold(module, dtype, layout)
            for module in net.modules()
            if (fold := folds.FOLDS.get(type(module))) is not None
        }
        self._conv_in = folds.convolution(net.conv_in, dtype, layout)
        self._norm_out = folds.norm(net.conv_norm_out, dtype, layout, silu=True)
        self._conv_out = folds.convolution(net.conv_out, dtype, layout)

    def __call__(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """As :meth:`model.network.unet.UNet.forward`; float32 out."""
        return self.forward(x, self.conditioning(t, y))

    def forward(self, x: Tensor, told: Tensor) -> Tensor:
        """All that depends on the images, float32 [B, out_channels, H, W]; nothing in it waits for the device.

        Args:
            x: [B, C, H, W].
            told: [B, S], what :meth:`conditioning` says of their timesteps and classes.
        """
        config = self.config
        if config.center_input_sample:
            x = 2 * x - 1
        x = x.to(self.dtype, memory_format=torch.contiguous_format if self.layout == "plain" else torch.channels_last)
        widths = [block.time_emb_proj.out_features for block in self._order]
        shares = dict(zip(self._order, torch.split(told, widths, dim=1), strict=True))

        h = self._conv_in(x)
        skips = [h]
        for down in self._net.down_blocks:
            for i in range(len(down.resnets)):  # type: ignore[arg-type]
                h = self._layer(cast(Block, down), i, h, shares)
                skips.append(h)
            if down.downsamplers is not None:
                h = self._others[down.downsamplers[0]](h)  # type: ignore[index]
                skips.append(h)
        mid = self._net.mid_block
        h = self._resnets[mid.resnets[0]](h, shares[mid.resnets[0]])  # type: ignore[index]
        if mid.add_attention:
            h = self._others[mid.attentions[0]](h)
        h = self._resnets[mid.resnets[1]](h, shares[mid.resnets[1]])  # type: ignore[index]
        for up in self._net.up_blocks:
            for i in range(len(up.resnets)):  # type: ignore[arg-type]
                h = self._layer(cast(Block, up), i, torch.cat([h, skips.pop()], dim=1), shares)
            if up.upsamplers is not None:
                h = self._others[up.upsamplers[0]](h)  # type: ignore[index]
        said = self._conv_out(self._norm_out(h))
        if self.layout == "fused":  # kernels want plain memory: in one pass, then
            return said.to(torch.float32, memory_format=torch.contiguous_format)
        return said.float()

    def _layer(self, block: Block, i: int, x: Tensor, shares: dict[Any, Tensor]) -> Tensor:
        resnet = block.resnets[i]
        x = self._resnets[resnet](x, shares[resnet])  # type: ignore[index]
        return self._others[block.attentions[i]](x) if block.attention else x

    # What timestep and class say to the residual blocks: [B, S], the outputs of all their projections side by side.

    def conditioning(self, t: Tensor, y: Tensor | None = None) -> Tensor:
        """[B, S] on the network's device, for :meth:`forward`.

        Args:
            t: [B] timesteps; best on the host, which has to know which of them can be looked up.
            y: int64 [B] or float [B, K] as the network takes them; likewise.
        """
        device = self.device
        if self._table is None:
            t, y = to_device(t, device), None if y is None else to_device(y, device)
            return self._computed(t, y).to(self._said_in)
        t, y = t.cpu(), None if y is None else y.cpu()
        index = t.long()
        known = index == t
        k: Tensor | int = 0
        if y is not None and y.is_floating_point():
            weight, k = y.max(dim=1)
            known = known & (weight == 1) & (y.sum(dim=1) == 1)
        elif y is not None:
            k = y
        T, classes, S = self._table.shape
        place = index.clamp(0, T - 1) * classes + k
        told = self._table.view(T * classes, S).index_select(0, to_device(place, device))
        for i in (~known).nonzero().flatten().tolist():
            one, label = (each if each is None else to_device(each[i : i + 1], device) for each in (t, y))
            told[i] = self._computed(cast(Tensor, one), label)[0]
        return told

    def _tabulated(self, timesteps: int) -> Tensor | None:
        """[T, K, S] of all that can be looked up, or None."""
        classes = self.config.num_class_embeds or 1
        if 4 * timesteps * classes * len(self._shift) > LARGEST_TABLE:
            return None
        t = torch.arange(timesteps, device=self.device)
        with torch.inference_mode():
            ys = range(classes) if self.config.num_class_embeds else [None]
            columns = [self._computed(t, None if y is None else torch.full_like(t, y)) for y in ys]
            return torch.stack(columns, dim=1).to(self._said_in)

    @property
    def _said_in(self) -> torch.dtype:
        """Kernels add in float32 anyway."""
        return torch.float32 if self.layout == "fused" else self.dtype

    def _told_at_rest(self, block: ResnetBlock) -> Tensor:
        """What a block is told whatever timestep and class are."""
        bias = block.time_emb_proj.bias
        if self.layout != "fused" or block.scale_shift or block.conv1.bias is None:
            return bias
        return bias + block.conv1.bias

    def _computed(self, t: Tensor, y: Tensor | None) -> Tensor:
        config, net = self.config, self._net
        freqs = timestep_embedding(
            t, config.block_out_channels[0], flip_sin_to_cos=config.flip_sin_to_cos, freq_shift=config.freq_shift
        )
        emb = net.time_embedding(freqs)
        if config.num_class_embeds is not None:
            emb = emb + net.class_share(y)
        return F.linear(F.silu(emb), self._project, self._shift)
