"""Samplers: each a function from (schedule, steps, options) to a Plan.

Notation: a walk goes down through levels; ``abar`` is ᾱ where a step starts and ``abar_next`` where it lands, 1 being
the clean picture. Formulas are those of DDPM (Ho et al. 2020) and DDIM (Song et al. 2021), whose α is ᾱ here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from model.plan import Clip, Plan, Step, conversion
from model.schedule import NoiseSchedule, ScheduleError, Spacing, covering_spacing, timesteps

Variance = Literal["fixed_small", "fixed_large", "learned_range"]


@dataclass(frozen=True, slots=True)
class Hop:
    """One step down the noise levels.

    Attributes:
        t: timestep where it starts.
        abar: ᾱ there.
        abar_next: ᾱ where it lands; 1 at the clean picture.
        noisy: whether a stochastic sampler adds noise on landing.
    """

    t: int
    abar: float
    abar_next: float
    noisy: bool


def hops(schedule: NoiseSchedule, steps: int, spacing: Spacing | None = None) -> list[Hop]:
    """The walk from grid point to grid point, and from the last one to the clean picture, which gets no noise.

    Args:
        spacing: None takes ``leading``, or ``trailing`` where leading would not reach the noise.
    """
    grid = timesteps(schedule.T, steps, spacing or covering_spacing(schedule.T, steps))
    levels = [float(schedule.alphas_cumprod[t]) for t in grid] + [1.0]
    return [Hop(t, levels[i], levels[i + 1], noisy=i + 1 < steps) for i, t in enumerate(grid)]


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
        ScheduleError: ``steps`` or ``spacing`` cannot be.
    """
    if variance not in get_args(Variance):
        raise ScheduleError("variance", variance, f"choose one of {', '.join(get_args(Variance))}")
    program = []
    for hop in walk or hops(schedule, steps, spacing):
        a = hop.abar / hop.abar_next  # the product of 1 - β over the timesteps that this hop skips
        b = 1 - a
        x0, eps = conversion(schedule.prediction, math.sqrt(hop.abar), math.sqrt(1 - hop.abar))
        small = max((1 - hop.abar_next) / (1 - hop.abar) * b, 1e-20)
        s, log_var = 0.0, None
        if hop.noisy and variance == "learned_range":
            log_var = ((math.log(b) + math.log(small)) / 2, (math.log(b) - math.log(small)) / 2)
        elif hop.noisy:
            s = math.sqrt(small if variance == "fixed_small" else b)
        program.append(
            Step(
                t=hop.t,
                x0=x0,
                eps=eps,
                A=((math.sqrt(a) * (1 - hop.abar_next) / (1 - hop.abar),),),
                b=(math.sqrt(hop.abar_next) * b / (1 - hop.abar),),
                c=(0.0,),
                s=(s,),
                clip=clip,
                log_var=log_var,
            )
        )
    return Plan(tuple(program))


def ddim(
    schedule: NoiseSchedule,
    steps: int,
    *,
    eta: float = 0.0,
    spacing: Spacing | None = None,
    clip: Clip | None = None,
    rederive: bool = False,
    walk: Sequence[Hop] | None = None,
) -> Plan:
    """The family with DDPM's marginals (DDIM eq. 12 and 16): deterministic at eta 0, ancestral at eta 1.

    Args:
        steps: 1..T.
        eta: 0..1, share of the ancestral noise.
        clip: what is done to x̂0.
        rederive: recompute ε from the clipped x̂0, as OpenAI's code does; the default keeps the network's own.
        walk: overrides the grid that ``steps`` and ``spacing`` describe.

    Raises:
        ScheduleError: ``steps``, ``spacing`` or ``eta`` cannot be.
    """
    if not 0 <= eta <= 1:
        raise ScheduleError("eta", eta, "must lie in 0..1: 0 is deterministic, 1 adds as much noise as ddpm")
    program = []
    for hop in walk or hops(schedule, steps, spacing):
        alpha, sigma = math.sqrt(hop.abar), math.sqrt(1 - hop.abar)
        x0, eps = conversion(schedule.prediction, alpha, sigma)
        if rederive:
            eps = (1 / sigma, 0.0, -alpha / sigma)
        s = eta * math.sqrt((1 - hop.abar_next) / (1 - hop.abar) * (1 - hop.abar / hop.abar_next))
        program.append(
            Step(
                t=hop.t,
                x0=x0,
                eps=eps,
                A=((0.0,),),
                b=(math.sqrt(hop.abar_next),),
                c=(math.sqrt(max(0.0, 1 - hop.abar_next - s**2)),),
                s=(s,),
                clip=clip,
            )
        )
    return Plan(tuple(program))


@dataclass(frozen=True)
class Sampler:
    """What a user should know of a sampler, and the function behind it.

    Attributes:
        summary: one plain sentence: what it is and when to use it.
        default_steps: None stands for T, the whole chain.
        options: names of the request fields that only some samplers take and this one does.
        compile: (schedule, steps, spacing=, clip=, and the options) to a Plan.
    """

    name: str
    summary: str
    default_steps: int | None
    options: frozenset[str]
    compile: Callable[..., Plan]


SAMPLERS = {
    sampler.name: sampler
    for sampler in (
        Sampler(
            "ddim",
            "Deterministic and fast: 20 to 50 steps, the same x_T always gives the same picture; eta > 0 adds noise.",
            50,
            frozenset({"eta"}),
            ddim,
        ),
        Sampler(
            "ddpm",
            "The original ancestral walk with fresh noise at every step: best with all T steps, poor below a hundred.",
            None,
            frozenset({"variance"}),
            ddpm,
        ),
    )
}


@dataclass(frozen=True)
class Habits:
    """How a checkpoint's scheduler config says that its network should be walked with."""

    clip: Clip | None = None
    clip_limit: float = 1.0
    spacing: Spacing = "leading"
    variance: Variance = "fixed_small"

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Habits:
        """Read a diffusers ``scheduler_config.json``."""
        limit = float(config.get("clip_sample_range", 1.0))
        clip = Clip(limit) if config.get("clip_sample", True) else None
        if config.get("thresholding"):
            clip = Clip(
                float(config.get("sample_max_value", 1.0)), float(config.get("dynamic_thresholding_ratio", 0.995))
            )
        variance = str(config.get("variance_type", "fixed_small")).removesuffix("_log")
        if variance not in ("fixed_small", "fixed_large", "learned_range"):
            raise ScheduleError("variance_type", variance, "choose fixed_small, fixed_large or learned_range")
        return cls(clip, limit, config.get("timestep_spacing", "leading"), variance)  # type: ignore[arg-type]

    def variance_for(self, steps: int, T: int) -> Variance:
        """The trained variance; but ``fixed_large`` is unusable on a shortened walk (DDIM, table 1, σ̂)."""
        return "fixed_small" if self.variance == "fixed_large" and steps < T else self.variance
