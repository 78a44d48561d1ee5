"""The network as inference wants it: the function of :class:`model.unet.UNet`, with what never changes done beforehand.

What timestep and class add to each residual block takes few values, so it is looked up; the three projections of an
attention are one; convolutions may keep their weights in the order in which oneDNN reads them. ``unet.py`` stays the
text to read, and the two agree to rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.unet import Attention, Block, Downsample, ResnetBlock, UNet, Upsample, timestep_embedding

Layout = Literal["plain", "channels_last", "packed"]
LARGEST_TABLE = 128 << 20  # bytes; a network that needs more computes its classes' share at each step


class Folded:
    """A :class:`model.machine.Net`. It copies the weights; the UNet that it was made from can be thrown away.

    A row's answer has the same bits in any company of the same width: which way its timestep and class take is its own
    affair, and what cannot be looked up is computed row by row.

    Attributes:
        layout: ``plain`` pictures are [B, C, H, W] in memory, ``channels_last`` [B, H, W, C]; ``packed`` is that with
            weights reordered for oneDNN.
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
        self.dtype = dtype
        self.layout: Layout = layout
        self._net = net
        self._order = [module for module in net.modules() if isinstance(module, ResnetBlock)]
        self._project = torch.cat([block.time_emb_proj.weight for block in self._order])  # [S, E]
        self._shift = torch.cat([block.time_emb_proj.bias for block in self._order])  # [S]
        self._table = self._tabulated(timesteps)
        self._resnets = {block: _resnet(block, dtype, layout) for block in self._order}
        self._others = {
            module: fold(module, dtype, layout)
            for module in net.modules()
            if (fold := _FOLDS.get(type(module))) is not None
        }
        self._conv_in = _convolution(net.conv_in, dtype, layout)
        self._norm_out, self._conv_out = _norm(net.conv_norm_out, dtype), _convolution(net.conv_out, dtype, layout)

    def __call__(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """As :meth:`model.unet.UNet.forward`; float32 out."""
        config = self.config
        if config.center_input_sample:
            x = 2 * x - 1
        x = x.to(self.dtype, memory_format=torch.contiguous_format if self.layout == "plain" else torch.channels_last)
        widths = [block.time_emb_proj.out_features for block in self._order]
        told = dict(zip(self._order, torch.split(self._conditions(t, y), widths, dim=1), strict=True))

        h = self._conv_in(x)
        skips = [h]
        for down in self._net.down_blocks:
            for i in range(len(down.resnets)):  # type: ignore[arg-type]
                h = self._layer(cast(Block, down), i, h, told)
                skips.append(h)
            if down.downsamplers is not None:
                h = self._others[down.downsamplers[0]](h)  # type: ignore[index]
                skips.append(h)
        mid = self._net.mid_block
        h = self._resnets[mid.resnets[0]](h, told[mid.resnets[0]])  # type: ignore[index]
        if mid.add_attention:
            h = self._others[mid.attentions[0]](h)
        h = self._resnets[mid.resnets[1]](h, told[mid.resnets[1]])  # type: ignore[index]
        for up in self._net.up_blocks:
            for i in range(len(up.resnets)):  # type: ignore[arg-type]
                h = self._layer(cast(Block, up), i, torch.cat([h, skips.pop()], dim=1), told)
            if up.upsamplers is not None:
                h = self._others[up.upsamplers[0]](h)  # type: ignore[index]
        return self._conv_out(_silu(self._norm_out(h))).float()

    def _layer(self, block: Block, i: int, x: Tensor, told: dict[Any, Tensor]) -> Tensor:
        resnet = block.resnets[i]
        x = self._resnets[resnet](x, told[resnet])  # type: ignore[index]
        return self._others[block.attentions[i]](x) if block.attention else x

    # What timestep and class say to the residual blocks: [B, S], the outputs of all their projections side by side.

    def _tabulated(self, timesteps: int) -> Tensor | None:
        """[T, K, S] of all that can be looked up, or None."""
        classes = self.config.num_class_embeds or 1
        if 4 * timesteps * classes * len(self._shift) > LARGEST_TABLE:
            return None
        t = torch.arange(timesteps, device=self._shift.device)
        with torch.inference_mode():
            ys = range(classes) if self.config.num_class_embeds else [None]
            columns = [self._computed(t, None if y is None else torch.full_like(t, y)) for y in ys]
            return torch.stack(columns, dim=1).to(self.dtype)

    def _conditions(self, t: Tensor, y: Tensor | None) -> Tensor:
        if self._table is None:
            return self._computed(t, y).to(self.dtype)
        index = t.long()
        known = index == t
        k: Tensor | int = 0
        if y is not None and y.is_floating_point():
            weight, k = y.max(dim=1)
            known = known & (weight == 1) & (y.sum(dim=1) == 1)
        elif y is not None:
            k = y
        told = self._table[index.clamp(0, len(self._table) - 1), k]
        for i in (~known).nonzero().flatten().tolist():
            told[i] = self._computed(t[i : i + 1], None if y is None else y[i : i + 1])[0]
        return told

    def _computed(self, t: Tensor, y: Tensor | None) -> Tensor:
        config, net = self.config, self._net
        freqs = timestep_embedding(
            t, config.block_out_channels[0], flip_sin_to_cos=config.flip_sin_to_cos, freq_shift=config.freq_shift
        )
        emb = net.time_embedding(freqs)
        if config.num_class_embeds is not None:
            emb = emb + net.class_share(y)
        return F.linear(F.silu(emb), self._project, self._shift)


Function = Callable[[Tensor], Tensor]


def _silu(x: Tensor) -> Tensor:
    return F.silu(x, inplace=True)  # of a fresh tensor, always


def _norm(norm: nn.GroupNorm, dtype: torch.dtype) -> Function:
    weight, bias = norm.weight.to(dtype), norm.bias.to(dtype)
    groups, eps = norm.num_groups, norm.eps
    return lambda x: F.group_norm(x, groups, weight, bias, eps)


def _linear(weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Function:
    weight, bias = weight.to(dtype), bias.to(dtype)
    return lambda x: F.linear(x, weight, bias)


def _convolution(conv: nn.Conv2d, dtype: torch.dtype, layout: Layout) -> Function:
    bias = None if conv.bias is None else conv.bias.to(dtype)
    stride, padding = list(conv.stride), [int(p) for p in conv.padding]
    if layout == "plain":
        weight = conv.weight.to(dtype)
        return lambda x: F.conv2d(x, weight, bias, stride, padding)
    weight = conv.weight.to(dtype, memory_format=torch.channels_last)
    if layout == "channels_last":
        return lambda x: F.conv2d(x, weight, bias, stride, padding)
    onednn = torch.ops.mkldnn  # what inductor calls, too
    packed = onednn._reorder_convolution_weight(weight, padding, stride, [1, 1], 1)
    return lambda x: onednn._convolution_pointwise(x, packed, bias, padding, stride, [1, 1], 1, "none", [], "")


def _resnet(block: ResnetBlock, dtype: torch.dtype, layout: Layout) -> Callable[[Tensor, Tensor], Tensor]:
    norm1, norm2 = _norm(block.norm1, dtype), _norm(block.norm2, dtype)
    conv1, conv2 = _convolution(block.conv1, dtype, layout), _convolution(block.conv2, dtype, layout)
    shortcut = None if block.conv_shortcut is None else _convolution(block.conv_shortcut, dtype, layout)
    scale_shift, output_scale = block.scale_shift, block.output_scale

    def forward(x: Tensor, told: Tensor) -> Tensor:
        h = conv1(_silu(norm1(x)))
        told = told[:, :, None, None]
        if scale_shift:
            scale, shift = told.chunk(2, dim=1)
            h = torch.addcmul(shift, norm2(h), 1 + scale)
        else:
            h = norm2(h.add_(told))
        h = conv2(_silu(h)).add_(x if shortcut is None else shortcut(x))
        return h if output_scale == 1.0 else h.div_(output_scale)

    return forward


def _attention(module: nn.Module, dtype: torch.dtype, _: Layout) -> Function:
    attention = cast(Attention, module)
    norm = None if attention.group_norm is None else _norm(attention.group_norm, dtype)
    three = (attention.to_q, attention.to_k, attention.to_v)
    qkv = _linear(torch.cat([p.weight for p in three]), torch.cat([p.bias for p in three]), dtype)
    last = cast(nn.Linear, attention.to_out[0])
    out, heads, output_scale = _linear(last.weight, last.bias, dtype), attention.heads, attention.output_scale

    def forward(x: Tensor) -> Tensor:
        b, c, height, width = x.shape
        tokens = (x if norm is None else norm(x)).permute(0, 2, 3, 1).reshape(b, height * width, c)
        q, k, v = qkv(tokens).view(b, height * width, 3, heads, c // heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, height * width, c)
        h = x + out(mixed).view(b, height, width, c).permute(0, 3, 1, 2)
        return h if output_scale == 1.0 else h.div_(output_scale)

    return forward


def _downsample(module: nn.Module, dtype: torch.dtype, layout: Layout) -> Function:
    down = cast(Downsample, module)
    conv = _convolution(down.conv, dtype, layout)
    return conv if down.padding else lambda x: conv(F.pad(x, (0, 1, 0, 1)))


def _upsample(module: nn.Module, dtype: torch.dtype, layout: Layout) -> Function:
    conv = _convolution(cast(Upsample, module).conv, dtype, layout)
    return lambda x: conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


_FOLDS = {Attention: _attention, Downsample: _downsample, Upsample: _upsample}
