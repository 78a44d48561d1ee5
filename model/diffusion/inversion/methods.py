"""Inversion: plans that encode an image, walking from x_0 up to the x_T from which a sampler returns to it.

They start with the image in S_0 and end with its latent there. All mirror deterministic walks: the levels are those
of the sampler with the same steps and spacing, x̂0 is never clipped, and there is no noise.

DDIM's step down is x_{i-1} = (x_i - c ε(x_i, t_i)) / a, so the way back solves x_i = a x_{i-1} + c ε(x_i, t_i), where
x_i stands on both sides. ``ddim`` puts x_{i-1} into the network instead; ``fixed_point`` repeats until it is solved;
``obelm`` mirrors another sampler, whose steps can be turned around exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Literal

from torch import Tensor

from model.diffusion.levels import Level, levels, step, terms
from model.diffusion.plan import Guard, Plan
from model.diffusion.samplers.classical import glide
from model.diffusion.samplers.obelm import leap
from model.diffusion.schedule import NoiseSchedule, ScheduleError, Spacing


def upward(schedule: NoiseSchedule, steps: int, spacing: Spacing | None) -> list[Level]:
    """The levels of a sampler's walk from the clean image to the noise."""
    return levels(schedule, steps, spacing)[::-1]


def ddim(
    schedule: NoiseSchedule,
    steps: int,
    *,
    time: Literal["source", "target"] = "target",
    spacing: Spacing | None = None,
    walk: Sequence[Level] | None = None,
) -> Plan:
    """DDIM run backwards (DDIM section 4.3): one evaluation a step, and exact only as steps become many.

    Args:
        steps: 1..T, which is also its NFE.
        time: tell the network the level that x_{i-1} has (``source``, as in the papers) or the one that it goes to
            (``target``, as diffusers' DDIMInverseScheduler does).
        walk: overrides the levels that ``steps`` and ``spacing`` describe; the clean image first.

    Raises:
        ScheduleError: ``steps`` or ``spacing`` cannot be.
    """
    walk = walk or upward(schedule, steps, spacing)
    x, _, eps, _ = terms(1)
    return Plan(
        tuple(
            step(schedule, there if time == "target" else _known(schedule, here), [glide(x, eps, here, there)])
            for here, there in pairwise(walk)
        )
    )


def fixed_point(
    schedule: NoiseSchedule,
    steps: int,
    *,
    refinements: int = 3,
    spacing: Spacing | None = None,
    walk: Sequence[Level] | None = None,
) -> Plan:
    """Each step of DDIM solved for its source by iteration (Pan et al. 2023, AIDI; Meiri et al. 2023).

    The iteration x_i ← a x_{i-1} + c ε(x_i, t_i) contracts wherever ε changes slowly with x. Where it does not, and the
    residual of an iterate is larger than that of the best so far, the best is kept, image by image.

    S_0 is the iterate, S_1 = x_{i-1}, S_2 the best iterate yet, S_3 by how much it fails its equation, and S_4 the sum
    of S_3 over the steps before.

    Args:
        steps: 1..T.
        refinements: K >= 1 iterations after the first guess; NFE is steps (K + 1).
        walk: overrides the levels that ``steps`` and ``spacing`` describe; the clean image first.

    Raises:
        ScheduleError: ``steps``, ``spacing`` or ``refinements`` cannot be.
    """
    if refinements < 1:
        raise ScheduleError("refinements", refinements, "must be at least 1; method ddim does without")
    walk = walk or upward(schedule, steps, spacing)
    x, start, best, miss, missed, _, eps, _ = terms(5)
    program = []
    for here, there in pairwise(walk):
        program.append(step(schedule, there, [glide(x, eps, here, there), x, best, 0 * miss, missed + miss]))
        for k in range(refinements):
            solved = glide(start, eps, here, there)
            last = k + 1 == refinements
            # The residual of x is known, that of what it maps to is not yet: the last one is trusted if x was the best.
            refine = step(schedule, there, [solved, start, x, solved - x, missed])
            if k:
                kept = (2 if last else None, None, 2, 3, None)
                refine = replace(refine, guard=Guard(watch=3, instead=kept))
            program.append(refine)
    return Plan(tuple(program))


def residual(slots: Tensor) -> Tensor:
    """By how much a walk of :func:`fixed_point` misses the exact one, as root mean square per image, [B].

    It is that of the last iterates but one, the last being better still where the iteration converges.

    Args:
        slots: all five at the walk's end, [B, 5, C, H, W].
    """
    return (slots[:, 3] + slots[:, 4]).square().mean(dim=(1, 2, 3)).sqrt()


def obelm(
    schedule: NoiseSchedule, steps: int, *, spacing: Spacing | None = None, walk: Sequence[Level] | None = None
) -> Plan:
    """O-BELM run backwards (Wang et al. 2024): one evaluation a step, and exact but for rounding.

    Exact only if both slots are kept: S_0 = x_T and S_1, the state below it, from which
    ``model.diffusion.samplers.obelm(paired=True)`` starts.

    Args:
        steps: 1..T, which is also its NFE.
        walk: overrides the levels that ``steps`` and ``spacing`` describe; the clean image first.

    Raises:
        ScheduleError: ``steps`` or ``spacing`` cannot be.
    """
    walk = walk or upward(schedule, steps, spacing)
    x, before, _, eps, _ = terms(2)
    program = []
    for i, (here, there) in enumerate(pairwise(walk)):
        update = leap(before, x, eps, walk[i - 1], here, there) if i else glide(x, eps, here, there)
        program.append(step(schedule, _known(schedule, here), [update, x]))
    return Plan(tuple(program))


def _known(schedule: NoiseSchedule, level: Level) -> Level:
    """The level to name to the network, which has never seen an image without any noise."""
    return level if level.sigma > 0 else Level(0, float(schedule.alphas_cumprod[0]))
