"""The network's kernels against plain torch; and where kernels run, and whether the compiler takes them."""

import importlib
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import model.network.kernels

pytest.importorskip("triton")

from model.network.kernels.norm import norm, tiling
from model.network.kernels.residual import residual
from tests.kernels import CUDA, DEVICE, assert_batch_invariant, images, long, pick, randn

FLOAT = torch.finfo(torch.float32).eps  # an ulp of 1: two roundings
# Of the result's magnitude. A card rounds to the nearest bfloat16; the interpreter cuts off.
LAST = {torch.float32: FLOAT / 2, torch.bfloat16: torch.finfo(torch.bfloat16).eps / (2 if CUDA else 1)}


def normalized(x, weight, bias, groups, eps, silu, add=None, scale_shift=None):
    """In float64: (the result, the largest magnitude on its way, how large means are beside deviations)."""
    h = x.double() if add is None else x.double() + add.double()[:, :, None, None]
    of_groups = h.reshape(len(h), groups, -1)
    steepness = float((of_groups.mean(2).abs() / of_groups.var(2, correction=0).add(eps).sqrt()).max())
    y = F.group_norm(h, groups, weight.double(), bias.double(), eps)
    largest = float(y.abs().max())
    if scale_shift is not None:
        scale, shift = scale_shift.double()[:, :, None, None].chunk(2, dim=1)
        y = y * (1 + scale) + shift
        largest = max(largest, float((y - shift).abs().max()), float(y.abs().max()))
    return F.silu(y) if silu else y, largest, steepness


def assert_normalized(found, x, *arguments, **more):
    expected, largest, steepness = normalized(x, *arguments, **more)
    assert found.dtype == x.dtype
    assert found.is_contiguous(memory_format=torch.channels_last)
    # A mean of many numbers, their variance, a root and four operations: 16 ulps are above what they add up to, even
    # where numbers are added one after another, as the interpreter does. A mean that is off moves all numbers with it.
    bound = 16 * FLOAT * (1 + steepness) * (1 + largest) + LAST[x.dtype] * expected.abs()
    assert ((found.double() - expected).abs() <= bound).all(), float((found.double() - expected).abs().max())


# C, H, W, groups
SMALL = [
    (64, 4, 4, 32),
    (96, 8, 8, 32),  # 3 channels a group
    (192, 4, 8, 32),
    (384, 2, 2, 32),
    (448, 4, 4, 32),  # 14
    (672, 3, 5, 32),  # 21, and a number of pixels that is no power of two
    (1024, 1, 1, 32),
    (12, 7, 9, 3),  # groups that are no power of two
    (8, 16, 16, 1),
    (8, 5, 5, 8),  # every channel for itself
    (128, 32, 32, 32),
]
LARGE = [
    (64, 64, 64, 32),
    (96, 48, 40, 32),  # the last chunk is shorter
    (8, 47, 45, 1),
    (84, 33, 31, 4),
    (32, 140, 140, 4),  # several tiles a chunk, and not all of them there
    (640, 8, 8, 1),  # a group wider than a tile is high
]
QUICK = [(8, 47, 45, 1), (32, 140, 140, 4), (640, 8, 8, 1)]  # the smallest of each kind


def test_the_shapes_below_take_both_ways():
    for shapes, several in ((SMALL, False), (LARGE, True)):
        for C, H, W, groups in shapes:
            for itemsize in (2, 4):
                assert (tiling(C, H * W, groups, itemsize).chunks > 1) == several, (C, H, W, groups)
    assert all(tiling(32, 140 * 140, 4, itemsize).tiles > 1 for itemsize in (2, 4))


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        *itertools.product(SMALL, (torch.float32, torch.bfloat16)),
        *(long(shape, torch.bfloat16) for shape in LARGE if shape not in QUICK),
        *((shape, torch.bfloat16) for shape in QUICK),
        *(long(shape, torch.float32) for shape in LARGE),
    ],
    ids=str,
)
def test_norm_is_that_of_torch(shape, dtype):
    C, H, W, groups = shape
    x, weight, bias = images(1, 2, C, H, W, dtype=dtype), randn(2, C), randn(3, C)
    given = randn(4, 2, 5 * C, dtype=dtype)
    assert_normalized(norm(x, weight, bias, groups, 1e-5, silu=False), x, weight, bias, groups, 1e-5, False)
    more = {"add": given[:, C : 2 * C], "scale_shift": given[:, 3 * C :]}
    found = norm(x, weight, bias, groups, 1e-5, silu=True, **more)
    assert_normalized(found, x, weight, bias, groups, 1e-5, True, **more)


@pytest.mark.parametrize("shape", [(64, 4, 4, 32), (64, 40, 40, 16)], ids=["one launch", "two"])
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("added", "scaled"), [(0, 2), (1, 0), (2, 0), (2, 1)])
def test_addition_and_scale_shift_come_in_every_form(shape, silu, given, added, scaled):
    """``added`` and ``scaled``: how many rows they have, 0 for none, 1 for all alike."""
    C, H, W, groups = shape
    x, weight, bias = images(1, 2, C, H, W, dtype=torch.bfloat16), randn(2, C), randn(3, C)
    more = {
        "add": randn(4, added, 3 * C, dtype=given)[:, C : 2 * C] if added else None,
        "scale_shift": randn(5, scaled, 3 * C, dtype=given)[:, C:] if scaled else None,
    }
    found = norm(x, weight, bias, groups, 1e-3, silu=silu, **more)
    assert_normalized(found, x, weight, bias, groups, 1e-3, silu, **more)


