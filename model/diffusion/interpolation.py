"""Interpolation: latents between latents.

A latent is [C, H, W], or [2, C, H, W] for the pair of states that an exact inversion ends with, whose two members are
interpolated alike. The arithmetic is float64; wherever the weights name one end alone, that end is returned bit for
bit.

Directions and norms are interpolated apart: x_T ~ N(0, I) of D numbers has norm √D to within 1/√2, and a network knows
no others. Encoded images have norms of their own, and keep them at their end of the way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from model.diffusion.noise import draw_noise, seeded_generator

Inversion = Literal["slerp", "lerp"]
PARALLEL = 1e-4  # radians; below, the arc is its chord to within float32
ANTIPODAL = 1e-2  # radians short of π; beyond, the two directions no longer say which arc is meant


class DegenerateBlend(ValueError):
    """Weighted latents that point against each other until nothing is left."""


@dataclass(frozen=True)
class Frame:
    """One latent between the ends.

    Attributes:
        weights: of each end, summing to 1.
    """

    latent: Tensor
    weights: tuple[float, ...]


def path(a: Tensor, b: Tensor, frames: int, method: Inversion = "slerp") -> list[Frame]:
    """``frames`` latents from a to b, evenly spaced, both included; at least 2."""
    way = [i / (frames - 1) for i in range(frames)]
    return [Frame(between(a, b, u, method), (1 - u, u)) for u in way]


def corners(ends: Sequence[Tensor], rows: int, columns: int, method: Inversion = "slerp") -> list[Frame]:
    """A grid between four corners, row by row (DDIM, appendix D.5): top left, top right, bottom left, bottom right.

    First along the upper and the lower edge, then between the two. Rows and columns: at least 2.
    """
    upper = path(ends[0], ends[1], columns, method)
    lower = path(ends[2], ends[3], columns, method)
    grid = []
    for i in range(rows):
        v = i / (rows - 1)
        for above, below in zip(upper, lower, strict=True):
            weights = (*((1 - v) * w for w in above.weights), *(v * w for w in below.weights))
            grid.append(Frame(between(above.latent, below.latent, v, method), weights))
    return grid


def blend(ends: Sequence[Tensor], weights: Sequence[float], method: Inversion = "slerp") -> Frame:
    """The weighted mean of several latents.

    ``slerp`` gives the sum the weighted mean of the ends' norms, as Bodin et al. 2024 (LOL) do by Σ w z / √(Σ w²) for
    independent latents; here also right for those that are not. With two ends it is near :func:`path`, not the same.

    Args:
        weights: not negative, not all zero; only their ratios matter.

    Raises:
        DegenerateBlend: the ends cancel each other.
    """
    shares = tuple(weight / sum(weights) for weight in weights)
    if 1.0 in shares:
        return Frame(ends[shares.index(1.0)].clone(), shares)

    def mean(parts: Sequence[Tensor]) -> Tensor:
        total = torch.zeros_like(parts[0])
        for w, z in zip(shares, parts, strict=True):
            total = total + w * z
        if method == "lerp":
            return total
        norm = sum(w * float(z.norm()) for w, z in zip(shares, parts, strict=True))
        if float(total.norm()) < 1e-3 * norm:
            raise DegenerateBlend("the weighted latents point against each other until nothing is left")
        scaled: Tensor = total / total.norm() * norm
        return scaled

    return Frame(_each(mean, ends), shares)


def between(a: Tensor, b: Tensor, u: float, method: Inversion = "slerp") -> Tensor:
    """The latent at u in [0, 1] of the way from a to b.

    ``slerp`` follows the great circle (DDIM, eq. 67) at a norm that is interpolated linearly. Equal directions give
    their chord. For opposite ones, where no great circle is distinguished, the way leads through a fixed direction
    orthogonal to both.
    """
    if u in (0.0, 1.0):
        return (b if u else a).clone()

    def mean(parts: Sequence[Tensor]) -> Tensor:
        one, other = parts
        if method == "lerp" or not (one.any() and other.any()):
            return (1 - u) * one + u * other
        norm = (1 - u) * one.norm() + u * other.norm()
        scaled: Tensor = _arc(one / one.norm(), other / other.norm(), u) * norm
        return scaled

    return _each(mean, (a, b))


def antipodal(a: Tensor, b: Tensor) -> bool:
    """Whether a and b point in opposite directions, so that the way between them is a convention."""
    one, other = a.double().flatten(), b.double().flatten()
    if not (one.any() and other.any()):
        return False
    return torch.pi - float(_angle(one / one.norm(), other / other.norm())) < ANTIPODAL


def _arc(a: Tensor, b: Tensor, u: float) -> Tensor:
    """Between unit vectors."""
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


def _each(mean: Callable[[Sequence[Tensor]], Tensor], ends: Sequence[Tensor]) -> Tensor:
    """Apply ``mean`` to flat float64 vectors, to each member of a pair by itself."""
    shape = ends[0].shape
    members = 1 if len(shape) == 3 else shape[0]
    flat = [end.double().reshape(members, -1) for end in ends]
    mixed = torch.stack([mean([end[k] for end in flat]) for k in range(members)])
    return mixed.reshape(shape).to(ends[0].dtype)
