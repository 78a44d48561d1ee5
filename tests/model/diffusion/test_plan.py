import json
import math
from dataclasses import replace

import numpy as np
import pytest

from model.diffusion import inversion
from model.diffusion.plan import Clip, Columns, Guard, Plan, Step, conversion
from model.diffusion.samplers import SAMPLERS, ddim, ddpm, dpmpp_2m, unipc
from model.diffusion.schedule import NoiseSchedule
from tests import golden

LINEAR = NoiseSchedule.from_config({})
STEP = Step(t=5, x0=(2.0, -1.0), eps=(0.0, 1.0, 0.0), A=((0.5,),), b=(0.25,), c=(0.125,), s=(0.0,))
PAIR = Step(
    t=7.5,
    x0=(3.0, -2.0),
    eps=(0.1, 0.2, 0.3),
    g=(0.4, 0.6),
    A=((1.0, 2.0), (3.0, 4.0)),
    b=(5.0, 6.0),
    c=(7.0, 8.0),
    s=(9.0, 10.0),
    clip=Clip(1.5),
    log_var=(-1.0, 0.5),
    guard=Guard(watch=1, instead=(None, 0)),
)


def test_an_empty_plan_is_refused():
    with pytest.raises(ValueError, match="at least one step"):
        Plan(())


@pytest.mark.parametrize(
    "wrong",
    [
        replace(PAIR, g=(1.0,)),
        replace(PAIR, b=(1.0,)),
        replace(PAIR, c=(1.0, 2.0, 3.0)),
        replace(PAIR, s=()),
        replace(PAIR, A=((1.0, 2.0),)),
        replace(PAIR, A=((1.0, 2.0), (3.0,))),
        replace(PAIR, guard=Guard(watch=0, instead=(1,))),
    ],
    ids=["g", "b", "c", "s", "A-rows", "A-columns", "guard"],
)
def test_steps_must_agree_on_the_slots(wrong):
    with pytest.raises(ValueError, match=r"^step 1 has .* slots, the plan has 2$"):
        Plan((PAIR, wrong))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "field",
    ["t", "x0", "eps", "A", "b", "c", "s", "g", "log_var"],
)
def test_coefficients_must_be_finite(field, bad):
    value = {"t": bad, "x0": (1.0, bad), "eps": (0.0, bad, 0.0), "A": ((bad,),), "log_var": (0.0, bad)}.get(
        field, (bad,)
    )
    with pytest.raises(ValueError, match="must be finite"):
        Plan((STEP, replace(STEP, **{field: value})))


def test_a_table_holds_every_letter_where_columns_says():
    plan = Plan((PAIR,))
    at = Columns(2)
    (row,) = plan.table(2)
    assert row[[at.T, at.P, at.Q, at.E_U, at.E_O, at.E_X]].tolist() == [7.5, 3.0, -2.0, 0.1, 0.2, 0.3]
    assert row[[at.LIMIT, at.QUANTILE, at.LEARNED, at.L0, at.L1]].tolist() == [1.5, 0.0, 1.0, -1.0, 0.5]
    assert row[at.g].tolist() == [0.4, 0.6]
    assert row[at.b].tolist() == [5.0, 6.0]
    assert row[at.c].tolist() == [7.0, 8.0]
    assert row[at.s].tolist() == [9.0, 10.0]
    assert [row[columns].tolist() for columns in at.A] == [[1.0, 2.0], [3.0, 4.0]]
    assert row[at.WATCH] == 2  # slots are counted from 1 there
    assert row[at.instead].tolist() == [0, 1]
    assert row.dtype == np.float64


def test_without_a_guard_no_slot_is_named():
    at = Columns(2)
    (row,) = Plan((replace(PAIR, guard=None),)).table(2)
    assert row[[at.WATCH, *at.instead]].tolist() == [0, 0, 0]


def test_each_number_of_a_row_has_a_column_of_its_own():
    for slots in (1, 2, 6):
        at = Columns(slots)
        used = [*range(13), *at.g, *at.b, *at.c, *at.s, *at.instead, *(c for columns in at.A for c in columns)]
        assert sorted(used) == list(range(at.width))


@pytest.mark.parametrize(
    ("clip", "limit", "quantile", "ceiling"),
    [(None, math.inf, 0, 0), (Clip(0.5), 0.5, 0, 0), (Clip(3.0, quantile=0.9), math.inf, 0.9, 3.0)],
    ids=["none", "clamp", "threshold"],
)
def test_what_is_done_to_x_0(clip, limit, quantile, ceiling):
    at = Columns(1)
    (row,) = Plan((replace(STEP, clip=clip),)).table(1)
    assert row[[at.LIMIT, at.QUANTILE, at.CEILING]].tolist() == [limit, quantile, ceiling]


def test_more_slots_change_no_coefficient():
    plan, own, padded = Plan((PAIR,)), Columns(2), Columns(5)
    (narrow,), (wide,) = plan.table(2), plan.table(5)
    assert wide[:13].tolist() == narrow[:13].tolist()
    for letter in ("g", "b", "c", "s", "instead"):
        assert wide[getattr(padded, letter)].tolist() == [*narrow[getattr(own, letter)], 0, 0, 0]
    matrix = np.array([wide[columns] for columns in padded.A])
    assert matrix[:2, :2].tolist() == [[1.0, 2.0], [3.0, 4.0]]
    assert np.abs(matrix).sum() == 10  # and nothing elsewhere


