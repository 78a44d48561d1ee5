import itertools
import math
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import pytest
import torch

from model import inversion, latents, machine
from model.plan import Clip, Plan
from model.samplers import SAMPLERS, ddim, ddpm, dpmpp_2m, dpmpp_2m_sde, dpmpp_2s, heun, obelm, pndm, unipc
from model.schedule import SPACINGS, NoiseSchedule, ScheduleError
from model.walk import CLEAN, Level, levels
from tests.fakes import GaussianEps, MixtureEps, WithVariance
from tests.oracles import (
    dpmpp_2m_loop,
    dpmpp_2s_loop,
    even_in_lambda,
    heun_loop,
    hops_between,
    mixture_cdf,
    mixture_flow,
    obelm_loop,
    pndm_loop,
    unipc_loop,
)

LINEAR = NoiseSchedule.from_config({})
COSINE = NoiseSchedule.from_config({"beta_schedule": "squaredcos_cap_v2"})
SCHEDULES = pytest.mark.parametrize("schedule", [LINEAR, COSINE], ids=["linear", "cosine"])
ALL = pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
# Every solver in every form that asks for other coefficients.
FORMS = {
    **{name: sampler.compile for name, sampler in SAMPLERS.items()},
    "ddim-eta": partial(ddim, eta=0.6),
    "ddpm-large": partial(ddpm, variance="fixed_large"),
    "dpmpp_2m-1": partial(dpmpp_2m, order=1),
    "dpmpp_2m-3": partial(dpmpp_2m, order=3),
    "dpmpp_2m_sde-1": partial(dpmpp_2m_sde, order=1),
    "unipc-1": partial(unipc, order=1),
    "unipc-3": partial(unipc, order=3),
    "pndm-warmup": partial(pndm, warmup=True),
}


def pixels(values):
    """[B, 1, 1, 1] in float64: one trajectory per value."""
    return torch.as_tensor(values, dtype=torch.float64).reshape(-1, 1, 1, 1)


def draws(seed, shape, dtype=torch.float64):
    """An endless stream of noise."""
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(shape, generator=generator, dtype=dtype)


# A batch in which no two rows have anything in common but the forward.
SHAPE = (1, 2, 3)


@dataclass
class Row:
    """One trajectory and how far it has come."""

    plan: Plan
    seed: int
    arrives: int
    slots: torch.Tensor  # those it starts with, [1.., C, H, W]
    cursor: int = 0
    source: torch.Generator = field(init=False)

    def __post_init__(self):
        self.source = latents.generator(self.seed)

    def noise(self):
        return latents.draw(self.source, SHAPE)


def company():
    """A row of every sampler and of every inversion, of different lengths, arriving one after another."""
    plans = {
        **{
            name: compile_(LINEAR, 4 + 3 * i % 8, spacing="trailing")
            for i, (name, compile_) in enumerate(FORMS.items())
        },
        **{
            f"{name} where it prefers": SAMPLERS[name].compile(LINEAR, 7, spacing="karras")
            for name in ("ddim", "unipc")
        },
        "learned": ddpm(LINEAR, 6, variance="learned_range", spacing="trailing", clip=Clip(0.7)),
        "thresholded": dpmpp_2m(LINEAR, 5, spacing="trailing", clip=Clip(1.5, quantile=0.9)),
        "paired": obelm(LINEAR, 6, spacing="trailing", paired=True),
        "inverse ddim": inversion.ddim(LINEAR, 9, spacing="trailing"),
        "inverse ddim, source": inversion.ddim(LINEAR, 4, time="source", spacing="karras"),
        "inverse fixed point": inversion.fixed_point(LINEAR, 3, refinements=1, spacing="trailing"),
        "inverse fixed point, guarded": inversion.fixed_point(LINEAR, 3, refinements=3, spacing="trailing"),
        "inverse obelm": inversion.obelm(LINEAR, 8, spacing="trailing"),
    }
    rows = {}
    for i, (name, plan) in enumerate(plans.items()):
        given = torch.randn(2 if name == "paired" else 1, *SHAPE, generator=latents.generator(1000 + i))
        rows[name] = Row(plan, seed=i, arrives=i % 5, slots=given)
    return rows


