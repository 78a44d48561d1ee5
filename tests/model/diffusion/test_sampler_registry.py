"""What holds for every line of the table of samplers, and what went wrong elsewhere."""

import inspect
from functools import partial

import pytest
import torch

from model.diffusion import machine
from model.diffusion.levels import CLEAN, Level
from model.diffusion.samplers import SAMPLERS, dpmpp_2m, dpmpp_2m_sde, dpmpp_2s, heun, obelm, pndm, unipc
from model.diffusion.samplers.classical import heun_on
from model.diffusion.samplers.dpmpp import dpmpp_2m_on, dpmpp_2s_on
from model.diffusion.samplers.obelm import obelm_on
from model.diffusion.samplers.unipc import unipc_on
from model.diffusion.schedule import SPACINGS, ScheduleError
from tests.fakes import MixtureEps
from tests.oracles import mixture_flow
from tests.plans import COSINE, LINEAR, VARIANTS, draws, pixels, sample_each

ALL = pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)


@pytest.mark.parametrize("steps", [2, 5, 10, 20, 50])
@ALL
def test_cost_and_noise_are_as_advertised(sampler, steps):
    a, b = sampler.evaluations
    plan = sampler.compile(LINEAR, steps, spacing="trailing")
    assert plan.nfe == a * steps + b
    assert plan.stochastic == sampler.stochastic
    assert sampler.nfe_formula == {"heun": "2N - 1", "pndm": "N + 1"}.get(sampler.name, "N")
    calls = []
    machine.run(lambda u, t, y: calls.append(t) or u, plan, pixels([0.0]), noise=draws(0, (1, 1, 1, 1)))
    assert len(calls) == plan.nfe


@ALL
def test_the_table_says_what_a_sampler_is_and_takes(sampler):
    plan = sampler.compile(LINEAR, 20, spacing="trailing")
    kind = "stochastic" if plan.stochastic else "deterministic"
    assert f"({kind}; {sampler.nfe_formula} evaluations for N steps; good with {sampler.good_steps})" in sampler.summary
    fields = inspect.signature(sampler.compile).parameters.keys() - {"schedule", "steps", "spacing", "clip"}
    assert sampler.options == fields - {"rederive"}  # which requests do not have


@pytest.mark.parametrize("name", ["dpmpp_2m", "unipc"])
def test_a_spacing_is_preferred_that_is_better_than_those_of_checkpoints(name):
    sampler, starts = SAMPLERS[name], (-2, -1, -0.3, 0.1, 0.4, 1.2, 2.1)

    def error(spacing):
        """The largest distance from the exact flow."""
        plan = sampler.compile(LINEAR, sampler.default_steps, spacing=spacing)
        ends = machine.run(MixtureEps(LINEAR), plan, pixels(starts)).flatten().tolist()
        first = LINEAR.alphas_cumprod[int(plan.steps[0].t)]
        return max(abs(end - mixture_flow(x, first)) for x, end in zip(starts, ends, strict=True))

    assert error(sampler.spacing) < min(error("leading"), error("trailing")) / 2
    assert SAMPLERS["dpmpp_2m_sde"].spacing == SAMPLERS["dpmpp_2m"].spacing


@pytest.mark.parametrize("steps", [10, 20, 50])
def test_heun_prefers_a_spacing_that_evaluates_nothing_without_noise(steps):
    plan = heun(LINEAR, steps, spacing=SAMPLERS["heun"].spacing)
    assert all(step.t > 0 for step in plan.steps)


@pytest.mark.parametrize("steps", [4, 10, 50])
def test_warmup_costs_nine_evaluations(steps):
    assert pndm(LINEAR, steps, warmup=True, spacing="trailing").nfe == steps + 9


@pytest.mark.parametrize("steps", [1, 2, 5, 10, 50, 333])
@pytest.mark.parametrize("spacing", SPACINGS)
@ALL
def test_every_spacing_works_or_says_why_not(sampler, spacing, steps):
    even = spacing not in ("quadratic", "karras")
    assert (spacing in sampler.spacings) == (even or sampler.name != "pndm")  # whose extrapolation assumes it
    if spacing not in sampler.spacings:
        return
    refused = (spacing == "leading" and steps < 10) or (spacing in ("linspace", "quadratic") and steps == 1)
    if refused:
        with pytest.raises(ScheduleError, match=f"^spacing = '{spacing}'"):
            sampler.compile(LINEAR, steps, spacing=spacing)
        return
    plan = sampler.compile(LINEAR, steps, spacing=spacing)
    end = machine.run(MixtureEps(LINEAR), plan, pixels([-1.0, 0.2, 1.1]), noise=draws(7, (3, 1, 1, 1)))
    assert end.isfinite().all()


