"""What is evaluated: which samplers, with which numbers of evaluations, on how many images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from model.diffusion.defaults import SamplingDefaults
from model.diffusion.plan import Plan
from model.diffusion.samplers import SAMPLERS
from model.diffusion.schedule import NoiseSchedule, ScheduleError


@dataclass(frozen=True)
class Scope:
    """Size of an evaluation.

    Attributes:
        images: per cell; image i has seed i, and class i modulo their number.
        budgets: numbers of network evaluations; a sampler takes as many steps as they allow.
        long: a budget for ``ddpm`` alone, or None.
        inverted: number of held-out images that are inverted and decoded.
        inversion_steps: numbers of steps of these round trips.
        reference: number of held-out images for comparison.
    """

    images: int = 1000
    budgets: tuple[int, ...] = (5, 10, 20, 50, 100)
    long: int | None = 1000
    inverted: int = 256
    inversion_steps: tuple[int, ...] = (10, 20, 50, 100)
    reference: int = 10_000


QUICK = Scope(images=100, budgets=(5, 10, 20), long=None, inverted=16, inversion_steps=(20, 50), reference=2000)

# By label in tables and plots: the sampler, and options that differ from the defaults.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("ddim", {}),
    "ddim, unclipped": ("ddim", {"clip": None}),
    "ddim, clipped as diffusers does": ("ddim", {"rederive": False}),
    "ddim, eta 0.5": ("ddim", {"eta": 0.5}),
    "ddpm": ("ddpm", {}),
    "ddpm, fixed_large": ("ddpm", {"variance": "fixed_large"}),
    "dpmpp_2m": ("dpmpp_2m", {}),
    "dpmpp_2m, order 3": ("dpmpp_2m", {"order": 3}),
    "dpmpp_2m_sde": ("dpmpp_2m_sde", {}),
    "dpmpp_2s": ("dpmpp_2s", {}),
    "unipc": ("unipc", {}),
    "heun": ("heun", {}),
    "pndm": ("pndm", {}),
    "obelm": ("obelm", {}),
}


@dataclass(frozen=True)
class Cell:
    """One variant of a sampler with one budget.

    Attributes:
        variant: label in ``VARIANTS``.
        budget: network evaluations allowed.
        steps: the sampler's number of steps.
    """

    variant: str
    sampler: str
    budget: int
    steps: int
    plan: Plan


def cells(schedule: NoiseSchedule, defaults: SamplingDefaults, scope: Scope) -> Iterator[Cell]:
    """Every variant with each budget, otherwise with the server's defaults."""
    for label, (name, options) in VARIANTS.items():
        sampler = SAMPLERS[name]
        a, b = sampler.evaluations
        budgets = [*scope.budgets, scope.long] if label == "ddpm" and scope.long else scope.budgets
        for budget in budgets:
            steps = (budget - b) // a
            try:
                chosen = defaults.options(sampler, steps, schedule.T) | options
                plan = sampler.compile(schedule, steps, **chosen)
            except ScheduleError:
                continue  # more steps than this network has timesteps
            yield Cell(label, name, budget, steps, plan)
