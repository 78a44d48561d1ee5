"""Inversions: plans from an image x_0 up to the x_T that a sampler decodes to it.

S_0 starts as the image and ends as its latent. Each mirrors a deterministic sampler: the same levels with the same
steps and spacing, in reverse, without clipping and without noise.

A DDIM step down is x_{i-1} = (x_i - c ε(x_i, t_i)) / a, so its inverse solves x_i = a x_{i-1} + c ε(x_i, t_i), with x_i
on both sides. ``ddim`` evaluates ε at x_{i-1} instead; ``fixed_point`` iterates until the equation holds; ``obelm``
mirrors a sampler whose steps can be inverted exactly.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Literal

from torch import Tensor

from model.diffusion.levels import CLEAN, Level, basis, last_level, noise_levels, step
from model.diffusion.plan import Guard, Plan
from model.diffusion.samplers.ddim import ddim_step
from model.diffusion.samplers.obelm import obelm_step
from model.diffusion.schedule import NoiseSchedule, ScheduleError, Spacing


def ascending_levels(schedule: NoiseSchedule, steps: int, spacing: Spacing | None, last: Level = CLEAN) -> list[Level]:
    """A sampler's levels in reverse: from the image, where the sampler has its ``last`` level, to the noise."""
    return noise_levels(schedule, steps, spacing, last=last)[::-1]


def ddim(
    schedule: NoiseSchedule,
    steps: int,
    *,
    time: Literal["source", "target"] = "target",
    spacing: Spacing | None = None,
) -> Plan:
    """DDIM run backwards (DDIM section 4.3): one evaluation a step, and exact only in the limit of many steps.

    Args:
        steps: 1..T, which is also its NFE.
        time: evaluate the network at x_{i-1} with the timestep of its own level (``source``, as in the papers) or of
            the level that the step leads to (``target``, as in diffusers' DDIMInverseScheduler).

    Raises:
        ScheduleError: invalid ``steps`` or ``spacing``.
    """
    x, _, eps, _ = basis(1)
    program = []
    for here, there in pairwise(ascending_levels(schedule, steps, spacing, last_level(schedule))):
        level = there if time == "target" else _trained_level(schedule, here)
        program.append(step(schedule, level, [ddim_step(x, eps, here, there)]))
    return Plan(tuple(program))


def fixed_point(schedule: NoiseSchedule, steps: int, *, refinements: int = 3, spacing: Spacing | None = None) -> Plan:
    """Each step of DDIM solved for its source by iteration (Pan et al. 2023, AIDI; Meiri et al. 2023).

    The iteration x_i ← a x_{i-1} + c ε(x_i, t_i) contracts wherever ε changes slowly with x. Where it does not, and the
    residual of an iterate is larger than that of the best so far, the best is kept, for each image separately.

    S_0 is the iterate, S_1 = x_{i-1}, S_2 the best iterate so far, S_3 its residual, and S_4 the sum of the residuals
    of earlier steps.

    Args:
        steps: 1..T.
        refinements: K >= 1 iterations after the first guess; NFE is steps (K + 1).

    Raises:
        ScheduleError: invalid ``steps``, ``spacing`` or ``refinements``.
    """
    if refinements < 1:
        raise ScheduleError("refinements", refinements, "must be at least 1; method ddim does without")
    x, start, best, error, total_error, _, eps, _ = basis(5)
    program = []
    for here, there in pairwise(ascending_levels(schedule, steps, spacing, last_level(schedule))):
        first_guess = ddim_step(x, eps, here, there)
        program.append(step(schedule, there, [first_guess, x, best, 0 * error, total_error + error]))
        # The residual of x is known here, that of ``solved`` is not; the last one is taken if x was the best.
        solved = ddim_step(start, eps, here, there)
        refine = step(schedule, there, [solved, start, x, solved - x, total_error])
        program.append(refine)
        if refinements > 1:
            guarded = replace(refine, guard=Guard(watch=3, instead=(None, None, 2, 3, None)))
            program += [guarded] * (refinements - 2)
            program.append(replace(refine, guard=Guard(watch=3, instead=(2, None, 2, 3, None))))
    return Plan(tuple(program))


def residual(slots: Tensor) -> Tensor:
    """By how much :func:`fixed_point` misses the exact inversion: root mean square of the residuals' sum, [B].

    The residuals are those of the last iterate but one; the last is better still where the iteration converges.

    Args:
        slots: the final slots [B, 5, C, H, W].
    """
    return (slots[:, 3] + slots[:, 4]).square().mean(dim=(1, 2, 3)).sqrt()


def obelm(schedule: NoiseSchedule, steps: int, *, spacing: Spacing | None = None) -> Plan:
    """O-BELM run backwards (Wang et al. 2024): one evaluation a step, and exact up to rounding.

    Exact only if both slots are kept: S_0 = x_T and S_1, the state one level below it, from which
    ``model.diffusion.samplers.obelm(paired=True)`` starts.

    Args:
        steps: 1..T, which is also its NFE.

    Raises:
        ScheduleError: invalid ``steps`` or ``spacing``.
    """
    levels = ascending_levels(schedule, steps, spacing)
    x, before, _, eps, _ = basis(2)
    program = []
    for i, (here, there) in enumerate(pairwise(levels)):
        update = obelm_step(before, x, eps, levels[i - 1], here, there) if i else ddim_step(x, eps, here, there)
        program.append(step(schedule, _trained_level(schedule, here), [update, x]))
    return Plan(tuple(program))


def _trained_level(schedule: NoiseSchedule, level: Level) -> Level:
    """The level at which to evaluate the network: never trained on an image without noise, it gets t = 0 there."""
    return level if level.sigma > 0 else Level(0, float(schedule.alphas_cumprod[0]))
