"""The runner on a pretended CUDA device: nothing waits, nothing is mixed, results are the same."""

from __future__ import annotations

import copy
from collections import deque

import pytest
import torch
from torch.utils._pytree import tree_map

from app.engine.networks import Networks
from app.engine.runner import Runner
from model.checkpoint import Checkpoint
from model.device import to_device
from model.diffusion.noise import draw_noise, seeded_generator
from model.network import cuda_graphs as graphs
from model.network.cuda_graphs import Arithmetic, GraphedUNet
from model.network.inference import InferenceUNet
from tests.app.engine.test_engine_plans import mixed_requests
from tests.pretend_card import DEVICE, Card, Objection, OnCard, inside

pytest.importorskip("triton")

from model.diffusion import machine_triton as rows

WIDTH = 8


@pytest.fixture
def card(monkeypatch):
    def capture(run, pool):
        """Run again, into the same memory: see tests/model/network/test_cuda_graphs.py."""
        said = run().clone()
        return said, lambda: said.copy_(run())

    monkeypatch.setattr(graphs, "capture_graph", capture)
    monkeypatch.setattr(graphs, "memory_pool", object)
    return Card(monkeypatch)


class Waves:
    """A network whose operations have the same bits in any order, so that only the runner can change them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def conditioning(self, t, y=None):
        assert len(t) == len(y) == WIDTH
        y = y.argmax(1) if y.is_floating_point() else y
        return to_device(torch.stack([t / 1000, y.float()], dim=1), self.device)

    def forward(self, x, conditioning):
        assert x.device.type == conditioning.device.type == self.device.type
        t, y = conditioning[:, 0, None, None, None], conditioning[:, 1, None, None, None]
        return (x + y).sin() * t + 0.5 * x


class Interpreted:
    """The row machine's kernels, which the pretended card cannot launch by itself."""

    @staticmethod
    def predict(*tensors):
        return tree_map(OnCard, rows.predict(*tree_map(inside, tensors)))

    @staticmethod
    def update(*tensors):
        return tree_map(OnCard, rows.update(*tree_map(inside, tensors)))

    @staticmethod
    def guard(*tensors):
        rows.guard(*tree_map(inside, tensors))


def runner_of(ckpt: Checkpoint, device: torch.device, kernels=None) -> Runner:
    net = Waves(device)
    return Runner(ckpt, device, Networks(net, net, kernels))


def advance_all(runner: Runner, lanes: list) -> None:
    """In forwards of one width, as many ticks ahead as the runner allows."""
    pending = deque()
    waiting = list(lanes)
    while waiting:
        batch, taken = [], 0
        for lane in waiting:
            if taken + lane.rows <= WIDTH:
                batch.append(lane)
                taken += lane.rows
        pending.append(runner.advance(batch, WIDTH, exact=True))
        waiting = [lane for lane in waiting if lane.remaining]
        while len(pending) > runner.ahead:
            assert pending.popleft().wait() >= 0
    while pending:
        pending.popleft().wait()


@pytest.mark.parametrize("kernels", [None, Interpreted], ids=["operations", "kernels"])
def test_results_are_those_of_the_cpu_and_nothing_waits(tiny_ckpt, card, kernels):
    # Kernels are slow to interpret: one image of each request, and plans of at most 14 steps, which are of all kinds.
    images, steps = (1, 14) if kernels else (3, 1000)
    mine, theirs = (
        [lane for lanes in mixed_requests(tiny_ckpt) for lane in lanes[:images] if lane.plan.nfe <= steps]
        for _ in range(2)
    )
    for lane in (*mine, *theirs):
        lane.snapshot_steps, lane.snapshot_kind = frozenset({0, 2}), "x_t" if lane.seed % 2 else "x_0"
        if lane.seed % 5 == 0:
            lane.label = (0.25, 0.5, 0.25, 0.0)
        if lane.seed % 7 == 0:
            lane.initial_state = draw_noise(seeded_generator(lane.seed), tiny_ckpt.shape)[None] / 2
    on_cpu = runner_of(tiny_ckpt, torch.device("cpu"))
    with card:
        runner = runner_of(tiny_ckpt, DEVICE, kernels)
        assert runner.ahead == 1
        advance_all(runner, mine)
        outputs = [runner.read_output(lane) for lane in mine]
    advance_all(on_cpu, theirs)
    assert len(outputs) >= 16
    for lane, other, output in zip(mine, theirs, outputs, strict=True):
        assert not isinstance(output, OnCard)
        assert torch.equal(output, on_cpu.read_output(other))
        assert lane.snapshots.keys() == other.snapshots.keys() == {0, 2}
        assert all(torch.equal(lane.snapshots[step], other.snapshots[step]) for step in lane.snapshots)


def test_an_output_that_is_read_too_early_is_noticed(tiny_ckpt, card):
    """The negative control: were pending ticks not waited for, the test above would fail."""
    lane = mixed_requests(tiny_ckpt)[0][0]
    with card:
        runner = runner_of(tiny_ckpt, DEVICE)
        while lane.remaining:
            pending = runner.advance([lane], WIDTH, exact=True)
        assert lane.state.isnan().all()
        pending.wait()
        assert runner.read_output(lane).isfinite().all()


@torch.inference_mode()
def test_a_network_whose_conditioning_is_computed_beforehand(tiny_ckpt, card):
    """Looked up and computed conditioning, replayed and launched; attention sums in another order there."""
    x = torch.randn(4, *tiny_ckpt.shape, generator=torch.Generator().manual_seed(0))
    t, y = torch.tensor([0.0, 500.5, 999, 3]), torch.eye(4)[[0, 1, 2, 3]]
    y[3] = torch.tensor([0.25, 0.25, 0.5, 0])
    said = tiny_ckpt.net(x, t, y)
    with card:
        net = GraphedUNet(InferenceUNet(card.holds(copy.deepcopy(tiny_ckpt.net)), 1000), Arithmetic())
        net.capture([4])
        for width in (4, 2):
            found = net(to_device(x[:width], DEVICE), t[:width], y[:width])
            assert isinstance(found, OnCard)
            assert (found.x - said[:width]).abs().max() < 1e-5


@pytest.mark.parametrize(
    "waits",
    [
        lambda x: x.sum().item(),
        lambda x: x.cpu(),
        lambda x: bool((x > 0).all()),
        lambda x: x.nonzero(),
        lambda x: x + torch.ones(3),
        lambda x: x[torch.tensor([0, 1])],
        lambda x: torch.ones(3).to(DEVICE),
        lambda x: torch.ones(3).to(DEVICE, non_blocking=True),
        lambda x: torch.empty(3).copy_(x, non_blocking=True),
        lambda x: x.copy_(torch.ones(3)),
    ],
)
def test_a_pretended_card_objects_to_what_a_real_one_would_wait_for(card, waits):
    with card:
        x = to_device(torch.zeros(3), DEVICE)
        assert x.device == DEVICE
        assert isinstance(x + 1, OnCard)
        with pytest.raises(Objection):
            waits(x)
