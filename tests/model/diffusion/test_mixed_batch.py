"""Rows of every sampler, of every inversion and at any step share one forward, and none changes."""

from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch

from model.diffusion import inversion, machine
from model.diffusion.noise import draw_noise, seeded_generator
from model.diffusion.plan import Clip, Plan
from model.diffusion.samplers import SAMPLERS, ddpm, dpmpp_2m, obelm
from tests.fakes import GaussianEps, MixtureEps, WithVariance
from tests.plans import LINEAR, VARIANTS

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
        self.source = seeded_generator(self.seed)

    def noise(self):
        return draw_noise(self.source, SHAPE)


def batch():
    """A row of every sampler and of every inversion, of different lengths, arriving one after another."""
    plans = {
        **{
            name: compile_(LINEAR, 4 + 3 * i % 8, spacing="trailing")
            for i, (name, compile_) in enumerate(VARIANTS.items())
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
        given = torch.randn(2 if name == "paired" else 1, *SHAPE, generator=seeded_generator(1000 + i))
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
    together = serve(net, batch())
    assert max(row.plan.slots for row in batch().values()) == 6
    for name, row in batch().items():
        alone = machine.run_slots(net, row.plan, row.slots[None], noise=lambda row=row: row.noise()[None])[0]
        assert alone.isfinite().all(), name
        assert torch.equal(together[name], alone), name


@pytest.mark.parametrize("perturbed", ["dpmpp_2m", "unipc", "pndm-warmup", "inverse fixed point, guarded"])
def test_another_plan_changes_no_other_row(perturbed):
    rows, before = batch(), serve(NETS["mixture"], batch())
    first, *others = rows[perturbed].plan.steps
    rows[perturbed].plan = Plan((replace(first, A=tuple((a[0] + 0.01, *a[1:]) for a in first.A)), *others))
    after = serve(NETS["mixture"], rows)
    assert {name for name in rows if not torch.equal(before[name], after[name])} == {perturbed}
