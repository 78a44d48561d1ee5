import math
from itertools import pairwise

import numpy as np
import pytest
from diffusers import DPMSolverMultistepScheduler, HeunDiscreteScheduler

from model.diffusion.levels import CLEAN, MIN_ABAR, Hop, Level, basis, hops, noise_levels, step
from model.diffusion.plan import Clip
from model.diffusion.schedule import SPACINGS, NoiseSchedule, ScheduleError, timesteps
from tests.diffusers_levels import diffusers_levels

LINEAR = NoiseSchedule.from_config({})
COSINE = NoiseSchedule.from_config({"beta_schedule": "squaredcos_cap_v2"})
PURE_NOISE = NoiseSchedule.from_config({"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"})
SCHEDULES = pytest.mark.parametrize("schedule", [LINEAR, COSINE, PURE_NOISE], ids=["linear", "cosine", "pure-noise"])


def known_abar(schedule, t):
    """ᾱ at any t, ln(σ/α) being interpolated between timesteps."""
    log_ratio = [math.log((1 - abar) / abar) / 2 if abar else math.inf for abar in schedule.alphas_cumprod]
    below = min(int(t), schedule.T - 2)
    return 1 / (1 + math.exp(2 * (log_ratio[below] + (t - below) * (log_ratio[below + 1] - log_ratio[below]))))


def test_a_level_in_all_its_names():
    level = Level(12.5, 0.36)
    assert (level.alpha, level.sigma) == pytest.approx((0.6, 0.8), abs=1e-15)
    assert level.ratio == pytest.approx(0.8 / 0.6, abs=1e-15)
    assert level.lam == pytest.approx(math.log(0.6 / 0.8), abs=1e-15)
    assert (CLEAN.alpha, CLEAN.sigma, CLEAN.ratio, CLEAN.lam) == (1, 0, 0, math.inf)


@SCHEDULES
@pytest.mark.parametrize("steps", [1, 2, 10, 50, 333, 1000])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_levels_fall_from_the_noise_to_the_clean_image(spacing, steps, schedule):
    if (spacing == "leading" and steps < 10) or (spacing in ("linspace", "quadratic") and steps == 1):
        with pytest.raises(ScheduleError, match=f"^spacing = '{spacing}'"):
            noise_levels(schedule, steps, spacing)
        return
    levels = noise_levels(schedule, steps, spacing)
    assert len(levels) == steps + 1
    assert levels[-1] == CLEAN
    t, abar = np.array([level.t for level in levels[:-1]]), np.array([level.abar for level in levels])
    assert (np.diff(t) < 0).all()
    assert (np.diff(abar) > 0).all()
    assert abar[0] > 0
    assert t[0] >= (0.79 if spacing == "quadratic" else 0.89) * 999


@SCHEDULES
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace", "quadratic"])
def test_levels_are_those_of_the_timesteps(spacing, schedule):
    # A level that is not the network's own of that t would misread its ε; only ᾱ = 0 has none to offer to 1/α.
    levels, grid = noise_levels(schedule, 20, spacing)[:-1], timesteps(1000, 20, spacing)
    assert [level.t for level in levels] == grid
    for level in levels:
        own = schedule.alphas_cumprod[int(level.t)]
        assert level.abar == (own if own > 0 else MIN_ABAR)


@pytest.mark.parametrize("schedule", [LINEAR, COSINE], ids=["linear", "cosine"])
@pytest.mark.parametrize("steps", [1, 2, 10, 50])
def test_karras_levels_are_evenly_spaced_in_the_seventh_root(steps, schedule):
    *levels, last = noise_levels(schedule, steps, "karras")
    assert last == CLEAN
    assert levels[0].t == pytest.approx(999, abs=1e-9)
    assert levels[0].abar == pytest.approx(schedule.alphas_cumprod[999], rel=1e-9)
    if steps > 1:
        assert levels[-1].t == pytest.approx(0, abs=1e-9)
        assert levels[-1].abar == pytest.approx(schedule.alphas_cumprod[0], rel=1e-12)
        distances = np.diff([level.ratio ** (1 / 7) for level in levels])
        assert distances == pytest.approx(distances[0], rel=1e-6)  # √(1 - ᾱ) loses digits where ᾱ is nearly 1
    for level in levels:
        assert level.abar == pytest.approx(known_abar(schedule, level.t), rel=1e-9)


# diffusers makes arrays of tensors in a way that numpy 2 will give up.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("steps", [10, 20, 50])
def test_karras_levels_are_those_of_diffusers(steps):
    heun = diffusers_levels(HeunDiscreteScheduler(beta_start=1e-4, beta_end=0.02, use_karras_sigmas=True), steps)
    multistep = diffusers_levels(DPMSolverMultistepScheduler(use_karras_sigmas=True), steps)
    for ours, theirs, rounded in zip(noise_levels(LINEAR, steps, "karras"), heun, multistep, strict=True):
        # Theirs come from float32 ᾱ, whose 1 - ᾱ of 1e-4 at t = 0 has an error of 6e-4.
        assert ours.ratio == pytest.approx(theirs.ratio, rel=6e-4)
        assert ours.ratio == pytest.approx(rounded.ratio, rel=6e-4)
        assert ours.t == pytest.approx(theirs.t, abs=1e-2)
        assert abs(ours.t - rounded.t) <= 0.5 + 1e-2  # DPM++ rounds t, but not the level


