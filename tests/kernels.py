"""Where kernels are tested, and what their tests share: on a card where there is one, else in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

import model.network.kernels

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
if not model.network.kernels.usable(DEVICE):
    pytest.skip("neither a card that Triton knows nor its interpreter", allow_module_level=True)


def long(*values):
    """Parameters that take seconds in the interpreter."""
    return pytest.param(*values, marks=[] if CUDA else pytest.mark.slow)


def randn(seed, *shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def images(seed, *shape, dtype=torch.float32):
    return randn(seed, *shape, dtype=dtype).to(memory_format=torch.channels_last)


def assert_batch_invariant(call, batch):
    """A row of ``call(indices)`` has the same bits alone, among all, among others, and at another index."""
    everyone = call(list(range(batch)))
    backwards = call(list(range(batch))[::-1])
    pair = call([batch - 1, 0])
    for i in range(batch):
        (alone,) = call([i])
        assert torch.equal(alone, everyone[i])
        assert torch.equal(alone, backwards[batch - 1 - i])
    assert torch.equal(pair[0], everyone[-1])
    assert torch.equal(pair[1], everyone[0])


def pick(x, indices):
    return x[indices].contiguous(memory_format=torch.channels_last)
