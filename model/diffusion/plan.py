"""Plan and Step: the coefficients of every step of a sampler or an inversion, computed before any image is.

A trajectory owns a few state slots S_0..S_{R-1}. S_0 starts as x_T and ends as the result; the others start at zero,
unless the trajectory is given more than one state to start from. One step is one network evaluation:

    u  = Σ_j g_j S_j                               the network's input (nearly always S_0)
    o  = εθ(u, t, y)                               one forward, shared by all rows of the batch
    x̂0 = clip(P u + Q o)                           by prediction type
    ε  = e_u u + e_o o + e_x x̂0
    S' = A S + b x̂0 + c ε + s z                    z ~ N(0, I)

A sampler is a function that returns a plan; executing a plan does not need to know which sampler made it.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from model.diffusion.schedule import Prediction


@dataclass(frozen=True, slots=True)
class Clip:
    """What is done to x̂0.

    Attributes:
        limit: x̂0 is clamped to ±limit; with a quantile, the largest threshold.
        quantile: dynamic thresholding (Saharia et al. 2022, section 2.3): the threshold is this quantile of |x̂0| of the
            image itself, kept in [1, limit], and x̂0 is divided by it.
    """

    limit: float = 1.0
    quantile: float | None = None


@dataclass(frozen=True, slots=True)
class Guard:
    """A condition on the update, evaluated for each image separately: some iterations improve only some images.

    Attributes:
        watch: the slot whose mean square must decrease in this step; where it does not, ``instead`` applies.
        instead: for each slot, the old slot that replaces its update; None keeps the update.
    """

    watch: int
    instead: tuple[int | None, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """One network evaluation of one trajectory; the letters are those of the module's docstring.

    Attributes:
        t: the network's timestep; may be fractional.
        x0: (P, Q).
        eps: (e_u, e_o, e_x).
        g, b, c, s: one number per slot.
        A: one row per slot.
        clip: None leaves x̂0 as it is.
        log_var: (l0, l1) where the network has learned the variance: exp(½(l0 + l1 v)) z is added to slot 0, v being
            the second half of the network's channels (Nichol & Dhariwal 2021, eq. 15).
        guard: None applies the update unconditionally.
    """

    t: float
    x0: tuple[float, float]
    eps: tuple[float, float, float]
    A: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    c: tuple[float, ...]
    s: tuple[float, ...]
    g: tuple[float, ...] = (1.0,)
    clip: Clip | None = None
    log_var: tuple[float, float] | None = None
    guard: Guard | None = None

    @property
    def noisy(self) -> bool:
        """Whether this step draws z."""
        return self.log_var is not None or any(self.s)


class Columns:
    """Column indices of the coefficients in a row of :meth:`Plan.table`, for R slots.

    A guard's slots are counted from 1 there; 0 is none.
    """

    T, P, Q, E_U, E_O, E_X, LIMIT, QUANTILE, CEILING, LEARNED, L0, L1, WATCH = range(13)

    def __init__(self, slots: int) -> None:
        r, at = slots, 13
        self.g = range(at, at + r)
        self.b = range(at + r, at + 2 * r)
        self.c = range(at + 2 * r, at + 3 * r)
        self.s = range(at + 3 * r, at + 4 * r)
        self.instead = range(at + 4 * r, at + 5 * r)
        self.A = [range(at + (5 + i) * r, at + (6 + i) * r) for i in range(r)]
        self.width = at + (5 + r) * r


@dataclass(frozen=True)
class Plan:
    """All steps of a trajectory; immutable.

    Attributes:
        steps: in the order of execution; at least one.
    """

    steps: tuple[Step, ...]

    def __post_init__(self) -> None:
        if not self.steps:
            raise ValueError("a plan needs at least one step")
        for step in _distinct(self.steps):
            sizes = {len(step.g), len(step.b), len(step.c), len(step.s), len(step.A), *map(len, step.A)}
            if step.guard is not None:
                sizes.add(len(step.guard.instead))
            if sizes != {self.slots}:
                at = self.steps.index(step)
                raise ValueError(f"step {at} has {sorted(sizes)} slots, the plan has {self.slots}")
        if not np.isfinite(np.delete(self.table(self.slots), Columns.LIMIT, axis=1)).all():
            raise ValueError("a plan's coefficients must be finite")

    @property
    def slots(self) -> int:
        """R, the number of state images that a trajectory owns."""
        return len(self.steps[0].g)

    @property
    def nfe(self) -> int:
        """Number of network evaluations."""
        return len(self.steps)

    @property
    def stochastic(self) -> bool:
        """Whether any step draws noise; if none does, x_T alone decides the result."""
        return any(step.noisy for step in self.steps)

    @cached_property
    def digest(self) -> str:
        """Twelve hexadecimal digits of the hash of the float32 coefficients, which identify the plan."""
        return hashlib.sha256(self.table(self.slots).astype("<f4").tobytes()).hexdigest()[:12]

    @property
    def nbytes(self) -> int:
        """About the memory that it takes: its tables, and objects of some 30 bytes for each number of a step."""
        numbers = Columns(self.slots).width
        tables = sum(int(table.nbytes) for table in list(self._tables.values()))
        return tables + len(_distinct(self.steps)) * (300 + 30 * numbers)

    def table(self, slots: int) -> np.ndarray:
        """The coefficients, float64 [NFE, K] in the columns of ``Columns(slots)``; ``slots`` may exceed the plan's."""
        if slots not in self._tables:
            self._tables[slots] = _pack(self.steps, slots)
            self._tables[slots].flags.writeable = False
        return self._tables[slots]

    @cached_property
    def _tables(self) -> dict[int, np.ndarray]:
        return {}


