from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.diffusion import inversion, machine
from model.diffusion.noise import draw_noise, seeded_generator
from model.diffusion.plan import Clip, Columns, Guard, Plan, Step
from model.diffusion.samplers import ddim, ddpm
from model.diffusion.schedule import NoiseSchedule
from tests.fakes import GaussianEps, MixtureEps, WithVariance

LINEAR = NoiseSchedule.from_config({})
VELOCITY = NoiseSchedule.from_config({"prediction_type": "v_prediction"})
SHAPE = (2, 3, 3)  # C, H, W


def dense(slots, steps, seed, guarded=False):
    """A plan that no sampler makes: every slot is read and written, gets noise, and may be guarded."""
    rng = np.random.default_rng(seed)

    def some(*shape):
        return rng.uniform(-0.4, 0.4, shape).tolist()

    return Plan(
        tuple(
            Step(
                t=int(rng.integers(1000)),
                x0=tuple(some(2)),
                eps=tuple(some(3)),
                g=tuple(some(slots)),
                A=tuple(map(tuple, some(slots, slots))),
                b=tuple(some(slots)),
                c=tuple(some(slots)),
                s=tuple(some(slots)),
                clip=Clip(0.7) if rng.random() < 0.5 else None,
                guard=Guard(watch=i % slots, instead=tuple(rng.permutation(slots).tolist())) if guarded else None,
            )
            for i in range(steps)
        )
    )


# Plans that have as little as possible in common.
PLANS = {
    "ddim": ddim(LINEAR, 10),
    "ddim-trailing": ddim(LINEAR, 3, spacing="trailing"),
    "ddim-clipped": ddim(LINEAR, 20, clip=Clip(0.8)),
    "ddim-eta": ddim(LINEAR, 15, eta=0.7, clip=Clip(1.0)),
    "ddim-thresholded": ddim(LINEAR, 12, clip=Clip(9.0, quantile=0.97)),
    "ddim-rederived": ddim(LINEAR, 12, clip=Clip(0.5), rederive=True),
    "ddim-v": ddim(VELOCITY, 11, eta=0.2),
    "ddpm": ddpm(LINEAR, 10),
    "ddpm-thresholded": ddpm(LINEAR, 13, clip=Clip(1.6, quantile=0.9)),
    "ddpm-large": ddpm(LINEAR, 30, variance="fixed_large", clip=Clip(1.0)),
    "ddpm-learned": ddpm(LINEAR, 14, variance="learned_range"),
    "two-slots": dense(2, 9, seed=1),
    "three-slots": dense(3, 8, seed=2),
    "guarded": dense(3, 9, seed=4, guarded=True),
}
ALL = {**PLANS, "six-slots": dense(6, 3, seed=3)}
# Both have 2C output channels, as a network with a learned variance has for every row.
NETS = {"gaussian": WithVariance(GaussianEps(LINEAR, 0.2, 0.5)), "mixture": WithVariance(MixtureEps(LINEAR))}


