"""The solvers against the papers' loops, against one another, and from pure noise to a clipped image."""

import itertools
from functools import partial

import pytest
import torch

from model.diffusion import inversion, machine
from model.diffusion.levels import noise_levels
from model.diffusion.plan import Clip, Plan
from model.diffusion.samplers import SAMPLERS, ddim, ddpm, dpmpp_2m, dpmpp_2m_sde, dpmpp_2s, heun, obelm, pndm, unipc
from model.diffusion.samplers.classical import heun_on, pndm_on
from model.diffusion.samplers.ddim import ddim_on
from model.diffusion.samplers.dpmpp import dpmpp_2m_on, dpmpp_2s_on
from model.diffusion.samplers.obelm import obelm_on
from model.diffusion.samplers.unipc import unipc_on
from model.diffusion.schedule import SPACINGS, NoiseSchedule, ScheduleError
from tests.fakes import GaussianEps, MixtureEps
from tests.oracles import (
    dpmpp_2m_loop,
    dpmpp_2s_loop,
    even_in_lambda,
    heun_loop,
    hops_between,
    obelm_loop,
    pndm_loop,
    rising,
    unipc_loop,
)
from tests.plans import COSINE, LINEAR, VARIANTS, draws, sample_each

SCHEDULES = pytest.mark.parametrize("schedule", [LINEAR, COSINE], ids=["linear", "cosine"])
ALL = pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)


def dpmpp_2m_of_the_paper(schedule, levels):
    """Of second order to the end, but for the step to the clean image, where λ is infinite."""
    orders = [
        1 if there.abar == 1 else order for order, there in zip(rising(2, len(levels) - 1), levels[1:], strict=True)
    ]
    return dpmpp_2m_on(schedule, levels, orders, slots=2)


def unipc_of_the_paper(schedule, levels):
    """Of second order, but for the last step."""
    return unipc_on(schedule, levels, [*rising(2, len(levels) - 2), 1], history=2)


# Textbook loops, which share no line with the plans.
LOOPS = {
    "dpmpp_2m": (dpmpp_2m_of_the_paper, dpmpp_2m_loop),
    "dpmpp_2s": (dpmpp_2s_on, dpmpp_2s_loop),
    "unipc": (unipc_of_the_paper, unipc_loop),
    "heun": (heun_on, heun_loop),
    "pndm": (pndm_on, pndm_loop),
    "obelm": (obelm_on, obelm_loop),
}


def predictor(net):
    return lambda x, t: net(x, torch.full((len(x),), float(t), dtype=torch.float64))


@SCHEDULES
@pytest.mark.parametrize(
    ("spacing", "steps"),
    [(spacing, steps) for spacing in ("trailing", "karras") for steps in (1, 2, 11, 24)]
    + [(spacing, steps) for spacing in ("leading", "linspace") for steps in (11, 24)],
)
@pytest.mark.parametrize("name", LOOPS)
def test_plans_are_the_papers_loops(name, steps, spacing, schedule):
    (compile_, loop), net, x = LOOPS[name], MixtureEps(schedule), draws(5, (2, 1, 3, 3))()
    levels = noise_levels(schedule, steps, spacing)
    found = machine.run(net, compile_(schedule, levels), x)
    expected = loop(predictor(net), [(level.t, level.abar) for level in levels], x)
    # float64 against float64: 1e-16 times 1/α at the top, 157 for linear and 2e4 for cosine, times roundings a step.
    # Two steps of Heun or PNDM may end as far out as they start.
    scale = max(1.0, float(expected.abs().max()))
    assert (found - expected).abs().max() < (1e-11 if schedule is LINEAR else 1e-9) * scale


@pytest.mark.parametrize("name", LOOPS)
def test_plans_that_end_above_the_clean_image_are_the_papers_loops(name):
    (compile_, loop), net, x = LOOPS[name], MixtureEps(LINEAR), draws(5, (2, 1, 3, 3))()
    levels = even_in_lambda(LINEAR, 12)
    found = machine.run(net, compile_(LINEAR, levels), x)
    expected = loop(predictor(net), [(level.t, level.abar) for level in levels], x)
    assert (found - expected).abs().max() < 1e-11


