"""What tests of training share: a recipe of milliseconds, its images, and when two runs are the same."""

from __future__ import annotations

import numpy as np
import torch

from model.data import Dataset
from model.training.recipe import Recipe

CPU = torch.device("cpu")
TINY = Recipe(
    size=8,
    channels=(8, 8),
    attention=(4,),
    head_dim=4,
    groups=4,
    batch=4,
    warmup=2,
    steps=7,
    dropout=0.1,
    flip=True,
    precision="fp32",
)


def shades(n, classes=("dark", "light")):
    """n images, each of one grey level that tells which it is; lopsided, so that a mirrored one shows."""
    images = np.zeros((n, 8, 8, 1), np.uint8)
    images[:, :, :4] = np.arange(10, 10 + n, dtype=np.uint8)[:, None, None, None]
    return Dataset(images, np.arange(n) % len(classes) if classes else None, classes)


def assert_equal_states(a, b):
    """Weights, averages and moments of two runs, bit for bit."""
    for key in ("net", "ema"):
        states = getattr(a, key).state_dict(), getattr(b, key).state_dict()
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0]), key
    moments = a.optimizer.state_dict()["state"], b.optimizer.state_dict()["state"]
    for name in moments[0]:
        for moment in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(moments[0][name][moment], moments[1][name][moment])
    assert (a.step, a.loss) == (b.step, b.loss)