def randn(seed, *shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def rows_of(picks, slots):
    """The table line of each (plan name, cursor)."""
    return np.stack([ALL[name].table(slots)[cursor] for name, cursor in picks])


def assert_the_batch_changes_nothing(net, picks, slots, seed):
    """Each row of one ``advance`` has the bits that it has alone, in a machine of no more slots than its plan needs."""
    rows, state = rows_of(picks, slots), randn(seed, len(picks), slots, *SHAPE)
    for row, (name, _) in enumerate(picks):
        state[row, ALL[name].slots :] = 0  # as every machine keeps the slots that a plan does not own
    z = randn(seed + 1, len(picks), *SHAPE)
    together = machine.advance(net, state, rows, noise=lambda: z)
    for i, (name, cursor) in enumerate(picks):
        own = ALL[name].slots
        alone = machine.advance(
            net, state[i : i + 1, :own], ALL[name].table(own)[cursor][None], noise=lambda i=i: z[i : i + 1]
        )
        assert torch.equal(together[i, :own], alone[0]), (name, cursor)
        assert not together[i, own:].any()


@pytest.mark.parametrize("net", NETS.values(), ids=NETS)
@pytest.mark.parametrize("part", [0, 0.5, 1], ids=["first", "middle", "last"])
def test_a_batch_of_different_rows_is_each_of_them_alone(part, net):
    picks = [(name, round(part * (plan.nfe - 1))) for name, plan in PLANS.items()]
    assert_the_batch_changes_nothing(net, picks, slots=3, seed=5)


@pytest.mark.parametrize("slots", [6, 8])
def test_unused_slots_of_a_wide_machine_change_nothing(slots):
    # With six slots an update has more than eight terms, and a sum in another order would have other bits.
    picks = [("ddpm", 4), ("six-slots", 1), ("ddpm-learned", 2), ("two-slots", 0)]
    assert_the_batch_changes_nothing(NETS["gaussian"], picks, slots, seed=6)


picks_of_all_kinds = st.lists(
    st.sampled_from(sorted(PLANS)).flatmap(
        lambda name: st.tuples(st.just(name), st.integers(0, PLANS[name].nfe - 1)),
    ),
    min_size=1,
    max_size=7,
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(picks=picks_of_all_kinds, net=st.sampled_from(sorted(NETS)), slots=st.integers(3, 4), seed=st.integers(0, 999))
def test_any_mix_in_any_order_is_each_row_alone(picks, net, slots, seed):
    assert_the_batch_changes_nothing(NETS[net], picks, slots, seed)


@pytest.mark.parametrize("name", PLANS)
def test_advance_is_the_equations_of_the_plan(name):
    # Written out for one row in float64, coefficient by coefficient; 1e-12 leaves room for P = 1/α = 157.
    net, plan = NETS["mixture"], PLANS[name]
    slots = randn(1, plan.slots, *SHAPE, dtype=torch.float64)
    for cursor in (0, plan.nfe // 2, plan.nfe - 1):
        step, z = plan.steps[cursor], randn(2, *SHAPE, dtype=torch.float64)
        u = sum(g * s for g, s in zip(step.g, slots, strict=True))
        o, v = net(u[None], torch.tensor([float(step.t)]))[0].split(SHAPE[0])
        x_0 = step.x0[0] * u + step.x0[1] * o
        if step.clip and step.clip.quantile:
            limit = torch.quantile(x_0.abs(), step.clip.quantile).clamp(1, step.clip.limit)
            x_0 = x_0.clamp(-limit, limit) / limit
        elif step.clip:
            x_0 = x_0.clamp(-step.clip.limit, step.clip.limit)
        eps = step.eps[0] * u + step.eps[1] * o + step.eps[2] * x_0
        expected = [
            sum(a * s for a, s in zip(step.A[i], slots, strict=True))
            + step.b[i] * x_0
            + step.c[i] * eps
            + step.s[i] * z
            for i in range(plan.slots)
        ]
        if step.log_var:
            expected[0] = expected[0] + torch.exp((step.log_var[0] + step.log_var[1] * v) / 2) * z
        if step.guard and not expected[step.guard.watch].square().mean() < slots[step.guard.watch].square().mean():
            sources = enumerate(step.guard.instead)
            expected = [expected[i] if source is None else slots[source] for i, source in sources]
        found = machine.advance(net, slots[None], plan.table(plan.slots)[[cursor]], noise=lambda z=z: z[None])[0]
        assert (found - torch.stack(expected)).abs().max() < 1e-12


def test_thresholding_within_its_first_limit_is_a_clamp():
    # With a ceiling of 1, dynamic thresholding is a clamp to [-1, 1].
    x = randn(3, 2, *SHAPE)
    ends = [
        machine.run(GaussianEps(LINEAR, 0.5, 1.5), ddim(LINEAR, 10, clip=clip), x)
        for clip in (Clip(1.0), Clip(1.0, quantile=0.995), Clip(3.0, quantile=0.995))
    ]
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])


def test_the_state_that_goes_in_stays_as_it_was():
    picks = [(name, plan.nfe - 1) for name, plan in PLANS.items()]
    rows, state, z = rows_of(picks, 3), randn(7, len(picks), 3, *SHAPE), randn(8, len(picks), *SHAPE)
    before = (rows.copy(), state.clone(), z.clone())
    machine.advance(NETS["mixture"], state, rows, noise=lambda: z)
    assert np.array_equal(rows, before[0])
    assert torch.equal(state, before[1])
    assert torch.equal(z, before[2])
    x = randn(9, 2, *SHAPE)
    kept = x.clone()
    machine.run(NETS["mixture"], PLANS["ddpm-thresholded"], x, noise=lambda: randn(1, 2, *SHAPE))
    assert torch.equal(x, kept)


@pytest.mark.parametrize(
    ("picks", "calls"),
    [
        ([("ddim", 0), ("ddim-clipped", 3)], 0),
        ([("ddpm", 0)], 1),
        ([("ddpm", 9), ("ddim-eta", 14), ("ddpm-learned", 13)], 0),
        ([("ddim", 0), ("ddpm-learned", 0)], 1),
        ([("ddpm", 1), ("ddim-eta", 2), ("two-slots", 3), ("ddpm-learned", 4)], 1),
    ],
    ids=["deterministic", "ddpm", "last-steps", "one-learned-among-ddim", "all-noisy"],
)
def test_noise_is_drawn_once_and_only_if_a_row_needs_it(picks, calls):
    asked = []

    def noise():
        asked.append(1)
        return randn(1, len(picks), *SHAPE)

    machine.advance(NETS["gaussian"], randn(2, len(picks), 2, *SHAPE), rows_of(picks, 2), noise=noise)
    assert len(asked) == calls


def test_no_noise_is_drawn_for_a_forward_that_failed():
    # Otherwise a tick that is tried again would go on with other noise, and its images would differ.
    def broken(u, t, y):
        raise MemoryError

    with pytest.raises(MemoryError):
        machine.advance(broken, randn(1, 1, 1, *SHAPE), rows_of([("ddpm", 0)], 1), noise=lambda: pytest.fail("drawn"))


def test_the_network_gets_input_time_and_class_of_its_row():
    seen = []

    def net(u, t, y):
        seen.append((u, t, y))
        return torch.zeros_like(u)

    state, y = randn(3, 2, 2, *SHAPE), torch.tensor([4, 2])
    rows = rows_of([("ddim", 3), ("two-slots", 1)], 2)
    machine.advance(net, state, rows, y=y, noise=lambda: torch.zeros(2, *SHAPE))
    ((u, t, labels),) = seen
    assert torch.equal(u[0], state[0, 0])
    g = PLANS["two-slots"].steps[1].g
    assert (u[1] - (g[0] * state[1, 0] + g[1] * state[1, 1])).abs().max() < 1e-6  # float32, values below 4
    assert t.tolist() == [600.0, PLANS["two-slots"].steps[1].t]
    assert labels is y


def test_fractional_times_reach_the_network():
    step = replace(PLANS["ddim"].steps[0], t=123.5)
    seen = []
    machine.advance(lambda u, t, _: seen.append(t) or u, randn(1, 1, 1, *SHAPE), Plan((step,)).table(1))
    assert seen[0].tolist() == [123.5]


def test_a_row_of_nan_changes_no_other():
    picks = [("ddim", 5), ("ddpm", 5), ("ddpm-learned", 5), ("two-slots", 5), ("ddpm-thresholded", 5)]
    state, z = randn(5, len(picks), 2, *SHAPE), randn(6, len(picks), *SHAPE)
    net = NETS["gaussian"]
    healthy = machine.advance(net, state, rows_of(picks, 2), noise=lambda: z)
    state[1] = torch.nan
    found = machine.advance(net, state, rows_of(picks, 2), noise=lambda: z)
    others = [0, 2, 3, 4]
    assert found[1, 0].isnan().all()
    assert torch.equal(found[others], healthy[others])


def test_a_run_is_its_steps_one_after_another():
    plan, x = PLANS["two-slots"], randn(4, 3, *SHAPE)
    zs = [randn(20 + i, 3, *SHAPE) for i in range(plan.nfe)]
    state = torch.stack([x, torch.zeros_like(x)], dim=1)
    for cursor in range(plan.nfe):
        lines = np.repeat(plan.table(2)[[cursor]], 3, axis=0)
        state = machine.advance(NETS["mixture"], state, lines, noise=lambda cursor=cursor: zs[cursor])
    remaining = iter(zs)
    found = machine.run(NETS["mixture"], plan, x, noise=lambda: next(remaining))
    assert torch.equal(found, state[:, 0])


def test_latents_come_from_one_generator_an_image():
    source = seeded_generator(2**64 - 1)
    first, second = draw_noise(source, SHAPE), draw_noise(source, SHAPE)
    assert first.dtype == torch.float32
    # One draw after another, as diffusers draws (1, C, H, W) per image and step.
    theirs = torch.Generator().manual_seed(2**64 - 1)
    assert torch.equal(first, torch.randn(1, *SHAPE, generator=theirs)[0])
    assert torch.equal(second, torch.randn(1, *SHAPE, generator=theirs)[0])


def test_a_sample_depends_on_its_own_seed_alone():
    net, plan = MixtureEps(LINEAR), PLANS["ddpm"]
    together = machine.sample(net, plan, [3, 1, 2], SHAPE)
    for i, seed in enumerate([3, 1, 2]):
        assert torch.equal(together[i], machine.sample(net, plan, [seed], SHAPE)[0])
    assert not torch.equal(together[0], together[1])


def test_every_column_matters():
    # If advance ignored a column, changing it would change nothing.
    at, plan = Columns(2), dense(2, 1, seed=9)
    plan = Plan((replace(plan.steps[0], clip=Clip(0.05), log_var=(-0.5, 0.2)),))
    state, z = randn(1, 1, 2, *SHAPE), randn(2, 1, *SHAPE)
    base = machine.advance(NETS["gaussian"], state, plan.table(2), noise=lambda: z)
    for column in set(range(at.width)) - {at.QUANTILE, at.CEILING, at.WATCH, *at.instead}:
        rows = plan.table(2).copy()
        rows[0, column] = 0.0 if column == at.LEARNED else rows[0, column] * 0.5 + (100 if column == at.T else 0.01)
        assert not torch.equal(machine.advance(NETS["gaussian"], state, rows, noise=lambda: z), base), column


def test_given_slots_are_those_a_plan_starts_from():
    plan = inversion.fixed_point(LINEAR, 10, refinements=2)
    given = randn(5, 2, 1, *SHAPE)
    found = machine.run_slots(NETS["mixture"], plan, given)
    assert found.shape == (2, 5, *SHAPE)
    assert torch.equal(found[:, 0], machine.run(NETS["mixture"], plan, given[:, 0]))
    padded = torch.cat([given, torch.zeros(2, 4, *SHAPE)], dim=1)
    assert torch.equal(machine.run_slots(NETS["mixture"], plan, padded), found)
