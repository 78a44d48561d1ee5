"""Independent computations of the same images: loops written from the papers' equations.

Nothing here imports ``model.diffusion.plan`` or ``model.diffusion.machine``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from model.diffusion.levels import Hop, Level
from model.diffusion.schedule import NoiseSchedule

Predict = Callable[[Tensor, float], Tensor]  # ε from (x_t, t)
Levels = Sequence[tuple[float, float]]  # (t, ᾱ), noisiest first; ᾱ = 1 at the clean image


def ddpm_loop(
    predict: Predict,
    levels: Sequence[tuple[int, float, float]],
    x: Tensor,
    zs: Iterator[Tensor],
    *,
    variance: str = "fixed_small",
    clip: float | None = None,
) -> Tensor:
    """DDPM's Algorithm 2 on a subset of timesteps; ``levels`` are (t, ᾱ_t, ᾱ where the step ends)."""
    for t, abar, abar_next in levels:
        eps = predict(x, t)
        beta = 1 - abar / abar_next
        if clip is None:  # eq. 11
            mean = (x - beta / math.sqrt(1 - abar) * eps) / math.sqrt(1 - beta)
        else:  # eq. 15, then eq. 7
            x_0 = ((x - math.sqrt(1 - abar) * eps) / math.sqrt(abar)).clamp(-clip, clip)
            mean = math.sqrt(abar_next) * beta / (1 - abar) * x_0
            mean = mean + math.sqrt(1 - beta) * (1 - abar_next) / (1 - abar) * x
        if abar_next == 1:
            return mean  # "z = 0 if t = 1"
        sigma_sq = beta if variance == "fixed_large" else (1 - abar_next) / (1 - abar) * beta  # section 3.2
        x = mean + math.sqrt(sigma_sq) * next(zs)
    raise AssertionError("the levels do not end at the clean image")


def ddim_loop(
    predict: Predict,
    levels: Sequence[tuple[int, float, float]],
    x: Tensor,
    zs: Iterator[Tensor],
    *,
    eta: float = 0.0,
    clip: float | None = None,
    rederive: bool = False,
) -> Tensor:
    """DDIM eq. 12 with the σ of eq. 16; ``rederive`` reads ε back out of the clipped x̂0, as OpenAI's code does."""
    for t, abar, abar_next in levels:
        eps = predict(x, t)
        x_0 = (x - math.sqrt(1 - abar) * eps) / math.sqrt(abar)
        if clip is not None:
            x_0 = x_0.clamp(-clip, clip)
        if rederive:
            eps = (x - math.sqrt(abar) * x_0) / math.sqrt(1 - abar)
        sigma = eta * math.sqrt((1 - abar_next) / (1 - abar)) * math.sqrt(1 - abar / abar_next)
        x = math.sqrt(abar_next) * x_0 + math.sqrt(1 - abar_next - sigma**2) * eps
        if sigma:
            x = x + sigma * next(zs)
    return x


def x_0_of(predict: Predict, x: Tensor, t: float, abar: float) -> Tensor:
    """x̂0, from DDPM's eq. 15."""
    return (x - math.sqrt(1 - abar) * predict(x, t)) / math.sqrt(abar)


def half_log_snr(abar: float) -> float:
    """λ of DPM-Solver: ln(α / σ)."""
    return math.log(abar / (1 - abar)) / 2


def dpmpp_2m_loop(predict: Predict, levels: Levels, x: Tensor) -> Tensor:
    """DPM-Solver++'s algorithm 2; the step to the clean image, where λ is infinite, is its first-order one."""
    h_before, m_before = 0.0, torch.zeros_like(x)
    for i in range(len(levels) - 1):
        (t, abar), (_, abar_next) = levels[i], levels[i + 1]
        m = x_0_of(predict, x, t, abar)
        if abar_next == 1:
            return m
        h = half_log_snr(abar_next) - half_log_snr(abar)
        r = h_before / h
        D = m if i == 0 else (1 + 1 / (2 * r)) * m - 1 / (2 * r) * m_before
        x = math.sqrt((1 - abar_next) / (1 - abar)) * x - math.sqrt(abar_next) * (math.exp(-h) - 1) * D
        h_before, m_before = h, m
    return x


