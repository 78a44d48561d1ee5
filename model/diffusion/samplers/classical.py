"""Classical ODE solvers on the probability flow: Heun's method in σ/α, and PNDM's Adams-Bashforth with its warm-ups."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from model.diffusion.levels import Level, basis, last_level, noise_levels, step
from model.diffusion.plan import Clip, Plan
from model.diffusion.samplers.ddim import ddim_step
from model.diffusion.schedule import NoiseSchedule, ScheduleError, Spacing


def heun(schedule: NoiseSchedule, steps: int, *, spacing: Spacing | None = None, clip: Clip | None = None) -> Plan:
    """Heun's second-order method (Karras et al. 2022, algorithm 1): two evaluations a step, one in the last.

    Args:
        steps: 1..T; NFE is 2 steps - 1.
        clip: what is done to x̂0.

    Raises:
        ScheduleError: invalid ``steps`` or ``spacing``.
    """
    return heun_on(schedule, noise_levels(schedule, steps, spacing), clip=clip)


def heun_on(schedule: NoiseSchedule, levels: Sequence[Level], *, clip: Clip | None = None) -> Plan:
    """:func:`heun` on given levels; the last need not be the clean image."""
    x, start, e_start, _, eps, _ = basis(3)
    program = []
    for here, there in pairwise(levels):
        program.append(step(schedule, here, [ddim_step(x, eps, here, there), x, eps], clip=clip, implied=True))
        if there.sigma > 0:
            mean = (e_start + eps) / 2
            corrected = [ddim_step(start, mean, here, there), start, e_start]
            program.append(step(schedule, there, corrected, clip=clip, implied=True))
    return Plan(tuple(program))


ADAMS_BASHFORTH = {
    1: np.array([1.0]),
    2: np.array([3, -1]) / 2,
    3: np.array([23, -16, 5]) / 12,
    4: np.array([55, -59, 37, -9]) / 24,
}


def pndm(
    schedule: NoiseSchedule,
    steps: int,
    *,
    warmup: bool = False,
    spacing: Spacing | None = None,
    clip: Clip | None = None,
) -> Plan:
    """Pseudo linear multistep (Liu et al. 2022): the DDIM step with ε extrapolated from up to four levels.

    Args:
        steps: 1..T, though few overshoot; NFE is steps + 1, because the first step is corrected once (a single one is
            not), or steps + 9 with ``warmup``.
        warmup: take the first three steps by Runge-Kutta (eq. 13) instead, four evaluations each; needs 4 steps.
        spacing: an even one, since the extrapolation assumes it.
        clip: what is done to x̂0.

    Raises:
        ScheduleError: invalid ``steps``, ``spacing`` or ``warmup``.
    """
    if warmup and steps < 4:
        raise ScheduleError("steps", steps, "with warmup, pndm needs at least 4 steps")
    levels = noise_levels(schedule, steps, spacing, last=last_level(schedule))
    return pndm_on(schedule, levels, warmup=warmup, clip=clip)


def pndm_on(
    schedule: NoiseSchedule, levels: Sequence[Level], *, warmup: bool = False, clip: Clip | None = None
) -> Plan:
    """:func:`pndm` on given levels; the last need not be the clean image."""
    implied = clip is not None
    x, start, e1, e2, e3, *mix, _, eps, _ = basis(6 if warmup else 5)
    program = []

    def evaluate(level: Level, *update: np.ndarray) -> None:
        program.append(step(schedule, level, update, clip=clip, implied=implied))

    for i, (here, there) in enumerate(pairwise(levels)):
        if warmup and i < 3:
            half = _midpoint(schedule, here, there)
            # The slope of this step's start joins the history; mix accumulates the average of the four slopes.
            evaluate(here, ddim_step(x, eps, here, half), x, eps, e1, e2, eps / 6)
            evaluate(half, ddim_step(start, eps, here, half), start, e1, e2, e3, mix[0] + eps / 3)
            evaluate(half, ddim_step(start, eps, here, there), start, e1, e2, e3, mix[0] + eps / 3)
            evaluate(there, ddim_step(start, mix[0] + eps / 6, here, there), start, e1, e2, e3, *mix)
            continue
        weights = ADAMS_BASHFORTH[min(i + 1, 4)]
        slope = weights @ np.array([eps, e1, e2, e3][: len(weights)])
        evaluate(here, ddim_step(x, slope, here, there), x, eps, e1, e2, *mix)
        if i == 0 and there.sigma > 0:
            evaluate(there, ddim_step(start, (e1 + eps) / 2, here, there), start, e1, e2, e3, *mix)
    return Plan(tuple(program))


def _midpoint(schedule: NoiseSchedule, here: Level, there: Level) -> Level:
    """The timestep between the two, rounded down."""
    t = int(here.t + there.t) // 2
    return Level(t, float(schedule.alphas_cumprod[t]))
