"""Classical ODE solvers on the probability flow: Heun's method in σ/α, and PNDM's Adams-Bashforth with its warm-ups.

Both rest on the exact DDIM step for a given ε (DDIM eq. 14): x/α moves along a straight line in σ/α.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from model.diffusion.levels import Level, levels, step, terms
from model.diffusion.plan import Clip, Plan
from model.diffusion.schedule import NoiseSchedule, ScheduleError, Spacing, covering_spacing


def heun(
    schedule: NoiseSchedule,
    steps: int,
    *,
    spacing: Spacing | None = None,
    clip: Clip | None = None,
    walk: Sequence[Level] | None = None,
) -> Plan:
    """Heun's second-order method (Karras et al. 2022, algorithm 1): two evaluations a step, one in the last.

    Args:
        steps: 1..T; NFE is 2 steps - 1.
        clip: what is done to x̂0.
        walk: overrides the levels that ``steps`` and ``spacing`` describe; the clean level need not be the last.

    Raises:
        ScheduleError: ``steps`` or ``spacing`` cannot be.
    """
    walk = walk or levels(schedule, steps, spacing)
    x, start, e_start, _, eps, _ = terms(3)
    program = []
    for here, there in pairwise(walk):
        program.append(step(schedule, here, [glide(x, eps, here, there), x, eps], clip=clip, implied=True))
        if there.sigma > 0:
            mean = (e_start + eps) / 2
            back = [glide(start, mean, here, there), start, e_start]
            program.append(step(schedule, there, back, clip=clip, implied=True))
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
    walk: Sequence[Level] | None = None,
) -> Plan:
    """Pseudo linear multistep (Liu et al. 2022): DDIM's step with ε extrapolated from up to four levels.

    Args:
        steps: 1..T, though few overshoot; NFE is steps + 1, because the first step is corrected once (a single one is
            not), or steps + 9 with ``warmup``.
        warmup: take the first three steps by Runge-Kutta (eq. 13) instead, four evaluations each; needs 4 steps.
        spacing: an even one, since the extrapolation assumes it; None takes the covering one.
        clip: what is done to x̂0.
        walk: overrides the levels that ``steps`` and ``spacing`` describe.

    Raises:
        ScheduleError: ``steps``, ``spacing`` or ``warmup`` cannot be.
    """
    if warmup and steps < 4:
        raise ScheduleError("steps", steps, "with warmup, pndm needs at least 4 steps")
    walk = walk or levels(schedule, steps, spacing or covering_spacing(schedule.T, steps))
    implied = clip is not None
    x, start, e1, e2, e3, *mix, _, eps, _ = terms(6 if warmup else 5)
    program = []

    def evaluate(level: Level, *update: np.ndarray) -> None:
        program.append(step(schedule, level, update, clip=clip, implied=implied))

    for i, (here, there) in enumerate(pairwise(walk)):
        if warmup and i < 3:
            half = _between(schedule, here, there)
            # The slope of this step's start joins the history; mix gathers the average of the four.
            evaluate(here, glide(x, eps, here, half), x, eps, e1, e2, eps / 6)
            evaluate(half, glide(start, eps, here, half), start, e1, e2, e3, mix[0] + eps / 3)
            evaluate(half, glide(start, eps, here, there), start, e1, e2, e3, mix[0] + eps / 3)
            evaluate(there, glide(start, mix[0] + eps / 6, here, there), start, e1, e2, e3, *mix)
            continue
        weights = ADAMS_BASHFORTH[min(i + 1, 4)]
        slope = weights @ np.array([eps, e1, e2, e3][: len(weights)])
        evaluate(here, glide(x, slope, here, there), x, eps, e1, e2, *mix)
        if i == 0 and there.sigma > 0:
            evaluate(there, glide(start, (e1 + eps) / 2, here, there), start, e1, e2, e3, *mix)
    return Plan(tuple(program))


def glide(x: np.ndarray, eps: np.ndarray, here: Level, there: Level) -> np.ndarray:
    """The DDIM step (PNDM eq. 11): x at ``there``, if ε stays as it is."""
    scale = there.alpha / here.alpha
    return np.asarray(scale * x + (there.sigma - here.sigma * scale) * eps)


def _between(schedule: NoiseSchedule, here: Level, there: Level) -> Level:
    t = int(here.t + there.t) // 2
    return Level(t, float(schedule.alphas_cumprod[t]))
