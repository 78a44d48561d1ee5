"""The kernels against plain torch: on a card where there is one, else in Triton's interpreter."""

import importlib
import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import model.kernels
from model import inversion, machine
from model.plan import Clip, Columns, Guard
from model.samplers import ddim, ddpm, dpmpp_2m, obelm
from tests.walks import FORMS, LINEAR

pytest.importorskip("triton")

from model.kernels import rows
from model.kernels.norm import norm, tiling
from model.kernels.residual import residual

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
if not model.kernels.usable(DEVICE):
    pytest.skip("neither a card that Triton knows nor its interpreter", allow_module_level=True)

FLOAT = torch.finfo(torch.float32).eps  # an ulp of 1: two roundings
# Of the result's magnitude. A card rounds to the nearest bfloat16; the interpreter cuts off.
LAST = {torch.float32: FLOAT / 2, torch.bfloat16: torch.finfo(torch.bfloat16).eps / (2 if CUDA else 1)}


def long(*values):
    """Parameters that take seconds in the interpreter."""
    return pytest.param(*values, marks=[] if CUDA else pytest.mark.slow)


def randn(seed, *shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def pictures(seed, *shape, dtype=torch.float32):
    return randn(seed, *shape, dtype=dtype).to(memory_format=torch.channels_last)


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
    (84, 33, 31, 4),
    (32, 140, 140, 4),  # several tiles a chunk, and not all of them there
    (640, 8, 8, 1),  # a group wider than a tile is high
]


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
        *((shape, torch.bfloat16) for shape in LARGE),
        *(long(shape, torch.float32) for shape in LARGE),
    ],
    ids=str,
)
def test_norm_is_that_of_torch(shape, dtype):
    C, H, W, groups = shape
    x, weight, bias = pictures(1, 2, C, H, W, dtype=dtype), randn(2, C), randn(3, C)
    told = randn(4, 2, 5 * C, dtype=dtype)
    assert_normalized(norm(x, weight, bias, groups, 1e-5, silu=False), x, weight, bias, groups, 1e-5, False)
    more = {"add": told[:, C : 2 * C], "scale_shift": told[:, 3 * C :]}
    found = norm(x, weight, bias, groups, 1e-5, silu=True, **more)
    assert_normalized(found, x, weight, bias, groups, 1e-5, True, **more)


@pytest.mark.parametrize("shape", [(64, 4, 4, 32), (64, 40, 40, 16)], ids=["one launch", "two"])
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("told", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("added", "scaled"), [(0, 2), (1, 0), (2, 0), (2, 1)])
def test_what_is_told_comes_in_every_form(shape, silu, told, added, scaled):
    """``added`` and ``scaled``: how many rows they have, 0 for none, 1 for all alike."""
    C, H, W, groups = shape
    x, weight, bias = pictures(1, 2, C, H, W, dtype=torch.bfloat16), randn(2, C), randn(3, C)
    more = {
        "add": randn(4, added, 3 * C, dtype=told)[:, C : 2 * C] if added else None,
        "scale_shift": randn(5, scaled, 3 * C, dtype=told)[:, C:] if scaled else None,
    }
    found = norm(x, weight, bias, groups, 1e-3, silu=silu, **more)
    assert_normalized(found, x, weight, bias, groups, 1e-3, silu, **more)


@pytest.mark.parametrize("shape", [(64, 16, 16, 32), (64, 64, 64, 32)], ids=["one launch", "two"])
@pytest.mark.parametrize("where", ["x", "add", "both"])
def test_a_mean_that_is_large_beside_the_deviation_does_no_harm(shape, where):
    C, H, W, groups = shape
    x, add = pictures(1, 2, C, H, W), randn(2, 2, C)
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
    x, weight, bias = pictures(1, 1, 64, 8, 8), randn(2, 64), randn(3, 64)
    shifted = torch.empty(x.numel() + 1, device=DEVICE)[1:].view(1, 8, 8, 64).permute(0, 3, 1, 2).copy_(x)
    assert shifted.data_ptr() % 16
    found = norm(shifted, weight, bias, 32, 1e-5, silu=True)
    assert torch.equal(found, norm(x, weight, bias, 32, 1e-5, silu=True))


