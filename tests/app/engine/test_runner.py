"""The runner by itself: which network, classes and slots a step reads, and what it leaves."""

from __future__ import annotations

import pytest
import torch

from app.engine.jobs import Lane
from app.engine.networks import Networks
from app.engine.runner import OutOfMemoryError, Runner
from model.diffusion import inversion, machine, samplers
from model.diffusion.noise import draw_noise, seeded_generator
from tests.conftest import FOLDED
from tests.engines import SCHEDULE, plan

CPU = torch.device("cpu")


class Bend:
    """ε = sin(slope · u): the same bits in any batch, whatever the timestep and the class."""

    def __init__(self, slope: float = 1.0) -> None:
        self.slope = slope
        self.forwards = 0

    def conditioning(self, t, y=None):
        return t

    def forward(self, x, conditioning):
        self.forwards += 1
        assert len(conditioning) == len(x)
        return torch.sin(self.slope * x)

    def __call__(self, u, t=None, y=None):
        return torch.sin(self.slope * u)


def noise(seed: int, shape) -> torch.Tensor:
    return draw_noise(seeded_generator(seed), shape)


def finish(runner: Runner, lanes: list[Lane], width: int) -> list[torch.Tensor]:
    while any(lane.remaining for lane in lanes):
        runner.advance([lane for lane in lanes if lane.remaining], width).wait()
    return [runner.read_output(lane) for lane in lanes]


def test_exact_forwards_are_those_of_the_exact_network(tiny_ckpt):
    fast, exact = Bend(), Bend(2.0)
    runner, lane = Runner(tiny_ckpt, CPU, Networks(fast, exact)), Lane(plan(), 1, 0)
    runner.advance([lane], 1)
    assert (fast.forwards, exact.forwards) == (1, 0)
    runner.advance([lane], 1, exact=True)
    assert (fast.forwards, exact.forwards) == (1, 1)


def test_the_host_waits_for_each_tick_where_it_computes_them_itself(tiny_ckpt):
    assert Runner(tiny_ckpt, CPU).ahead == 0  # on a card 1: see test_pretend_card.py


def test_the_update_is_computed_by_the_kernels_that_are_given(tiny_ckpt):
    class Kernels:
        @staticmethod
        def update(state, u, output, z, coef, x_0=None):
            return state + 1, u

    net = Bend()
    lane = Lane(plan(), 1, 0)
    Runner(tiny_ckpt, CPU, Networks(net, net, Kernels)).advance([lane], 2)
    assert torch.equal(lane.state, noise(1, tiny_ckpt.shape)[None] + 1)


@pytest.mark.parametrize("slots", [None, 1, 2])
def test_the_output_is_the_first_slots_of_the_final_state(tiny_ckpt, slots):
    plans = [
        samplers.dpmpp_2m(SCHEDULE, 4, order=3, spacing="trailing"),
        samplers.obelm(SCHEDULE, 3, spacing="trailing"),
    ]
    kept = {} if slots is None else {"output_slots": slots}
    lanes = [Lane(each, seed, 0, **kept) for seed, each in enumerate(plans)]
    net = Bend()
    outputs = finish(Runner(tiny_ckpt, CPU, Networks(net, net)), lanes, width=4)
    for seed, (each, output) in enumerate(zip(plans, outputs, strict=True)):
        final = machine.run_slots(net, each, noise(seed, tiny_ckpt.shape)[None, None])[0]
        assert torch.equal(output, final[: slots or 1])


def test_a_trajectory_starts_from_the_states_that_it_is_given(tiny_ckpt):
    """One state or two; the noise of later steps is what it is without them."""
    pair = torch.stack([noise(7, tiny_ckpt.shape), noise(8, tiny_ckpt.shape)])
    paired, stochastic = samplers.obelm(SCHEDULE, 4, spacing="trailing", paired=True), samplers.ddpm(SCHEDULE, 10)
    net = Bend()
    lanes = [Lane(paired, 1, 0, initial_state=pair), Lane(stochastic, 2, 0, initial_state=pair[:1])]
    found = finish(Runner(tiny_ckpt, CPU, Networks(net, net)), lanes, width=2)
    assert torch.equal(found[0][0], machine.run_slots(net, paired, pair[None])[0, 0])
    source = seeded_generator(2)
    draw_noise(source, tiny_ckpt.shape)  # x_T
    draw = lambda: draw_noise(source, tiny_ckpt.shape)[None]  # noqa: E731
    assert torch.equal(found[1], machine.run(net, stochastic, pair[:1], noise=draw))


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_a_class_is_the_same_beside_lanes_that_mix_classes(tiny_ckpt, guidance):
    """Weights that are 1 for one class are that class, and a class is itself where other rows have weights."""
    one_hot, mixed = (0.0, 1.0, 0.0, 0.0), (0.25, 0.5, 0.25, 0.0)
    lanes = [Lane(plan(4), 3, label, guidance=guidance) for label in (1, one_hot, mixed)]
    [alone] = finish(Runner(tiny_ckpt, CPU), [Lane(plan(4), 3, 1, guidance=guidance)], width=2)
    chosen, weighted, blended = finish(Runner(tiny_ckpt, CPU), lanes, width=6)
    size = float(alone.abs().max())
    assert (chosen - alone).abs().max() < FOLDED * size
    assert (weighted - alone).abs().max() < FOLDED * size
    assert (blended - alone).abs().max() > 100 * FOLDED * size


def test_snapshots_are_the_state_before_a_step_or_its_prediction(tiny_ckpt):
    steps = frozenset({0, 3})
    two_slots = samplers.dpmpp_2m(SCHEDULE, 4, spacing="trailing")
    net = Bend()
    before, predicted = (Lane(two_slots, 5, 0, snapshot_steps=steps, snapshot_kind=kind) for kind in ("x_t", "x_0"))
    [_, output] = finish(Runner(tiny_ckpt, CPU, Networks(net, net)), [before, predicted], width=2)
    assert before.snapshots.keys() == predicted.snapshots.keys() == steps
    assert torch.equal(before.snapshots[0], noise(5, tiny_ckpt.shape))
    assert torch.equal(predicted.snapshots[3], output[0])  # the last step ends at its prediction
    # A step before that the prediction is S_1, as the step leaves it.
    runner, again = Runner(tiny_ckpt, CPU, Networks(net, net)), Lane(two_slots, 5, 0)
    runner.advance([again], 2)
    assert torch.equal(predicted.snapshots[0], again.state[1])


def test_a_forward_without_room_leaves_the_lanes_as_they_were(tiny_ckpt):
    class Full(Bend):
        def forward(self, x, conditioning):
            raise torch.OutOfMemoryError("no room")

    net = Full()
    lane = Lane(plan(), 1, 0)
    with pytest.raises(OutOfMemoryError, match="a forward of 4 rows does not fit: no room"):
        Runner(tiny_ckpt, CPU, Networks(net, net)).advance([lane], 4)
    assert lane.cursor == 0
    assert torch.equal(lane.state, noise(1, tiny_ckpt.shape)[None])


def test_an_inversion_ends_with_all_the_slots_that_its_residual_needs(tiny_ckpt):
    ascent = inversion.fixed_point(SCHEDULE, 3, refinements=2, spacing="trailing")
    image = noise(1, tiny_ckpt.shape)[None] / 4
    net = Bend(0.1)
    lane = Lane(ascent, 0, 0, initial_state=image, output_slots=ascent.slots)
    [slots] = finish(Runner(tiny_ckpt, CPU, Networks(net, net)), [lane], width=1)
    assert torch.equal(slots, machine.run_slots(net, ascent, image[None])[0])
