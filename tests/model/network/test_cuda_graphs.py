"""Captured forwards, with a recording on the CPU in the place of CUDA's: what it replays is frozen as a graph's is."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from model.network import cuda_graphs
from model.network.cuda_graphs import Arithmetic, GraphedUNet
from model.network.inference import InferenceUNet
from tests.model.network.test_inference import SHAPES, network, rows


def record(run, pool):
    """Traces the operations once, constants and all; only what memory holds can differ from one replay to the next."""

    def without_arguments():  # make_fx would trace those of a partial
        return run()

    trace = make_fx(without_arguments)()
    output = run().clone().fill_(float("nan"))

    def replay() -> None:
        output.copy_(trace())

    return output, replay


@pytest.fixture(autouse=True)
def _recording(monkeypatch):
    monkeypatch.setattr(cuda_graphs, "capture_graph", record)
    monkeypatch.setattr(cuda_graphs, "memory_pool", object)


@pytest.mark.parametrize("shape", SHAPES)
@torch.inference_mode()
def test_a_replayed_forward_has_the_bits_of_a_launched_one(shape):
    net = network(**SHAPES[shape])
    fast = InferenceUNet(net, 1000)
    graphed = GraphedUNet(fast, Arithmetic())
    graphed.capture([5])
    for seed in range(2):
        x, t, y = rows(net)
        x = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
        t = (t + seed) % 1000
        assert torch.equal(graphed(x, t, y), fast(x, t, y))


@torch.inference_mode()
def test_a_graph_takes_conditioning_that_is_not_in_the_table():
    net = network(num_class_embeds=4)
    fast = InferenceUNet(net, 1000)
    graphed = GraphedUNet(fast, Arithmetic())
    graphed.capture([5])
    x, _, _ = rows(net)
    t, y = torch.tensor([0.5, 3, 999, 500.25, 7]), torch.rand(5, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(graphed(x, t, y), fast(x, t, y))


@torch.inference_mode()
def test_each_width_has_its_graph_and_what_has_none_is_launched():
    net = network()
    graphed = GraphedUNet(InferenceUNet(net, 1000), Arithmetic())
    graphed.capture([1, 2])
    graphed.capture([2])
    assert graphed.widths == {1, 2}
    x, t, y = rows(net)
    for width in (1, 2, 5):
        assert torch.equal(graphed(x[:width], t[:width], y), graphed.net(x[:width], t[:width], y))
    assert graphed.widths == {1, 2}


@torch.inference_mode()
def test_outputs_of_a_call_can_be_kept_those_of_a_forward_cannot():
    """The contract that spares a copy: the next forward of the same width writes into the same memory."""
    net = network()
    graphed = GraphedUNet(InferenceUNet(net, 1000), Arithmetic())
    graphed.capture([5])
    x, t, y = rows(net)
    kept, lent = graphed(x, t, y), graphed.forward(x, graphed.conditioning(t, y))
    assert torch.equal(kept, lent)
    before = kept.clone()
    graphed(2 * x, t, y)
    assert torch.equal(kept, before)
    assert not torch.equal(lent, before)


def test_arithmetic_is_applied_in_its_context():
    cudnn = torch.backends.cudnn

    def now():
        newer = cudnn.conv.fp32_precision == "tf32", torch.backends.cuda.matmul.fp32_precision == "tf32"
        return (cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32, torch.get_float32_matmul_precision(), *newer)

    before = now()
    with Arithmetic(tf32=True, benchmark=True).apply():
        assert now() == (True, False, True, "high", True, True)
    assert now() == before
    with contextlib.suppress(ZeroDivisionError), Arithmetic().apply():
        assert now() == (False, True, False, "highest", False, False)
        raise ZeroDivisionError
    assert now() == before
