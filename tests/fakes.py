"""Noise predictors with closed-form answers, so that tests of the mathematics need no trained weights.

Each is a ``machine.Net``: (u [B, C, H, W], t [B], y) to [B, C, H, W]. They work pixel by pixel, so a row's answer
has the same bits in any batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from model.diffusion.levels import MIN_ABAR
from model.diffusion.schedule import NoiseSchedule


def level(schedule: NoiseSchedule, t: Tensor, like: Tensor) -> Tensor:
    """ᾱ at timesteps t [B], as [B, 1, 1, 1] in the dtype of ``like``.

    Between two integers ln(σ/α) is interpolated, as Karras levels do; at an integer ᾱ is the schedule's, 0 included.
    """
    abar = torch.as_tensor(schedule.alphas_cumprod)
    t = t.double().clamp(0, schedule.T - 1)
    below, above = t.floor().long(), t.ceil().long()
    log_ratio = [torch.log((1 - a) / a) / 2 for a in (abar[i].clamp(min=MIN_ABAR) for i in (below, above))]
    between = torch.sigmoid(-2 * torch.lerp(*log_ratio, t - below))
    return torch.where(below == above, abar[below], between).to(like.dtype)[:, None, None, None]


def as_prediction(schedule: NoiseSchedule, abar: Tensor, x_0: Tensor, eps: Tensor) -> Tensor:
    """What a network of this prediction type would answer; u = α x_0 + σ ε holds by construction."""
    match schedule.prediction:
        case "epsilon":
            return eps
        case "sample":
            return x_0
        case "v_prediction":
            return abar.sqrt() * eps - (1 - abar).sqrt() * x_0


@dataclass(frozen=True)
class GaussianEps:
    """The exact predictor for data N(μ, s² I).

    x_t has variance v = ᾱ s² + 1 - ᾱ, so E[ε | x_t] = √(1-ᾱ) (x_t - √ᾱ μ) / v. Written in this form it also holds at
    s = 0 (a single point) and at ᾱ = 0 (pure noise).
    """

    schedule: NoiseSchedule
    mu: float = 0.0
    s: float = 1.0

    def __call__(self, u: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        abar = level(self.schedule, t, u)
        v = abar * self.s**2 + 1 - abar
        centred = u - abar.sqrt() * self.mu
        eps = (1 - abar).sqrt() * centred / v
        x_0 = self.mu + abar.sqrt() * self.s**2 * centred / v
        return as_prediction(self.schedule, abar, x_0, eps)


@dataclass(frozen=True)
class MixtureEps:
    """The exact predictor when each pixel is drawn from a mixture of Gaussians: nonlinear, and still in closed form."""

    schedule: NoiseSchedule
    weights: tuple[float, ...] = (0.5, 0.5)
    means: tuple[float, ...] = (-0.6, 0.5)
    deviations: tuple[float, ...] = (0.1, 0.2)

    def __call__(self, u: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        abar = level(self.schedule, t, u)
        logits, eps_k, x_k = [], [], []
        for weight, mean, deviation in zip(self.weights, self.means, self.deviations, strict=True):
            v = abar * deviation**2 + 1 - abar
            centred = u - abar.sqrt() * mean
            logits.append(torch.log(weight / v.sqrt()) - centred**2 / (2 * v))
            eps_k.append((1 - abar).sqrt() * centred / v)
            x_k.append(mean + abar.sqrt() * deviation**2 * centred / v)
        # Their softmax by hand: torch's starts threads, which on a busy machine takes milliseconds for a few numbers.
        top = torch.stack(logits).amax(0)
        shares = [torch.exp(logit - top) for logit in logits]
        eps = sum(p * e for p, e in zip(shares, eps_k, strict=True)) / sum(shares)
        x_0 = sum(p * x for p, x in zip(shares, x_k, strict=True)) / sum(shares)
        return as_prediction(self.schedule, abar, x_0, eps)


@dataclass(frozen=True)
class WithVariance:
    """Any predictor, with a second half of channels for a learned variance: tanh of the input, so within -1..1."""

    net: GaussianEps | MixtureEps

    def __call__(self, u: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        return torch.cat([self.net(u, t, y), torch.tanh(u)], dim=1)