def conversion(
    prediction: Prediction, alpha: float, sigma: float
) -> tuple[tuple[float, float], tuple[float, float, float]]:
    """(P, Q) and (e_u, e_o, e_x), which turn the output of a network of this prediction type into x̂0 and ε.

    Args:
        alpha: √ᾱ at the input's level; above 0 for epsilon.
        sigma: √(1 - ᾱ) there; above 0 for sample.
    """
    match prediction:
        case "epsilon":
            return (1 / alpha, -sigma / alpha), (0.0, 1.0, 0.0)
        case "v_prediction":  # Salimans & Ho 2022, appendix D
            return (alpha, -sigma), (sigma, alpha, 0.0)
        case "sample":
            return (0.0, 1.0), (1 / sigma, -alpha / sigma, 0.0)


def _distinct(steps: tuple[Step, ...]) -> list[Step]:
    """The steps, each object once: a plan may repeat one."""
    return list({id(step): step for step in steps}.values())


def _pack(steps: tuple[Step, ...], slots: int) -> np.ndarray:
    at = Columns(slots)
    distinct = _distinct(steps)
    places = {id(step): place for place, step in enumerate(distinct)}
    table = np.zeros((len(distinct), at.width))
    for row, step in zip(table, distinct, strict=True):
        r = len(step.g)
        row[at.T] = step.t
        row[[at.P, at.Q]] = step.x0
        row[[at.E_U, at.E_O, at.E_X]] = step.eps
        row[at.LIMIT] = math.inf if step.clip is None or step.clip.quantile else step.clip.limit
        if step.clip is not None and step.clip.quantile:
            row[[at.QUANTILE, at.CEILING]] = step.clip.quantile, step.clip.limit
        if step.log_var is not None:
            row[[at.LEARNED, at.L0, at.L1]] = 1.0, *step.log_var
        row[at.g[:r]], row[at.b[:r]], row[at.c[:r]], row[at.s[:r]] = step.g, step.b, step.c, step.s
        if step.guard is not None:
            row[at.WATCH] = step.guard.watch + 1
            row[at.instead[:r]] = [0 if slot is None else slot + 1 for slot in step.guard.instead]
        for i in range(r):
            row[at.A[i][:r]] = step.A[i]
    return table if len(distinct) == len(steps) else table[[places[id(step)] for step in steps]]