@pytest.mark.parametrize("steps", [4, 10, 50])
def test_warmup_is_the_papers_runge_kutta(steps):
    net, x = MixtureEps(LINEAR), draws(5, (2, 1, 3, 3))()
    levels = noise_levels(LINEAR, steps, "trailing")
    middles = [int(here.t + there.t) // 2 for here, there in itertools.pairwise(levels[:4])]
    halves = [(t, float(LINEAR.alphas_cumprod[t])) for t in middles]
    found = machine.run(net, pndm(LINEAR, steps, warmup=True, spacing="trailing"), x)
    expected = pndm_loop(predictor(net), [(level.t, level.abar) for level in levels], x, halves)
    assert (found - expected).abs().max() < 1e-11


# Identities.


@pytest.mark.parametrize(
    ("schedule", "name", "steps"),
    [
        pytest.param(schedule, name, steps, id=f"{kind}-{name}-{steps}")
        for kind, schedule in (("linear", LINEAR), ("cosine", COSINE))
        for name in VARIANTS
        for steps in (1, 2, 3, 10, 77)
        # ε extrapolated from the cosine schedule's σ/α = 2e4 multiplies roundings by up to 1e9.
        if not (name.startswith("pndm") and schedule is COSINE) and not (name == "pndm-warmup" and steps < 4)
    ],
)
def test_every_sampler_ends_at_the_only_image(name, steps, schedule):
    compile_ = VARIANTS[name]
    x = draws(0, (3, 1, 2, 2))()
    end = machine.run(
        GaussianEps(schedule, -0.4, 0), compile_(schedule, steps, spacing="trailing"), x, noise=draws(1, x.shape)
    )
    # ε is the same everywhere on a path, and x̂0 is μ; the roundings of a difference of numbers up to 1/α = 2e4 remain.
    assert (end + 0.4).abs().max() < 1e-9


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize(
    ("one", "other"),
    [
        (partial(dpmpp_2m, order=1), ddim),
        (partial(dpmpp_2m_sde, order=1), partial(ddim, eta=1)),
        (partial(dpmpp_2m_sde, order=1), ddpm),
    ],
    ids=["dpmpp_2m-1", "dpmpp_2m_sde-1-ddim", "dpmpp_2m_sde-1-ddpm"],
)
def test_first_order_solvers_are_the_ancestral_samplers(one, other, spacing):
    first, second = sample_each(one(LINEAR, 25, spacing=spacing), other(LINEAR, 25, spacing=spacing))
    assert (first - second).abs().max() < 1e-11  # 157 times 1e-16, and some roundings a step


@ALL
def test_one_step_is_the_prediction_of_x_0(sampler):
    first, second = sample_each(sampler.compile(LINEAR, 1, spacing="trailing"), ddim(LINEAR, 1, spacing="trailing"))
    assert second.isfinite().all()
    assert (first - second).abs().max() < 1e-11


def test_two_steps_of_the_solvers_without_history_are_two_of_ddim():
    # The second leads to the clean image, so it is of first order, and nothing was corrected before it.
    first, *others = sample_each(*(compile_(LINEAR, 2, spacing="trailing") for compile_ in (ddim, dpmpp_2m, dpmpp_2s)))
    for other in others:
        assert (first - other).abs().max() < 1e-11


def test_heun_without_its_corrections_is_ddim():
    levels = noise_levels(LINEAR, 10)
    evaluations = heun_on(LINEAR, levels).steps
    first, second = sample_each(Plan(evaluations[::2]), ddim_on(LINEAR, hops_between(levels)))
    assert (first - second).abs().max() < 1e-11


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
@pytest.mark.parametrize("steps", [10, 50])
@pytest.mark.parametrize("compile_", VARIANTS.values(), ids=VARIANTS)
def test_samplers_start_from_pure_noise(compile_, steps, prediction):
    schedule = NoiseSchedule.from_config({"rescale_betas_zero_snr": True, "prediction_type": prediction})
    assert schedule.alphas_cumprod[-1] == 0
    plan, x = compile_(schedule, steps, spacing="trailing"), draws(4, (2, 1, 2, 2))()
    assert plan.steps[0].t == 999
    end = machine.run(MixtureEps(schedule), plan, x, noise=draws(5, x.shape))
    assert end.isfinite().all()
    assert end.abs().max() < 1.5  # the data lie within -1 and 1.2; ddpm with fixed_large adds noise up to the end


@pytest.mark.parametrize("steps", [333, 500, 1000])
@pytest.mark.parametrize("compile_", [dpmpp_2m, dpmpp_2m_sde, dpmpp_2s, unipc, heun, obelm, inversion.obelm])
def test_many_steps_from_pure_noise_have_distances_in_lambda(compile_, steps):
    # Three timesteps lie below ᾱ = 2^-24; lifted to the same level, they would make steps of no length.
    schedule = NoiseSchedule.from_config({"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"})
    assert compile_(schedule, steps, spacing="trailing").nfe >= steps


def test_pure_noise_needs_another_prediction_than_epsilon():
    with pytest.raises(ScheduleError) as caught:
        NoiseSchedule.from_config({"rescale_betas_zero_snr": True})
    assert caught.value.field == "rescale_betas_zero_snr"


@pytest.mark.parametrize("spacing", ["trailing", "karras"])
@pytest.mark.parametrize("name", [name for name in VARIANTS if name.startswith(("dd", "dpmpp", "unipc", "heun"))])
def test_clipped_samples_stay_within_the_clip(name, spacing):
    # Not those whose last step extrapolates ε.
    x, net = 3 * draws(13, (4, 1, 4, 4))(), GaussianEps(LINEAR, 0.9, 1.5)  # whose samples leave [-1, 1] freely
    free, clipped = (VARIANTS[name](LINEAR, 12, spacing=spacing, clip=clip) for clip in (None, Clip(1.0)))
    assert machine.run(net, free, x, noise=draws(14, x.shape)).abs().max() > 1.5
    # Exactly 1 where the update is x̂0; Heun's takes it apart and puts it together again.
    assert machine.run(net, clipped, x, noise=draws(14, x.shape)).abs().max() <= 1 + 1e-12


@pytest.mark.parametrize("name", ["pndm", "pndm-warmup", "obelm", "heun"])
def test_solvers_in_epsilon_use_the_epsilon_of_the_clipped_image(name):
    # With x̂0 clamped to 0 all of x is noise, ε is the same everywhere, and x shrinks with σ.
    x = draws(13, (4, 1, 4, 4))()
    plan = VARIANTS[name](LINEAR, 12, spacing="trailing", clip=Clip(0.0))
    assert machine.run(MixtureEps(LINEAR), plan, x).abs().max() < 1e-12