def dpmpp_2s_loop(predict: Predict, levels: Levels, x: Tensor) -> Tensor:
    """DPM-Solver++'s algorithm 1: from every second level to the next but one, with u at the level between them."""
    for i in range(0, len(levels) - 1, 2):
        (t, abar), (s, abar_s) = levels[i], levels[i + 1]
        m = x_0_of(predict, x, t, abar)
        if abar_s == 1:
            return m
        to_s = half_log_snr(abar_s) - half_log_snr(abar)
        u = math.sqrt((1 - abar_s) / (1 - abar)) * x - math.sqrt(abar_s) * (math.exp(-to_s) - 1) * m
        m_s = x_0_of(predict, u, s, abar_s)
        _, abar_next = levels[i + 2]
        if abar_next == 1:
            return m_s
        h = half_log_snr(abar_next) - half_log_snr(abar)
        r = to_s / h
        D = (1 - 1 / (2 * r)) * m + 1 / (2 * r) * m_s
        x = math.sqrt((1 - abar_next) / (1 - abar)) * x - math.sqrt(abar_next) * (math.exp(-h) - 1) * D
    return x


def heun_loop(predict: Predict, levels: Levels, x: Tensor) -> Tensor:
    """EDM's algorithm 1 with σ(t) = t and s(t) = 1, so for X = x / α, whose derivative in σ/α is ε."""
    X = x / math.sqrt(levels[0][1])
    for (t, abar), (t_next, abar_next) in itertools.pairwise(levels):
        sigma, sigma_next = (math.sqrt((1 - a) / a) for a in (abar, abar_next))
        d = predict(X * math.sqrt(abar), t)
        moved = X + (sigma_next - sigma) * d
        if sigma_next != 0:
            d_next = predict(moved * math.sqrt(abar_next), t_next)
            moved = X + (sigma_next - sigma) * (d + d_next) / 2
        X = moved
    return X * math.sqrt(levels[-1][1])


def unipc_loop(predict: Predict, levels: Levels, x: Tensor) -> Tensor:
    """UniPC-2 as quadrature: the corrector is the exact integral of e^λ P(λ), P a parabola through three x̂0.

    UniPC's theorem 3.1 chooses its weights so that they are exact for polynomials of that degree; predictor and first
    corrector, of one unknown weight, take it as ½, so that they integrate a straight line by its middle.
    """
    nodes, weights = np.polynomial.legendre.leggauss(40)

    def ahead(y: Tensor, here: float, there: float, known: list[tuple[float, Tensor]]) -> Tensor:
        """(σ'/σ) y + α' ∫ e^(λ-λ') P dλ, P through x̂0 at up to three λ; a line is taken at half of h."""
        lam, lam_next = half_log_snr(here), half_log_snr(there)
        h = lam_next - lam
        total = torch.zeros_like(y)
        for node, weight in zip(lam + h * (nodes + 1) / 2, weights * h / 2, strict=True):
            at = lam + h / 2 if len(known) == 2 else node
            for k, (own, m) in enumerate(known):
                others = [lam_k for j, (lam_k, _) in enumerate(known) if j != k]
                lagrange = math.prod((at - other) / (own - other) for other in others)
                total = total + weight * math.exp(node - lam_next) * lagrange * m
        return math.sqrt((1 - there) / (1 - here)) * y + math.sqrt(there) * total

    y, known = x, []
    for i, (t, abar) in enumerate(levels[:-1]):
        m = x_0_of(predict, x, t, abar)
        if i > 0:
            y = ahead(y, levels[i - 1][1], abar, [*known, (half_log_snr(abar), m)])
        if levels[i + 1][1] == 1:
            return m
        known = [*known[-1:], (half_log_snr(abar), m)]
        x = ahead(y, abar, levels[i + 1][1], known if i < len(levels) - 2 else known[-1:])
    return x


def pndm_loop(predict: Predict, levels: Levels, x: Tensor, halves: Levels | None = None) -> Tensor:
    """PNDM's eq. 9, 12 and 13; without ``halves``, the levels within the first three steps, its start is Heun's."""

    def transfer(x: Tensor, e: Tensor, a: float, a_next: float) -> Tensor:  # eq. 11
        below = math.sqrt(a) * (math.sqrt((1 - a_next) * a) + math.sqrt((1 - a) * a_next))
        return math.sqrt(a_next / a) * x - (a_next - a) / below * e

    history: list[Tensor] = []
    for i in range(len(levels) - 1):
        (t, a), (t_next, a_next) = levels[i], levels[i + 1]
        history.append(predict(x, t))
        e1 = e = history[-1]
        if halves is not None and i < 3:
            t_half, a_half = halves[i]
            e2 = predict(transfer(x, e1, a, a_half), t_half)
            e3 = predict(transfer(x, e2, a, a_half), t_half)
            e4 = predict(transfer(x, e3, a, a_next), t_next)
            e = (e1 + 2 * e2 + 2 * e3 + e4) / 6
        elif i == 0 and a_next < 1:
            e = (e1 + predict(transfer(x, e1, a, a_next), t_next)) / 2
        elif i == 1:
            e = (3 * history[-1] - history[-2]) / 2
        elif i == 2:
            e = (23 * history[-1] - 16 * history[-2] + 5 * history[-3]) / 12
        elif i > 2:
            e = (55 * history[-1] - 59 * history[-2] + 37 * history[-3] - 9 * history[-4]) / 24
        x = transfer(x, e, a, a_next)
    return x


