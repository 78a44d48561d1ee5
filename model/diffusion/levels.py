"""Noise levels, hops between them, and steps written as formulas.

A trajectory is a sequence of levels: from the noisiest down to the clean image, or upwards when an image is inverted.
The update at a level is written as a formula over the vectors of :func:`basis`; :func:`step` reads its coefficients.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from model.diffusion.plan import Clip, Step, conversion
from model.diffusion.schedule import NoiseSchedule, ScheduleError, Spacing, covering_spacing, timesteps

# Where the terminal SNR is zero, σ/α is ∞; solvers that need a number start here instead, as diffusers' do.
MIN_ABAR = 2.0**-24


@dataclass(frozen=True, slots=True)
class Level:
    """A noise level: there, x = alpha x_0 + sigma ε.

    Attributes:
        t: the network's timestep; may lie between two that it was trained on.
        abar: ᾱ, in [0, 1].
    """

    t: float
    abar: float

    @property
    def alpha(self) -> float:
        """√ᾱ."""
        return math.sqrt(self.abar)

    @property
    def sigma(self) -> float:
        """√(1 - ᾱ)."""
        return math.sqrt(1 - self.abar)

    @property
    def ratio(self) -> float:
        """σ/α, the noise level of the image scaled so that its signal has weight 1 (the σ of EDM)."""
        return self.sigma / self.alpha

    @property
    def lam(self) -> float:
        """λ = ln(α/σ), half the logarithm of the signal-to-noise ratio; ∞ at the clean image."""
        return math.inf if self.abar == 1 else math.log(self.alpha / self.sigma)


CLEAN = Level(0, 1.0)  # the image itself; a network evaluated there gets t = 0


@dataclass(frozen=True, slots=True)
class Hop:
    """One step down in noise level, as the ancestral samplers take it.

    Attributes:
        t: timestep of its start.
        abar: ᾱ of its start.
        abar_next: ᾱ of its end; 1 at the clean image.
        noisy: whether a stochastic sampler adds noise in it.
    """

    t: float
    abar: float
    abar_next: float
    noisy: bool


def last_level(schedule: NoiseSchedule) -> Level:
    """Where DDIM and PNDM end: the clean image, or the level of t = 0 if the schedule asks for that."""
    return CLEAN if schedule.ends_clean else Level(0, float(schedule.alphas_cumprod[0]))


def noise_levels(
    schedule: NoiseSchedule,
    steps: int,
    spacing: Spacing | None = None,
    min_abar: float = MIN_ABAR,
    last: Level = CLEAN,
) -> list[Level]:
    """The ``steps`` levels at which a sampler evaluates the network, noisiest first, and after them the last.

    Args:
        steps: 1..T.
        spacing: None takes ``leading``, or ``trailing`` where leading would leave out the noisiest timesteps.
        min_abar: takes the place of ᾱ = 0, unless the next level has little more; 0 keeps it, for formulas that allow
            σ/α = ∞.
        last: the clean image, or :func:`last_level`.

    Raises:
        ScheduleError: invalid ``steps`` or ``spacing``.
    """
    if spacing == "karras":
        noisy = _karras(schedule, steps)
    else:
        grid = timesteps(schedule.T, steps, spacing or covering_spacing(schedule.T, steps), schedule.steps_offset)
        noisy = [Level(t, float(schedule.alphas_cumprod[t])) for t in grid]
    levels = [*noisy, last]
    if levels[0].abar == 0:
        levels[0] = Level(levels[0].t, min(min_abar, levels[1].abar / 4))
    return levels


def _karras(schedule: NoiseSchedule, steps: int, rho: float = 7.0) -> list[Level]:
    """Levels evenly spaced in (σ/α)^(1/7) (Karras et al. 2022, eq. 5), with t interpolated in ln(σ/α)."""
    if not 1 <= steps <= schedule.T:
        raise ScheduleError("steps", steps, f"must lie in 1..{schedule.T}")
    abar = schedule.alphas_cumprod.copy()
    if abar[-1] == 0:
        abar[-1] = min((MIN_ABAR, *abar[-2:-1] / 4))
    known = np.log((1 - abar) / abar) / 2
    last, first = np.exp(known[[0, -1]] / rho)
    ratios = np.linspace(first, last, steps) ** rho
    t = np.interp(np.log(ratios), known, np.arange(schedule.T))
    return [Level(float(t), float(1 / (1 + ratio**2))) for t, ratio in zip(t, ratios, strict=True)]


def hops(schedule: NoiseSchedule, steps: int, spacing: Spacing | None = None, last: Level = CLEAN) -> list[Hop]:
    """The hops between :func:`noise_levels`; the last one gets no noise.

    Args and errors: as :func:`noise_levels`.
    """
    levels = noise_levels(schedule, steps, spacing, 0, last)
    return [Hop(levels[i].t, levels[i].abar, levels[i + 1].abar, noisy=i + 1 < steps) for i in range(steps)]


def basis(slots: int) -> np.ndarray:
    """What a step can combine, as unit vectors: S_0 … S_{slots-1}, then x̂0, ε and z.

    Unpack them, and write the paper's update as it stands::

        x, x_0, eps, z = basis(1)
        update = [alpha * x_0 + sigma * eps]
    """
    return np.eye(slots + 3)


def step(
    schedule: NoiseSchedule,
    level: Level,
    update: Sequence[np.ndarray],
    *,
    input_slot: int = 0,
    clip: Clip | None = None,
    implied: bool = False,
) -> Step:
    """The step that evaluates the network at ``level`` and assigns ``update`` to the slots.

    Args:
        update: for each slot its new value, over :func:`basis`.
        input_slot: the slot that is the network's input.
        clip: what is done to x̂0.
        implied: ε is not the network's own, but what x and the clipped x̂0 imply: (x - α x̂0) / σ.
    """
    slots = len(update)
    matrix = np.array(update)
    x0, eps = conversion(schedule.prediction, level.alpha, level.sigma)
    if implied:
        eps = (1 / level.sigma, 0.0, -level.alpha / level.sigma)
    return Step(
        t=level.t,
        x0=x0,
        eps=eps,
        A=tuple(map(tuple, matrix[:, :slots].tolist())),
        b=tuple(matrix[:, slots].tolist()),
        c=tuple(matrix[:, slots + 1].tolist()),
        s=tuple(matrix[:, slots + 2].tolist()),
        g=tuple(1.0 if slot == input_slot else 0.0 for slot in range(slots)),
        clip=clip,
    )
