"""Group normalization fused with an addition before it, and with scale, shift and SiLU after it.

In memory an image is [H, W, C]. A program handles some whole groups of one row, as a tile [pixels, channels], where
the channels of a group are padded to a power of two. The number of groups is chosen such that it reads at least 32
contiguous bytes, the smallest memory transaction; 64 where registers allow, 128 for large maps. Sums run over the
pixels of each channel first, and over the channels of a group when few numbers are left.

A small map is read once: its tile stays in registers between statistics and output. A large one is cut into at most 64
chunks of pixels. A first launch writes each chunk's mean and centred sum of squares, a second one merges them (Chan et
al. 1983, "Algorithms for computing the sample variance") and normalizes; it reads its pixels again, from the L2 cache
where they fit. Each of its programs takes a whole chunk, so that it reads few statistics compared with its pixels.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_TILE = 16384  # elements: 32 for each of a program's 512 threads, which leaves registers for two programs
MAX_CHUNKS = 64


@dataclass(frozen=True)
class Tiling:
    """The partition of a map.

    Attributes:
        P, G, K: a tile's pixels, groups, and channels per group with padding; powers of two.
        tiles: per program, one after another.
        chunks: programs along the pixels; 1 where a program reads whole groups.
        warps: of 32 threads, per program.
    """

    P: int
    G: int
    K: int
    tiles: int
    chunks: int
    warps: int


@functools.cache
def tiling(C: int, pixels: int, groups: int, itemsize: int) -> Tiling:
    """The tiling for the shape of one row, see :mod:`model.network.kernels`.

    One row of 32 x 32 x 128 in bfloat16 is eight programs of 32 KiB each: they do not fill a device, but more programs
    would need a second launch, which is assumed to cost more than it saves (not measured).
    """
    per_group = C // groups
    K = _power(per_group)

    def groups_of(width: int) -> int:
        return min(_power(-(-width // (per_group * itemsize))), _power(groups))

    def warps(numbers: int) -> int:
        return min(max(numbers // 512, 1), 16)  # 16 elements a thread, up to 512 threads

    P = _power(pixels)
    for width, most in ((64, MAX_TILE // 2), (32, MAX_TILE)):
        G = groups_of(width)
        numbers = P * G * K
        if numbers <= most:
            return Tiling(P, G, K, 1, 1, warps(numbers))
    G = groups_of(128)
    P = max(MAX_TILE // 2 // (G * K), 1)
    tiles = -(-pixels // (P * MAX_CHUNKS))
    return Tiling(P, G, K, tiles, -(-pixels // (P * tiles)), warps(P * G * K))


def _power(n: int) -> int:
    """The smallest power of two >= n."""
    return 1 << (n - 1).bit_length()


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
    """SiLU((GroupNorm(x + add) · weight + bias) · (1 + scale) + shift), in float32, rounded once at the end.

    The variance is the mean square of centred values, so a mean that is large beside it costs no accuracy.

    Args:
        x: [B, C, H, W], channels_last in memory, of any floating dtype up to float32; B below 65536.
        weight: float32 [C].
        bias: float32 [C].
        groups: divides C.
        silu: y · sigmoid(y) at the end.
        add: [B, C], or [1, C] for all rows; channels contiguous, rows of any stride.
        scale_shift: [B, 2C] or [1, 2C], scales first; likewise.

    Returns:
        A new tensor like ``x``.
    """
    B, C, H, W = x.shape
    assert x.is_contiguous(memory_format=torch.channels_last), "This is a bug: norm needs channels_last."
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
        sizes["POWER"] = _power(cut.chunks)
        _normalize[grid](x, out, moments, *before, *after, SILU=silu, **sizes, **options)
    return out


def _stride(rows: Tensor | None, B: int, width: int) -> int:
    """Of the first dimension, in elements; 0 where one row serves all."""
    if rows is None:
        return 0
    assert rows.shape in ((B, width), (1, width)), (
        "This is a bug: norm needs a row of channels for each row of x, or one for all."
    )
    assert rows.stride(1) == 1, "This is a bug: norm needs contiguous channels."
    return rows.stride(0) if len(rows) > 1 else 0


# These are read once per channel: not worth a compilation for each alignment.
_jit = triton.jit(
    do_not_specialize=["add_stride", "scale_shift_stride"],
    do_not_specialize_on_alignment=["add", "scale_shift", "weight", "bias"],
)


@_jit
def _whole(
    x, out, add, add_stride, weight, bias, scale_shift, scale_shift_stride, eps,
    SILU: tl.constexpr, C: tl.constexpr, PIXELS: tl.constexpr, GROUPS: tl.constexpr,
    P: tl.constexpr, G: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Some groups of a row, all pixels."""
    row = tl.program_id(2).to(tl.int64)
    channel, real = _channels(C, GROUPS, G, K)
    at, inside = _pixels(0, channel, real, C, PIXELS, P)
    first = row * C * PIXELS
    h = tl.load(x + first + at, mask=inside, other=0.0).to(tl.float32)
    h += _or_zero(add, row * add_stride + channel, real)
    mean, m2 = _moments(h, inside, PIXELS * (C // GROUPS), G, K)
    gain, shift = _affine(
        m2, eps, weight, bias, scale_shift, row * scale_shift_stride, channel, real, C, PIXELS, GROUPS
    )
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
    channel, real = _channels(C, GROUPS, G, K)
    added = _or_zero(add, row * add_stride + channel, real)
    mean = tl.zeros([1, G * K], tl.float32)
    m2 = tl.zeros([1, G * K], tl.float32)
    counted = 0.0
    for tile in range(TILES):
        pixel = (chunk * TILES + tile) * P
        at, inside = _pixels(pixel, channel, real, C, PIXELS, P)
        h = tl.load(x + row * C * PIXELS + at, mask=inside, other=0.0).to(tl.float32) + added
        new = (tl.minimum(tl.maximum(PIXELS - pixel, 0), P) * (C // GROUPS)).to(tl.float32)
        mean_of_new, m2_of_new = _moments(h, inside, tl.maximum(new, 1.0), G, K)
        share = tl.div_rn(new, counted + new)
        m2 += m2_of_new + (mean_of_new - mean) * (mean_of_new - mean) * (counted * share)
        mean += (mean_of_new - mean) * share
        counted += new
    group, k = _groups(G, K)
    place = moments + (row * CHUNKS + chunk) * 2 * GROUPS + group
    tl.store(place, mean, mask=real & (k == 0))
    tl.store(place + GROUPS, m2, mask=real & (k == 0))


@_jit
def _normalize(
    x, out, moments, add, add_stride, weight, bias, scale_shift, scale_shift_stride, eps,
    SILU: tl.constexpr, C: tl.constexpr, PIXELS: tl.constexpr, GROUPS: tl.constexpr,
    P: tl.constexpr, G: tl.constexpr, K: tl.constexpr, TILES: tl.constexpr, CHUNKS: tl.constexpr, POWER: tl.constexpr,
):  # fmt: skip
    """A chunk of some groups, by the moments of all chunks."""
    row, chunk = tl.program_id(2).to(tl.int64), tl.program_id(1)
    channel, real = _channels(C, GROUPS, G, K)
    mean, m2 = _merged(moments + row * CHUNKS * 2 * GROUPS, C, PIXELS, GROUPS, P * TILES, G, K, CHUNKS, POWER)
    centre = tl.where(real, mean, 0.0) - _or_zero(add, row * add_stride + channel, real)
    gain, shift = _affine(
        m2, eps, weight, bias, scale_shift, row * scale_shift_stride, channel, real, C, PIXELS, GROUPS
    )
    first = row * C * PIXELS
    for tile in range(TILES):
        at, inside = _pixels((chunk * TILES + tile) * P, channel, real, C, PIXELS, P)
        h = tl.load(x + first + at, mask=inside, other=0.0).to(tl.float32)
        y = _silu((h - centre) * gain + shift, SILU)
        tl.store(out + first + at, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _groups(G: tl.constexpr, K: tl.constexpr):
    """Each channel's group and place in it, [1, G · K]."""
    i = tl.arange(0, G * K)[None, :]
    return tl.program_id(0) * G + i // K, i % K


@triton.jit
def _channels(C: tl.constexpr, GROUPS: tl.constexpr, G: tl.constexpr, K: tl.constexpr):
    """The channels of the program's groups, and which of them there are: [1, G · K]."""
    if K == C // GROUPS:  # the same as below, and the compiler sees that they lie side by side across groups
        channel = tl.program_id(0) * G * K + tl.arange(0, G * K)[None, :]
        return channel, channel < C
    group, k = _groups(G, K)
    channel = group * (C // GROUPS) + k
    return channel, (channel < C) & (k < C // GROUPS)


@triton.jit
def _pixels(pixel, channel, real, C: tl.constexpr, PIXELS: tl.constexpr, P: tl.constexpr):
    """Where the tile [P, G · K] from ``pixel`` on lies in its row, and what of it there is."""
    p = pixel + tl.arange(0, P)[:, None]
    return p * C + channel, (p < PIXELS) & real


@triton.jit
def _or_zero(rows, at, real):
    return 0.0 if rows is None else tl.load(rows + at, mask=real, other=0.0).to(tl.float32)


@triton.jit
def _of_groups(x, G: tl.constexpr, K: tl.constexpr):
    """Sums within each group of x [G · K], repeated for each of its channels: [1, G · K]."""
    return _to_channels(tl.sum(tl.reshape(x, [G, K]), axis=1), G, K)


@triton.jit
def _to_channels(x, G: tl.constexpr, K: tl.constexpr):
    return tl.reshape(tl.broadcast_to(x[:, None], [G, K]), [1, G * K])


@triton.jit
def _moments(h, inside, count, G: tl.constexpr, K: tl.constexpr):
    """Mean and centred sum of squares of each channel's group, [1, G · K]."""
    mean = _of_groups(tl.sum(tl.where(inside, h, 0.0), axis=0), G, K) / count
    centred = tl.where(inside, h - mean, 0.0)
    return mean, _of_groups(tl.sum(centred * centred, axis=0), G, K)


@triton.jit
def _merged(
    moments, C: tl.constexpr, PIXELS: tl.constexpr, GROUPS: tl.constexpr, CHUNK: tl.constexpr,
    G: tl.constexpr, K: tl.constexpr, CHUNKS: tl.constexpr, POWER: tl.constexpr,
):  # fmt: skip
    """``_moments`` of all chunks together; each has ``CHUNK`` pixels, but for the last."""
    chunk = tl.arange(0, POWER)[:, None]
    group = tl.program_id(0) * G + tl.arange(0, G)[None, :]
    inside = (chunk < CHUNKS) & (group < GROUPS)
    count = (tl.maximum(tl.minimum(PIXELS - chunk * CHUNK, CHUNK), 0) * (C // GROUPS)).to(tl.float32)
    at = chunk * 2 * GROUPS + group
    means = tl.load(moments + at, mask=inside, other=0.0)
    m2s = tl.load(moments + at + GROUPS, mask=inside, other=0.0)
    mean = tl.sum(means * count, axis=0) / (PIXELS * (C // GROUPS))
    off = means - mean[None, :]
    return _to_channels(mean, G, K), _to_channels(tl.sum(m2s + off * off * count, axis=0), G, K)


@triton.jit
def _affine(
    m2, eps, weight, bias, scale_shift, scale_shift_row, channel, real,
    C: tl.constexpr, PIXELS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """(gain, shift) [1, G · K]: what follows the statistics, as one multiply-add of centred values."""
    gain = tl.load(weight + channel, mask=real, other=0.0) * tl.rsqrt(m2 / (PIXELS * (C // GROUPS)) + eps)
    shift = tl.load(bias + channel, mask=real, other=0.0)
    scale = 1.0 + _or_zero(scale_shift, scale_shift_row + channel, real)
    return gain * scale, shift * scale + _or_zero(scale_shift, scale_shift_row + C + channel, real)


@triton.jit
def _silu(y, SILU: tl.constexpr):
    return y * tl.sigmoid(y) if SILU else y
