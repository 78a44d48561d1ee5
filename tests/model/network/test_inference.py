"""The inference network against the UNet, over the shapes that a UNet can have."""

from __future__ import annotations

import pytest
import torch

from model.network import inference
from model.network.config import UNetConfig
from model.network.inference import InferenceUNet
from model.network.unet import UNet

SMALL = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (8, 16), "norm_num_groups": 4}
LEVELS = {
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 4,
    "layers_per_block": 1,
}
SHAPES = {
    "classes": {"num_class_embeds": 4},
    "no-classes": {},
    "scale-shift": {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 4},
    "scale-shift-without-norm": {"resnet_time_scale_shift": "scale_shift"},
    "padding-of-tensorflow": {"downsample_padding": 0},
    "scaled-mid-block": {"mid_block_scale_factor": 2**0.5},
    "centred": {"center_input_sample": True, "flip_sin_to_cos": False, "freq_shift": 1},
    "no-attention": {
        "add_attention": False,
        "down_block_types": ("DownBlock2D",) * 2,
        "up_block_types": ("UpBlock2D",) * 2,
    },
    "learned-variance": {"out_channels": 2},
    "two-layers": {"layers_per_block": 2},
}


def network(**config) -> UNet:
    torch.manual_seed(0)
    net = UNet(UNetConfig(**{**SMALL, **LEVELS, **config})).eval().requires_grad_(False)
    torch.nn.init.normal_(net.conv_out.weight, std=0.1)
    return net


def rows(net: UNet, width: int = 5):
    x = torch.randn(width, net.config.in_channels, 8, 8, generator=torch.Generator().manual_seed(1))
    y = torch.arange(width) % net.config.num_class_embeds if net.config.num_class_embeds else None
    return x, torch.tensor([0.0, 3, 999, 500, 7])[:width], y


@pytest.mark.parametrize("layout", ["plain", "channels_last", "packed", "fused"])
@pytest.mark.parametrize("shape", SHAPES)
@torch.inference_mode()
def test_it_is_the_same_function(shape, layout):
    """To 1e-5 of an output of about 1: sums in another order."""
    if layout == "fused":
        pytest.importorskip("triton")
    net = network(**SHAPES[shape])
    x, t, y = rows(net, 2 if layout == "fused" else 5)  # kernels are slow to interpret
    before = x.clone()
    assert (InferenceUNet(net, 1000, layout=layout)(x, t, y) - net(x, t, y)).abs().max() < 1e-5
    assert torch.equal(x, before)  # it works in place, but not on what it is given


@torch.inference_mode()
def test_what_is_not_in_the_table_is_computed_row_by_row():
    net = network(num_class_embeds=4)
    fast = InferenceUNet(net, 1000)
    x, _, _ = rows(net)
    t = torch.tensor([0.0, 3.5, 999, 500.25, 7])
    y = torch.eye(4)[[0, 1, 2, 3, 0]]
    y[4] = torch.tensor([0.5, 0.25, 0.25, 0])
    together = fast(x, t, y)
    assert (together - net(x, t, y)).abs().max() < 1e-5
    # A row has the same bits among any other rows at the same width.
    others = torch.full_like(t, 100.0)
    for i in range(5):
        timesteps, classes = others.clone(), torch.eye(4)[[3] * 5]
        timesteps[i], classes[i] = t[i], y[i]
        z = torch.randn_like(x)
        z[i] = x[i]
        assert torch.equal(fast(z, timesteps, classes)[i], together[i])
    assert torch.equal(fast(x[:1], t[:1], torch.tensor([0])), fast(x[:1], t[:1], y[:1]))  # an index or its weight


@torch.inference_mode()
def test_a_table_that_would_be_too_large_is_left_out(monkeypatch):
    net = network(num_class_embeds=4)
    monkeypatch.setattr(inference, "MAX_TABLE", 1000)
    fast = InferenceUNet(net, 1000)
    assert fast._table is None
    assert (fast(*rows(net)) - net(*rows(net))).abs().max() < 1e-5


@torch.inference_mode()
def test_bfloat16_is_close():
    net = network(num_class_embeds=4)
    expected, half = net(*rows(net)), InferenceUNet(net, 1000, torch.bfloat16)(*rows(net))
    assert half.dtype == torch.float32
    error = ((half - expected).square().mean() / expected.square().mean()).sqrt()
    assert 0 < error < 0.02  # eight bits of mantissa, 0.004 each operation at worst
