"""DPM-Solver++ (Lu et al. 2022): the probability-flow ODE solved exactly but for x̂0, which is extrapolated in λ.

Between two levels the exact solution is x' = (σ'/σ) x + σ' ∫ e^λ x̂0 dλ. Order 1 holds x̂0 constant and is ddim;
higher orders extrapolate it from earlier steps (multistep, 2M) or from a step halfway (singlestep, 2S).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from model.diffusion.levels import Level, basis, noise_levels, step
from model.diffusion.plan import Clip, Plan
from model.diffusion.schedule import NoiseSchedule, ScheduleError, Spacing

FEW_STEPS = 15  # below this, the last steps are so long that high orders overshoot


def dpmpp_2m(
    schedule: NoiseSchedule,
    steps: int,
    *,
    order: int = 2,
    spacing: Spacing | None = None,
    clip: Clip | None = None,
) -> Plan:
    """The multistep solver (algorithm 2, midpoint form): second-order accuracy for one evaluation a step.

    Below 15 steps the order falls towards 1 at the end.

    Args:
        steps: 1..T, which is also its NFE.
        order: 1 (the same as ddim), 2 or 3; that many slots.
        clip: what is done to x̂0.

    Raises:
        ScheduleError: invalid ``steps``, ``spacing`` or ``order``.
    """
    check_order(order, 3)
    levels = noise_levels(schedule, steps, spacing)
    return dpmpp_2m_on(schedule, levels, step_orders(levels, order), slots=order, clip=clip)


def dpmpp_2m_on(
    schedule: NoiseSchedule, levels: Sequence[Level], orders: Sequence[int], *, slots: int, clip: Clip | None = None
) -> Plan:
    """:func:`dpmpp_2m` on given levels, with the order of each step; the last level need not be the clean image."""
    x, *past, x_0, _, _ = basis(slots)
    program = []
    for i, (here, there) in enumerate(pairwise(levels)):
        lam = [level.lam for level in levels[max(0, i - 2) : i + 2]][::-1]
        update = there.sigma / here.sigma * x + there.alpha * _integral(lam, orders[i], [x_0, *past])
        program.append(step(schedule, here, [update, x_0, *past][:slots], clip=clip))
    return Plan(tuple(program))


def dpmpp_2m_sde(
    schedule: NoiseSchedule,
    steps: int,
    *,
    order: int = 2,
    spacing: Spacing | None = None,
    clip: Clip | None = None,
) -> Plan:
    """The multistep solver of the reverse SDE (appendix B of the paper), which adds fresh noise at every step.

    Order 1 is ddim with eta = 1.

    Args and errors: as :func:`dpmpp_2m`, with ``order`` 1 or 2.
    """
    check_order(order, 2)
    levels = noise_levels(schedule, steps, spacing)
    return dpmpp_2m_sde_on(schedule, levels, step_orders(levels, order), slots=order, clip=clip)


def dpmpp_2m_sde_on(
    schedule: NoiseSchedule, levels: Sequence[Level], orders: Sequence[int], *, slots: int, clip: Clip | None = None
) -> Plan:
    """:func:`dpmpp_2m_sde` on given levels, with the order of each step."""
    x, *past, x_0, _, z = basis(slots)
    program = []
    for i, (here, there) in enumerate(pairwise(levels)):
        h = there.lam - here.lam
        blend = x_0 if orders[i] == 1 else x_0 + (x_0 - past[0]) * h / (here.lam - levels[i - 1].lam) / 2
        update = (
            there.sigma / here.sigma * math.exp(-h) * x
            - there.alpha * math.expm1(-2 * h) * blend
            + there.sigma * math.sqrt(-math.expm1(-2 * h)) * z
        )
        program.append(step(schedule, here, [update, x_0, *past][:slots], clip=clip))
    return Plan(tuple(program))


def dpmpp_2s(schedule: NoiseSchedule, steps: int, *, spacing: Spacing | None = None, clip: Clip | None = None) -> Plan:
    """The singlestep solver (algorithm 1): levels in pairs; the second of each corrects the whole pair.

    It uses nothing from before its pair, so it recovers at once where x̂0 changes abruptly.

    Args and errors: as :func:`dpmpp_2m`.
    """
    return dpmpp_2s_on(schedule, noise_levels(schedule, steps, spacing), clip=clip)


def dpmpp_2s_on(schedule: NoiseSchedule, levels: Sequence[Level], *, clip: Clip | None = None) -> Plan:
    """:func:`dpmpp_2s` on given levels; the last need not be the clean image."""
    x, start, m_start, x_0, _, _ = basis(3)
    program = []
    for i, (here, there) in enumerate(pairwise(levels)):
        if i % 2 and there.sigma > 0:
            before = levels[i - 1]
            h = there.lam - before.lam
            slope = (x_0 - m_start) * h / (here.lam - before.lam)
            update = there.sigma / before.sigma * start - there.alpha * math.expm1(-h) * (m_start + slope / 2)
        else:
            h = there.lam - here.lam
            update = there.sigma / here.sigma * x - there.alpha * math.expm1(-h) * x_0
        program.append(step(schedule, here, [update, x, x_0], clip=clip))
    return Plan(tuple(program))


def check_order(order: int, highest: int) -> None:
    """Raise ScheduleError unless ``order`` is in 1..highest."""
    if not 1 <= order <= highest:
        raise ScheduleError("order", order, f"this sampler has orders 1..{highest}")


def step_orders(levels: Sequence[Level], order: int, few: int = FEW_STEPS) -> list[int]:
    """The order of each step: it rises with the history, and with fewer than ``few`` steps falls towards the end.

    The step to the clean image always has order 1: λ is infinite there.
    """
    steps = len(levels) - 1
    orders = [min(order, i + 1, steps - i if steps < few else order) for i in range(steps)]
    return [1 if there.sigma == 0 else p for p, there in zip(orders, levels[1:], strict=True)]


def _integral(lam: Sequence[float], order: int, m: Sequence[np.ndarray]) -> np.ndarray:
    """∫ e^(λ - λ') x̂0 dλ from λ to λ', with x̂0 extrapolated from the last ``order`` predictions.

    As in the authors' code, order 2 takes the slope's midpoint, and order 3 gives the curvature half of a parabola's
    weight, which costs it the third order in the limit, and pays where steps are few.

    Args:
        lam: λ' of the target, λ of the source, and of earlier levels, as far as there are any.
        m: x̂0 at the source and at the earlier levels.
    """
    h = lam[0] - lam[1]
    flat = -math.expm1(-h) * m[0]
    if order == 1:
        return flat
    r0 = (lam[1] - lam[2]) / h
    d10 = (m[0] - m[1]) / r0
    if order == 2:
        return np.asarray(flat - math.expm1(-h) * d10 / 2)
    r1 = (lam[2] - lam[3]) / h
    d11 = (m[1] - m[2]) / r1
    d1 = d10 + r0 / (r0 + r1) * (d10 - d11)
    d2 = (d10 - d11) / (r0 + r1)
    linear = math.expm1(-h) / h + 1
    quadratic = (math.expm1(-h) + h) / h**2 - 0.5
    return np.asarray(flat + linear * d1 - quadratic * d2)