def serve(net, rows):
    """Advance all rows together, each from its arrival to the end of its plan, as the server does; slots by name."""
    widest = max(row.plan.slots for row in rows.values())
    states = {}
    for name, row in rows.items():
        states[name] = torch.zeros(widest, *SHAPE)
        states[name][: len(row.slots)] = row.slots
    tick = 0
    while any(row.cursor < row.plan.nfe for row in rows.values()):
        busy = {name: row for name, row in rows.items() if row.arrives <= tick and row.cursor < row.plan.nfe}
        steps = {name: row.plan.steps[row.cursor] for name, row in busy.items()}
        lines = np.stack([row.plan.table(widest)[row.cursor] for row in busy.values()])

        def noise(busy=busy, steps=steps):
            return torch.stack([busy[name].noise() if steps[name].noisy else torch.zeros(SHAPE) for name in busy])

        after = machine.advance(net, torch.stack([states[name] for name in busy]), lines, noise=noise)
        for name, slots in zip(busy, after, strict=True):
            states[name] = slots
            rows[name].cursor += 1
        tick += 1
    return {name: states[name][: row.plan.slots] for name, row in rows.items()}


NETS = {"gaussian": WithVariance(GaussianEps(LINEAR, 0.2, 0.5)), "mixture": WithVariance(MixtureEps(LINEAR))}


@pytest.mark.parametrize("net", NETS.values(), ids=NETS)
def test_all_samplers_and_inversions_in_one_batch_are_each_of_them_alone(net):
    together = serve(net, company())
    assert max(row.plan.slots for row in company().values()) == 6
    for name, row in company().items():
        alone = machine.run_slots(net, row.plan, row.slots[None], noise=lambda row=row: row.noise()[None])[0]
        assert alone.isfinite().all(), name
        assert torch.equal(together[name], alone), name


@pytest.mark.parametrize("perturbed", ["dpmpp_2m", "unipc", "pndm-warmup", "inverse fixed point, guarded"])
def test_another_plan_changes_no_other_row(perturbed):
    rows, before = company(), serve(NETS["mixture"], company())
    first, *others = rows[perturbed].plan.steps
    rows[perturbed].plan = Plan((replace(first, A=tuple((a[0] + 0.01, *a[1:]) for a in first.A)), *others))
    after = serve(NETS["mixture"], rows)
    assert {name for name in rows if not torch.equal(before[name], after[name])} == {perturbed}


# Order of convergence: levels evenly spaced in λ from t = 999 to t = 0, no step to the clean picture, where λ = ∞.


def on_even_levels(compile_, steps, **options):
    return compile_(LINEAR, steps, walk=even_in_lambda(LINEAR, steps), **options)


KEEPING = {"lower_order_final": False}
# SAMPLERS.md section 7: the slope of the error, and the error at 80 steps where it is printed.
ORDERS = {
    "ddim": (lambda n: ddim(LINEAR, n, walk=hops_between(even_in_lambda(LINEAR, n))), 0.99, 1.93e-2),
    "dpmpp_2m-1": (partial(on_even_levels, dpmpp_2m, order=1, **KEEPING), 0.99, 1.93e-2),
    "dpmpp_2m": (partial(on_even_levels, dpmpp_2m, **KEEPING), 2.00, 5.9e-4),
    "dpmpp_2s": (partial(on_even_levels, dpmpp_2s), 2.00, None),
    "unipc-1": (partial(on_even_levels, unipc, order=1, **KEEPING), 2.00, None),
    "unipc": (partial(on_even_levels, unipc, order=2, **KEEPING), 3.00, 9.5e-5),
    "unipc-3": (partial(on_even_levels, unipc, order=3, **KEEPING), 3.90, None),
    "heun": (partial(on_even_levels, heun), 2.01, 1.2e-3),
    "obelm": (partial(on_even_levels, obelm), 2.00, 1.2e-3),
}