@ALL
def test_all_steps_take_each_timestep_once(sampler):
    plan = sampler.compile(LINEAR, 1000, spacing="trailing")
    assert sorted({step.t for step in plan.steps}) == list(range(1000))
    end = machine.run(MixtureEps(LINEAR), plan, pixels([-1.0, 0.2, 1.1]), noise=draws(7, (3, 1, 1, 1)))
    assert end.abs().max() < 1.3


@pytest.mark.parametrize("steps", [0, 1001])
@ALL
def test_steps_outside_the_chain_are_refused(sampler, steps):
    for spacing in (None, sampler.spacings[-1]):
        with pytest.raises(ScheduleError) as caught:
            sampler.compile(LINEAR, steps, spacing=spacing)
        assert (caught.value.field, caught.value.value) == ("steps", steps)


@pytest.mark.parametrize(("compile_", "highest"), [(dpmpp_2m, 3), (dpmpp_2m_sde, 2), (unipc, 3)])
def test_an_order_outside_its_range_is_refused(compile_, highest):
    for order in (0, -1, highest + 1):
        with pytest.raises(
            ScheduleError, match=rf"^order = {order}: this sampler has orders 1\.\.{highest}$"
        ) as caught:
            compile_(LINEAR, 10, order=order)
        assert caught.value.field == "order"


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_warmup_in_fewer_than_four_steps_is_refused(steps):
    with pytest.raises(ScheduleError, match="at least 4 steps") as caught:
        pndm(LINEAR, steps, warmup=True, spacing="trailing")
    assert (caught.value.field, caught.value.value) == ("steps", steps)


def test_a_pair_in_one_step_is_refused():
    with pytest.raises(ScheduleError, match="at least 2") as caught:
        obelm(LINEAR, 1, paired=True, spacing="trailing")
    assert caught.value.field == "steps"


# Regressions: what went wrong elsewhere.


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("steps", [1, 2, 3, 5, 20])
def test_unipc_to_the_clean_image_is_a_number(steps, order):
    (end,) = sample_each(unipc(LINEAR, steps, order=order, spacing="trailing"))
    assert end.abs().max() < 1.5


@pytest.mark.parametrize("compile_", [dpmpp_2m, partial(dpmpp_2m, order=3), dpmpp_2m_sde, dpmpp_2s, unipc, heun, obelm])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_cosine_schedule_starts_far_out_and_arrives(compile_, dtype):
    # σ/α = 2e4 at its end; the data lie within 1.2, and Heun in 20 steps brings every x to within 1 of where it should.
    x = draws(6, (4, 1, 2, 2), dtype)()
    end = machine.run(MixtureEps(COSINE), compile_(COSINE, 20, spacing="trailing"), x, noise=draws(7, x.shape, dtype))
    assert end.abs().max() < 2.2


@pytest.mark.parametrize("steps", [61, 103, 121, 122, 201])
@ALL
def test_no_sampler_leaves_the_timesteps(sampler, steps):
    # Float accumulation gives diffusers N + 1 timesteps here, of which the last is -1.
    for spacing in sampler.spacings:
        plan = sampler.compile(LINEAR, steps, spacing=spacing)
        assert all(0 <= step.t <= 999 for step in plan.steps)
        a, b = sampler.evaluations
        assert plan.nfe == a * steps + b


def test_no_step_after_the_last_level_adds_noise():
    # steps_offset = 1 makes diffusers' DDPM add noise on its last step.
    for name, compile_ in VARIANTS.items():
        assert not compile_(LINEAR, 20, spacing="trailing").steps[-1].noisy, name


def test_a_trajectory_may_end_above_the_clean_image_or_at_it():
    levels = [Level(999, float(LINEAR.alphas_cumprod[999])), Level(500, float(LINEAR.alphas_cumprod[500]))]
    for compile_ in (
        lambda *given: dpmpp_2m_on(*given, [1] * 2, slots=2),
        dpmpp_2s_on,
        lambda *given: unipc_on(*given, [1] * (len(given[1]) - 1), history=2),
        heun_on,
        obelm_on,
    ):
        to_500, to_clean = compile_(LINEAR, levels), compile_(LINEAR, [*levels, CLEAN])
        x = draws(8, (1, 1, 2, 2))()
        assert machine.run(MixtureEps(LINEAR), to_500, x).isfinite().all()
        assert machine.run(MixtureEps(LINEAR), to_clean, x).isfinite().all()
