"""O-BELM (Wang et al. 2024, eq. 18 and 19): a two-step scheme, second-order accurate, that can be undone exactly."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from model.diffusion.levels import Level, levels, step, terms
from model.diffusion.plan import Clip, Plan
from model.diffusion.samplers.classical import glide
from model.diffusion.schedule import NoiseSchedule, ScheduleError, Spacing


def obelm(
    schedule: NoiseSchedule,
    steps: int,
    *,
    paired: bool = False,
    spacing: Spacing | None = None,
    clip: Clip | None = None,
    walk: Sequence[Level] | None = None,
) -> Plan:
    """Each x comes from the two before it, by a relation that holds just as well upwards.

    Args:
        steps: 1..T, which is also its NFE.
        paired: start from the two states that :func:`model.diffusion.inversion.methods.obelm` ends with, x_T in S_0 and
            the one below it
            in S_1, and so return to the very image that they encode; saves the first evaluation.
        clip: what is done to x̂0; leave it out where the walk should be reversible.
        walk: overrides the levels that ``steps`` and ``spacing`` describe.

    Raises:
        ScheduleError: ``steps`` or ``spacing`` cannot be.
    """
    if paired and steps < 2:
        raise ScheduleError("steps", steps, "a pair of states lies at two levels; take at least 2")
    walk = walk or levels(schedule, steps, spacing)
    x, before, _, eps, _ = terms(2)
    program = []
    for i, (here, there) in enumerate(pairwise(walk)):
        if i == 0:
            update, kept, sees = glide(x, eps, here, there), x, 0
        elif i == 1 and paired:  # the given pair: the network sees the lower of the two
            update, kept, sees = leap(x, before, eps, walk[0], here, there), before, 1
        else:
            update, kept, sees = leap(before, x, eps, walk[i - 1], here, there), x, 0
        program.append(step(schedule, here, [update, kept], sees=sees, clip=clip, implied=clip is not None))
    return Plan(tuple(program[1:] if paired else program))


def leap(x_before: np.ndarray, x: np.ndarray, eps: np.ndarray, before: Level, here: Level, there: Level) -> np.ndarray:
    """x at ``there`` from those at ``before`` and ``here``, and ε at ``here``.

    In X = x/α, which moves along σ/α with slope ε, with steps h before and h' = r h after:
    X' = r² X_before + (1 - r²) X + h' (1 + r) ε. Solved for X_before it is the same relation walked the other way.
    """
    following = there.ratio - here.ratio
    r = following / (here.ratio - before.ratio)
    scaled = r**2 / before.alpha * x_before + (1 - r**2) / here.alpha * x + following * (1 + r) * eps
    return np.asarray(there.alpha * scaled)
