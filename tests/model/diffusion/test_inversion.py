import inspect
import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
import torch

from model.diffusion import inversion, machine, samplers
from model.diffusion.inversion.registry import INVERSIONS
from model.diffusion.levels import CLEAN
from model.diffusion.plan import Clip
from model.diffusion.samplers.ddim import ddim_on
from model.diffusion.schedule import NoiseSchedule, ScheduleError
from tests.fakes import GaussianEps, MixtureEps
from tests.oracles import hops_between
from tests.plans import LINEAR, pixels

IMAGE = [-0.7, -0.55, 0.2, 0.5, 0.62]


def round_trip(net, steps, encode, dtype=torch.float64, values=IMAGE):
    """Largest error of images that are encoded by a plan and decoded by plain ddim."""
    x_0 = pixels(values, dtype)
    x_T = machine.run_slots(net, encode, x_0[:, None])[:, 0]
    return float((machine.run(net, samplers.ddim(net.schedule, steps), x_T) - x_0).abs().max())


# From a separate computation in float64: relative error of there and back, Gaussian data, leading, target time.
GAINS = [
    (0.5, {10: -0.2725, 20: -0.1349, 50: -0.0536, 100: -0.0267, 200: -0.0133, 500: -0.0053, 1000: -0.0027}),
    (0.1, {50: -0.3799}),
]


@pytest.mark.parametrize(("s", "steps", "gain"), [(s, n, g) for s, table in GAINS for n, g in table.items()])
def test_round_trip_gains_are_the_closed_forms(s, steps, gain):
    net = GaussianEps(LINEAR, 0, s)
    x_T = machine.run(net, inversion.ddim(LINEAR, steps), pixels([1.0]))
    assert float(machine.run(net, samplers.ddim(LINEAR, steps), x_T)) - 1 == pytest.approx(gain, abs=5e-5)


@pytest.mark.parametrize("time", ["source", "target"])
def test_plain_inversion_is_the_textbook_loop(time):
    net = MixtureEps(LINEAR)
    levels = [(0, 1.0)] + [(t, float(LINEAR.alphas_cumprod[t])) for t in range(0, 1000, 50)]
    x = pixels(IMAGE)
    for (t, abar), (t_next, abar_next) in pairwise(levels):
        eps = net(x, torch.full((len(x),), float(t if time == "source" else t_next)))
        x_0 = (x - math.sqrt(1 - abar) * eps) / math.sqrt(abar)
        x = math.sqrt(abar_next) * x_0 + math.sqrt(1 - abar_next) * eps
    ours = machine.run(net, inversion.ddim(LINEAR, 20, time=time), pixels(IMAGE))
    assert (ours - x).abs().max() < 1e-12