@pytest.mark.parametrize("steps", [0, -1, 1001])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_steps_outside_the_chain_are_refused(spacing, steps):
    for make in (noise_levels, hops):
        with pytest.raises(ScheduleError) as caught:
            make(LINEAR, steps, spacing)
        assert (caught.value.field, caught.value.value) == ("steps", steps)


def test_an_unknown_spacing_is_refused():
    with pytest.raises(ScheduleError, match=r"^spacing = 'cubic'.*karras"):
        noise_levels(LINEAR, 10, "cubic")


@pytest.mark.parametrize("spacing", ["trailing", "linspace", "karras"])
def test_pure_noise_is_lifted_for_formulas_in_lambda_only(spacing):
    lifted = noise_levels(PURE_NOISE, 10, spacing)
    assert 0 < lifted[0].abar <= MIN_ABAR * (1 + 1e-9)
    assert math.isfinite(lifted[0].lam)
    if spacing != "karras":
        assert hops(PURE_NOISE, 10, spacing)[0].abar == 0
        assert noise_levels(PURE_NOISE, 10, spacing, min_abar=0)[0].abar == 0


@pytest.mark.parametrize("spacing", ["trailing", "linspace", "karras"])
def test_pure_noise_stays_the_noisiest_level_where_the_next_has_hardly_more_signal(spacing):
    schedule = NoiseSchedule(np.array([0.5, 1e-9, 0.0]), "v_prediction")
    levels = noise_levels(schedule, 3, spacing)
    assert levels[0].abar == pytest.approx(1e-9 / 4, rel=1e-9)
    assert all(here.abar < there.abar for here, there in pairwise(levels))


@SCHEDULES
@pytest.mark.parametrize("spacing", [None, *SPACINGS])
def test_hops_lead_from_level_to_level(spacing, schedule):
    levels, found = noise_levels(schedule, 12, spacing, min_abar=0), hops(schedule, 12, spacing)
    assert found == [Hop(a.t, a.abar, b.abar, b is not CLEAN) for a, b in pairwise(levels)]
    assert [hop.noisy for hop in found] == [True] * 11 + [False]
    assert found[-1].abar_next == 1


def test_the_basis_is_one_unit_vector_each():
    x, other, x_0, eps, z = basis(2)
    assert np.array([x, other, x_0, eps, z]).tolist() == np.eye(5).tolist()


HALF = Level(300.5, 0.36)


def test_an_update_is_written_into_the_coefficients_that_it_names():
    x, other, x_0, eps, z = basis(2)
    made = step(LINEAR, HALF, [2 * x - other + 3 * x_0, 0.5 * eps + 4 * z])
    assert made.A == ((2, -1), (0, 0))
    assert made.b == (3, 0)
    assert made.c == (0, 0.5)
    assert made.s == (0, 4)
    assert made.t == 300.5
    assert made.g == (1, 0)
    assert (made.clip, made.guard, made.log_var) == (None, None, None)
    assert made.noisy


def test_an_update_without_z_draws_nothing():
    x, x_0, eps, z = basis(1)
    assert not step(LINEAR, HALF, [x + x_0 + eps + 0 * z]).noisy


@pytest.mark.parametrize("input_slot", [0, 1, 2])
def test_the_input_slot_is_the_networks_input(input_slot):
    made = step(LINEAR, HALF, list(basis(3)[:3]), input_slot=input_slot)
    assert made.g == tuple(float(slot == input_slot) for slot in range(3))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("implied", [False, True], ids=["own", "implied"])
def test_epsilon_is_the_networks_own_or_what_the_clipped_image_implies(implied, prediction):
    schedule = NoiseSchedule.from_config({"prediction_type": prediction})
    made = step(schedule, HALF, [basis(1)[0]], clip=Clip(0.5), implied=implied)
    image, noise = 0.9, -0.3
    u = 0.6 * image + 0.8 * noise
    o = {"epsilon": noise, "v_prediction": 0.6 * noise - 0.8 * image, "sample": image}[prediction]
    x_0 = made.x0[0] * u + made.x0[1] * o
    assert x_0 == pytest.approx(image, abs=1e-14)
    found = made.eps[0] * u + made.eps[1] * o + made.eps[2] * min(x_0, 0.5)
    # The own one is as if nothing had been clipped, also where the network predicts x_0.
    assert found == pytest.approx((u - 0.6 * 0.5) / 0.8 if implied else noise, abs=1e-14)
    assert made.clip == Clip(0.5)
