"""The end of a residual block: two images and a convolution's bias in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # of 128 threads: 16 bytes of bfloat16 each, the widest access; many small programs hide their waiting


def residual(h: Tensor, skip: Tensor, bias: Tensor, scale: float = 1.0) -> Tensor:
    """(h + skip + bias) / scale in float32, rounded once. It is written over ``h``, which must be the caller's own.

    Args:
        h: [B, C, H, W], channels_last in memory, of any floating dtype up to float32.
        skip: like ``h``.
        bias: float32 [C].
        scale: not 0.

    Returns:
        ``h``.
    """
    assert (h.shape, h.dtype) == (skip.shape, skip.dtype), "This is a bug: residual of unlike tensors."
    for tensor in (h, skip):
        assert tensor.is_contiguous(memory_format=torch.channels_last), "This is a bug: residual wants channels_last."
    blocks = triton.cdiv(h.numel(), BLOCK)
    with torch.cuda.device_of(h):
        _residual[blocks,](
            h, skip, bias, scale, h.numel(), C=h.shape[1], SCALED=scale != 1, BLOCK=BLOCK,
            num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return h


# Pixel by pixel there is no order of terms that alignment or size could change.
@triton.jit
def _residual(h, skip, bias, scale, size, C: tl.constexpr, SCALED: tl.constexpr, BLOCK: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    i = tl.arange(0, BLOCK)
    inside = first + i < size
    channel = ((first % C).to(tl.int32) + i) % C
    total = tl.load(h + first + i, mask=inside).to(tl.float32) + tl.load(skip + first + i, mask=inside).to(tl.float32)
    total += tl.load(bias + channel, mask=inside)
    if SCALED:
        total = tl.div_rn(total, scale)
    tl.store(h + first + i, total.to(h.dtype.element_ty), mask=inside)