@pytest.mark.parametrize("steps", [20, 50])
@pytest.mark.parametrize("s", [0.5, 1.0])
def test_refinements_shrink_the_error_by_the_contraction(s, steps):
    """For Gaussian data each step contracts by ρ = (σ̄' - σ̄) σ̄' / (s² + σ̄'²) at the most."""
    net = GaussianEps(LINEAR, 0, s)
    ratios = [0.0] + [math.sqrt((1 - a) / a) for a in LINEAR.alphas_cumprod[:: 1000 // steps]]
    rho = max((b - a) * b / (s**2 + b**2) for a, b in pairwise(ratios))
    assert rho < (0.375 if steps == 20 else 0.179)
    errors = [round_trip(net, steps, inversion.fixed_point(LINEAR, steps, refinements=k)) for k in (1, 2, 3, 5, 10, 20)]
    powers = [k + 1 for k in (1, 2, 3, 5, 10, 20)]
    for (a, p), (b, q) in pairwise(zip(errors, powers, strict=True)):
        assert b < max(1.3 * a * rho ** (q - p), 1e-13)
    assert errors[-1] < max(1e-12, 50 * rho**21)


def test_the_residual_says_how_much_is_missing():
    net = MixtureEps(LINEAR)
    found = []
    for k in (1, 3, 10, 30):
        slots = machine.run_slots(net, inversion.fixed_point(LINEAR, 50, refinements=k), pixels(IMAGE)[:, None])
        found.append(inversion.residual(slots))
        assert found[-1].shape == (5,)
    for before, after in pairwise(found):
        assert (after < before).all()
    assert found[-1].max() < 1e-12


@pytest.mark.parametrize("refinements", [1, 3])
def test_fixed_point_is_the_textbook_loop(refinements):
    net, x, misses = MixtureEps(LINEAR), pixels(IMAGE), []
    levels = [(0, 1.0)] + [(t, float(LINEAR.alphas_cumprod[t])) for t in range(0, 1000, 20)]
    for (_, abar), (t_next, abar_next) in pairwise(levels):

        def mapped(y, x=x, abar=abar, t_next=t_next, abar_next=abar_next):
            eps = net(y, torch.full((len(y),), float(t_next)))
            scale = math.sqrt(abar_next / abar)
            return scale * x + (math.sqrt(1 - abar_next) - math.sqrt(1 - abar) * scale) * eps

        y = mapped(x)
        for _ in range(refinements):
            y, before = mapped(y), y
        x = y
        misses.append(y - before)  # by how much the last iterate but one fails its equation
    slots = machine.run_slots(net, inversion.fixed_point(LINEAR, 50, refinements=refinements), pixels(IMAGE)[:, None])
    assert (slots[:, 0] - x).abs().max() < 1e-11
    assert inversion.residual(slots) == pytest.approx(sum(misses).flatten().abs(), rel=1e-6, abs=1e-14)


@dataclass(frozen=True)
class Steep:
    """An ε that turns quickly with x above a threshold, so that the iteration diverges there, and is 0 below it."""

    schedule: NoiseSchedule
    slope: float = 30.0

    def __call__(self, u, t, y=None):
        return torch.where(u > 0.5, torch.sin(self.slope * u), torch.zeros_like(u))


def fields(step):
    return {name: getattr(step, name) for name in step.__dataclass_fields__}


def test_a_diverging_iteration_falls_back_to_its_best_iterate():
    # x' = 0.6 x + 0.8 ε(x') with an ε as steep as this has no attracting solution near x = 1.
    schedule = NoiseSchedule(np.array([0.36]))
    net = Steep(schedule)

    def iterate(k, guarded):
        plan = inversion.fixed_point(schedule, 1, refinements=k)
        if not guarded:
            plan = type(plan)(tuple(type(s)(**{**fields(s), "guard": None}) for s in plan.steps))
        return float(machine.run(net, plan, pixels([1.0])))

    def failure(x):
        """Of the equation x = 0.6 · 1 + 0.8 ε(x)."""
        return abs(0.6 + 0.8 * float(net(pixels([x]), None)) - x)

    plain = [iterate(k, guarded=False) for k in range(1, 13)]
    kept = [iterate(k, guarded=True) for k in range(1, 13)]
    assert max(map(failure, plain[6:])) > 0.5  # it does not converge
    first_guess = 0.6 + 0.8 * float(net(pixels([1.0]), None))
    for k in range(2, 13):
        # All iterates whose failure was measured: the first guess, and those of fewer refinements.
        measured = [failure(first_guess), *map(failure, plain[: k - 1])]
        best = int(np.argmin(measured))
        trusted = plain[k - 1] if best == k - 1 else [first_guess, *plain][best]
        assert kept[k - 1] == trusted
        slots = machine.run_slots(net, inversion.fixed_point(schedule, 1, refinements=k), pixels([1.0])[:, None])
        assert float(inversion.residual(slots)) == pytest.approx(
            measured[best], rel=1e-12
        )  # and says what it misses by
    assert failure(kept[-1]) <= min(map(failure, plain[:-1]))


def test_each_image_chooses_for_itself():
    schedule = NoiseSchedule(np.array([0.36]))
    net = Steep(schedule)
    plan = inversion.fixed_point(schedule, 1, refinements=7)
    together = machine.run(net, plan, pixels([1.0, -2.0, 1.3]))
    alone = torch.cat([machine.run(net, plan, pixels([value])) for value in (1.0, -2.0, 1.3)])
    assert torch.equal(together, alone)
    assert float(together[1]) == pytest.approx(-1.2)  # ε is 0 there: x' = 0.6 x


@pytest.mark.parametrize("net", [GaussianEps(LINEAR, 0.1, 0.5), MixtureEps(LINEAR)], ids=["gaussian", "mixture"])
@pytest.mark.parametrize("steps", [2, 10, 20, 50, 100])
def test_obelm_returns_to_the_image(net, steps):
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 1e-5)):  # all that is left is rounding
        x_0 = pixels(IMAGE, dtype)
        spacing = "leading" if steps >= 10 else "trailing"
        pair = machine.run_slots(net, inversion.obelm(LINEAR, steps, spacing=spacing), x_0[:, None])
        assert pair.shape == (5, 2, 1, 1, 1)
        back = machine.run_slots(net, samplers.obelm(LINEAR, steps, paired=True, spacing=spacing), pair)[:, 0]
        assert (back - x_0).abs().max() < bound
    assert samplers.obelm(LINEAR, steps, paired=True, spacing=spacing).nfe == steps - 1


def test_obelm_needs_both_slots():
    net, x_0 = MixtureEps(LINEAR), pixels(IMAGE)
    pair = machine.run_slots(net, inversion.obelm(LINEAR, 50), x_0[:, None])
    alone = machine.run(net, samplers.obelm(LINEAR, 50), pair[:, 0])
    assert (alone - x_0).abs().max() > 1e-3


