"""DDPM's ancestral sampling and DDIM.

Formulas are those of DDPM (Ho et al. 2020) and DDIM (Song et al. 2021), whose α is ᾱ here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, get_args

import numpy as np

from model.diffusion.levels import Hop, Level, basis, hops, last_level, step
from model.diffusion.plan import Clip, Plan
from model.diffusion.schedule import NoiseSchedule, ScheduleError, Spacing

Variance = Literal["fixed_small", "fixed_large", "learned_range"]


def ddpm(
    schedule: NoiseSchedule,
    steps: int,
    *,
    variance: Variance = "fixed_small",
    spacing: Spacing | None = None,
    clip: Clip | None = None,
) -> Plan:
    """Ancestral sampling (DDPM eq. 6, 7 and 11), on any subset of the timesteps.

    Args:
        steps: 1..T.
        variance: of the noise added: β̃ (``fixed_small``), β (``fixed_large``, poor below some hundreds of steps), or
            interpolated between the logarithms of the two by the network (Nichol & Dhariwal 2021, eq. 15).
        clip: what is done to x̂0.

    Raises:
        ScheduleError: invalid ``steps``, ``spacing`` or ``variance``.
    """
    if variance not in get_args(Variance):
        raise ScheduleError("variance", variance, f"choose one of {', '.join(get_args(Variance))}")
    return ddpm_on(schedule, hops(schedule, steps, spacing), variance=variance, clip=clip)


def ddpm_on(
    schedule: NoiseSchedule, trajectory: Sequence[Hop], *, variance: Variance = "fixed_small", clip: Clip | None = None
) -> Plan:
    """:func:`ddpm` on given hops."""
    x, x_0, _, z = basis(1)
    program = []
    for hop in trajectory:
        a = hop.abar / hop.abar_next  # the product of 1 - β over the timesteps that this hop skips
        b = 1 - a
        small = max((1 - hop.abar_next) / (1 - hop.abar) * b, 1e-20)
        s, log_var = 0.0, None
        if hop.noisy and variance == "learned_range":
            log_var = ((math.log(b) + math.log(small)) / 2, (math.log(b) - math.log(small)) / 2)
        elif hop.noisy:
            s = math.sqrt(small if variance == "fixed_small" else b)
        x_weight = math.sqrt(a) * (1 - hop.abar_next) / (1 - hop.abar)
        x_0_weight = math.sqrt(hop.abar_next) * b / (1 - hop.abar)
        update = x_weight * x + x_0_weight * x_0 + s * z
        program.append(replace(step(schedule, Level(hop.t, hop.abar), [update], clip=clip), log_var=log_var))
    return Plan(tuple(program))


def ddim(
    schedule: NoiseSchedule,
    steps: int,
    *,
    eta: float = 0.0,
    spacing: Spacing | None = None,
    clip: Clip | None = None,
    rederive: bool = True,
) -> Plan:
    """The family with DDPM's marginals (DDIM eq. 12 and 16): deterministic at eta 0, ancestral at eta 1.

    Args:
        steps: 1..T.
        eta: 0..1, share of the ancestral noise.
        clip: what is done to x̂0.
        rederive: where x̂0 is clipped, replace ε by what x and x̂0 imply, as OpenAI's code does. diffusers by default
            keeps the network's ε; then every clip leaves a part of x_t unaccounted for: colours fade, the more the
            more steps there are.

    Raises:
        ScheduleError: invalid ``steps``, ``spacing`` or ``eta``.
    """
    if not 0 <= eta <= 1:
        raise ScheduleError("eta", eta, "must lie in 0..1: 0 is deterministic, 1 adds as much noise as ddpm")
    trajectory = hops(schedule, steps, spacing, last_level(schedule))
    return ddim_on(schedule, trajectory, eta=eta, clip=clip, rederive=rederive)


def ddim_on(
    schedule: NoiseSchedule,
    trajectory: Sequence[Hop],
    *,
    eta: float = 0.0,
    clip: Clip | None = None,
    rederive: bool = True,
) -> Plan:
    """:func:`ddim` on given hops."""
    _, x_0, eps, z = basis(1)
    program = []
    for hop in trajectory:
        s = eta * math.sqrt((1 - hop.abar_next) / (1 - hop.abar) * (1 - hop.abar / hop.abar_next))
        eps_weight = math.sqrt(max(0.0, 1 - hop.abar_next - s**2))
        update = math.sqrt(hop.abar_next) * x_0 + eps_weight * eps + s * z
        implied = rederive and clip is not None
        program.append(step(schedule, Level(hop.t, hop.abar), [update], clip=clip, implied=implied))
    return Plan(tuple(program))


def ddim_step(x: np.ndarray, eps: np.ndarray, here: Level, there: Level) -> np.ndarray:
    """x at ``there`` from x at ``here`` for a constant ε: x/α is linear in σ/α (DDIM eq. 13 and 14, PNDM eq. 11)."""
    scale = there.alpha / here.alpha
    return np.asarray(scale * x + (there.sigma - here.sigma * scale) * eps)
