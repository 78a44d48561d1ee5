"""Group normalization with what stands around it: an addition before; scale, shift and SiLU after.

In memory a picture is [H, W, C]. A program handles some whole groups of one row, as a tile [pixels, groups, channels of
a group], the last padded to a power of two. How many groups is chosen so that it reads at least 32 bytes side by side,
the smallest piece that the memory hands out; 64 where registers allow.

A small map is read once: its tile stays in registers between statistics and output. A large one is cut into at most 64
chunks of pixels. A first launch leaves each chunk's mean and centred sum of squares, a second one merges them (Chan et
al. 1983, "Algorithms for computing the sample variance") and normalizes; it reads its pixels again, from the L2 cache
where they fit. Each of its programs takes a whole chunk, so that the statistics it reads are few beside its pixels.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

LARGEST_TILE = 16384  # numbers: 32 for each of the 512 threads of a program, which leaves registers for two of them
MAX_CHUNKS = 64


@dataclass(frozen=True)
class Tiling:
    """How a map is cut.

    Attributes:
        P, G, K: a tile's pixels, groups and (padded) channels per group; powers of two.
        tiles: how many a program takes, one after another.
        chunks: programs along the pixels; 1 where a program sees whole groups.
        warps: 32 threads each.
    """

    P: int
    G: int
    K: int
    tiles: int
    chunks: int
    warps: int


@functools.cache
def tiling(C: int, pixels: int, groups: int, itemsize: int) -> Tiling:
    """By the shape of one row alone, see :mod:`model.kernels`.

    One row of 32 x 32 x 128 is eight programs of 16 KiB each: too few to fill a card, and each as short as a launch.
    """
    per_group = C // groups
    K = triton.next_power_of_2(per_group)

    def groups_of(width: int) -> int:
        return min(triton.next_power_of_2(-(-width // (per_group * itemsize))), triton.next_power_of_2(groups))

    def warps(numbers: int) -> int:
        return min(max(numbers // 512, 1), 16)  # 16 numbers a thread, until there are too many

    P = triton.next_power_of_2(pixels)
    for width, largest in ((64, LARGEST_TILE // 2), (32, LARGEST_TILE)):
        G = groups_of(width)
        if P * G * K <= largest:
            return Tiling(P, G, K, 1, 1, warps(P * G * K))
    G = groups_of(128)
    P = max(LARGEST_TILE // 2 // (G * K), 1)
    tiles = -(-pixels // (P * MAX_CHUNKS))
    return Tiling(P, G, K, tiles, -(-pixels // (P * tiles)), warps(P * G * K))


def norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    *,
    silu: bool,
    add: Tensor | None = None,
    scale_shift: Tensor | None = None,
) -> Tensor:
    """GroupNorm of x + add, times weight plus bias, times 1 + scale plus shift, through SiLU; rounded once, at the end.

    Everything in between is float32; the variance is the mean square of what is centred already, so that a mean that
    is large beside it does no harm.

    Args:
        x: [B, C, H, W], channels_last in memory, of any floating dtype up to float32; B below 65536.
        weight: float32 [C].
        bias: float32 [C].
        groups: divides C.
        silu: y · sigmoid(y) at the end.
        add: [B, C], or [1, C] for all rows alike; its channels must lie side by side, its rows may be apart.
        scale_shift: [B, 2C] or [1, 2C], first scales, then shifts; likewise.

    Returns:
        A fresh tensor like ``x``.
    """
    B, C, H, W = x.shape
    assert x.is_contiguous(memory_format=torch.channels_last), "This is a bug: norm wants channels_last."
    x = x if x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.preserve_format)
    out = torch.empty_like(x, memory_format=torch.channels_last)
    cut = tiling(C, H * W, groups, x.element_size())
    blocks = -(-groups // cut.G)
    before = (add, _stride(add, B, C))
    after = (weight, bias, scale_shift, _stride(scale_shift, B, 2 * C), eps)
    options = {"num_warps": cut.warps, "enable_fp_fusion": True}
    sizes = {"C": C, "PIXELS": H * W, "GROUPS": groups, "P": cut.P, "G": cut.G, "K": cut.K}
    with torch.cuda.device_of(x):
        if cut.chunks == 1:
            _whole[blocks, 1, B](x, out, *before, *after, SILU=silu, **sizes, **options)
            return out
        moments = torch.empty(B, cut.chunks, 2, groups, dtype=torch.float32, device=x.device)
        sizes |= {"TILES": cut.tiles, "CHUNKS": cut.chunks}
        grid = (blocks, cut.chunks, B)
        _measure[grid](x, moments, *before, **sizes, **options)
        _normalize[grid](x, out, moments, *before, *after, SILU=silu, **sizes, **options)
    return out


def _stride(rows: Tensor | None, B: int, width: int) -> int:
    """From one row to the next, in elements; 0 where there is one for all."""
    if rows is None:
        return 0
    assert rows.shape[1] == width and len(rows) in (1, B) and rows.stride(1) == 1, "This is a bug: no rows of channels."
    return rows.stride(0) if len(rows) > 1 else 0


# What is read once per channel is not worth compiling again for each alignment that it happens to have.
_jit = triton.jit(
    do_not_specialize=["add_stride", "told_stride"],
    do_not_specialize_on_alignment=["add", "told", "weight", "bias"],
)


@_jit
def _whole(
    x, out, add, add_stride, weight, bias, told, told_stride, eps,
    SILU: tl.constexpr, C: tl.constexpr, PIXELS: tl.constexpr, GROUPS: tl.constexpr,
    P: tl.constexpr, G: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Some groups of a row, all pixels."""
    row = tl.program_id(2).to(tl.int64)
    channel, real = _channels(tl.program_id(0) * G, C, GROUPS, G, K)
    at, inside = _pixels(0, channel, real, C, PIXELS, P)
    first = row * C * PIXELS
    h = _read(x + first, at, inside, add, row * add_stride, channel, real)
    mean, m2 = _moments(h, inside, PIXELS * (C // GROUPS))
    scale = tl.rsqrt(m2 / (PIXELS * (C // GROUPS)) + eps)
    gain, shift = _gain_and_shift(scale, weight, bias, told, row * told_stride, channel, real, C)
    y = _silu((h - mean) * gain + shift, SILU)
    tl.store(out + first + at, y.to(out.dtype.element_ty), mask=inside)


@_jit
def _measure(
    x, moments, add, add_stride,
    C: tl.constexpr, PIXELS: tl.constexpr, GROUPS: tl.constexpr, P: tl.constexpr, G: tl.constexpr, K: tl.constexpr,
    TILES: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Mean and centred sum of squares of a chunk, to moments [B, CHUNKS, 2, GROUPS]."""
    row, chunk = tl.program_id(2).to(tl.int64), tl.program_id(1)
    channel, real = _channels(tl.program_id(0) * G, C, GROUPS, G, K)
    mean = tl.zeros([1, G, 1], tl.float32)
    m2 = tl.zeros([1, G, 1], tl.float32)
    seen = 0.0
    for tile in range(TILES):
        pixel = (chunk * TILES + tile) * P
        at, inside = _pixels(pixel, channel, real, C, PIXELS, P)
        h = _read(x + row * C * PIXELS, at, inside, add, row * add_stride, channel, real)
        new = (tl.minimum(tl.maximum(PIXELS - pixel, 0), P) * (C // GROUPS)).to(tl.float32)
        mean_of_new, m2_of_new = _moments(h, inside, tl.maximum(new, 1.0))
        share = tl.div_rn(new, seen + new)
        m2 += m2_of_new + (mean_of_new - mean) * (mean_of_new - mean) * (seen * share)
        mean += (mean_of_new - mean) * share
        seen += new
    group = tl.program_id(0) * G + tl.arange(0, G)[None, :, None]
    place = moments + (row * CHUNKS + chunk) * 2 * GROUPS + group
    tl.store(place, mean, mask=group < GROUPS)
    tl.store(place + GROUPS, m2, mask=group < GROUPS)


@_jit
def _normalize(
    x, out, moments, add, add_stride, weight, bias, told, told_stride, eps,
    SILU: tl.constexpr, C: tl.constexpr, PIXELS: tl.constexpr, GROUPS: tl.constexpr,
    P: tl.constexpr, G: tl.constexpr, K: tl.constexpr, TILES: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """A chunk of some groups, by the moments of all chunks."""
    row, chunk = tl.program_id(2).to(tl.int64), tl.program_id(1)
    channel, real = _channels(tl.program_id(0) * G, C, GROUPS, G, K)
    mean, m2 = _merged(moments + row * CHUNKS * 2 * GROUPS, C, PIXELS, GROUPS, P * TILES, G, CHUNKS)
    scale = tl.rsqrt(m2 / (PIXELS * (C // GROUPS)) + eps)
    gain, shift = _gain_and_shift(scale, weight, bias, told, row * told_stride, channel, real, C)
    first = row * C * PIXELS
    if add is not None:
        mean = mean - tl.load(add + row * add_stride + channel, mask=real, other=0.0).to(tl.float32)
    for tile in range(TILES):
        at, inside = _pixels((chunk * TILES + tile) * P, channel, real, C, PIXELS, P)
        h = tl.load(x + first + at, mask=inside, other=0.0).to(tl.float32)
        y = _silu((h - mean) * gain + shift, SILU)
        tl.store(out + first + at, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _channels(group, C: tl.constexpr, GROUPS: tl.constexpr, G: tl.constexpr, K: tl.constexpr):
    """Channels [1, G, K] of the groups from ``group`` on, and which of them there are."""
    g = group + tl.arange(0, G)[None, :, None]
    k = tl.arange(0, K)[None, None, :]
    return g * (C // GROUPS) + k, (g < GROUPS) & (k < C // GROUPS)


@triton.jit
def _pixels(pixel, channel, real, C: tl.constexpr, PIXELS: tl.constexpr, P: tl.constexpr):
    """Where the tile [P, G, K] from ``pixel`` on lies in its row, and what of it there is."""
    p = pixel + tl.arange(0, P)[:, None, None]
    return p * C + channel, (p < PIXELS) & real


@triton.jit
def _read(x, at, inside, add, add_row, channel, real):
    h = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if add is not None:
        h += tl.load(add + add_row + channel, mask=real, other=0.0).to(tl.float32)
    return h


@triton.jit
def _moments(h, inside, count):
    """Mean and centred sum of squares of each group, [1, G, 1]."""
    mean = tl.sum(tl.sum(tl.where(inside, h, 0.0), axis=2, keep_dims=True), axis=0, keep_dims=True) / count
    centred = tl.where(inside, h - mean, 0.0)
    return mean, tl.sum(tl.sum(centred * centred, axis=2, keep_dims=True), axis=0, keep_dims=True)


@triton.jit
def _merged(
    moments, C: tl.constexpr, PIXELS: tl.constexpr, GROUPS: tl.constexpr,
    CHUNK: tl.constexpr, G: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Mean and centred sum of squares of all chunks of ``CHUNK`` pixels, of which the last may be shorter: [1, G, 1]."""
    chunk = tl.arange(0, triton.next_power_of_2(CHUNKS))[:, None]
    group = tl.program_id(0) * G + tl.arange(0, G)[None, :]
    inside = (chunk < CHUNKS) & (group < GROUPS)
    count = (tl.maximum(tl.minimum(PIXELS - chunk * CHUNK, CHUNK), 0) * (C // GROUPS)).to(tl.float32)
    at = chunk * 2 * GROUPS + group
    means = tl.load(moments + at, mask=inside, other=0.0)
    m2s = tl.load(moments + at + GROUPS, mask=inside, other=0.0)
    mean = tl.sum(means * count, axis=0) / (PIXELS * (C // GROUPS))
    off = means - mean[None, :]
    # Two dimensions until here: the compiler would otherwise move tiles, not these few numbers, from thread to thread.
    return mean[None, :, None], tl.sum(m2s + off * off * count, axis=0)[None, :, None]


@triton.jit
def _gain_and_shift(scale, weight, bias, told, told_row, channel, real, C: tl.constexpr):
    """What is done to a centred value, [1, G, K] each: everything after the statistics is one multiply-add."""
    gain = scale * tl.load(weight + channel, mask=real, other=0.0)
    shift = tl.load(bias + channel, mask=real, other=0.0)
    if told is not None:
        factor = 1.0 + tl.load(told + told_row + channel, mask=real, other=0.0).to(tl.float32)
        gain *= factor
        shift = shift * factor + tl.load(told + told_row + C + channel, mask=real, other=0.0).to(tl.float32)
    return gain, shift


@triton.jit
def _silu(y, SILU: tl.constexpr):
    return y * tl.sigmoid(y) if SILU else y
