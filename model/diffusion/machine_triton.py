"""The row machine's update as Triton kernels: rows of different plans in one launch.

:func:`model.diffusion.machine.advance` is the text to read. ``update`` is bit-identical to it: every product and every
sum is rounded separately, in the same order, so the kernels are compiled without fused multiply-adds. A term whose
coefficient is 0 is left out and its tensor is not read, so NaN there does not spread; the machine does the same for a
single row. Only the sign of a zero may differ.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from model.diffusion.plan import Columns

BLOCK = 1024  # 64 x 64 x 3 is twelve programs a row
GUARD_BLOCK = 8192

_P, _Q, _LIMIT = tl.constexpr(Columns.P), tl.constexpr(Columns.Q), tl.constexpr(Columns.LIMIT)
_E_U, _E_O, _E_X = tl.constexpr(Columns.E_U), tl.constexpr(Columns.E_O), tl.constexpr(Columns.E_X)
_LEARNED, _L0, _L1 = tl.constexpr(Columns.LEARNED), tl.constexpr(Columns.L0), tl.constexpr(Columns.L1)
_WATCH = tl.constexpr(Columns.WATCH)
# The interpreter has no libdevice. On CUDA devices its exp is CUDA's expf, as in torch; tl.exp is less exact.
_INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


def update(
    state: Tensor, u: Tensor, output: Tensor, z: Tensor | None, coef: Tensor, x_0: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The state after the forward, without dynamic thresholding and without guards.

    Args:
        state: float32 [B, R, C, H, W]; left untouched, like the other arguments.
        u: float32 [B, C, H, W], the network's input.
        output: float32 [B, C, H, W], its output, or [B, 2C, H, W] where it has learned the variance.
        z: float32 [B, C, H, W], standard normal where a row draws noise, anything elsewhere; None if no row does.
        coef: float32 [B, K], lines of ``Plan.table(R)``.
        x_0: float32 [B, C, H, W], already clipped and thresholded; None computes and clips it.

    All must be contiguous and on one device; B below 65536.

    Returns:
        (the new state, x̂0).
    """
    B, R = state.shape[:2]
    size = u[0].numel()
    _check(state, u, output, z, x_0, coef)
    at = Columns(R)
    after, found = torch.empty_like(state), torch.empty_like(u) if x_0 is None else x_0
    with torch.cuda.device_of(state):
        _update[triton.cdiv(size, BLOCK), B](
            state, u, output, z, coef, x_0, after, found, coef.stride(0),
            SIZE=size, OUTPUT=output[0].numel(), R=R, BLOCK=BLOCK,
            B=at.b.start, C=at.c.start, S=at.s.start, A=at.A[0].start,
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return after, found


def predict(u: Tensor, output: Tensor, coef: Tensor) -> Tensor:
    """x̂0 [B, C, H, W] as in ``update``: clamped to each row's limit, not yet thresholded.

    Args:
        u: float32 [B, C, H, W], the network's input.
        output: float32 [B, C, H, W] or [B, 2C, H, W], its output.
        coef: float32 [B, K], lines of ``Plan.table(R)`` for any R.
    """
    size = u[0].numel()
    _check(u, output, coef)
    x_0 = torch.empty_like(u)
    with torch.cuda.device_of(u):
        _predict[triton.cdiv(size, BLOCK), len(u)](
            u, output, coef, x_0, coef.stride(0),
            SIZE=size, OUTPUT=output[0].numel(), BLOCK=BLOCK, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return x_0


def guard(after: Tensor, before: Tensor, coef: Tensor) -> None:
    """Apply the guards, in place on ``after``; see :class:`model.diffusion.plan.Guard`.

    The squares are summed in another order than in :mod:`model.diffusion.machine`, so the two may decide differently
    where the sums differ by no more than rounding. Equal images have equal sums.

    Args:
        after: float32 [B, R, C, H, W], contiguous.
        before: like ``after``, in other memory.
        coef: float32 [B, K], lines of ``Plan.table(R)``.
    """
    B, R = after.shape[:2]
    _check(after, before, coef)
    with torch.cuda.device_of(after):
        _guard[B,](
            after, before, coef, coef.stride(0),
            SIZE=after[0, 0].numel(), R=R, BLOCK=GUARD_BLOCK, INSTEAD=Columns(R).instead.start,
            num_warps=8, enable_fp_fusion=True,
        )  # fmt: skip


def _check(*tensors: Tensor | None) -> None:
    for tensor in tensors:
        if tensor is not None:
            assert tensor.dtype == torch.float32, "This is a bug: the kernels need float32."
            assert tensor.is_contiguous(), "This is a bug: the kernels need contiguous tensors."


_jit = triton.jit(do_not_specialize=["coef_stride"])


@_jit
def _update(
    state, u, output, z, coef, given, after, x_0, coef_stride,
    SIZE: tl.constexpr, OUTPUT: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
    B: tl.constexpr, C: tl.constexpr, S: tl.constexpr, A: tl.constexpr,
):  # fmt: skip
    """A block of a row, in all slots."""
    row = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < SIZE
    coef += row * coef_stride
    state += row * R * SIZE
    u_i = tl.load(u + row * SIZE + i, mask=inside)
    o_i = tl.load(output + row * OUTPUT + i, mask=inside)
    if given is None:
        x = _clean(coef, u_i, o_i, BLOCK)
        tl.store(x_0 + row * SIZE + i, x, mask=inside)
    else:
        x = tl.load(given + row * SIZE + i, mask=inside)
    eps = _plus(_plus(_plus(tl.zeros([BLOCK], tl.float32), coef + _E_U, u_i), coef + _E_O, o_i), coef + _E_X, x)
    if z is not None:
        noise = tl.load(z + row * SIZE + i, mask=inside)
    for slot in tl.static_range(R):
        new = tl.zeros([BLOCK], tl.float32)
        for source in tl.static_range(R):
            a = coef + A + slot * R + source
            used = tl.where(inside, tl.load(a), 0.0) != 0
            old = tl.load(state + source * SIZE + i, mask=used, other=0.0)
            new = _plus(new, a, old)
        new = _plus(_plus(new, coef + B + slot, x), coef + C + slot, eps)
        if z is not None:
            new = _plus(new, coef + S + slot, noise)
            if slot == 0 and OUTPUT > SIZE:
                v = tl.load(output + row * OUTPUT + SIZE + i, mask=inside)
                new = _plus(new, coef + _LEARNED, _exp((tl.load(coef + _L0) + tl.load(coef + _L1) * v) * 0.5) * noise)
        tl.store(after + (row * R + slot) * SIZE + i, new, mask=inside)


@_jit
def _predict(
    u, output, coef, x_0, coef_stride, SIZE: tl.constexpr, OUTPUT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < SIZE
    u_i = tl.load(u + row * SIZE + i, mask=inside)
    o_i = tl.load(output + row * OUTPUT + i, mask=inside)
    tl.store(x_0 + row * SIZE + i, _clean(coef + row * coef_stride, u_i, o_i, BLOCK), mask=inside)


@triton.jit
def _clean(coef, u, o, BLOCK: tl.constexpr):
    """x̂0 clamped to ±limit; the comparisons keep NaN."""
    x_0 = _plus(_plus(tl.zeros([BLOCK], tl.float32), coef + _P, u), coef + _Q, o)
    limit = tl.load(coef + _LIMIT)
    x_0 = tl.where(x_0 > limit, limit, x_0)
    return tl.where(x_0 < -limit, -limit, x_0)


@triton.jit
def _plus(total, coef, term):
    """total + coefficient · term; ``coef`` is the coefficient's address."""
    c = tl.load(coef)
    return tl.where(c != 0, total + c * term, total)


@triton.jit
def _exp(x):
    return tl.exp(x) if _INTERPRETED else libdevice.exp(x)


@_jit
def _guard(
    after, before, coef, coef_stride,
    SIZE: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr, INSTEAD: tl.constexpr,
):  # fmt: skip
    """One row. Slots are counted from 1 here; 0 is none."""
    row = tl.program_id(0).to(tl.int64)
    coef += row * coef_stride
    after += row * R * SIZE
    before += row * R * SIZE
    watch = tl.load(coef + _WATCH).to(tl.int32)
    if watch > 0:
        new = _squares(after + (watch - 1) * SIZE, SIZE, BLOCK)
        old = _squares(before + (watch - 1) * SIZE, SIZE, BLOCK)
        decreased = new < old  # false for NaN
        for slot in tl.static_range(R):
            source = tl.load(coef + INSTEAD + slot).to(tl.int32)
            if (source > 0) & (decreased == 0):
                for first in range(0, SIZE, BLOCK):
                    i = first + tl.arange(0, BLOCK)
                    kept = tl.load(before + (source - 1) * SIZE + i, mask=i < SIZE)
                    tl.store(after + slot * SIZE + i, kept, mask=i < SIZE)


@triton.jit
def _squares(x, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, SIZE, BLOCK):
        i = first + tl.arange(0, BLOCK)
        value = tl.load(x + i, mask=i < SIZE, other=0.0)
        total += value * value
    return tl.sum(total)
