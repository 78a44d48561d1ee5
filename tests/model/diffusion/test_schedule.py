import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from model.diffusion.schedule import NoiseSchedule, ScheduleError, covering_spacing, timesteps
from tests.diffusers_levels import diffusers_grid

GRIDS = ("leading", "trailing", "linspace", "quadratic")
LINEAR = NoiseSchedule.from_config({})
COSINE = NoiseSchedule.from_config({"beta_schedule": "squaredcos_cap_v2"})


@pytest.mark.parametrize(
    ("schedule", "t", "abar", "printed"),
    [  # half a unit of the last printed digit
        (LINEAR, 0, 0.9999, 1e-15),
        (LINEAR, 20, 0.993735, 5e-7),
        (LINEAR, 100, 0.895142, 5e-7),
        (LINEAR, 500, 0.077797, 5e-7),
        (LINEAR, 980, 5.904e-5, 5e-9),
        (LINEAR, 999, 4.0358e-5, 5e-10),
        (COSINE, 999, 2.43e-9, 5e-12),
    ],
    ids=lambda value: f"{value:g}" if isinstance(value, float | int) else "",
)
def test_known_levels(schedule, t, abar, printed):
    assert schedule.T == 1000
    assert abs(schedule.alphas_cumprod[t] - abar) <= printed


def test_the_noise_left_at_the_top_of_the_linear_schedule():
    abar = LINEAR.alphas_cumprod[999]
    sigma = math.sqrt((1 - abar) / abar)
    assert abs(sigma - 157.407) < 5e-4
    assert abs(-math.log(sigma) + 5.0588) < 5e-5


