"""UniPC (Zhao et al. 2023): a predictor like DPM-Solver++, and a corrector that costs no evaluation of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from model.diffusion.levels import Level, basis, noise_levels, step
from model.diffusion.plan import Clip, Plan
from model.diffusion.samplers.dpmpp import check_order, step_orders
from model.diffusion.schedule import NoiseSchedule, Spacing


def unipc(
    schedule: NoiseSchedule,
    steps: int,
    *,
    order: int = 2,
    spacing: Spacing | None = None,
    clip: Clip | None = None,
) -> Plan:
    """UniPC-p in its B2(h) form, predicting x̂0 (algorithms 7 and 8 of the paper).

    At each level the x̂0 just evaluated also corrects the step that led there: S_0 is the predicted x, the network's
    input, S_1 the corrected one, from which the next prediction starts. The order falls to 1 at the end.

    Args:
        steps: 1..T, which is also its NFE.
        order: 1, 2 or 3; accuracy is one order higher thanks to the corrector.
        clip: what is done to x̂0.

    Raises:
        ScheduleError: invalid ``steps``, ``spacing`` or ``order``.
    """
    check_order(order, 3)
    levels = noise_levels(schedule, steps, spacing)
    return unipc_on(schedule, levels, step_orders(levels, order, few=len(levels)), history=order, clip=clip)


def unipc_on(
    schedule: NoiseSchedule, levels: Sequence[Level], orders: Sequence[int], *, history: int, clip: Clip | None = None
) -> Plan:
    """:func:`unipc` on given levels, with the order of each step; the last level need not be the clean image.

    Args:
        history: how many x̂0 the state keeps; at least the highest order.
    """
    x, y, *past, x_0, _, _ = basis(2 + history)
    program = []
    for i, order in enumerate(orders):
        corrected = _advance(levels, i - 1, orders[i - 1], y, past, arrived=x_0) if i else x
        predicted = _advance(levels, i, order, corrected, [x_0, *past])
        program.append(step(schedule, levels[i], [predicted, corrected, x_0, *past[:-1]], clip=clip))
    return Plan(tuple(program))


def _advance(
    levels: Sequence[Level],
    i: int,
    p: int,
    y: np.ndarray,
    m: Sequence[np.ndarray],
    arrived: np.ndarray | None = None,
) -> np.ndarray:
    """From level i to the next: predicted from the history, or corrected with x̂0 of the next level.

    Args:
        p: order of the step.
        y: x at level i.
        m: x̂0 at level i and before it.
        arrived: x̂0 at level i + 1; None in the prediction.
    """
    here, there = levels[i], levels[i + 1]
    if there.sigma == 0:
        return m[0]
    h = there.lam - here.lam
    grown = math.expm1(-h)  # E; with B2(h), B is the same
    ratios = [(levels[i - k].lam - here.lam) / h for k in range(1, p)]
    slopes = [(m[k] - m[0]) / ratios[k - 1] for k in range(1, p)]
    if arrived is not None:
        ratios, slopes = [*ratios, 1.0], [*slopes, arrived - m[0]]
    bend = sum((weight * slope for weight, slope in zip(_weights(ratios, h), slopes, strict=True)), np.zeros_like(y))
    return np.asarray(there.sigma / here.sigma * y - there.alpha * grown * (m[0] + bend))


def _weights(ratios: Sequence[float], h: float) -> Sequence[float]:
    """ρ of the paper's theorem 3.1: the solution of R ρ = b, in which R_qk = r_k^(q-1) and b_q = f_q(-h) q! / B."""
    size = len(ratios)
    if size <= 1:
        return [0.5] * size  # exact to the order needed, and better conditioned
    matrix = np.array([[r ** (q - 1) for r in ratios] for q in range(1, size + 1)])
    grown, f = math.expm1(-h), []
    term = grown / -h - 1
    for q in range(1, size + 1):
        f.append(term * math.factorial(q) / grown)
        term = term / -h - 1 / math.factorial(q + 1)
    return [float(weight) for weight in np.linalg.solve(matrix, np.array(f))]
