"""The vocabulary in which walks are written: noise levels, hops between them, and steps as formulas.

A walk visits *levels*, from the noisiest to the clean image, or upwards when an image is encoded. What happens at a
level is written as a formula over the vectors of :func:`terms`, and :func:`step` turns it into coefficients.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from model.diffusion.plan import Clip, Step, conversion
from model.diffusion.schedule import NoiseSchedule, ScheduleError, Spacing, covering_spacing, timesteps

# Where the terminal SNR is zero, σ/α is ∞; solvers that need a number start from here instead, as diffusers' do.
LEAST_ABAR = 2.0**-24


@dataclass(frozen=True, slots=True)
class Level:
    """A noise level: there, x = alpha x_0 + sigma ε.

    Attributes:
        t: the timestep that the network is told; may lie between two that it was trained on.
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
        """σ/α, the noise level of the same image scaled so that its signal has weight 1 (the σ of EDM)."""
        return self.sigma / self.alpha

    @property
    def lam(self) -> float:
        """λ = ln(α/σ), half the logarithm of the signal-to-noise ratio; ∞ at the clean image."""
        return math.inf if self.abar == 1 else math.log(self.alpha / self.sigma)


CLEAN = Level(0, 1.0)  # the image itself; a network asked about it is told t = 0


@dataclass(frozen=True, slots=True)
class Hop:
    """One step down the noise levels, as the ancestral samplers take it.

    Attributes:
        t: timestep where it starts.
        abar: ᾱ there.
        abar_next: ᾱ where it lands; 1 at the clean image.
        noisy: whether a stochastic sampler adds noise on landing.
    """

    t: float
    abar: float
    abar_next: float
    noisy: bool


def levels(
    schedule: NoiseSchedule, steps: int, spacing: Spacing | None = None, least_abar: float = LEAST_ABAR
) -> list[Level]:
    """The ``steps`` levels that a walk visits, noisiest first, and the clean image after them.

    Args:
        steps: 1..T.
        spacing: None takes ``leading``, or ``trailing`` where leading would not reach the noise.
        least_abar: takes the place of ᾱ = 0, unless the next level has little more; 0 leaves it, for formulas that bear
            σ/α = ∞.

    Raises:
        ScheduleError: ``steps`` or ``spacing`` cannot be.
    """
    if spacing == "karras":
        visited = _karras(schedule, steps)
    else:
        grid = timesteps(schedule.T, steps, spacing or covering_spacing(schedule.T, steps))
        visited = [Level(t, float(schedule.alphas_cumprod[t])) for t in grid]
    walk = [*visited, CLEAN]
    if walk[0].abar == 0:
        walk[0] = Level(walk[0].t, min(least_abar, walk[1].abar / 4))
    return walk


def _karras(schedule: NoiseSchedule, steps: int, rho: float = 7.0) -> list[Level]:
    """Levels evenly spaced in (σ/α)^(1/7) (Karras et al. 2022, eq. 5), with t by interpolation in ln(σ/α)."""
    if not 1 <= steps <= schedule.T:
        raise ScheduleError("steps", steps, f"must lie in 1..{schedule.T}")
    abar = schedule.alphas_cumprod.copy()
    if abar[-1] == 0:
        abar[-1] = min((LEAST_ABAR, *abar[-2:-1] / 4))
    known = np.log((1 - abar) / abar) / 2
    last, first = np.exp(known[[0, -1]] / rho)
    ratios = np.linspace(first, last, steps) ** rho
    t = np.interp(np.log(ratios), known, np.arange(schedule.T))
    return [Level(float(t), float(1 / (1 + ratio**2))) for t, ratio in zip(t, ratios, strict=True)]


def hops(schedule: NoiseSchedule, steps: int, spacing: Spacing | None = None) -> list[Hop]:
    """The walk from level to level; the last hop, to the clean image, gets no noise.

    Args:
        spacing: None takes ``leading``, or ``trailing`` where leading would not reach the noise.
    """
    walk = levels(schedule, steps, spacing, least_abar=0)
    return [Hop(walk[i].t, walk[i].abar, walk[i + 1].abar, noisy=i + 1 < steps) for i in range(steps)]


def terms(slots: int) -> np.ndarray:
    """The things that a step can combine, as unit vectors: S_0 … S_{slots-1}, then x̂0, ε and z.

    Unpack them, and the paper's update can be written down as it stands::

        x, x_0, eps, z = terms(1)
        update = [alpha * x_0 + sigma * eps]
    """
    return np.eye(slots + 3)


def step(
    schedule: NoiseSchedule,
    level: Level,
    update: Sequence[np.ndarray],
    *,
    sees: int = 0,
    clip: Clip | None = None,
    implied: bool = False,
) -> Step:
    """The step that evaluates the network at ``level``, and gives each slot its update.

    Args:
        update: for each slot its new value, over :func:`terms`.
        sees: the slot that the network is shown.
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
        g=tuple(1.0 if slot == sees else 0.0 for slot in range(slots)),
        clip=clip,
    )
