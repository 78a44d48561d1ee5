"""The forward process q(x_t | x_0) = N(√ᾱ_t x_0, (1 - ᾱ_t) I), and the timesteps of samplers.

Everything is float64 on the CPU. Symbols follow DDPM (Ho et al. 2020): β_t and ᾱ_t = Π(1 - β). The names of schedules
and spacings are those of diffusers' scheduler configs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

Prediction = Literal["epsilon", "v_prediction", "sample"]
Spacing = Literal["leading", "trailing", "linspace", "quadratic", "karras"]
MAX_T = 100_000  # timesteps of a schedule
SPACINGS: tuple[Spacing, ...] = get_args(Spacing)


class ScheduleError(ValueError):
    """Invalid parameters of a schedule, a sampler or an inversion.

    Attributes:
        field: name of the parameter as in requests and configs (``steps``, ``spacing``, ``eta``…).
        value: its invalid value.
        remedy: the values that are allowed.
    """

    def __init__(self, field: str, value: object, remedy: str) -> None:
        super().__init__(f"{field} = {value!r}: {remedy}")
        self.field = field
        self.value = value
        self.remedy = remedy


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """ᾱ_t for t = 0..T-1, and what a network trained on it predicts.

    Attributes:
        alphas_cumprod: float64 [T], strictly decreasing, in (0, 1); the last may be 0 (zero terminal SNR).
        prediction: ``epsilon`` (the noise), ``v_prediction`` (α ε - σ x_0, Salimans & Ho 2022) or ``sample`` (x_0).
        steps_offset: added to the timesteps of ``leading`` spacing, as far as they stay below T.
        ends_clean: DDIM and PNDM, and their inversions, end at the image itself, ᾱ = 1; else at the level of t = 0, as
            diffusers' ``set_alpha_to_one: false`` has it.
    """

    alphas_cumprod: np.ndarray
    prediction: Prediction = "epsilon"
    steps_offset: int = 0
    ends_clean: bool = True

    def __post_init__(self) -> None:
        if self.prediction not in get_args(Prediction):
            raise ScheduleError("prediction_type", self.prediction, f"choose one of {', '.join(get_args(Prediction))}")
        abar = np.asarray(self.alphas_cumprod, dtype=np.float64)
        if abar.ndim != 1 or not len(abar) or not (np.all(np.diff(abar) < 0) and abar[0] < 1 and abar[-1] >= 0):
            raise ScheduleError(
                "alphas_cumprod", f"array of shape {abar.shape}", "must be strictly decreasing in [0, 1)"
            )
        if abar[-1] == 0 and self.prediction == "epsilon":
            raise ScheduleError(
                "rescale_betas_zero_snr",
                True,
                "with prediction_type epsilon the first step would divide by zero; use v_prediction or sample",
            )
        object.__setattr__(self, "alphas_cumprod", abar)

    @classmethod
    def from_betas(cls, betas: np.ndarray, prediction: Prediction = "epsilon") -> NoiseSchedule:
        """Build ᾱ from β_t, float64 [T], each in (0, 1)."""
        return cls(np.cumprod(1.0 - np.asarray(betas, dtype=np.float64)), prediction)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> NoiseSchedule:
        """Read a diffusers ``scheduler_config.json``; missing keys take diffusers' defaults.

        Raises:
            ScheduleError: an unknown ``beta_schedule`` or ``prediction_type``, or zero terminal SNR with epsilon.
        """
        betas = _betas(config)
        if config.get("rescale_betas_zero_snr"):
            betas = _zero_terminal_snr(betas)
        abar = np.cumprod(1.0 - betas)
        prediction = config.get("prediction_type", "epsilon")
        return cls(abar, prediction, config.get("steps_offset", 0), config.get("set_alpha_to_one", True))

    @property
    def T(self) -> int:
        """Number of timesteps in training."""
        return len(self.alphas_cumprod)

    def add_noise(self, x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """x_t from q(x_t | x_0) with the given noise (DDPM eq. 4).

        Args:
            x_0: [B, C, H, W] in [-1, 1].
            t: int64 [B] in 0..T-1.
            eps: like ``x_0``, standard normal.
        """
        abar = _alphas_cumprod_on(x_0.device, self)[t][:, None, None, None]
        return abar.sqrt().to(x_0.dtype) * x_0 + (1 - abar).sqrt().to(x_0.dtype) * eps


@lru_cache(maxsize=8)
def _alphas_cumprod_on(device: torch.device, schedule: NoiseSchedule) -> Tensor:
    """ᾱ_t, float64 [T]; cached, because the copy synchronizes with a CUDA device."""
    return torch.as_tensor(schedule.alphas_cumprod, device=device)


def _betas(config: Mapping[str, Any]) -> np.ndarray:
    if config.get("trained_betas") is not None:
        return np.asarray(config["trained_betas"], dtype=np.float64)
    T = int(config.get("num_train_timesteps", config.get("timesteps", 1000)))
    first, last = float(config.get("beta_start", 1e-4)), float(config.get("beta_end", 0.02))
    match config.get("beta_schedule", "linear"):
        case "linear":  # DDPM section 4
            return np.linspace(first, last, T)
        case "scaled_linear":  # latent diffusion: linear in √β
            return np.linspace(first**0.5, last**0.5, T) ** 2
        case "squaredcos_cap_v2":  # Nichol & Dhariwal 2021, eq. 17
            edge = np.cos((np.arange(T + 1) / T + 0.008) / 1.008 * np.pi / 2) ** 2
            return np.asarray(np.minimum(1 - edge[1:] / edge[:-1], 0.999))
        case other:
            known = "linear, scaled_linear, squaredcos_cap_v2, or trained_betas"
            raise ScheduleError("beta_schedule", other, f"choose one of {known}")


def _zero_terminal_snr(betas: np.ndarray) -> np.ndarray:
    """β whose √ᾱ is shifted and scaled to end at exactly 0 (Lin et al. 2023, algorithm 1)."""
    root = np.sqrt(np.cumprod(1 - betas))
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    abar = root**2
    return 1 - np.concatenate([abar[:1], abar[1:] / abar[:-1]])


def timesteps(T: int, steps: int, spacing: Spacing, offset: int = 0) -> list[int]:
    """``steps`` distinct timesteps, noisiest first, for every spacing but ``karras``.

    ``leading`` and ``trailing`` are evenly spaced and contain t = 0 and t = T - 1 respectively, ``linspace`` contains
    both, ``quadratic`` is denser near t = 0 and starts at 0.8 T (DDIM, appendix D.2). Where ``steps`` divides T, these
    are diffusers' grids; elsewhere ``leading`` and ``trailing`` still cover all of 0..T-1, which diffusers' do not.

    Args:
        offset: added to those of ``leading``, as far as they stay below T.

    Raises:
        ScheduleError: ``steps`` outside 1..T, an unknown spacing, or a first timestep at which an image is not yet
            noise, so that sampling cannot start there (``leading`` below 10 steps, ``linspace`` with one).
    """
    if not 1 <= steps <= T:
        raise ScheduleError(
            "steps", steps, f"must lie in 1..{T}, the number of timesteps that the network was trained on"
        )
    i = np.arange(steps)
    match spacing:
        case "leading":
            grid = i * T // steps
            grid += min(offset, T - 1 - int(grid[-1]))
        case "trailing":
            grid = np.sort(np.round(T - i * T / steps).astype(int) - 1)
        case "linspace":
            grid = np.round(np.linspace(0, T - 1, steps)).astype(int)
        case "quadratic":
            grid = (np.linspace(0, np.sqrt(0.8 * T), steps) ** 2).astype(int)
            # Near t = 0 several squares round to the same integer: move them up to the next free one.
            grid = np.maximum.accumulate(grid - i) + i
        case _:
            raise ScheduleError("spacing", spacing, f"choose one of {', '.join(SPACINGS)}")
    top = int(grid[-1])
    if spacing != "trailing" and top < (0.8 if spacing == "quadratic" else 0.9) * T - 1:
        raise ScheduleError(
            "spacing",
            spacing,
            f"with steps = {steps} sampling would start at t = {top} of {T}, where an image is not yet noise; "
            "use trailing, or more steps",
        )
    return [int(t) for t in grid[::-1]]


def covering_spacing(T: int, steps: int, preferred: Spacing = "leading") -> Spacing:
    """``preferred``, or ``trailing`` where so few steps would leave out the noisiest timesteps."""
    if preferred == "karras":
        return preferred
    try:
        timesteps(T, steps, preferred)
    except ScheduleError as error:
        if error.field == "spacing" and preferred in SPACINGS:
            return "trailing"
        raise
    return preferred
