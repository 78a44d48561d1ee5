"""Classes as weights of their embeddings."""

from __future__ import annotations

import pytest
import torch

from model.checkpoint import load
from tests.plans import guide


@pytest.fixture(scope="module")
def net(tiny):
    return load(tiny).net


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, 1, 8, 8, generator=generator), torch.tensor([0.0, 250.0, 600.0, 999.0])


@torch.inference_mode()
def test_all_the_weight_on_one_class_has_the_bits_of_that_class(net, inputs):
    y = torch.tensor([2, 0, 3, 1])
    one_hot = torch.nn.functional.one_hot(y, net.config.num_class_embeds).float()
    assert torch.equal(net(*inputs, y), net(*inputs, one_hot))


@torch.inference_mode()
def test_half_and_half_is_the_mean_of_two_embeddings(net, inputs):
    weights = torch.zeros(4, net.config.num_class_embeds)
    weights[:, 0] = weights[:, 2] = 0.5
    mixed = net(*inputs, weights)
    table = net.class_embedding.weight
    original = table[1].clone()
    table[1] = (table[0] + table[2]) / 2
    expected = net(*inputs, torch.full((4,), 1))
    table[1] = original
    assert (mixed - expected).abs().max() < 1e-5  # the same sum in float32, rounded in another order
    assert (mixed - net(*inputs, torch.full((4,), 0))).abs().max() > 1e-3


@torch.inference_mode()
def test_guidance_takes_weights_as_it_takes_classes(net, inputs):
    y = torch.tensor([2, 0, 1, 1])
    one_hot = torch.nn.functional.one_hot(y, net.config.num_class_embeds).float()
    scale, null = [1.0, 2.0, 3.5, 1.0], 3
    by_class, by_weights = guide(net, scale, null), guide(net, scale, torch.eye(net.config.num_class_embeds)[null])
    assert torch.equal(by_class(*inputs, y), by_weights(*inputs, one_hot))