def test_a_pair_needs_two_levels():
    with pytest.raises(ScheduleError, match=r"^steps = 1: "):
        samplers.obelm(LINEAR, 1, paired=True, spacing="trailing")


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_every_prediction_type_is_inverted(prediction):
    schedule = NoiseSchedule.from_config({"prediction_type": prediction})
    same = NoiseSchedule.from_config({})
    for make in (
        lambda s: inversion.ddim(s, 50),
        lambda s: inversion.fixed_point(s, 50, refinements=2),
        lambda s: inversion.obelm(s, 50),
    ):
        ours = machine.run(MixtureEps(schedule), make(schedule), pixels(IMAGE))
        # ε is the same function for every prediction type, but for evaluations with an image of another level than
        # that of their timestep: the first guesses, and the clean image.
        expected = machine.run(MixtureEps(same), make(same), pixels(IMAGE))
        assert (ours - expected).abs().max() < 0.05
    error = round_trip(MixtureEps(schedule), 50, inversion.fixed_point(schedule, 50, refinements=20))
    assert error < 1e-6


@pytest.mark.parametrize("make", [inversion.ddim, inversion.fixed_point, inversion.obelm])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace", "quadratic", "karras"])
def test_no_inversion_clips_or_draws_and_all_go_up(make, spacing):
    plan = make(LINEAR, 20, spacing=spacing)
    assert not plan.stochastic
    assert all(step.clip is None for step in plan.steps)
    times = [step.t for step in plan.steps]
    assert times == sorted(times)
    assert inversion.ascending_levels(LINEAR, 20, spacing)[0] == CLEAN


def test_evaluations():
    assert inversion.ddim(LINEAR, 50).nfe == 50
    assert inversion.obelm(LINEAR, 50).nfe == 50
    assert [inversion.fixed_point(LINEAR, 50, refinements=k).nfe for k in (1, 3, 10)] == [100, 200, 550]


@pytest.mark.parametrize("entry", INVERSIONS.values(), ids=INVERSIONS)
def test_the_table_says_how_each_latent_is_decoded_and_what_it_costs(entry):
    net, x_0 = MixtureEps(LINEAR), pixels(IMAGE)
    plan = entry.compile(LINEAR, 50)
    assert plan.nfe == {"N": 50, "N(K + 1)": 200}[entry.nfe_formula]  # K is 3 unless a request says otherwise
    assert entry.summary.endswith(f" ({entry.nfe_formula} evaluations for N steps)")
    fields = inspect.signature(entry.compile).parameters.keys() - {"schedule", "steps", "spacing"}
    assert entry.options == fields - {"time"}  # which requests do not have
    slots = machine.run_slots(net, plan, x_0[:, None])
    latent = slots[:, : entry.slots]
    assert latent.shape[1] == entry.slots
    paired = {"paired": True} if entry.slots == 2 else {}
    decoded = machine.run_slots(net, samplers.SAMPLERS[entry.sampler].compile(LINEAR, 50, **paired), latent)[:, 0]
    error = (decoded - x_0).abs().flatten()
    # Rounding for the exact one; for the others the errors of their methods, of which fixed_point's is known.
    assert error.max() < {"obelm": 1e-12, "fixed_point": 1e-3, "ddim": 0.05}[entry.name]
    assert (entry.residual is not None) == ("refinements" in entry.options)
    if entry.residual is not None:
        assert entry.residual(slots).max() < 0.01


@pytest.mark.parametrize("refinements", [0, -1])
def test_no_refinement_is_the_other_method(refinements):
    with pytest.raises(ScheduleError, match="must be at least 1; method ddim"):
        inversion.fixed_point(LINEAR, 50, refinements=refinements)


def test_zero_terminal_snr_is_inverted():
    schedule = NoiseSchedule.from_config({"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"})
    net = GaussianEps(schedule, 0.1, 0.5)
    x_0 = pixels(IMAGE)
    x_T = machine.run(net, inversion.fixed_point(schedule, 50, refinements=10, spacing="trailing"), x_0)
    # Down from 2^-24 instead of 0, as the way up went.
    hops = hops_between(inversion.ascending_levels(schedule, 50, "trailing")[::-1])
    assert (machine.run(net, ddim_on(schedule, hops), x_T) - x_0).abs().max() < 1e-4


def test_clipping_the_way_back_would_not_undo_it():
    """Why decoding is unclipped: the latent of an unusual image leads through predictions outside the range."""
    net, x_0 = GaussianEps(LINEAR, 0, 1.0), pixels([0.95, -0.99])
    x_T = machine.run(net, inversion.fixed_point(LINEAR, 50, refinements=10), x_0)
    assert (machine.run(net, samplers.ddim(LINEAR, 50), x_T) - x_0).abs().max() < 1e-6
    clipped = machine.run(net, samplers.ddim(LINEAR, 50, clip=Clip(0.5)), x_T)
    assert (clipped - x_0).abs().max() > 0.1
