"""O-BELM (Wang et al. 2024, eq. 18 and 19): a two-step scheme, second-order accurate, with an exact inverse."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from model.diffusion.levels import Level, basis, noise_levels, step
from model.diffusion.plan import Clip, Plan
from model.diffusion.samplers.ddim import ddim_step
from model.diffusion.schedule import NoiseSchedule, ScheduleError, Spacing


def obelm(
    schedule: NoiseSchedule,
    steps: int,
    *,
    paired: bool = False,
    spacing: Spacing | None = None,
    clip: Clip | None = None,
) -> Plan:
    """Each x comes from the two before it, by a relation that can be solved for either end.

    Args:
        steps: 1..T, which is also its NFE.
        paired: start from the two states with which :func:`model.diffusion.inversion.obelm` ends, x_T in S_0 and the
            state one level below it in S_1, and so reconstruct the inverted image; saves the first evaluation.
        clip: what is done to x̂0; None where the trajectory should be reversible.

    Raises:
        ScheduleError: invalid ``steps`` or ``spacing``.
    """
    if paired and steps < 2:
        raise ScheduleError("steps", steps, "a pair of states lies at two levels; take at least 2")
    return obelm_on(schedule, noise_levels(schedule, steps, spacing), paired=paired, clip=clip)


def obelm_on(
    schedule: NoiseSchedule, levels: Sequence[Level], *, paired: bool = False, clip: Clip | None = None
) -> Plan:
    """:func:`obelm` on given levels; the last need not be the clean image."""
    x, before, _, eps, _ = basis(2)
    program = []
    for i, (here, there) in enumerate(pairwise(levels)):
        if i == 0:
            update, kept, input_slot = ddim_step(x, eps, here, there), x, 0
        elif i == 1 and paired:  # the given pair: the network's input is the lower of the two
            update, kept, input_slot = obelm_step(x, before, eps, levels[0], here, there), before, 1
        else:
            update, kept, input_slot = obelm_step(before, x, eps, levels[i - 1], here, there), x, 0
        implied = clip is not None
        program.append(step(schedule, here, [update, kept], input_slot=input_slot, clip=clip, implied=implied))
    return Plan(tuple(program[1:] if paired else program))


def obelm_step(
    x_before: np.ndarray, x: np.ndarray, eps: np.ndarray, before: Level, here: Level, there: Level
) -> np.ndarray:
    """x at ``there`` from those at ``before`` and ``here``, and ε at ``here``.

    In X = x/α, whose derivative in σ/α is ε, with steps h before and h' = r h after:
    X' = r² X_before + (1 - r²) X + h' (1 + r) ε. Solved for X_before it is the same relation in the other direction.
    """
    following = there.ratio - here.ratio
    r = following / (here.ratio - before.ratio)
    scaled = r**2 / before.alpha * x_before + (1 - r**2) / here.alpha * x + following * (1 + r) * eps
    return np.asarray(there.alpha * scaled)
