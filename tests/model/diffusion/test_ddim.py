import itertools
import math

import numpy as np
import pytest
import torch

from model.diffusion import machine
from model.diffusion.defaults import SamplingDefaults
from model.diffusion.levels import hops
from model.diffusion.plan import Clip
from model.diffusion.samplers import SAMPLERS, ddim, ddpm
from model.diffusion.schedule import ScheduleError, timesteps
from tests.fakes import GaussianEps, MixtureEps
from tests.oracles import ddim_loop, ddpm_loop, levels_of, mixture_flow
from tests.plans import COSINE, LINEAR, draws, pixels


def still(shape):
    return lambda: torch.zeros(shape, dtype=torch.float64)


def gain(plan, net):
    """x_T to result, both counted from their means: one run with two inputs, exact because everything is linear."""
    start = math.sqrt(net.schedule.alphas_cumprod[int(plan.steps[0].t)]) * net.mu
    end = machine.run(net, plan, pixels([start, start + 1]), noise=still((2, 1, 1, 1))).flatten()
    return float(end[1] - end[0])


def final_variance(plan, schedule, s_sq):
    """Variance of the result when x_T ~ N(0, 1): the sum of squared responses to every draw, x_T among them.

    Row 0 starts at 1 and gets no noise; row k > 0 starts at 0 and gets a 1 at the k-th noisy step alone.
    """
    rows = 1 + sum(step.noisy for step in plan.steps)
    impulses = iter(torch.eye(rows, dtype=torch.float64)[1:])
    noise = lambda: pixels(next(impulses))  # noqa: E731
    x_T = pixels([1.0] + [0.0] * (rows - 1))
    return float(machine.run(GaussianEps(schedule, 0, math.sqrt(s_sq)), plan, x_T, noise=noise).square().sum())


# From a separate computation in float64: linear, leading, final ᾱ = 1.
VARIANCES = [
    (1, "ddim", {}, {10: 0.691718, 20: 0.832714, 50: 0.929449, 100: 0.964031, 1000: 0.996252}),
    (1, "ddim", {"eta": 1}, {10: 0.548207, 20: 0.710726, 50: 0.857434, 100: 0.921599, 1000: 0.991067}),
    (1, "ddpm", {}, {10: 0.548207, 20: 0.710726, 50: 0.857434, 100: 0.921599, 1000: 0.991067}),
    (1, "ddpm", {"variance": "fixed_large"}, dict.fromkeys((10, 20, 50, 100, 1000), 0.999900)),
    (0.25, "ddim", {}, {10: 0.139972, 20: 0.188126, 50: 0.223199, 100: 0.236177, 1000: 0.248498}),
    (0.25, "ddim", {"eta": 0.5}, {10: 0.134750, 20: 0.181203, 50: 0.217764, 100: 0.232576, 1000: 0.247981}),
    (0.25, "ddim", {"eta": 1}, {10: 0.111064, 20: 0.153244, 50: 0.197245, 100: 0.219264, 1000: 0.246125}),
    (
        0.25,
        "ddpm",
        {"variance": "fixed_large"},
        {10: 0.346951, 20: 0.296005, 50: 0.267526, 100: 0.258562, 1000: 0.250752},
    ),
    (0.01, "ddim", {}, {10: 0.001353, 20: 0.003089, 50: 0.006139, 100: 0.007800, 1000: 0.009667}),
    (0.01, "ddim", {"eta": 1}, {10: 0.000846, 20: 0.002218, 50: 0.004687, 100: 0.006298, 1000: 0.009276}),
    (0.01, "ddpm", {}, {10: 0.000846, 20: 0.002218, 50: 0.004687, 100: 0.006298, 1000: 0.009276}),
]


@pytest.mark.parametrize(
    ("s_sq", "name", "options", "steps", "expected"),
    [
        pytest.param(s_sq, name, options, steps, value, id="-".join(map(str, [name, *options.values(), s_sq, steps])))
        for s_sq, name, options, row in VARIANCES
        for steps, value in row.items()
    ],
)
def test_variance_of_samples_from_gaussian_data(s_sq, name, options, steps, expected):
    plan = SAMPLERS[name].compile(LINEAR, steps, spacing="leading", **options)
    assert abs(final_variance(plan, LINEAR, s_sq) - expected) < 6e-7  # half of the last printed digit, and a little


