"""The function of :class:`model.network.unet.UNet`, optimized for inference.

The conditioning, what timestep and class add to each residual block, takes few values, so it is looked up in a table;
the three projections of an attention are one; convolutions may keep their weights in oneDNN's order, and on a CUDA
device the operations between them are fused (``inference_layers.py``). ``unet.py`` is the text to read; the two agree
to rounding.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from model.device import to_device
from model.network import inference_layers
from model.network.inference_layers import Layout
from model.network.unet import Block, ResnetBlock, UNet, timestep_embedding

MAX_TABLE = 128 << 20  # bytes; a network that needs more computes the conditioning at each step


class InferenceUNet:
    """A :class:`model.diffusion.machine.Net` with copies of the UNet's weights.

    At one width, a row's output is bit-identical whatever the other rows are: what the table does not have is computed
    row by row.

    Attributes:
        layout: ``plain`` images are [B, C, H, W] in memory, ``channels_last`` [B, H, W, C]; ``packed`` is channels_last
            with weights reordered for oneDNN, ``fused`` is channels_last with kernels that need a CUDA device.
    """

    def __init__(
        self, net: UNet, timesteps: int, dtype: torch.dtype = torch.float32, layout: Layout = "channels_last"
    ) -> None:
        """Prepare the layers and the table.

        Args:
            timesteps: T of the schedule; integers in 0..T-1 are looked up.
            dtype: of weights and activations; input and output are float32.
        """
        self.config = net.config
        self.device = net.conv_in.weight.device
        self.dtype = dtype
        self.layout: Layout = layout
        self._net = net
        self._blocks = [module for module in net.modules() if isinstance(module, ResnetBlock)]
        self._projection = torch.cat([block.time_emb_proj.weight for block in self._blocks])  # [S, E]
        self._bias = torch.cat([self._constant_conditioning(block) for block in self._blocks])  # [S]
        self._table = self._build_table(timesteps)
        self._resnets = {block: inference_layers.resnet(block, dtype, layout) for block in self._blocks}
        self._others = {
            module: build(module, dtype, layout)
            for module in net.modules()
            if (build := inference_layers.BUILDERS.get(type(module))) is not None
        }
        self._conv_in = inference_layers.convolution(net.conv_in, dtype, layout)
        self._norm_out = inference_layers.norm(net.conv_norm_out, dtype, layout, silu=True)
        self._conv_out = inference_layers.convolution(net.conv_out, dtype, layout)

    def __call__(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """As :meth:`model.network.unet.UNet.forward`; float32 out."""
        return self.forward(x, self.conditioning(t, y))

    def forward(self, x: Tensor, conditioning: Tensor) -> Tensor:
        """The output, float32 [B, out_channels, H, W]; nothing here synchronizes with the device.

        Args:
            x: [B, C, H, W].
            conditioning: [B, S], from :meth:`conditioning`.
        """
        config = self.config
        if config.center_input_sample:
            x = 2 * x - 1
        x = x.to(self.dtype, memory_format=torch.contiguous_format if self.layout == "plain" else torch.channels_last)
        widths = [block.time_emb_proj.out_features for block in self._blocks]
        shares = dict(zip(self._blocks, torch.split(conditioning, widths, dim=1), strict=True))

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
        output = self._conv_out(self._norm_out(h))
        if self.layout == "fused":  # the update kernels need plain memory: both conversions in one pass
            return output.to(torch.float32, memory_format=torch.contiguous_format)
        return output.float()

    def _layer(self, block: Block, i: int, x: Tensor, shares: dict[Any, Tensor]) -> Tensor:
        resnet = block.resnets[i]
        x = self._resnets[resnet](x, shares[resnet])  # type: ignore[index]
        return self._others[block.attentions[i]](x) if block.attention else x

    def conditioning(self, t: Tensor, y: Tensor | None = None) -> Tensor:
        """What timestep and class add to the residual blocks: [B, S], all blocks' projections side by side.

        Args:
            t: [B] timesteps; on the host, which looks them up, or a copy waits for the device.
            y: int64 [B] or float [B, K] as the network takes them; likewise.

        Returns:
            On the network's device.
        """
        device = self.device
        if self._table is None:
            t, y = to_device(t, device), None if y is None else to_device(y, device)
            return self._compute(t, y).to(self._conditioning_dtype)
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
        entry = index.clamp(0, T - 1) * classes + k
        conditioning = self._table.view(T * classes, S).index_select(0, to_device(entry, device))
        for i in (~known).nonzero().flatten().tolist():
            one, label = (each if each is None else to_device(each[i : i + 1], device) for each in (t, y))
            conditioning[i] = self._compute(cast(Tensor, one), label)[0]
        return conditioning

    def _build_table(self, timesteps: int) -> Tensor | None:
        """The conditioning of all timesteps and classes [T, K, S], or None if it were larger than ``MAX_TABLE``."""
        classes = self.config.num_class_embeds or 1
        if 4 * timesteps * classes * len(self._bias) > MAX_TABLE:
            return None
        t = torch.arange(timesteps, device=self.device)
        with torch.inference_mode():
            ys = range(classes) if self.config.num_class_embeds else [None]
            columns = [self._compute(t, None if y is None else torch.full_like(t, y)) for y in ys]
            return torch.stack(columns, dim=1).to(self._conditioning_dtype)

    @property
    def _conditioning_dtype(self) -> torch.dtype:
        """float32 for kernels, which add in float32 anyway."""
        return torch.float32 if self.layout == "fused" else self.dtype

    def _constant_conditioning(self, block: ResnetBlock) -> Tensor:
        """The part that does not depend on timestep and class."""
        bias = block.time_emb_proj.bias
        if self.layout != "fused" or block.scale_shift or block.conv1.bias is None:
            return bias
        return bias + block.conv1.bias

    def _compute(self, t: Tensor, y: Tensor | None) -> Tensor:
        config, net = self.config, self._net
        freqs = timestep_embedding(
            t, config.block_out_channels[0], flip_sin_to_cos=config.flip_sin_to_cos, freq_shift=config.freq_shift
        )
        emb = net.time_embedding(freqs)
        if config.num_class_embeds is not None:
            emb = emb + net.embed_classes(y)
        return F.linear(F.silu(emb), self._projection, self._bias)