def obelm_loop(predict: Predict, levels: Levels, x: Tensor) -> Tensor:
    """BELM's eq. 18, whose α is α here and whose first step is DDIM's."""
    before = x
    for i in range(len(levels) - 1):
        (t, abar), (_, abar_next) = levels[i], levels[i + 1]
        alpha, alpha_next = math.sqrt(abar), math.sqrt(abar_next)
        ratio, ratio_next = (math.sqrt((1 - a) / a) for a in (abar, abar_next))
        h = ratio - ratio_next
        eps = predict(x, t)
        if i == 0:
            x, before = alpha_next * (x / alpha - h * eps), x
            continue
        alpha_before = math.sqrt(levels[i - 1][1])
        h_before = math.sqrt((1 - levels[i - 1][1]) / levels[i - 1][1]) - ratio
        following = (h / h_before) ** 2 * alpha_next / alpha_before * before
        following = following + (h_before**2 - h**2) / h_before**2 * alpha_next / alpha * x
        following = following - h * (h + h_before) / h_before * alpha_next * eps
        x, before = following, x
    return x


def even_in_lambda(schedule: NoiseSchedule, steps: int) -> list[Level]:
    """``steps`` + 1 levels evenly spaced in λ, from t = T - 1 to t = 0: every step equally long, and none infinite."""
    known = np.array([half_log_snr(abar) for abar in schedule.alphas_cumprod])
    lam = np.linspace(known[-1], known[0], steps + 1)
    t = np.interp(-lam, -known, np.arange(schedule.T))
    return [Level(float(t), 1 / (1 + math.exp(-2 * lam))) for t, lam in zip(t, lam, strict=True)]


def hops_between(levels: Sequence[Level]) -> list[Hop]:
    """The same levels, as the ancestral samplers take them."""
    return [Hop(here.t, here.abar, there.abar, there.abar < 1) for here, there in itertools.pairwise(levels)]


def rising(order: int, steps: int) -> list[int]:
    """The order of each step of a multistep solver that is limited by its history alone, and keeps it to the end."""
    return [min(order, i + 1) for i in range(steps)]


def guided(net: Callable[..., Tensor], scale: Sequence[float], null: int) -> Callable[..., Tensor]:
    """Classifier-free guidance (Ho & Salimans 2022, eq. 6) by two forwards; ``scale`` is the paper's w plus 1."""

    def forward(u: Tensor, t: Tensor, y: Tensor) -> Tensor:
        w = torch.tensor(scale, dtype=u.dtype)[:, None, None, None]
        conditional, unconditional = net(u, t, y), net(u, t, torch.full_like(y, null))
        return torch.where(w == 1, conditional, unconditional + w * (conditional - unconditional))

    return forward


def mixture_cdf(x: float, abar: float) -> float:
    """Of ``fakes.MixtureEps``' data at level ᾱ."""
    parts = [
        (1 + math.erf((x - math.sqrt(abar) * mean) / math.sqrt(2 * (abar * deviation**2 + 1 - abar)))) / 2
        for mean, deviation in ((-0.6, 0.1), (0.5, 0.2))
    ]
    return sum(parts) / 2


def mixture_flow(x: float, abar: float, abar_next: float = 1.0) -> float:
    """Where the exact ODE takes x: in one dimension it is monotone, so it maps quantiles to quantiles."""
    target, low, high = mixture_cdf(x, abar), -3.0, 3.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if mixture_cdf(middle, abar_next) < target else (low, middle)
    return low


def levels_of(schedule: NoiseSchedule, grid: Sequence[int]) -> list[tuple[int, float, float]]:
    """(t, ᾱ_t, ᾱ of the next grid entry, or 1 after the last) for a descending grid."""
    abar = [float(schedule.alphas_cumprod[t]) for t in grid]
    return list(zip(grid, abar, [*abar[1:], 1.0], strict=True))
