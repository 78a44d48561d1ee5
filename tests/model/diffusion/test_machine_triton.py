"""The row machine's kernels against the machine itself, for rows of every plan."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from model.diffusion import inversion, machine
from model.diffusion.plan import Clip, Columns, Guard
from model.diffusion.samplers import ddim, ddpm, dpmpp_2m, obelm
from tests.plans import LINEAR, VARIANTS

pytest.importorskip("triton")

from model.diffusion import machine_triton
from model.network.kernels.norm import norm
from model.network.kernels.residual import residual
from tests.kernels import CUDA, DEVICE, assert_batch_invariant, images, long, pick, randn

PLANS = {
    **{name: compile_(LINEAR, 6, spacing="trailing") for name, compile_ in VARIANTS.items()},
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


def executed(state, table, output, z):
    """(after, u, x̂0) as the machine finds them."""
    seen = []

    def net(u, t, y):
        seen.append(u)
        return output

    after = machine.advance(net, state, table, noise=None if z is None else lambda: z, observe=seen.append)
    return after, seen[0].contiguous(), seen[1]


def to_device(table):
    return torch.from_numpy(table).to(DEVICE, torch.float32)


@pytest.mark.parametrize(
    ("R", "learned"),
    [(1, True), (2, False), (5, True), *(long(R, True) for R in (2, 3, 4)), *(long(R, False) for R in (1, 3, 4, 5))],
)
@pytest.mark.usefixtures("_exp")
def test_update_has_the_bits_of_the_machine(R, learned):
    table = lines(R, lambda step: (step.clip is None or step.clip.quantile is None) and (learned or not step.log_var))
    assert (table[:, Columns.LEARNED].any(), R < 5 or bool(table[:, Columns.WATCH].any())) == (learned, True)
    B, shape = len(table), (3, 20, 20)  # more than a block
    state, z = randn(R, B, R, *shape), randn(20 + R, B, *shape)
    output = randn(10 + R, B, 6 if learned else 3, *shape[1:])
    expected, u, x_0 = executed(state, table, output, z)
    before, coef = state.clone(), to_device(table)
    after, found = machine_triton.update(state, u, output, z, coef)
    machine_triton.guard(after, state, coef)
    assert torch.equal(after, expected)
    assert torch.equal(found, x_0)
    assert torch.equal(machine_triton.predict(u, output, coef), x_0)
    assert torch.equal(state, before)


def test_update_needs_no_noise_where_none_is_drawn():
    table = lines(5, lambda step: not step.noisy and (step.clip is None or step.clip.quantile is None))
    state, output = randn(1, len(table), 5, 3, 4, 4), randn(2, len(table), 3, 4, 4)
    expected, u, x_0 = executed(state, table, output, None)
    coef = to_device(table)
    after, found = machine_triton.update(state, u, output, None, coef)
    machine_triton.guard(after, state, coef)
    assert torch.equal(after, expected)
    assert torch.equal(found, x_0)


@pytest.mark.usefixtures("_exp")
def test_update_goes_on_with_what_was_thresholded():
    table = lines(5)
    at, coef = Columns, to_device(table)
    state, output, z = randn(1, len(table), 5, 3, 4, 4), randn(2, len(table), 6, 4, 4), randn(3, len(table), 3, 4, 4)
    expected, u, shown = executed(state, table, output, z)
    x_0 = machine_triton.predict(u, output, coef)
    thresholded = np.flatnonzero(table[:, at.QUANTILE])
    assert len(thresholded)
    for i in thresholded:
        threshold = torch.quantile(x_0[i].abs().flatten(), float(table[i, at.QUANTILE]))
        threshold = threshold.clamp(1, float(table[i, at.CEILING]))
        x_0[i] = torch.minimum(torch.maximum(x_0[i], -threshold), threshold) / threshold
    assert torch.equal(x_0, shown)
    after, found = machine_triton.update(state, u, output, z, coef, x_0=x_0)
    machine_triton.guard(after, state, coef)
    assert torch.equal(after, expected)
    assert torch.equal(found, x_0)


def test_a_term_without_a_coefficient_is_not_read():
    # A slot that no row reads, noise for a row that draws none, and a variance that the plan does not ask for.
    table = PLANS["ddim"].table(2)[[2]]
    state, output, z = randn(1, 1, 2, 3, 4, 4), randn(2, 1, 6, 4, 4), torch.full((1, 3, 4, 4), torch.nan, device=DEVICE)
    state[:, 1] = output[:, 3:] = torch.nan
    expected, u, _ = executed(state, table, output, None)
    after, _ = machine_triton.update(state, u, output, z, to_device(table))
    assert torch.equal(after, expected)
    assert after.isfinite().all()


def test_clipping_lets_nan_through():
    table = PLANS["clipped"].table(1)[[2]]
    state, output = randn(1, 1, 1, 3, 4, 4), randn(2, 1, 3, 4, 4)
    output[0, 0, 0, 0], output[0, 0, 0, 1] = torch.nan, torch.inf
    _, u, expected = executed(state, table, output, None)
    found = machine_triton.predict(u, output, to_device(table))
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(), expected.nan_to_num())


def guarded(R, watch, instead):
    step = PLANS["inverse fixed point"].steps[0]
    plan = replace(PLANS["inverse fixed point"], steps=(replace(step, guard=Guard(watch, instead)),))
    return plan.table(R)[0]


@pytest.mark.parametrize("shape", [(2, 3, 3), (3, 64, 48)], ids=["small", "more than a block"])
def test_guards_decide_as_in_the_machine(shape):
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
    before[6, 1, 0, 0, 0] = torch.nan  # NaN has not decreased
    after[7, 3] = torch.nan
    expected = machine._apply_guards(after.clone(), before, table)
    kept = [torch.equal(expected[i].nan_to_num(), after[i].nan_to_num()) for i in range(len(table))]
    assert kept == [True, False, False, True, True, False, False, True]
    machine_triton.guard(after, before, to_device(table))
    assert torch.equal(after.isnan(), expected.isnan())
    assert torch.equal(after.nan_to_num(), expected.nan_to_num())


def test_a_row_is_bit_identical_in_any_batch():
    table = lines(5, lambda step: step.log_var or step.guard or step.clip)[::3]
    B, shape = len(table), (3, 20, 20)
    state, u, output, z = randn(1, B, 5, *shape), randn(2, B, *shape), randn(3, B, 6, 20, 20), randn(4, B, *shape)
    coef = to_device(table)

    def call(some):
        after, x_0 = machine_triton.update(state[some], u[some], output[some], z[some], coef[some])
        machine_triton.guard(after, state[some], coef[some])
        return torch.cat(
            [after, x_0[:, None], machine_triton.predict(u[some], output[some], coef[some])[:, None]], dim=1
        )

    assert_batch_invariant(call, B)


@pytest.mark.skipif(not CUDA, reason="graphs are captured on a card")
def test_kernels_can_be_captured():
    x, weight, added = images(1, 2, 64, 64, 64), randn(2, 64), randn(3, 2, 64)
    table = lines(5, lambda step: step.guard)
    state, output = randn(4, len(table), 5, 3, 8, 8), randn(5, len(table), 3, 8, 8)
    u, coef = state[:, 0].contiguous(), to_device(table)

    def call():
        small = norm(pick(x[..., :8, :8], [0, 1]), weight, weight, 32, 1e-5, silu=True)
        large = norm(x, weight, weight, 32, 1e-5, silu=True, add=added)
        after, x_0 = machine_triton.update(state, u, output, None, coef)
        machine_triton.guard(after, state, coef)
        return small, residual(large, x, weight), after, x_0, machine_triton.predict(u, output, coef)

    expected = call()  # and all is compiled
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