@pytest.mark.parametrize(
    ("sampler", "steps", "expected"),
    [(ddim, 10, 0.695695), (ddim, 50, 0.697459), (ddpm, 10, 0.699953), (ddpm, 50, 0.699990)],
)
def test_mean_reached_from_x_T_zero(sampler, steps, expected):
    end = machine.run(GaussianEps(LINEAR, 0.7, 0.5), sampler(LINEAR, steps), pixels([0.0]), noise=still((1, 1, 1, 1)))
    assert abs(float(end) - expected) < 6e-7


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace", "quadratic"])
@pytest.mark.parametrize("s", [1.0, 0.5, 0.1, 0.01])
@pytest.mark.parametrize("steps", [10, 33, 200])
def test_ddim_turns_by_angles(steps, s, spacing):
    # With θ = atan(σ̄ / s), a step multiplies the standardised state by the cosine of the angle that it turns through.
    net, plan = GaussianEps(LINEAR, 0.3, s), ddim(LINEAR, steps, spacing=spacing)
    abar = LINEAR.alphas_cumprod[timesteps(1000, steps, spacing)]
    theta = [*np.arctan(np.sqrt((1 - abar) / abar) / s), 0.0]
    v_T = abar[0] * s**2 + 1 - abar[0]
    expected = math.sqrt(s**2 / v_T) * math.prod(math.cos(a - b) for a, b in itertools.pairwise(theta))
    # Relative: 3 roundings a step, each magnified where 1 - ᾱ is small, down to 1e-4.
    assert abs(gain(plan, net) / expected - 1) < 1e-11


@pytest.mark.parametrize("steps", [10, 37, 1000])
def test_fixed_large_is_stationary_on_standard_normal_data(steps):
    # Its mean is √a x and its noise 1 - a, so variance 1 stays 1; only the last, noiseless hop leaves ᾱ_0.
    plan = ddpm(LINEAR, steps, variance="fixed_large", spacing="leading")
    assert abs(final_variance(plan, LINEAR, 1.0) - LINEAR.alphas_cumprod[0]) < 1e-12


@pytest.mark.parametrize("schedule", [LINEAR, COSINE], ids=["linear", "cosine"])
@pytest.mark.parametrize("steps", [1, 2, 10, 77])
@pytest.mark.parametrize(
    "compile_",
    [
        ddim,
        lambda schedule, n: ddim(schedule, n, eta=0.5),
        lambda schedule, n: ddim(schedule, n, eta=1),
        lambda schedule, n: ddim(schedule, n, rederive=True),
        ddpm,
        lambda schedule, n: ddpm(schedule, n, variance="fixed_large"),
    ],
    ids=["ddim", "eta-half", "eta-1", "rederive", "ddpm", "fixed-large"],
)
def test_every_sampler_ends_at_the_only_image(compile_, steps, schedule):
    x = draws(0, (3, 1, 2, 2))()
    end = machine.run(GaussianEps(schedule, -0.4, 0), compile_(schedule, steps), x, noise=draws(1, x.shape))
    # x̂0 is a difference of numbers up to 1/α: 157 for linear, 2e4 for cosine; by the last hop, of numbers near 1.
    assert (end + 0.4).abs().max() < 1e-10


def test_a_single_image_keeps_the_variance_of_the_forward_process():
    # s = 0: with η = 1, started at variance 1 - ᾱ, every level keeps exactly its own 1 - ᾱ (DDPM section 3.2).
    plan = ddim(LINEAR, 50, eta=1)
    variance = 1 - LINEAR.alphas_cumprod[int(plan.steps[0].t)]
    net = GaussianEps(LINEAR, 0, 0)
    for step, following in itertools.pairwise(plan.steps):
        one = machine.advance(
            net, pixels([1.0])[:, None], type(plan)((step,)).table(1), noise=still((1, 1, 1, 1))
        ).item()
        variance = one**2 * variance + step.s[0] ** 2
        assert abs(variance - (1 - LINEAR.alphas_cumprod[int(following.t)])) < 1e-12