@pytest.mark.parametrize("shape", [(64, 16, 16, 32), (64, 40, 40, 16)], ids=["one launch", "two"])
@pytest.mark.parametrize("where", ["x", "add", "both"])
def test_a_mean_that_is_large_beside_the_deviation_does_no_harm(shape, where):
    C, H, W, groups = shape
    x, add = images(1, 2, C, H, W), randn(2, 2, C)
    weight, bias = torch.ones(C, device=DEVICE), torch.zeros(C, device=DEVICE)
    x, add = (x + 1000 if where != "add" else x), (add + 1000 if where != "x" else add)
    arguments = (x, weight, bias, groups, 1e-6, False, add)
    assert_normalized(norm(x, weight, bias, groups, 1e-6, silu=False, add=add), *arguments)
    # The same from the mean square less the squared mean: 10^6 + 1 - 10^6, of which float32 keeps a sixteenth.
    h = (x + add[:, :, None, None]).reshape(2, groups, -1)
    variance = h.square().mean(2, keepdim=True) - h.mean(2, keepdim=True).square()
    naive = ((h - h.mean(2, keepdim=True)) * variance.clamp(min=1e-6).rsqrt()).reshape(x.shape)
    with pytest.raises(AssertionError):
        assert_normalized(naive.contiguous(memory_format=torch.channels_last), *arguments)


def test_memory_that_is_not_aligned_changes_no_bits():
    x, weight, bias = images(1, 1, 64, 8, 8), randn(2, 64), randn(3, 64)
    shifted = torch.empty(x.numel() + 1, device=DEVICE)[1:].view(1, 8, 8, 64).permute(0, 3, 1, 2).copy_(x)
    assert shifted.data_ptr() % 16
    found = norm(shifted, weight, bias, 32, 1e-5, silu=True)
    assert torch.equal(found, norm(x, weight, bias, 32, 1e-5, silu=True))


def test_norm_leaves_its_input_alone():
    x, weight = images(1, 2, 64, 8, 8), randn(2, 64)
    before = x.clone()
    norm(x, weight, weight, 32, 1e-5, silu=True, add=randn(3, 2, 64))
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("scale", [1.0, 2**0.5])
@pytest.mark.parametrize("shape", [(2, 64, 8, 8), (3, 21, 5, 7), (1, 1, 3, 3), (2, 448, 4, 4)], ids=str)
def test_residual_is_that_of_torch(shape, scale, dtype):
    h, skip, bias = images(1, *shape, dtype=dtype), images(2, *shape, dtype=dtype), randn(3, shape[1])
    parts = [h.double(), skip.double(), bias.double()[:, None, None]]
    expected = sum(parts) / scale
    # Two sums, each rounded, and a quotient by a rounded number.
    bound = 4 * FLOAT / 2 * sum(part.abs() for part in parts) + LAST[dtype] * expected.abs()
    found = residual(h, skip, bias, scale)
    assert found.dtype == dtype
    assert ((found.double() - expected).abs() <= bound).all()
    assert found.data_ptr() == h.data_ptr()


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        *itertools.product([(64, 4, 4, 32), (96, 9, 7, 32)], (torch.float32, torch.bfloat16)),
        ((8, 47, 45, 1), torch.bfloat16),
        long((84, 33, 31, 4), torch.bfloat16),
        *(long((64, 48, 48, 16), dtype) for dtype in (torch.float32, torch.bfloat16)),
        long((84, 33, 31, 4), torch.float32),
    ],
    ids=str,
)
def test_a_row_of_norm_is_bit_identical_in_any_batch(shape, dtype):
    C, H, W, groups = shape
    x, given = images(1, 3, C, H, W, dtype=dtype), randn(2, 3, 4 * C, dtype=dtype)
    weight, bias = randn(3, C), randn(4, C)

    def call(indices):
        # Gathered, and, where it is one row only, a view into the others' memory.
        some = x[indices[0] : indices[0] + 1] if len(indices) == 1 else x[indices]
        some, of = some.contiguous(memory_format=torch.channels_last), given[indices]
        more = {"add": of[:, C : 2 * C], "scale_shift": of[:, 2 * C :]}
        return norm(some, weight, bias, groups, 1e-5, silu=True, **more)

    assert_batch_invariant(call, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_row_of_a_residual_is_the_same_in_any_batch(dtype):
    h, skip, bias = images(1, 5, 21, 5, 7, dtype=dtype), images(2, 5, 21, 5, 7, dtype=dtype), randn(3, 21)
    assert_batch_invariant(lambda some: residual(pick(h, some), pick(skip, some), bias, 2**0.5), 5)


def test_usable_says_where_kernels_run(monkeypatch):
    assert model.network.kernels.usable(torch.device("meta")) is False
    assert model.network.kernels.usable(torch.device("cpu")) is not CUDA
    monkeypatch.setitem(sys.modules, "triton", None)  # as if it were not installed
    without = importlib.reload(model.network.kernels)
    assert without.usable(torch.device("cpu")) is False
    assert without.usable(torch.device("cuda")) is False


@pytest.mark.slow
def test_the_compiler_takes_what_the_interpreter_takes(tmp_path):
    """For Ampere and Hopper; a minute, since every form of every kernel is compiled."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.compile_kernels", "80", "90"],
        cwd=Path(__file__).parents[3],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    names = {(kernel["kernel"], kernel["capability"]) for kernel in found}
    kernels = ("_whole", "_measure", "_normalize", "_residual", "_update", "_predict", "_guard")
    assert names == {(name, capability) for name in kernels for capability in (80, 90)}
    for kernel in found:
        assert not kernel["spilled"], kernel
        if kernel["kernel"] in ("_update", "_predict"):
            # No sum takes a product unrounded. What is left in rows of learned variance is inside of exp.
            assert kernel["contracted"] == 0, kernel
