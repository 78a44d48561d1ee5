"""Fréchet distance between two sets of feature vectors (Heusel et al. 2017)."""

from __future__ import annotations

import numpy as np


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """‖μ_a - μ_b‖² + tr(Σ_a + Σ_b - 2 (Σ_a Σ_b)^½), the distance of Gaussians with the same moments.

    It is biased upwards for few images: compare values of equal numbers of images, and with the floor, the distance of
    as many real images from the same reference.

    Args:
        a, b: float [n, D] and [m, D]; n and m at least 2.
    """
    mean_a, mean_b = a.mean(axis=0), b.mean(axis=0)
    root_a, root_b = (a - mean_a) / np.sqrt(len(a) - 1), (b - mean_b) / np.sqrt(len(b) - 1)
    # With Σ = rootᵀ root, tr (Σ_a Σ_b)^½ is the sum of the singular values of root_a root_bᵀ. Where there are more
    # images than features, the triangular factors of the roots have the same ones and are smaller.
    small_a, small_b = (root if len(root) <= root.shape[1] else _triangle(root) for root in (root_a, root_b))
    overlap = np.linalg.svd(small_a @ small_b.T, compute_uv=False).sum()
    return float(np.square(mean_a - mean_b).sum() + np.square(root_a).sum() + np.square(root_b).sum() - 2 * overlap)


def _triangle(root: np.ndarray) -> np.ndarray:
    return np.asarray(np.linalg.qr(root, mode="r"))