def test_norm_leaves_its_input_alone():
    x, weight = pictures(1, 2, 64, 8, 8), randn(2, 64)
    before = x.clone()
    norm(x, weight, weight, 32, 1e-5, silu=True, add=randn(3, 2, 64))
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("scale", [1.0, 2**0.5])
@pytest.mark.parametrize("shape", [(2, 64, 8, 8), (3, 21, 5, 7), (1, 1, 3, 3), (2, 448, 4, 4)], ids=str)
def test_residual_is_that_of_torch(shape, scale, dtype):
    h, skip, bias = pictures(1, *shape, dtype=dtype), pictures(2, *shape, dtype=dtype), randn(3, shape[1])
    parts = [h.double(), skip.double(), bias.double()[:, None, None]]
    expected = sum(parts) / scale
    # Two sums, each rounded, and a quotient by a rounded number.
    bound = 4 * FLOAT / 2 * sum(part.abs() for part in parts) + LAST[dtype] * expected.abs()
    found = residual(h, skip, bias, scale)
    assert found.dtype == dtype
    assert ((found.double() - expected).abs() <= bound).all()
    assert found.data_ptr() == h.data_ptr()


def alone_and_in_company(call, batch):
    """Whether a row of ``call(indices)`` is the same alone, among all, among others, and elsewhere."""
    everyone = call(list(range(batch)))
    backwards = call(list(range(batch))[::-1])
    pair = call([batch - 1, 0])
    for i in range(batch):
        (alone,) = call([i])
        assert torch.equal(alone, everyone[i])
        assert torch.equal(alone, backwards[batch - 1 - i])
    assert torch.equal(pair[0], everyone[-1])
    assert torch.equal(pair[1], everyone[0])


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        *itertools.product([(64, 4, 4, 32), (96, 9, 7, 32)], (torch.float32, torch.bfloat16)),
        ((84, 33, 31, 4), torch.bfloat16),
        *(long((64, 48, 48, 16), dtype) for dtype in (torch.float32, torch.bfloat16)),
        long((84, 33, 31, 4), torch.float32),
    ],
    ids=str,
)
def test_a_row_of_norm_is_the_same_in_any_company(shape, dtype):
    C, H, W, groups = shape
    x, told = pictures(1, 3, C, H, W, dtype=dtype), randn(2, 3, 4 * C, dtype=dtype)
    weight, bias = randn(3, C), randn(4, C)

    def call(indices):
        # Gathered, and, where it is one row only, a view into the others' memory.
        some = x[indices[0] : indices[0] + 1] if len(indices) == 1 else x[indices]
        some, of = some.contiguous(memory_format=torch.channels_last), told[indices]
        more = {"add": of[:, C : 2 * C], "scale_shift": of[:, 2 * C :]}
        return norm(some, weight, bias, groups, 1e-5, silu=True, **more)

    alone_and_in_company(call, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_row_of_a_residual_is_the_same_in_any_company(dtype):
    h, skip, bias = pictures(1, 5, 21, 5, 7, dtype=dtype), pictures(2, 5, 21, 5, 7, dtype=dtype), randn(3, 21)
    alone_and_in_company(lambda some: residual(pick(h, some), pick(skip, some), bias, 2**0.5), 5)


def pick(x, indices):
    return x[indices].contiguous(memory_format=torch.channels_last)


PLANS = {
    **{name: compile_(LINEAR, 6, spacing="trailing") for name, compile_ in FORMS.items()},
    "clipped": ddim(LINEAR, 6, clip=Clip(0.3), spacing="trailing"),
    "learned": ddpm(LINEAR, 6, variance="learned_range", spacing="trailing", clip=Clip(0.7)),
    "thresholded": dpmpp_2m(LINEAR, 6, spacing="trailing", clip=Clip(1.5, quantile=0.9)),
    "paired": obelm(LINEAR, 6, spacing="trailing", paired=True),
    "inverse ddim": inversion.ddim(LINEAR, 6, spacing="trailing"),
    "inverse fixed point": inversion.fixed_point(LINEAR, 3, refinements=1, spacing="trailing"),
    "inverse fixed point, guarded": inversion.fixed_point(LINEAR, 2, refinements=3, spacing="trailing"),
    "inverse obelm": inversion.obelm(LINEAR, 6, spacing="trailing"),
}


def lines(R, only=lambda step: True):
    """First, middle and last steps of all plans of up to R slots, as one batch [B, K]."""
    chosen = [
        plan.table(R)[i]
        for plan in PLANS.values()
        if plan.slots <= R
        for i in sorted({0, plan.nfe // 2, plan.nfe - 1})
        if only(plan.steps[i])
    ]
    return np.stack(chosen)


@pytest.fixture
def _exp(monkeypatch):
    """The interpreter's exp is numpy's, which may differ from torch's in the last bit: let torch have it, too."""
    if not CUDA:
        monkeypatch.setattr(torch, "exp", lambda x: torch.from_numpy(np.exp(x.numpy())))


def walked(state, table, output, z):
    """(after, u, x̂0) as the machine finds them."""
    seen = []

    def net(u, t, y):
        seen.append(u)
        return output

    after = machine.advance(net, state, table, noise=None if z is None else lambda: z, show=seen.append)
    return after, seen[0].contiguous(), seen[1]


def to_device(table):
    return torch.from_numpy(table).to(DEVICE, torch.float32)


@pytest.mark.parametrize(
    ("R", "learned"),
    [*((R, R % 2 == 1) for R in (1, 2, 3, 4, 5)), *(long(R, R % 2 == 0) for R in (1, 2, 3, 4, 5))],
)
@pytest.mark.usefixtures("_exp")
def test_update_has_the_bits_of_the_machine(R, learned):
    table = lines(R, lambda step: (step.clip is None or step.clip.quantile is None) and (learned or not step.log_var))
    assert (table[:, Columns.LEARNED].any(), R < 5 or bool(table[:, Columns.WATCH].any())) == (learned, True)
    B, shape = len(table), (3, 20, 20)  # more than a block
    state, z = randn(R, B, R, *shape), randn(20 + R, B, *shape)
    output = randn(10 + R, B, 6 if learned else 3, *shape[1:])
    expected, u, x_0 = walked(state, table, output, z)
    before, coef = state.clone(), to_device(table)
    after, found = rows.update(state, u, output, z, coef)
    rows.guard(after, state, coef)
    assert torch.equal(after, expected)
    assert torch.equal(found, x_0)
    assert torch.equal(rows.predict(u, output, coef), x_0)
    assert torch.equal(state, before)


def test_update_needs_no_noise_where_none_is_drawn():
    table = lines(5, lambda step: not step.noisy and (step.clip is None or step.clip.quantile is None))
    state, output = randn(1, len(table), 5, 3, 4, 4), randn(2, len(table), 3, 4, 4)
    expected, u, x_0 = walked(state, table, output, None)
    coef = to_device(table)
    after, found = rows.update(state, u, output, None, coef)
    rows.guard(after, state, coef)
    assert torch.equal(after, expected)
    assert torch.equal(found, x_0)


@pytest.mark.usefixtures("_exp")
def test_update_goes_on_with_what_was_thresholded():
    table = lines(5)
    at, coef = Columns, to_device(table)
    state, output, z = randn(1, len(table), 5, 3, 4, 4), randn(2, len(table), 6, 4, 4), randn(3, len(table), 3, 4, 4)
    expected, u, shown = walked(state, table, output, z)
    x_0 = rows.predict(u, output, coef)
    asking = np.flatnonzero(table[:, at.QUANTILE])
    assert len(asking)
    for i in asking:
        threshold = torch.quantile(x_0[i].abs().flatten(), float(table[i, at.QUANTILE]))
        threshold = threshold.clamp(1, float(table[i, at.CEILING]))
        x_0[i] = torch.minimum(torch.maximum(x_0[i], -threshold), threshold) / threshold
    assert torch.equal(x_0, shown)
    after, found = rows.update(state, u, output, z, coef, x_0=x_0)
    rows.guard(after, state, coef)
    assert torch.equal(after, expected)
    assert torch.equal(found, x_0)


def test_a_term_without_a_coefficient_is_not_heard():
    # A slot that nobody reads, noise for a row that draws none, and a variance that the plan does not ask for.
    table = PLANS["ddim"].table(2)[[2]]
    state, output, z = randn(1, 1, 2, 3, 4, 4), randn(2, 1, 6, 4, 4), torch.full((1, 3, 4, 4), torch.nan, device=DEVICE)
    state[:, 1] = output[:, 3:] = torch.nan
    expected, u, _ = walked(state, table, output, None)
    after, _ = rows.update(state, u, output, z, to_device(table))
    assert torch.equal(after, expected)
    assert after.isfinite().all()


def test_clipping_lets_nan_through():
    table = PLANS["clipped"].table(1)[[2]]
    state, output = randn(1, 1, 1, 3, 4, 4), randn(2, 1, 3, 4, 4)
    output[0, 0, 0, 0], output[0, 0, 0, 1] = torch.nan, torch.inf
    _, u, expected = walked(state, table, output, None)
    found = rows.predict(u, output, to_device(table))
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(), expected.nan_to_num())


def guarded(R, watch, instead):
    step = PLANS["inverse fixed point"].steps[0]
    plan = replace(PLANS["inverse fixed point"], steps=(replace(step, guard=Guard(watch, instead)),))
    return plan.table(R)[0]


@pytest.mark.parametrize("shape", [(2, 3, 3), (3, 64, 48)], ids=["small", "more than a block"])
def test_guard_chooses_as_the_machine_does(shape):
    none = (None,) * 5
    table = np.stack(
        [
            guarded(5, 0, (1, 1, None, 4, 3)),
            guarded(5, 0, (1, 1, None, 4, 3)),
            guarded(5, 4, (4, None, 0, None, None)),
            guarded(5, 4, (4, None, 0, None, None)),
            guarded(5, 2, none),
            guarded(5, 1, (4, 3, 2, 1, 0)),
            guarded(5, 1, (4, 3, 2, 1, 0)),
            PLANS["ddim"].table(5)[0],
        ]
    )
    before, after = randn(1, len(table), 5, *shape), randn(2, len(table), 5, *shape)
    for i, watch in enumerate([0, 0, 4, 4, 2, 1, 1, 0]):
        after[i, watch] = before[i, watch] * [0.9, 1.1, 1.1, 0.9, 2.0, 1.0, 0.5, 3.0][i]
    before[6, 1, 0, 0, 0] = torch.nan  # what is not a number has not fallen
    after[7, 3] = torch.nan
    expected = machine._guarded(after.clone(), before, table)
    kept = [torch.equal(expected[i].nan_to_num(), after[i].nan_to_num()) for i in range(len(table))]
    assert kept == [True, False, False, True, True, False, False, True]
    rows.guard(after, before, to_device(table))
    assert torch.equal(after.isnan(), expected.isnan())
    assert torch.equal(after.nan_to_num(), expected.nan_to_num())


def test_a_row_of_the_machine_is_the_same_in_any_company():
    table = lines(5, lambda step: step.log_var or step.guard or step.clip)[::3]
    B, shape = len(table), (3, 20, 20)
    state, u, output, z = randn(1, B, 5, *shape), randn(2, B, *shape), randn(3, B, 6, 20, 20), randn(4, B, *shape)
    coef = to_device(table)

    def call(some):
        after, x_0 = rows.update(state[some], u[some], output[some], z[some], coef[some])
        rows.guard(after, state[some], coef[some])
        return torch.cat([after, x_0[:, None], rows.predict(u[some], output[some], coef[some])[:, None]], dim=1)

    alone_and_in_company(call, B)


@pytest.mark.skipif(not CUDA, reason="graphs are captured on a card")
def test_kernels_can_be_captured():
    x, weight, told = pictures(1, 2, 64, 64, 64), randn(2, 64), randn(3, 2, 64)
    table = lines(5, lambda step: step.guard)
    state, output = randn(4, len(table), 5, 3, 8, 8), randn(5, len(table), 3, 8, 8)
    u, coef = state[:, 0].contiguous(), to_device(table)

    def call():
        small = norm(pick(x[..., :8, :8], [0, 1]), weight, weight, 32, 1e-5, silu=True)
        large = norm(x, weight, weight, 32, 1e-5, silu=True, add=told)
        after, x_0 = rows.update(state, u, output, None, coef)
        rows.guard(after, state, coef)
        return small, residual(large, x, weight), after, x_0, rows.predict(u, output, coef)

    expected = call()  # and all is compiled
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_usable_says_where_kernels_run(monkeypatch):
    assert model.kernels.usable(torch.device("meta")) is False
    assert model.kernels.usable(torch.device("cpu")) is not CUDA
    monkeypatch.setitem(sys.modules, "triton", None)  # as if it were not installed
    without = importlib.reload(model.kernels)
    assert without.usable(torch.device("cpu")) is False
    assert without.usable(torch.device("cuda")) is False


@pytest.mark.slow
def test_the_compiler_takes_what_the_interpreter_takes(tmp_path):
    """For Ampere and Hopper; a minute, since every form of every kernel is compiled."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.compile_kernels", "80", "90"],
        cwd=Path(__file__).parents[2],
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
