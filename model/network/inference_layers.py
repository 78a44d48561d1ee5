"""The layers of :class:`model.network.inference.InferenceUNet`: functions built from the modules of a UNet.

Layout ``fused`` is for CUDA devices: images are [B, H, W, C] in memory; the operations between two convolutions run in
a few passes of our own kernels, with statistics and sums in float32 whatever the activations are. A convolution has no
bias there: the norm or the sum after it adds it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.network.unet import Attention, Downsample, ResnetBlock, Upsample

Layout = Literal["plain", "channels_last", "packed", "fused"]
Function = Callable[[Tensor], Tensor]


def norm(module: nn.GroupNorm, dtype: torch.dtype, layout: Layout, *, silu: bool = False) -> Function:
    """A group norm, with the SiLU after it where there is one."""
    groups, eps = module.num_groups, module.eps
    if layout == "fused":
        fused, w, b = _kernels().norm, module.weight.float(), module.bias.float()
        return lambda x: fused(x, w, b, groups, eps, silu=silu)
    weight, bias = module.weight.to(dtype), module.bias.to(dtype)
    if silu:
        return lambda x: _silu(F.group_norm(x, groups, weight, bias, eps))
    return lambda x: F.group_norm(x, groups, weight, bias, eps)


def convolution(conv: nn.Conv2d, dtype: torch.dtype, layout: Layout, *, with_bias: bool = True) -> Function:
    bias = None if conv.bias is None or not with_bias else conv.bias.to(dtype)
    stride, padding = list(conv.stride), [int(p) for p in conv.padding]
    if layout == "plain":
        weight = conv.weight.to(dtype)
        return lambda x: F.conv2d(x, weight, bias, stride, padding)
    weight = conv.weight.to(dtype, memory_format=torch.channels_last)
    if layout != "packed":
        return lambda x: F.conv2d(x, weight, bias, stride, padding)
    onednn = torch.ops.mkldnn  # as inductor calls it
    packed = onednn._reorder_convolution_weight(weight, padding, stride, [1, 1], 1)
    return lambda x: onednn._convolution_pointwise(x, packed, bias, padding, stride, [1, 1], 1, "none", [], "")


def resnet(block: ResnetBlock, dtype: torch.dtype, layout: Layout) -> Callable[[Tensor, Tensor], Tensor]:
    """A residual block: (x [B, C, H, W], its columns of the conditioning [B, …]) to [B, C', H, W].

    In layout ``fused`` the conditioning includes the first convolution's bias, unless it scales and shifts.
    """
    if layout == "fused":
        return _fused_resnet(block, dtype)
    norm1, norm2 = norm(block.norm1, dtype, layout, silu=True), norm(block.norm2, dtype, layout)
    conv1, conv2 = convolution(block.conv1, dtype, layout), convolution(block.conv2, dtype, layout)
    shortcut = None if block.conv_shortcut is None else convolution(block.conv_shortcut, dtype, layout)
    scale_shift, output_scale = block.scale_shift, block.output_scale

    def forward(x: Tensor, conditioning: Tensor) -> Tensor:
        h = conv1(norm1(x))
        conditioning = conditioning[:, :, None, None]
        if scale_shift:
            scale, shift = conditioning.chunk(2, dim=1)
            h = torch.addcmul(shift, norm2(h), 1 + scale)
        else:
            h = norm2(h.add_(conditioning))
        h = conv2(_silu(h)).add_(x if shortcut is None else shortcut(x))
        return h if output_scale == 1.0 else h.div_(output_scale)

    return forward


def _fused_resnet(block: ResnetBlock, dtype: torch.dtype) -> Callable[[Tensor, Tensor], Tensor]:
    kernels = _kernels()
    norm1 = norm(block.norm1, dtype, "fused", silu=True)
    conv1, conv2 = (convolution(conv, dtype, "fused", with_bias=False) for conv in (block.conv1, block.conv2))
    weight, bias, groups, eps = block.norm2.weight, block.norm2.bias, block.norm2.num_groups, block.norm2.eps
    bias1, bias2 = _bias(block.conv1)[None], _bias(block.conv2)
    shortcut = None
    if block.conv_shortcut is not None:
        shortcut = convolution(block.conv_shortcut, dtype, "fused", with_bias=False)
        bias2 = bias2 + _bias(block.conv_shortcut)
    scale_shift, output_scale = block.scale_shift, block.output_scale

    def forward(x: Tensor, conditioning: Tensor) -> Tensor:
        h = conv1(norm1(x))
        if scale_shift:
            h = kernels.norm(h, weight, bias, groups, eps, silu=True, add=bias1, scale_shift=conditioning)
        else:
            h = kernels.norm(h, weight, bias, groups, eps, silu=True, add=conditioning)
        skip = x if shortcut is None else shortcut(x)
        return kernels.residual(conv2(h), skip, bias2, output_scale)

    return forward


def attention(module: nn.Module, dtype: torch.dtype, layout: Layout) -> Function:
    """Self-attention with its residual connection; the three projections are one."""
    this = cast(Attention, module)
    normed = (lambda x: x) if this.group_norm is None else norm(this.group_norm, dtype, layout)
    three = (this.to_q, this.to_k, this.to_v)
    qkv = _linear(torch.cat([p.weight for p in three]), torch.cat([p.bias for p in three]), dtype)
    last = cast(nn.Linear, this.to_out[0])
    add = _sum(last.bias, layout, this.output_scale)
    out, heads = _linear(last.weight, None if layout == "fused" else last.bias, dtype), this.heads

    def forward(x: Tensor) -> Tensor:
        b, c, height, width = x.shape
        tokens = normed(x).permute(0, 2, 3, 1).reshape(b, height * width, c)
        q, k, v = qkv(tokens).view(b, height * width, 3, heads, c // heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, height * width, c)
        return add(out(mixed).view(b, height, width, c).permute(0, 3, 1, 2), x)

    return forward


def downsample(module: nn.Module, dtype: torch.dtype, layout: Layout) -> Function:
    down = cast(Downsample, module)
    conv = convolution(down.conv, dtype, layout)
    return conv if down.padding else lambda x: conv(F.pad(x, (0, 1, 0, 1)))


def upsample(module: nn.Module, dtype: torch.dtype, layout: Layout) -> Function:
    conv = convolution(cast(Upsample, module).conv, dtype, layout)
    return lambda x: conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


BUILDERS = {Attention: attention, Downsample: downsample, Upsample: upsample}


def _silu(x: Tensor) -> Tensor:
    return F.silu(x, inplace=True)  # x is always a temporary


def _linear(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Function:
    weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    return lambda x: F.linear(x, weight, bias)


def _bias(conv: nn.Conv2d) -> Tensor:
    return torch.zeros_like(conv.weight[:, 0, 0, 0]) if conv.bias is None else conv.bias


def _sum(bias: Tensor, layout: Layout, scale: float) -> Callable[[Tensor, Tensor], Tensor]:
    """(h + x) / scale; in layout ``fused`` with the bias that h lacks."""
    if layout == "fused":
        residual = _kernels().residual
        return lambda h, x: residual(h, x, bias, scale)
    return lambda h, x: x + h if scale == 1.0 else (x + h).div_(scale)


class _Kernels(NamedTuple):
    norm: Callable[..., Tensor]
    residual: Callable[..., Tensor]


def _kernels() -> _Kernels:
    """Imported late: they need Triton, which only CUDA builds of torch install."""
    from model.network.kernels.norm import norm as fused_norm  # noqa: PLC0415
    from model.network.kernels.residual import residual  # noqa: PLC0415

    return _Kernels(fused_norm, residual)