def gaussian_error(plan, mu=0.3, s=0.5, x_T=1.3):
    """Against the exact flow of Gaussian data, which keeps x's distance from the mean in standard deviations."""
    abar_T, abar = LINEAR.alphas_cumprod[[-1, 0]]
    v_T, v = (a * s**2 + 1 - a for a in (abar_T, abar))
    exact = math.sqrt(abar) * mu + math.sqrt(v / v_T) * (x_T - math.sqrt(abar_T) * mu)
    return abs(float(machine.run(GaussianEps(LINEAR, mu, s), plan, pixels([x_T]))) - exact)


def slope(coarse, fine):
    """-d ln(error) / d ln(steps), between 80 and 320 of them."""
    return math.log(coarse / fine) / math.log(4)


@pytest.mark.parametrize("name", ORDERS)
def test_order_of_convergence(name):
    compile_, order, at_80 = ORDERS[name]
    coarse, fine = gaussian_error(compile_(80)), gaussian_error(compile_(320))
    assert abs(slope(coarse, fine) - order) < 0.15
    if at_80 is not None:
        assert coarse == pytest.approx(at_80, rel=0.04)  # printed with two digits


def test_order_3_of_dpmpp_2m_gains_without_being_of_third_order():
    # The authors' code gives the second difference half the weight of a parabola's: slope 2 remains, the error shrinks.
    third = [gaussian_error(on_even_levels(dpmpp_2m, n, order=3, **KEEPING)) for n in (80, 320)]
    second = [gaussian_error(on_even_levels(dpmpp_2m, n, **KEEPING)) for n in (80, 320)]
    assert slope(*third) > 1.85
    assert third[0] < second[0] / 2
    assert third[1] < second[1] / 2


X_T = (-2, -1, -0.3, 0.1, 0.4, 1.2, 2.1)


def mixture_error(plan):
    end = machine.run(MixtureEps(LINEAR), plan, pixels(X_T)).flatten().tolist()
    abar_T, abar = LINEAR.alphas_cumprod[[-1, 0]]
    return max(abs(x - mixture_flow(x_T, abar_T, abar)) for x, x_T in zip(end, X_T, strict=True))


@pytest.mark.parametrize(("name", "order"), [("ddim", 1.00), ("dpmpp_2m", 1.97), ("unipc", 3.1)])
def test_order_of_convergence_on_a_mixture(name, order):
    compile_, *_ = ORDERS[name]
    assert abs(slope(mixture_error(compile_(80)), mixture_error(compile_(320))) - order) < 0.15


def test_the_exact_flow_is_the_printed_one():
    printed = (-0.768982, -0.647482, -0.527942, 0.218863, 0.401443, 0.647763, 0.860589)
    found = [mixture_flow(x, LINEAR.alphas_cumprod[999]) for x in X_T]
    assert max(abs(a - b) for a, b in zip(found, printed, strict=True)) < 6e-7


# Each must beat ddim, whose largest errors are .046 at 50 steps and .024 at 100.
@pytest.mark.parametrize("name", ["dpmpp_2m", "dpmpp_2s", "unipc", "heun", "pndm", "obelm"])
def test_solvers_approach_the_exact_flow(name):
    errors = []
    for steps in (25, 50, 100):
        plan = SAMPLERS[name].compile(LINEAR, steps, spacing=SAMPLERS[name].spacing)
        abar = levels(LINEAR, steps, SAMPLERS[name].spacing)[0].abar
        end = machine.run(MixtureEps(LINEAR), plan, pixels(X_T)).flatten().tolist()
        errors.append(max(abs(x - mixture_flow(x_T, abar)) for x, x_T in zip(end, X_T, strict=True)))
    assert errors[0] > errors[1] > errors[2]
    assert errors[1] < 0.046
    assert errors[2] < 0.024


def kolmogorov_smirnov(samples):
    """The largest distance between the samples' distribution and the mixture's own."""
    x = np.sort(np.asarray(samples))
    exact = np.array([mixture_cdf(value, 1.0) for value in x])
    steps = np.arange(len(x) + 1) / len(x)
    return max(np.max(steps[1:] - exact), np.max(exact - steps[:-1]))


