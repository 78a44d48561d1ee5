"""Latents between latents, against closed forms."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from model.diffusion.interpolation import DegenerateBlend, antipodal, between, blend, grid, path
from model.diffusion.noise import draw_noise, seeded_generator

SHAPE = (3, 8, 8)


def gaussian(seed: int, shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    return draw_noise(seeded_generator(seed), shape)


def orthonormal(count: int) -> list[torch.Tensor]:
    """Orthogonal latents of norm √D, float64."""
    d = math.prod(SHAPE)
    q, _ = torch.linalg.qr(torch.stack([gaussian(k).flatten() for k in range(count)]).double().T)
    return [math.sqrt(d) * q[:, k].reshape(SHAPE) for k in range(count)]


@pytest.mark.parametrize("method", ["slerp", "lerp"])
@pytest.mark.parametrize("shape", [SHAPE, (2, *SHAPE)], ids=["single", "pair"])
def test_the_ends_are_returned_bit_for_bit(shape, method):
    ends = [gaussian(k, shape) * (1 + k) for k in range(4)]
    way = path(ends[0], ends[1], 5, method)
    assert torch.equal(way[0].latent, ends[0])
    assert torch.equal(way[-1].latent, ends[1])
    blends = grid(ends, 3, 4, method)
    for at, end in zip((0, 3, 8, 11), ends, strict=True):
        assert torch.equal(blends[at].latent, end)
    assert torch.equal(blend(ends, [0, 0, 2, 0], method).latent, ends[2])
    assert all(frame.latent.dtype == torch.float32 and frame.latent.shape == shape for frame in way + blends)


def test_slerp_of_orthogonal_latents_is_cosine_and_sine():
    a, b = orthonormal(2)
    for i, frame in enumerate(path(a, b, 9)):
        angle = i / 8 * math.pi / 2
        # float64 all the way: rounding of a few operations on numbers of size 1
        assert (frame.latent - math.cos(angle) * a - math.sin(angle) * b).abs().max() < 1e-12
        assert frame.weights == pytest.approx((1 - i / 8, i / 8))


def test_the_way_has_constant_speed_and_the_norm_is_interpolated():
    a, b = gaussian(1).double(), 3 * gaussian(2).double() + gaussian(1).double()
    way = [frame.latent for frame in path(a, b, 9)]
    for i, z in enumerate(way):
        assert float(z.norm()) == pytest.approx(float((1 - i / 8) * a.norm() + i / 8 * b.norm()), rel=1e-12)
    angles = [float(torch.arccos((x * y).sum() / x.norm() / y.norm())) for x, y in pairwise(way)]
    assert angles == pytest.approx([angles[0]] * 8, rel=1e-6)  # an arc cosine of angles of 0.1 loses half the digits


def test_the_way_back_is_the_same_way():
    a, b = gaussian(1), gaussian(2) * 2
    for there, back in zip(path(a, b, 7), reversed(path(b, a, 7)), strict=True):
        assert (there.latent - back.latent).abs().max() < 1e-6  # float32 rounding of numbers up to 8


def test_equal_ends_give_themselves():
    a = gaussian(3)
    for frame in path(a, a.clone(), 6):
        assert (frame.latent - a).abs().max() < 1e-6  # float32 rounding
    for i, frame in enumerate(path(a, 2 * a, 5)):
        assert (frame.latent - (1 + i / 4) * a).abs().max() < 2e-6


@pytest.mark.parametrize("tilt", [0, 1e-4, 5e-3, 2e-2])
def test_opposite_ends_have_a_way_of_the_right_norm_without_jumps(tilt):
    a = gaussian(4)
    b = -a + tilt * gaussian(5)
    assert antipodal(a, b) == (tilt < 1e-2)
    way = [frame.latent for frame in path(a, b, 101)]
    norm = float(a.norm())
    assert all(float(z.norm()) == pytest.approx(norm, rel=0.02) for z in way)
    # The whole arc is about π, so a hundredth of it π/100; half as much again bounds the convention's two halves.
    assert max(float((y - x).norm()) for x, y in pairwise(way)) < 1.5 * math.pi / 100 * norm
    assert all(torch.equal(x.latent, y) for x, y in zip(path(a, b, 101), way, strict=True))
    assert not antipodal(a, gaussian(6))


def test_opposite_ends_meet_a_direction_that_is_orthogonal_to_both():
    a = gaussian(4).double()
    middle = between(a, -a, 0.5)
    # float64 all the way; a cosine of rounding, where that of two random directions is about 1/√192.
    assert abs(float((middle * a).sum() / middle.norm() / a.norm())) < 1e-14
    assert float(middle.norm()) == pytest.approx(float(a.norm()), rel=1e-14)
    for u in (0.1, 0.4, 0.7):
        angle = torch.arccos((between(a, -a, u) * a).sum() / a.norm() ** 2)
        assert float(angle) == pytest.approx(u * math.pi, rel=1e-12)


@pytest.mark.parametrize("method", ["slerp", "lerp"])
def test_the_states_of_a_pair_are_interpolated_separately(method):
    pairs = [gaussian(k, (2, *SHAPE)) * (1 + k) for k in range(3)]
    found = between(pairs[0], pairs[1], 0.3, method), blend(pairs, [5, 3, 2], method).latent
    for k in range(2):
        states = [pair[k] for pair in pairs]
        assert torch.equal(found[0][k], between(states[0], states[1], 0.3, method))
        assert torch.equal(found[1][k], blend(states, [5, 3, 2], method).latent)


def test_zero_has_no_direction_and_is_met_in_a_straight_line():
    a = gaussian(1)
    assert torch.equal(between(a, torch.zeros_like(a), 0.5), (a.double() / 2).float())
    assert not antipodal(a, torch.zeros_like(a))


def test_lerp_is_straight():
    a, b = gaussian(1), gaussian(2)
    assert torch.equal(between(a, b, 0.25, "lerp"), (0.75 * a.double() + 0.25 * b.double()).float())


def test_blend_of_independent_latents_is_the_linear_combination_of_lol():
    """Bodin et al. 2024: Σ w z / √(Σ w²) for orthogonal latents of one norm."""
    ends, weights = orthonormal(3), [0.5, 0.3, 0.2]
    expected = sum(w * z for w, z in zip(weights, ends, strict=True)) / math.sqrt(sum(w * w for w in weights))
    found = blend(ends, [5, 3, 2])
    assert (found.latent - expected).abs().max() < 1e-12
    assert found.weights == pytest.approx(weights)


def test_blend_of_what_cancels_is_refused():
    a = gaussian(1)
    with pytest.raises(DegenerateBlend):
        blend([a, -a], [1, 1])
    assert torch.equal(blend([a, -a], [1, 1], "lerp").latent, torch.zeros_like(a))


def test_the_edges_of_a_grid_are_paths_and_orthogonal_corners_have_product_weights():
    ends = orthonormal(4)
    blends = grid(ends, 4, 5)
    assert all(torch.equal(x.latent, y.latent) for x, y in zip(blends[:5], path(ends[0], ends[1], 5), strict=True))
    assert all(torch.equal(x.latent, y.latent) for x, y in zip(blends[-5:], path(ends[2], ends[3], 5), strict=True))
    assert all(torch.equal(x.latent, y.latent) for x, y in zip(blends[::5], path(ends[0], ends[2], 4), strict=True))
    for i in range(4):
        for j in range(5):
            v, u = i / 3, j / 4
            down = math.cos(v * math.pi / 2), math.sin(v * math.pi / 2)
            across = math.cos(u * math.pi / 2), math.sin(u * math.pi / 2)
            shares = (down[0] * across[0], down[0] * across[1], down[1] * across[0], down[1] * across[1])
            expected = sum(s * z for s, z in zip(shares, ends, strict=True))
            assert (blends[5 * i + j].latent - expected).abs().max() < 1e-12
            assert blends[5 * i + j].weights == pytest.approx(((1 - v) * (1 - u), (1 - v) * u, v * (1 - u), v * u))


def test_slerp_stays_where_noise_lives_and_lerp_does_not():
    """Mean squares of D Gaussian numbers are 1 ± √(2/D); the middle of a straight line has half of that."""
    d = 3 * 64 * 64
    a, b = gaussian(1, (3, 64, 64)), gaussian(2, (3, 64, 64))
    five_sigma = 5 * math.sqrt(2 / d)
    assert float(between(a, b, 0.5).square().mean()) == pytest.approx(1, abs=five_sigma)
    assert float(between(a, b, 0.5, "lerp").square().mean()) == pytest.approx(0.5, abs=five_sigma)
