"""Interpolation between latents.

A latent is [C, H, W], or [2, C, H, W] for the pair of states with which an exact inversion ends; the two states are
interpolated separately. The arithmetic is float64; where one latent has all the weight, it is returned bit for bit.

Directions and norms are interpolated separately: x_T ~ N(0, I) of D numbers has norm √D to within 1/√2, and the network
was trained on no others. Latents of images have other norms, and keep them where they have all the weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from model.diffusion.noise import draw_noise, seeded_generator

InterpolationMethod = Literal["slerp", "lerp"]
PARALLEL = 1e-4  # radians; below, the arc is its chord to within float32
ANTIPODAL = 1e-2  # radians short of π; beyond, the two directions do not determine the arc


class DegenerateBlend(ValueError):
    """Weighted latents whose sum is nearly zero."""


@dataclass(frozen=True)
class Blend:
    """An interpolated latent.

    Attributes:
        weights: of each given latent, summing to 1.
    """

    latent: Tensor
    weights: tuple[float, ...]


def path(a: Tensor, b: Tensor, frames: int, method: InterpolationMethod = "slerp") -> list[Blend]:
    """``frames`` latents from a to b, evenly spaced, both included; at least 2."""
    return [Blend(between(a, b, u, method), (1 - u, u)) for u in (i / (frames - 1) for i in range(frames))]


def grid(corners: Sequence[Tensor], rows: int, columns: int, method: InterpolationMethod = "slerp") -> list[Blend]:
    """A grid between four corners, row by row (DDIM, appendix D.5).

    Interpolated along the upper and the lower edge first, then between the two.

    Args:
        corners: top left, top right, bottom left, bottom right.
        rows, columns: at least 2.
    """
    upper = path(corners[0], corners[1], columns, method)
    lower = path(corners[2], corners[3], columns, method)
    blends = []
    for i in range(rows):
        v = i / (rows - 1)
        for above, below in zip(upper, lower, strict=True):
            weights = (*((1 - v) * w for w in above.weights), *(v * w for w in below.weights))
            blends.append(Blend(between(above.latent, below.latent, v, method), weights))
    return blends


def blend(latents: Sequence[Tensor], weights: Sequence[float], method: InterpolationMethod = "slerp") -> Blend:
    """The weighted mean of several latents.

    ``slerp`` gives the sum the weighted mean of the norms, as Bodin et al. 2024 (LOL) do by Σ w z / √(Σ w²) for
    independent latents; here for dependent ones as well. For two latents it is close to :func:`path`, not equal.

    Args:
        weights: not negative, not all zero; only their ratios matter.

    Raises:
        DegenerateBlend: the latents cancel each other.
    """
    shares = tuple(weight / sum(weights) for weight in weights)
    if 1.0 in shares:
        return Blend(latents[shares.index(1.0)].clone(), shares)

    def mean(vectors: Sequence[Tensor]) -> Tensor:
        total = torch.zeros_like(vectors[0])
        for w, z in zip(shares, vectors, strict=True):
            total = total + w * z
        if method == "lerp":
            return total
        norm = sum(w * float(z.norm()) for w, z in zip(shares, vectors, strict=True))
        if float(total.norm()) < 1e-3 * norm:
            raise DegenerateBlend("the weighted latents cancel each other")
        scaled: Tensor = total / total.norm() * norm
        return scaled

    return Blend(_combine(mean, latents), shares)


def between(a: Tensor, b: Tensor, u: float, method: InterpolationMethod = "slerp") -> Tensor:
    """The latent at u in [0, 1] from a to b.

    ``slerp`` follows the great circle (DDIM, eq. 67), with a norm that is interpolated linearly. Equal directions give
    their chord. Opposite ones determine no great circle: the path then leads through a fixed direction orthogonal to
    both.
    """
    if u in (0.0, 1.0):
        return (b if u else a).clone()

    def mean(vectors: Sequence[Tensor]) -> Tensor:
        one, other = vectors
        if method == "lerp" or not (one.any() and other.any()):
            return (1 - u) * one + u * other
        norm = (1 - u) * one.norm() + u * other.norm()
        scaled: Tensor = _arc(one / one.norm(), other / other.norm(), u) * norm
        return scaled

    return _combine(mean, (a, b))


def antipodal(a: Tensor, b: Tensor) -> bool:
    """Whether a and b point in opposite directions, so that the path between them is a convention."""
    one, other = a.double().flatten(), b.double().flatten()
    if not (one.any() and other.any()):
        return False
    return torch.pi - float(_angle(one / one.norm(), other / other.norm())) < ANTIPODAL


def _arc(a: Tensor, b: Tensor, u: float) -> Tensor:
    """:func:`between` for unit vectors."""
    theta = _angle(a, b)
    if theta < PARALLEL:
        mixed = (1 - u) * a + u * b
        return mixed / mixed.norm()  # type: ignore[no-any-return]
    if torch.pi - theta < ANTIPODAL:
        middle = draw_noise(seeded_generator(0), tuple(a.shape)).to(a)
        axis = (a - b) / (a - b).norm()
        middle = middle - (middle @ axis) * axis
        middle = middle / middle.norm()
        return _arc(a, middle, 2 * u) if u < 0.5 else _arc(middle, b, 2 * u - 1)
    return (torch.sin((1 - u) * theta) * a + torch.sin(u * theta) * b) / torch.sin(theta)


def _angle(a: Tensor, b: Tensor) -> Tensor:
    """In 0..π, exact near both ends, where an arc cosine is not (Kahan)."""
    return 2 * torch.atan2((a - b).norm(), (a + b).norm())


def _combine(mean: Callable[[Sequence[Tensor]], Tensor], latents: Sequence[Tensor]) -> Tensor:
    """Apply ``mean`` to flat float64 vectors, to each state of a pair separately."""
    shape = latents[0].shape
    states = 1 if len(shape) == 3 else shape[0]
    flat = [latent.double().reshape(states, -1) for latent in latents]
    mixed = torch.stack([mean([latent[k] for latent in flat]) for k in range(states)])
    return mixed.reshape(shape).to(latents[0].dtype)