def test_dpmpp_2m_sde_draws_from_the_mixture():
    distances = {}
    for steps in (10, 50):
        noise = draws(1, (20_000, 1, 1, 1), torch.float32)
        plan = dpmpp_2m_sde(LINEAR, steps, spacing="karras")
        x = machine.run(MixtureEps(LINEAR), plan, noise(), noise=noise).flatten().double()
        distances[steps] = kolmogorov_smirnov(x)
    # The bound of section 7 for 50 steps is .08; this solver reaches .008, and chance alone 1.36 / √20000 = .0096.
    assert distances[50] < 0.02
    assert distances[10] > 2 * distances[50]
    # Of the last x: mean -.05 and variance .3275, each with 4 standard errors and some bias of 50 steps.
    assert abs(float(x.mean()) + 0.05) < 4 * math.sqrt(0.3275 / 20_000)
    assert abs(float(x.var()) - 0.3275) < 0.01
    assert abs(float((x < 0).double().mean()) - 0.5031) < 4 * 0.5 / math.sqrt(20_000)


# Textbook loops, which share no line with the plans.
LOOPS = {
    "dpmpp_2m": (partial(dpmpp_2m, lower_order_final=False), dpmpp_2m_loop),
    "dpmpp_2s": (dpmpp_2s, dpmpp_2s_loop),
    "unipc": (unipc, unipc_loop),
    "heun": (heun, heun_loop),
    "pndm": (pndm, pndm_loop),
    "obelm": (obelm, obelm_loop),
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
    walk = levels(schedule, steps, spacing)
    found = machine.run(net, compile_(schedule, steps, walk=walk), x)
    expected = loop(predictor(net), [(level.t, level.abar) for level in walk], x)
    # float64 against float64: 1e-16 times 1/α at the top, 157 for linear and 2e4 for cosine, times roundings a step.
    # Two steps of Heun or PNDM may end as far out as they start.
    scale = max(1.0, float(expected.abs().max()))
    assert (found - expected).abs().max() < (1e-11 if schedule is LINEAR else 1e-9) * scale


@pytest.mark.parametrize("name", LOOPS)
def test_plans_that_end_above_the_clean_picture_are_the_papers_loops(name):
    (compile_, loop), net, x = LOOPS[name], MixtureEps(LINEAR), draws(5, (2, 1, 3, 3))()
    walk = even_in_lambda(LINEAR, 12)
    found = machine.run(net, compile_(LINEAR, 12, walk=walk), x)
    expected = loop(predictor(net), [(level.t, level.abar) for level in walk], x)
    assert (found - expected).abs().max() < 1e-11


@pytest.mark.parametrize("steps", [4, 10, 50])
def test_warmup_is_the_papers_runge_kutta(steps):
    net, x = MixtureEps(LINEAR), draws(5, (2, 1, 3, 3))()
    walk = levels(LINEAR, steps, "trailing")
    middles = [int(here.t + there.t) // 2 for here, there in itertools.pairwise(walk[:4])]
    halves = [(t, float(LINEAR.alphas_cumprod[t])) for t in middles]
    found = machine.run(net, pndm(LINEAR, steps, warmup=True, spacing="trailing"), x)
    expected = pndm_loop(predictor(net), [(level.t, level.abar) for level in walk], x, halves)
    assert (found - expected).abs().max() < 1e-11


# Identities.


@pytest.mark.parametrize(
    ("schedule", "name", "steps"),
    [
        pytest.param(schedule, name, steps, id=f"{kind}-{name}-{steps}")
        for kind, schedule in (("linear", LINEAR), ("cosine", COSINE))
        for name in FORMS
        for steps in (1, 2, 3, 10, 77)
        # ε extrapolated from the cosine schedule's σ/α = 2e4 multiplies roundings by up to 1e9.
        if not (name.startswith("pndm") and schedule is COSINE) and not (name == "pndm-warmup" and steps < 4)
    ],
)
def test_every_walk_ends_at_the_only_picture(name, steps, schedule):
    form = FORMS[name]
    x = draws(0, (3, 1, 2, 2))()
    end = machine.run(
        GaussianEps(schedule, -0.4, 0), form(schedule, steps, spacing="trailing"), x, noise=draws(1, x.shape)
    )
    # ε is the same everywhere on a path, and x̂0 is μ; the roundings of a difference of numbers up to 1/α = 2e4 remain.
    assert (end + 0.4).abs().max() < 1e-9


def ends(*plans, seed=2):
    x = draws(seed, (4, 1, 2, 2))()
    return [machine.run(MixtureEps(LINEAR), plan, x, noise=draws(3, x.shape)) for plan in plans]


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
    first, second = ends(one(LINEAR, 25, spacing=spacing), other(LINEAR, 25, spacing=spacing))
    assert (first - second).abs().max() < 1e-11  # 157 times 1e-16, and some roundings a step


@ALL
def test_one_step_is_the_prediction_of_x_0(sampler):
    first, second = ends(sampler.compile(LINEAR, 1, spacing="trailing"), ddim(LINEAR, 1, spacing="trailing"))
    assert second.isfinite().all()
    assert (first - second).abs().max() < 1e-11


def test_two_steps_of_the_solvers_without_history_are_two_of_ddim():
    # The second leads to the clean picture, so it is of first order, and nothing was corrected before it.
    first, *others = ends(*(compile_(LINEAR, 2, spacing="trailing") for compile_ in (ddim, dpmpp_2m, dpmpp_2s)))
    for other in others:
        assert (first - other).abs().max() < 1e-11


def test_heun_without_its_second_look_is_ddim():
    walk = levels(LINEAR, 10)
    looks = heun(LINEAR, 10, walk=walk).steps
    first, second = ends(Plan(looks[::2]), ddim(LINEAR, 10, walk=hops_between(walk)))
    assert (first - second).abs().max() < 1e-11


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
@pytest.mark.parametrize("steps", [10, 50])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_walks_start_from_pure_noise(form, steps, prediction):
    schedule = NoiseSchedule.from_config({"rescale_betas_zero_snr": True, "prediction_type": prediction})
    assert schedule.alphas_cumprod[-1] == 0
    plan, x = form(schedule, steps, spacing="trailing"), draws(4, (2, 1, 2, 2))()
    assert plan.steps[0].t == 999
    end = machine.run(MixtureEps(schedule), plan, x, noise=draws(5, x.shape))
    assert end.isfinite().all()
    assert end.abs().max() < 1.5  # the data lie within -1 and 1.2; ddpm with fixed_large adds noise up to the end


@pytest.mark.parametrize("steps", [333, 500, 1000])
@pytest.mark.parametrize("compile_", [dpmpp_2m, dpmpp_2m_sde, dpmpp_2s, unipc, heun, obelm, inversion.obelm])
def test_many_steps_from_pure_noise_have_distances_in_lambda(compile_, steps):
    # Three timesteps lie below ᾱ = 2^-24; lifted to the same level, they would be a walk with steps of no length.
    schedule = NoiseSchedule.from_config({"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"})
    assert compile_(schedule, steps, spacing="trailing").nfe >= steps


def test_pure_noise_needs_another_prediction_than_epsilon():
    with pytest.raises(ScheduleError) as caught:
        NoiseSchedule.from_config({"rescale_betas_zero_snr": True})
    assert caught.value.field == "rescale_betas_zero_snr"


@pytest.mark.parametrize("spacing", ["trailing", "karras"])
@pytest.mark.parametrize("name", sorted(set(FORMS) - {"pndm", "pndm-warmup", "obelm"}))  # whose last step extrapolates
def test_clipped_samples_stay_within_the_clip(name, spacing):
    x, net = 3 * draws(13, (4, 1, 4, 4))(), GaussianEps(LINEAR, 0.9, 1.5)  # whose samples leave [-1, 1] freely
    free, clipped = (FORMS[name](LINEAR, 12, spacing=spacing, clip=clip) for clip in (None, Clip(1.0)))
    assert machine.run(net, free, x, noise=draws(14, x.shape)).abs().max() > 1.5
    # Exactly 1 where the update is x̂0; Heun's takes it apart and puts it together again.
    assert machine.run(net, clipped, x, noise=draws(14, x.shape)).abs().max() <= 1 + 1e-12


@pytest.mark.parametrize("name", ["pndm", "pndm-warmup", "obelm", "heun"])
def test_solvers_in_epsilon_use_the_epsilon_of_the_clipped_picture(name):
    # With x̂0 clamped to 0 all of x is noise, ε is the same everywhere, and x shrinks with σ.
    x = draws(13, (4, 1, 4, 4))()
    plan = FORMS[name](LINEAR, 12, spacing="trailing", clip=Clip(0.0))
    assert machine.run(MixtureEps(LINEAR), plan, x).abs().max() < 1e-12


# The table of samplers.


@pytest.mark.parametrize("steps", [2, 5, 10, 20, 50])
@ALL
def test_cost_and_noise_are_as_advertised(sampler, steps):
    a, b = sampler.evaluations
    plan = sampler.compile(LINEAR, steps, spacing="trailing")
    assert plan.nfe == a * steps + b
    assert plan.stochastic == sampler.stochastic
    assert sampler.nfe == {"heun": "2N - 1", "pndm": "N + 1"}.get(sampler.name, "N")
    calls = []
    machine.run(lambda u, t, y: calls.append(t) or u, plan, pixels([0.0]), noise=draws(0, (1, 1, 1, 1)))
    assert len(calls) == plan.nfe


@pytest.mark.parametrize("steps", [4, 10, 50])
def test_warmup_costs_nine_evaluations(steps):
    assert pndm(LINEAR, steps, warmup=True, spacing="trailing").nfe == steps + 9


@pytest.mark.parametrize("steps", [1, 2, 5, 10, 50, 333])
@pytest.mark.parametrize("spacing", SPACINGS)
@ALL
def test_every_spacing_walks_or_says_why_not(sampler, spacing, steps):
    if spacing not in sampler.spacings:
        assert (sampler.name, spacing) in {("pndm", "quadratic"), ("pndm", "karras")}
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
def test_the_whole_chain_is_walked_timestep_by_timestep(sampler):
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
        with pytest.raises(ScheduleError, match=rf"^order = {order}: must lie in 1\.\.{highest}$") as caught:
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


# Regressions: what went wrong elsewhere (SAMPLERS.md section 1.10).


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("steps", [1, 2, 3, 5, 20])
def test_unipc_to_the_clean_picture_is_a_number(steps, order):
    (end,) = ends(unipc(LINEAR, steps, order=order, spacing="trailing"))
    assert end.abs().max() < 1.5


@pytest.mark.parametrize("form", [dpmpp_2m, partial(dpmpp_2m, order=3), dpmpp_2m_sde, dpmpp_2s, unipc, heun, obelm])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_cosine_schedule_starts_far_out_and_arrives(form, dtype):
    # σ/α = 2e4 at its end; the data lie within 1.2, and Heun in 20 steps brings every x to within 1 of where it should.
    x = draws(6, (4, 1, 2, 2), dtype)()
    end = machine.run(MixtureEps(COSINE), form(COSINE, 20, spacing="trailing"), x, noise=draws(7, x.shape, dtype))
    assert end.abs().max() < 2.2


@pytest.mark.parametrize("steps", [61, 103, 121, 122, 201])
@ALL
def test_no_walk_leaves_the_chain(sampler, steps):
    # Float accumulation gives diffusers N + 1 timesteps here, of which the last is -1.
    for spacing in sampler.spacings:
        plan = sampler.compile(LINEAR, steps, spacing=spacing)
        assert all(0 <= step.t <= 999 for step in plan.steps)
        a, b = sampler.evaluations
        assert plan.nfe == a * steps + b


def test_no_step_after_the_last_level_adds_noise():
    # steps_offset = 1 makes diffusers' DDPM add noise on its last step.
    for name, form in FORMS.items():
        assert not form(LINEAR, 20, spacing="trailing").steps[-1].noisy, name


def test_a_walk_may_end_above_the_clean_picture_or_at_it():
    walk = [Level(999, float(LINEAR.alphas_cumprod[999])), Level(500, float(LINEAR.alphas_cumprod[500]))]
    for form in (dpmpp_2m, dpmpp_2s, unipc, heun, obelm):
        to_500, to_clean = form(LINEAR, 1, walk=walk), form(LINEAR, 2, walk=[*walk, CLEAN])
        x = draws(8, (1, 1, 2, 2))()
        assert machine.run(MixtureEps(LINEAR), to_500, x).isfinite().all()
        assert machine.run(MixtureEps(LINEAR), to_clean, x).isfinite().all()