def test_cost_and_noise():
    assert [ddim(LINEAR, n, spacing="trailing").nfe for n in (1, 7, 50)] == [1, 7, 50]
    assert not ddim(LINEAR, 10).stochastic
    assert ddim(LINEAR, 10, eta=0.1).stochastic
    assert ddpm(LINEAR, 10).stochastic
    assert ddpm(LINEAR, 10, variance="learned_range").stochastic
    assert not ddpm(LINEAR, 1).stochastic  # the only step ends at the clean image
    assert [step.noisy for step in ddpm(LINEAR, 10).steps] == [True] * 9 + [False]


def test_the_digest_names_the_plan():
    plan = ddim(LINEAR, 10)
    assert plan.digest == ddim(LINEAR, 10).digest
    assert plan.digest == Plan(plan.steps).digest
    assert len(plan.digest) == 12
    assert int(plan.digest, 16) >= 0
    plan.table(6)
    assert plan.digest == Plan(plan.steps).digest  # a padded table is the same plan


def unguarded(plan):
    return Plan(tuple(replace(step, guard=None) for step in plan.steps))


def test_different_plans_have_different_digests():
    cosine = NoiseSchedule.from_config({"beta_schedule": "squaredcos_cap_v2"})
    velocity = NoiseSchedule.from_config({"prediction_type": "v_prediction"})
    others = [
        ddim(LINEAR, 10),
        ddim(LINEAR, 11),
        ddim(LINEAR, 10, spacing="trailing"),
        ddim(LINEAR, 10, eta=0.5),
        ddim(LINEAR, 10, clip=Clip(1.0)),
        ddim(LINEAR, 10, clip=Clip(2.0)),
        ddim(LINEAR, 10, clip=Clip(1.0, quantile=0.995)),
        ddim(LINEAR, 10, clip=Clip(1.0), rederive=True),
        ddim(cosine, 10),
        ddim(velocity, 10),
        ddpm(LINEAR, 10),
        ddpm(LINEAR, 10, variance="fixed_large"),
        ddpm(LINEAR, 10, variance="learned_range"),
        Plan(ddim(LINEAR, 10).steps[1:]),
        Plan(ddim(LINEAR, 10).steps[::-1]),
        Plan(ddim(LINEAR, 10).steps[:-1]),
        Plan((*ddim(LINEAR, 10).steps[:-1], ddim(LINEAR, 10, clip=Clip(1.0)).steps[-1])),
        *(sampler.compile(LINEAR, 10, spacing="trailing") for sampler in SAMPLERS.values()),
        *(dpmpp_2m(LINEAR, 10, order=order) for order in (1, 2, 3)),
        unipc(LINEAR, 10, order=1),
        unipc(LINEAR, 10, spacing="karras"),
        inversion.ddim(LINEAR, 10),
        inversion.ddim(LINEAR, 10, time="source"),
        *(inversion.fixed_point(LINEAR, 10, refinements=k) for k in (1, 2, 3)),
        unguarded(inversion.fixed_point(LINEAR, 10, refinements=2)),
        inversion.obelm(LINEAR, 10),
    ]
    others = [plan for i, plan in enumerate(others) if plan not in others[:i]]  # ddim, trailing is there twice
    assert len(others) > 30
    assert len({plan.digest for plan in others}) == len(others)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_conversion_recovers_image_and_noise(prediction):
    alpha, sigma, image, noise = 0.6, 0.8, 0.3, -1.1
    u = alpha * image + sigma * noise
    o = {"epsilon": noise, "v_prediction": alpha * noise - sigma * image, "sample": image}[prediction]
    (P, Q), (e_u, e_o, e_x) = conversion(prediction, alpha, sigma)
    x_0 = P * u + Q * o
    assert abs(x_0 - image) < 1e-15  # a few roundings of numbers below 2
    assert abs(e_u * u + e_o * o + e_x * x_0 - noise) < 1e-15


def _numbers(value):
    """The leaves of a JSON document, with the path to each."""
    if isinstance(value, dict):
        return [(f"{k}.{path}", leaf) for k, v in value.items() for path, leaf in _numbers(v)]
    if isinstance(value, list):
        return [(f"{i}.{path}", leaf) for i, v in enumerate(value) for path, leaf in _numbers(v)]
    return [("", value)]


@pytest.mark.parametrize("name", golden.plans())
def test_plans_are_the_golden_ones(name):
    written = json.loads(golden.PLANS.read_text())
    assert written.keys() == golden.plans().keys()
    expected, found = _numbers(written[name]), _numbers(golden.readable(golden.plans()[name]))
    assert [path for path, _ in found] == [path for path, _ in expected]
    for (path, was), (_, now) in zip(expected, found, strict=True):
        if isinstance(was, float | int):
            # Not exact: log and pow differ in their last digit between C libraries, and 1 - ᾱ, about 1e-4 near the
            # image, turns 1e-16 of that into 1e-12.
            assert abs(now - was) <= max(1e-12 * abs(was), 1e-15), f"{path} was {was}, is {now}; `make golden` accepts"
        else:
            assert now == was, path
