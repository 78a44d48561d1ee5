"""What the runner does on a CUDA device, on a pretended one: nothing waits, nothing is mixed, walks are the same."""

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
from tests.app.engine.test_engine_plans import unlike_requests
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
    """A form whose operations have the same bits in any order: what is left is what the runner makes of it."""

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


def runner_of(ckpt: Checkpoint, device: torch.device, updates=None) -> Runner:
    form = Waves(device)
    return Runner(ckpt, device, Networks(form, form, updates))


def walked(runner: Runner, lanes: list) -> None:
    """In forwards of one width, as many ticks ahead as the runner allows."""
    pending_ticks = deque()
    waiting = list(lanes)
    while waiting:
        batch, taken = [], 0
        for lane in waiting:
            if taken + lane.rows <= WIDTH:
                batch.append(lane)
                taken += lane.rows
        pending_ticks.append(runner.advance(batch, WIDTH, exact=True))
        waiting = [lane for lane in waiting if lane.remaining]
        while len(pending_ticks) > runner.ahead:
            assert pending_ticks.popleft().wait() >= 0
    while pending_ticks:
        pending_ticks.popleft().wait()


@pytest.mark.parametrize("updates", [None, Interpreted], ids=["operations", "kernels"])
def test_unlike_walks_come_out_as_on_the_cpu_and_nobody_waits(tiny_ckpt, card, updates):
    most = 1 if updates else 3  # images of each request: kernels are slow to interpret
    mine, theirs = ([lane for lanes in unlike_requests(tiny_ckpt) for lane in lanes[:most]] for _ in range(2))
    for lane in (*mine, *theirs):
        lane.snapshot_steps, lane.snapshot_kind = frozenset({0, 2}), "x_t" if lane.seed % 2 else "x_0"
        if lane.seed % 5 == 0:
            lane.label = (0.25, 0.5, 0.25, 0.0)
        if lane.seed % 7 == 0:
            lane.initial_state = draw_noise(seeded_generator(lane.seed), tiny_ckpt.shape)[None] / 2
    on_cpu = runner_of(tiny_ckpt, torch.device("cpu"))
    with card:
        runner = runner_of(tiny_ckpt, DEVICE, updates)
        assert runner.ahead == 1
        walked(runner, mine)
        ends = [runner.read_output(lane) for lane in mine]
    walked(on_cpu, theirs)
    assert len(ends) >= 20
    for lane, other, end in zip(mine, theirs, ends, strict=True):
        assert not isinstance(end, OnCard)
        assert torch.equal(end, on_cpu.read_output(other))
        assert lane.snapshots.keys() == other.snapshots.keys() == {0, 2}
        assert all(torch.equal(lane.snapshots[step], other.snapshots[step]) for step in lane.snapshots)


def test_an_end_that_is_read_too_early_is_noticed(tiny_ckpt, card):
    """The control: were pending_ticks not waited for, the test above would fail."""
    lane = unlike_requests(tiny_ckpt)[0][0]
    with card:
        runner = runner_of(tiny_ckpt, DEVICE)
        while lane.remaining:
            pending = runner.advance([lane], WIDTH, exact=True)
        assert lane.state.isnan().all()
        pending.wait()
        assert runner.read_output(lane).isfinite().all()


@torch.inference_mode()
def test_a_network_of_which_all_can_be_told_beforehand(tiny_ckpt, card):
    """Table and computed rows, replayed and launched; attention is taken apart there: sums in another order."""
    x = torch.randn(4, *tiny_ckpt.shape, generator=torch.Generator().manual_seed(0))
    t, y = torch.tensor([0.0, 500.5, 999, 3]), torch.eye(4)[[0, 1, 2, 3]]
    y[3] = torch.tensor([0.25, 0.25, 0.5, 0])
    said = tiny_ckpt.net(x, t, y)
    with card:
        form = GraphedUNet(InferenceUNet(card.holds(copy.deepcopy(tiny_ckpt.net)), 1000), Arithmetic())
        form.capture([4])
        for width in (4, 2):
            found = form(to_device(x[:width], DEVICE), t[:width], y[:width])
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