@pytest.mark.parametrize("schedule", [LINEAR, COSINE], ids=["linear", "cosine"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_eta_1_is_ddpm(spacing, schedule):
    x = draws(2, (4, 1, 2, 2))()
    net = MixtureEps(schedule)
    ends = [
        machine.run(net, plan, x, noise=draws(3, x.shape))
        for plan in (ddim(schedule, 25, eta=1, spacing=spacing), ddpm(schedule, 25, spacing=spacing))
    ]
    # Roundings of x̂0 (2e4 of cancellation for cosine) times the mixture's sensitivity, a few units a step.
    assert (ends[0] - ends[1]).abs().max() < 1e-9


@pytest.mark.parametrize("sampler", [ddim, ddpm])
def test_one_step_is_the_prediction_of_x_0(sampler):
    net, x = MixtureEps(LINEAR), draws(4, (3, 1, 2, 2))()
    abar = LINEAR.alphas_cumprod[999]
    x_0 = (x - math.sqrt(1 - abar) * net(x, torch.full((3,), 999.0))) / math.sqrt(abar)
    plan = sampler(LINEAR, 1, spacing="trailing")
    assert plan.steps[0].t == 999
    assert (machine.run(net, plan, x) - x_0).abs().max() < 1e-12  # 1/α = 157 times float64's 1e-16, and some roundings


X_T = (-2, -1, -0.3, 0.1, 0.4, 1.2, 2.1)


@pytest.mark.parametrize(
    ("steps", "error", "printed"),
    [
        (10, 0.184, 5e-4),
        (20, 0.106, 5e-4),
        (50, 0.046, 5e-4),
        (100, 0.024, 5e-4),
        (250, 0.010, 5e-4),
        (1000, 0.0029, 5e-5),
    ],
)
def test_ddim_approaches_the_exact_flow(steps, error, printed):
    plan = ddim(LINEAR, steps)
    end = machine.run(MixtureEps(LINEAR), plan, pixels(X_T)).flatten()
    exact = [mixture_flow(x, LINEAR.alphas_cumprod[int(plan.steps[0].t)]) for x in X_T]
    assert abs(max(abs(a - b) for a, b in zip(end.tolist(), exact, strict=True)) - error) < printed * 1.1


@pytest.mark.parametrize("schedule", [LINEAR, COSINE], ids=["linear", "cosine"])
@pytest.mark.parametrize("clip", [None, 1.0, 0.4], ids=["free", "clip", "clip-0.4"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace", "quadratic"])
@pytest.mark.parametrize("name", ["fixed_small", "fixed_large", "eta-0", "eta-0.5", "eta-1", "rederive"])
def test_plans_are_the_papers_loops(name, spacing, clip, schedule):
    steps, x, net = 23, draws(5, (2, 1, 3, 3))(), MixtureEps(schedule)
    levels = levels_of(schedule, timesteps(1000, steps, spacing))

    def predict(x, t):
        return net(x, torch.full((len(x),), float(t)))

    zs = iter(draws(6, x.shape), None)
    limit = None if clip is None else Clip(clip)
    if name.startswith("fixed"):
        plan = ddpm(schedule, steps, variance=name, spacing=spacing, clip=limit)
        expected = ddpm_loop(predict, levels, x, zs, variance=name, clip=clip)
    else:
        options = {"rederive": True} if name == "rederive" else {"eta": float(name[4:]), "rederive": False}
        plan = ddim(schedule, steps, spacing=spacing, clip=limit, **options)
        expected = ddim_loop(predict, levels, x, zs, clip=clip, **options)
    found = machine.run(net, plan, x, noise=draws(6, x.shape))
    # float64 against float64: 1e-16 times 1/α at the top, 157 for linear and 2e4 for cosine, times roundings a step.
    assert (found - expected).abs().max() < (1e-12 if schedule is LINEAR else 1e-10)


@pytest.mark.parametrize("sampler", [ddim, ddpm])
def test_clipped_samples_stay_within_the_clip(sampler):
    x = 3 * draws(13, (4, 1, 4, 4))()
    net = GaussianEps(LINEAR, 0.9, 1.5)  # whose samples leave [-1, 1] freely
    assert machine.run(net, sampler(LINEAR, 20), x, noise=draws(14, x.shape)).abs().max() > 1.5
    assert machine.run(net, sampler(LINEAR, 20, clip=Clip(1.0)), x, noise=draws(14, x.shape)).abs().max() <= 1


@pytest.mark.parametrize("steps", [0, 1001])
@pytest.mark.parametrize("sampler", [ddim, ddpm])
def test_steps_outside_the_chain_are_refused(sampler, steps):
    with pytest.raises(ScheduleError) as caught:
        sampler(LINEAR, steps)
    assert (caught.value.field, caught.value.value) == ("steps", steps)


@pytest.mark.parametrize("eta", [-0.1, 2, math.nan])
def test_eta_outside_its_range_is_refused(eta):
    with pytest.raises(ScheduleError, match=r"^eta = .*must lie in 0\.\.1"):
        ddim(LINEAR, 10, eta=eta)


@pytest.mark.parametrize("sampler", [ddim, ddpm])
def test_an_unknown_spacing_is_refused(sampler):
    with pytest.raises(ScheduleError, match=r"^spacing = 'spiral'"):
        sampler(LINEAR, 10, spacing="spiral")


def test_an_unknown_variance_is_refused():
    with pytest.raises(ScheduleError, match=r"^variance = 'fixed_huge'"):
        ddpm(LINEAR, 10, variance="fixed_huge")


def test_without_a_spacing_the_hops_cover_the_noise():
    assert [hop.t for hop in hops(LINEAR, 10)] == list(range(900, -1, -100))
    assert [hop.t for hop in hops(LINEAR, 4)] == [999, 749, 499, 249]
    assert hops(LINEAR, 4, "quadratic")[0].t == 800


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, SamplingDefaults(clip=Clip(1.0))),
        ({"clip_sample": False}, SamplingDefaults()),
        ({"clip_sample_range": 2.0}, SamplingDefaults(clip=Clip(2.0), clip_limit=2.0)),
        ({"thresholding": True}, SamplingDefaults(clip=Clip(1.0, 0.995))),
        (
            {"thresholding": True, "clip_sample": False, "sample_max_value": 3, "dynamic_thresholding_ratio": 0.9},
            SamplingDefaults(clip=Clip(3.0, 0.9)),
        ),
        ({"timestep_spacing": "trailing", "clip_sample": False}, SamplingDefaults(spacing="trailing")),
        ({"variance_type": "fixed_small_log", "clip_sample": False}, SamplingDefaults()),
        ({"variance_type": "fixed_large", "clip_sample": False}, SamplingDefaults(variance="fixed_large")),
        ({"variance_type": "learned_range", "clip_sample": False}, SamplingDefaults(variance="learned_range")),
    ],
    ids=["defaults", "free", "range-2", "threshold", "threshold-3", "trailing", "small-log", "large", "learned"],
)
def test_defaults_of_a_checkpoint(config, expected):
    assert SamplingDefaults.from_config(config) == expected


@pytest.mark.parametrize(
    ("sampler", "steps", "asked", "spacing"),
    [
        ("ddim", 50, "linspace", "linspace"),  # the checkpoint's, where the sampler prefers none
        ("ddim", 5, "leading", "trailing"),  # which would leave the noise out
        ("unipc", 50, "linspace", "karras"),  # the sampler's own
        ("pndm", 50, "quadratic", "leading"),  # the checkpoint's is not among pndm's
        ("ddpm", 50, "leading", "leading"),
    ],
)
def test_options_that_a_request_leaves_open(sampler, steps, asked, spacing):
    entry = SAMPLERS[sampler]
    options = SamplingDefaults(clip=Clip(0.5), spacing=asked, variance="fixed_large").options(entry, steps, 1000)
    variance = {"variance": "fixed_small"} if sampler == "ddpm" else {}
    assert options == {"spacing": spacing, "clip": Clip(0.5)} | variance
    plan = entry.compile(LINEAR, steps, **options)
    assert all(step.clip == Clip(0.5) for step in plan.steps)


def test_an_unsupported_variance_is_refused():
    with pytest.raises(ScheduleError, match=r"^variance_type = 'learned'"):
        SamplingDefaults.from_config({"variance_type": "learned"})


def test_fixed_large_is_kept_for_the_whole_chain_only():
    large = SamplingDefaults(variance="fixed_large")
    assert (large.variance_for(1000, 1000), large.variance_for(999, 1000)) == ("fixed_large", "fixed_small")
    assert SamplingDefaults(variance="learned_range").variance_for(10, 1000) == "learned_range"
