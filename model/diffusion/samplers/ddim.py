"""The family that DDPM's training defines: ancestral sampling, and its deterministic member.

Formulas are those of DDPM (Ho et al. 2020) and DDIM (Song et al. 2021), whose α is ᾱ here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, get_args

from model.diffusion.levels import Hop, Level, hops, step, terms
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
    walk: Sequence[Hop] | None = None,
) -> Plan:
    """Ancestral sampling (DDPM eq. 6, 7 and 11), on any subset of the timesteps.

    Args:
        steps: 1..T.
        variance: of the noise added: β̃ (``fixed_small``), β (``fixed_large``, poor below some hundreds of steps), or
            learned by the network between the two in the logarithm (Nichol & Dhariwal 2021, eq. 15).
        clip: what is done to x̂0.
        walk: overrides the grid that ``steps`` and ``spacing`` describe.

    Raises:
        ScheduleError: ``steps``, ``spacing`` or ``variance`` cannot be.
    """
    if variance not in get_args(Variance):
        raise ScheduleError("variance", variance, f"choose one of {', '.join(get_args(Variance))}")
    x, x_0, _, z = terms(1)
    program = []
    for hop in walk or hops(schedule, steps, spacing):
        a = hop.abar / hop.abar_next  # the product of 1 - β over the timesteps that this hop skips
        b = 1 - a
        small = max((1 - hop.abar_next) / (1 - hop.abar) * b, 1e-20)
        s, log_var = 0.0, None
        if hop.noisy and variance == "learned_range":
            log_var = ((math.log(b) + math.log(small)) / 2, (math.log(b) - math.log(small)) / 2)
        elif hop.noisy:
            s = math.sqrt(small if variance == "fixed_small" else b)
        keep, pull = math.sqrt(a) * (1 - hop.abar_next) / (1 - hop.abar), math.sqrt(hop.abar_next) * b / (1 - hop.abar)
        made = step(schedule, Level(hop.t, hop.abar), [keep * x + pull * x_0 + s * z], clip=clip)
        program.append(replace(made, log_var=log_var))
    return Plan(tuple(program))


def ddim(
    schedule: NoiseSchedule,
    steps: int,
    *,
    eta: float = 0.0,
    spacing: Spacing | None = None,
    clip: Clip | None = None,
    rederive: bool = True,
    walk: Sequence[Hop] | None = None,
) -> Plan:
    """The family with DDPM's marginals (DDIM eq. 12 and 16): deterministic at eta 0, ancestral at eta 1.

    Args:
        steps: 1..T.
        eta: 0..1, share of the ancestral noise.
        clip: what is done to x̂0.
        rederive: where x̂0 is clipped, take for ε what x and x̂0 imply, as OpenAI's code does. diffusers by default keeps
            the network's own, and then every clip leaves a little of x_t unaccounted for: colours fade, and more
            steps make it worse.
        walk: overrides the grid that ``steps`` and ``spacing`` describe.

    Raises:
        ScheduleError: ``steps``, ``spacing`` or ``eta`` cannot be.
    """
    if not 0 <= eta <= 1:
        raise ScheduleError("eta", eta, "must lie in 0..1: 0 is deterministic, 1 adds as much noise as ddpm")
    _, x_0, eps, z = terms(1)
    program = []
    for hop in walk or hops(schedule, steps, spacing):
        s = eta * math.sqrt((1 - hop.abar_next) / (1 - hop.abar) * (1 - hop.abar / hop.abar_next))
        toward = math.sqrt(max(0.0, 1 - hop.abar_next - s**2))
        update = math.sqrt(hop.abar_next) * x_0 + toward * eps + s * z
        program.append(
            step(schedule, Level(hop.t, hop.abar), [update], clip=clip, implied=rederive and clip is not None)
        )
    return Plan(tuple(program))