@pytest.mark.parametrize(
    ("config", "relative"),
    [  # diffusers' tables are float32: each of T factors is rounded, and the product after each, by up to 3e-8 of its
        # value, T · 6e-8 in the worst case. Cosine ends in factors of 1 - 0.999, which lose three digits more.
        ({"beta_schedule": "linear"}, 6e-5),
        ({"beta_schedule": "linear", "beta_start": 0.0015, "beta_end": 0.0195, "num_train_timesteps": 300}, 2e-5),
        ({"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}, 6e-5),
        ({"beta_schedule": "squaredcos_cap_v2"}, 9e-5),
        ({"trained_betas": [0.1, 0.2, 0.3, 0.5], "num_train_timesteps": 4}, 3e-7),
    ],
    ids=["linear", "linear-300", "scaled-linear", "cosine", "trained"],
)
def test_levels_are_those_of_diffusers(config, relative):
    ours = NoiseSchedule.from_config(config).alphas_cumprod
    theirs = DDPMScheduler(**config).alphas_cumprod.double().numpy()
    assert ours.shape == theirs.shape
    assert np.max(np.abs(ours / theirs - 1)) < relative


def test_betas_come_back_out_of_the_levels():
    betas = DDPMScheduler(beta_schedule="squaredcos_cap_v2").betas.double().numpy()
    abar = np.concatenate([[1.0], COSINE.alphas_cumprod])
    # Half a float32 unit at 0.999 is 3e-8; the tables are float32 throughout.
    assert np.max(np.abs(1 - abar[1:] / abar[:-1] - betas)) < 1e-6


def test_levels_of_float32_betas_are_computed_in_float64():
    betas = DDPMScheduler().betas.numpy()
    assert betas.dtype == np.float32
    exact = np.cumprod(1 - betas.astype(np.float64))
    assert NoiseSchedule.from_betas(betas).alphas_cumprod.tolist() == exact.tolist()


def test_zero_terminal_snr():
    config = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    ours = NoiseSchedule.from_config(config).alphas_cumprod
    theirs = DDIMScheduler(**config).alphas_cumprod.double().numpy()
    assert ours[-1] == 0
    assert abs(ours[0] - LINEAR.alphas_cumprod[0]) < 1e-15  # √ᾱ_0 is kept
    assert np.max(np.abs(ours - theirs)) < 1e-6  # float32 tables


@pytest.mark.parametrize(
    ("config", "field"),
    [
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr"),
        ({"beta_schedule": "sigmoid"}, "beta_schedule"),
        ({"prediction_type": "flow"}, "prediction_type"),
        ({"trained_betas": []}, "alphas_cumprod"),
        ({"trained_betas": [0.1, 0.0, 0.1]}, "alphas_cumprod"),
        ({"trained_betas": [-0.1, 0.1]}, "alphas_cumprod"),
        ({"trained_betas": [0.1, 1.5]}, "alphas_cumprod"),
        ({"trained_betas": [0.1, float("nan"), 0.1]}, "alphas_cumprod"),
    ],
    ids=["zero-snr-with-epsilon", "sigmoid", "flow", "no-betas", "beta-0", "beta-negative", "beta-above-1", "beta-nan"],
)
def test_a_schedule_that_cannot_be_is_refused(config, field):
    with pytest.raises(ScheduleError) as caught:
        NoiseSchedule.from_config(config)
    assert caught.value.field == field
    assert field in str(caught.value)


def test_add_noise_is_that_of_diffusers():
    generator = torch.Generator().manual_seed(0)
    x_0, eps = torch.rand(5, 3, 4, 4, generator=generator) * 2 - 1, torch.randn(5, 3, 4, 4, generator=generator)
    t = torch.tensor([0, 1, 500, 998, 999])
    ours, theirs = LINEAR.add_noise(x_0, t, eps), DDPMScheduler().add_noise(x_0, eps, t)
    assert ours.dtype == torch.float32
    # Their ᾱ is float32 and off by up to 3e-7, so √ᾱ and √(1-ᾱ) by as much or (near t = 0, where 1 - ᾱ is 1e-4 only)
    # half of 3e-8 / 1e-2; times noise of up to 4.
    assert (ours - theirs).abs().max() < 1e-5


def test_noised_images_have_the_promised_mean_and_variance():
    n, t = 200_000, 300
    abar = LINEAR.alphas_cumprod[t]
    eps = torch.randn(n, 1, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x_t = LINEAR.add_noise(torch.full_like(eps, 0.7), torch.full((n,), t), eps)
    # Five standard errors: 5 σ / √n of the mean, 5 √2 σ² / √n of the variance; one seed in 10^6 would fail.
    assert abs(x_t.mean() - math.sqrt(abar) * 0.7) < 5 * math.sqrt((1 - abar) / n)
    assert abs(x_t.var() - (1 - abar)) < 5 * math.sqrt(2 / n) * (1 - abar)


@pytest.mark.parametrize("T", [1, 2, 7, 50, 1000, 2000])
@pytest.mark.parametrize("spacing", GRIDS)
def test_every_grid_falls_within_the_chain_and_starts_at_noise(spacing, T):
    refused = []
    for steps in range(1, T + 1):
        try:
            grid = np.array(timesteps(T, steps, spacing))
        except ScheduleError:
            refused.append(steps)
            continue
        assert len(grid) == steps
        assert np.all(np.diff(grid) < 0)
        assert grid[-1] >= 0
        assert grid[0] <= T - 1
        # quadratic starts at 0.8 T by its definition; the others reach the last tenth of the chain.
        assert grid[0] >= min(T - 1, math.floor(0.8 * T) - 1 if spacing == "quadratic" else 0.9 * T - 1)
    assert all(steps < 10 for steps in refused)
    assert spacing != "trailing" or not refused


@pytest.mark.parametrize("spacing", GRIDS)
def test_all_steps_are_the_whole_chain(spacing):
    assert timesteps(1000, 1000, spacing) == list(range(999, -1, -1))


@pytest.mark.parametrize("steps", [1, 2, 5, 8, 10, 20, 40, 50, 100, 125, 200, 250, 500, 1000])
@pytest.mark.parametrize("scheduler_class", [DDPMScheduler, DDIMScheduler])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_grids_are_those_of_diffusers_where_steps_divide_T(spacing, scheduler_class, steps):
    scheduler = scheduler_class(timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    try:
        grid = timesteps(1000, steps, spacing)
    except ScheduleError:
        assert scheduler.timesteps[0] < 899  # refused because it does not start at noise
        return
    assert grid == scheduler.timesteps.tolist()


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("offset", [0, 1])
def test_the_oracle_knows_diffusers_grids(spacing, offset):
    for scheduler_class in (DDPMScheduler, DDIMScheduler):
        scheduler = scheduler_class(timestep_spacing=spacing, steps_offset=offset)
        for steps in (1, 2, 3, 7, 30, 50, 61, 103, 150, 501, 599, 999, 1000):
            scheduler.set_timesteps(steps)
            assert diffusers_grid(scheduler.config, steps) == scheduler.timesteps.tolist()


def test_trailing_is_exact_arithmetic_rounded():
    for n in range(1, 1001):
        assert timesteps(1000, n, "trailing") == [round(1000 - Fraction(1000 * i, n)) - 1 for i in range(n)]


def test_trailing_keeps_its_count_where_diffusers_appends_minus_one():
    config = DDPMScheduler(timestep_spacing="trailing").config
    bad = [n for n in range(1, 1001) if len(diffusers_grid(config, n)) != n]
    assert len(bad) == 62
    assert bad[:5] == [61, 103, 121, 122, 201]
    for n in bad:
        theirs, ours = diffusers_grid(config, n), timesteps(1000, n, "trailing")
        assert theirs[-1] == -1  # an index that silently means t = 999
        # Their accumulated steps may round the other way; never by more than one timestep.
        assert np.max(np.abs(np.array(theirs[:-1]) - ours)) <= 1


@pytest.mark.parametrize(("steps", "theirs"), [(30, 957), (150, 894), (501, 500), (599, 598), (600, 599)])
def test_leading_covers_the_chain_where_diffusers_does_not(steps, theirs):
    assert diffusers_grid(DDPMScheduler(timestep_spacing="leading").config, steps)[0] == theirs
    grid = timesteps(1000, steps, "leading")
    assert grid[0] >= 1000 - 1000 / steps - 1  # one stride below the top, rounded down
    assert grid[-1] == 0


@pytest.mark.parametrize(("steps", "spacing", "top"), [(1, "leading", 0), (9, "leading", 888), (1, "linspace", 0)])
def test_a_grid_that_leaves_the_noise_out_is_refused(steps, spacing, top):
    with pytest.raises(ScheduleError) as caught:
        timesteps(1000, steps, spacing)
    message = str(caught.value)
    assert caught.value.field == "spacing"
    assert caught.value.value == spacing
    assert f"spacing = '{spacing}'" in message
    assert f"steps = {steps}" in message
    assert f"t = {top} of 1000" in message
    assert "use trailing" in message


def test_a_grid_that_just_reaches_the_last_tenth_is_accepted():
    assert timesteps(10, 5, "leading") == [8, 6, 4, 2, 0]


def test_ten_leading_steps_are_accepted():
    assert timesteps(1000, 10, "leading") == [900, 800, 700, 600, 500, 400, 300, 200, 100, 0]


@pytest.mark.parametrize("steps", [-1, 0, 1001])
@pytest.mark.parametrize("spacing", GRIDS)
def test_steps_outside_the_chain_are_refused(spacing, steps):
    with pytest.raises(ScheduleError, match=rf"^steps = {steps}: must lie in 1\.\.1000"):
        timesteps(1000, steps, spacing)


def test_an_unknown_spacing_is_refused_with_the_known_ones():
    with pytest.raises(ScheduleError) as caught:
        timesteps(1000, 10, "spiral")
    assert str(caught.value) == "spacing = 'spiral': choose one of leading, trailing, linspace, quadratic, karras"


def test_quadratic_is_the_papers_grid_made_distinct():
    # DDIM appendix D.2, as ermongroup's code writes it; its squares collide near 0 only.
    theirs = (np.linspace(0, math.sqrt(0.8 * 1000), 100) ** 2).astype(int)[::-1]
    ours = np.array(timesteps(1000, 100, "quadratic"))
    crowded = np.flatnonzero(np.diff(theirs) == 0).min()
    assert crowded > 80
    assert ours[:80].tolist() == theirs[:80].tolist()
    assert ours[80:].tolist() != theirs[80:].tolist()
    assert np.max(ours[80:] - theirs[80:]) <= 4  # pushed up, to the next free timesteps
    assert np.min(ours[80:] - theirs[80:]) == 0


@pytest.mark.parametrize(
    ("steps", "preferred", "expected"),
    [
        (10, "leading", "leading"),
        (9, "leading", "trailing"),
        (1, "leading", "trailing"),
        (1, "linspace", "trailing"),
        (2, "linspace", "linspace"),
        (1, "quadratic", "trailing"),
        (2, "quadratic", "quadratic"),
        (1, "trailing", "trailing"),
        (1000, "leading", "leading"),
        (1, "karras", "karras"),
    ],
)
def test_covering_spacing_gives_way_only_where_it_must(steps, preferred, expected):
    assert covering_spacing(1000, steps, preferred) == expected


@pytest.mark.parametrize(
    ("steps", "preferred", "field"), [(0, "leading", "steps"), (1001, "leading", "steps"), (5, "spiral", "spacing")]
)
def test_covering_spacing_hides_no_other_mistake(steps, preferred, field):
    with pytest.raises(ScheduleError) as caught:
        covering_spacing(1000, steps, preferred)
    assert caught.value.field == field
