"""What is evaluated: which walks, within which budgets, with how many images."""

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
    """How much is measured.

    Attributes:
        images: generated with each walk; image i is drawn from seed i, with class i modulo their number.
        budgets: numbers of network evaluations; each sampler takes the longest walk that keeps within them.
        long: the budget for ``ddpm`` alone, or None.
        inverted: how many held-out images are encoded and decoded again.
        inversion_steps: step counts of those round trips.
        reference: how many held-out images all others are compared with.
    """

    images: int = 1000
    budgets: tuple[int, ...] = (5, 10, 20, 50, 100)
    long: int | None = 1000
    inverted: int = 256
    inversion_steps: tuple[int, ...] = (10, 20, 50, 100)
    reference: int = 10_000


QUICK = Scope(images=100, budgets=(5, 10, 20), long=None, inverted=16, inversion_steps=(20, 50), reference=2000)

# What is compared: the label in tables and plots, the sampler, and options that differ from the defaults.
WALKS: dict[str, tuple[str, dict[str, Any]]] = {
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
    """One walk whose images are looked at.

    Attributes:
        walk: its label.
        budget: the evaluations that it was allowed.
        steps: the sampler's own count.
    """

    walk: str
    sampler: str
    budget: int
    steps: int
    plan: Plan


def cells(schedule: NoiseSchedule, habits: SamplingDefaults, scope: Scope) -> Iterator[Cell]:
    """Every walk within each budget, as the server would take it by default."""
    for label, (name, options) in WALKS.items():
        sampler = SAMPLERS[name]
        a, b = sampler.evaluations
        budgets = [*scope.budgets, scope.long] if label == "ddpm" and scope.long else scope.budgets
        for budget in budgets:
            steps = (budget - b) // a
            try:
                chosen = habits.options(sampler, steps, schedule.T) | options
                plan = sampler.compile(schedule, steps, **chosen)
            except ScheduleError:
                continue  # more steps than this network has timesteps
            yield Cell(label, name, budget, steps, plan)
