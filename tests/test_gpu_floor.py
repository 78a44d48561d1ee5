"""The networks that gpu-check measures, and the least that their forwards can take."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.gpu import floor, networks
from model.network.config import UNetConfig
from model.network.unet import UNet

CONFIGS = {
    "cifar": networks.CIFAR,
    "celebahq": networks.CELEBAHQ,
    "shipped": networks.shipped_config(),
    "tiny": networks.TINY,
}


@pytest.mark.parametrize(("config", "count"), [(networks.CIFAR, 35_746_307), (networks.CELEBAHQ, 113_673_219)])
def test_networks_have_the_size_of_the_papers(config, count):
    assert networks.parameters(config) == count


def test_random_weights_say_something_of_unit_size():
    net = networks.random(networks.TINY, seed=0)
    x = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    assert 0.5 < float(net(x, torch.full((16,), 300.0)).std()) < 2
    assert sum(p.numel() for p in net.parameters()) == networks.parameters(networks.TINY) < 100_000


@pytest.mark.parametrize("name", CONFIGS)
def test_operations_are_those_that_torch_counts(name):
    """All of UNet's but what timestep and class say to the blocks, which is looked up."""
    config, rows = CONFIGS[name], 2
    with torch.device("meta"):
        net = UNet(config)
        x, t = torch.empty(rows, config.in_channels, *config.size), torch.zeros(rows)
        y = None if config.num_class_embeds is None else torch.zeros(rows, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        net(x, t, y)
    conditioned = [
        module for name, module in net.named_modules() if name.endswith(("time_emb_proj", "linear_1", "linear_2"))
    ]
    assert counter.get_total_flops() == floor.work(config).operations(rows) + sum(
        2 * rows * m.weight.numel() for m in conditioned
    )


def test_bytes_are_those_of_a_network_counted_by_hand():
    """One level of four channels on 8x8: conv_in, three blocks of four channels, two of eight to four, conv_out."""
    config = UNetConfig(
        sample_size=8,
        block_out_channels=(4,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        layers_per_block=1,
        norm_num_groups=2,
        add_attention=False,
    )
    channels = (3 + 4) + 3 * 2 * (4 + 4) + 2 * ((8 + 4) + (4 + 4) + (8 + 4)) + (4 + 3)
    weights = 4 * (27 + 1) + (6 + 2) * 4 * (36 + 1) + 2 * 4 * (72 + 1) + 2 * 4 * (8 + 1) + 3 * (36 + 1)
    work = floor.work(config)
    assert (work.row_bytes, work.weight_bytes) == (2 * 64 * channels, 2 * weights)
    assert work.bytes(3) == 2 * (weights + 3 * 64 * channels)


def test_what_is_doubled_or_projected_thrice_is_read_once():
    """With a level above, and attention: by differences to the same network without them."""
    base = UNetConfig(
        sample_size=8,
        block_out_channels=(4, 4),
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=2,
        add_attention=False,
    )
    tokens = 16 * 4  # 4x4 pixels of four channels, in the middle
    with_attention = UNetConfig(**{**base.__dict__, "add_attention": True, "attention_head_dim": 2})
    # x to q, k and v; those to their mixture; that to the output.
    assert floor.work(with_attention).row_bytes - floor.work(base).row_bytes == 2 * tokens * (
        (1 + 3) + (3 + 1) + (1 + 1)
    )
    one_level = floor.work(UNetConfig(**{**base.__dict__, "sample_size": 4, "block_out_channels": (4,),
        "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}))  # fmt: skip
    # On 8x8 the same blocks but the middle's, once; besides, an image is halved, and one is doubled.
    ends = 2 * tokens * 4 * ((3 + 4) + (4 + 3)) / 4
    small = one_level.row_bytes - 2 * 16 * ((3 + 4) + (4 + 3))
    middle = 2 * tokens * 4 * 2
    large = 4 * (small - middle)
    assert floor.work(base).row_bytes == small + large + ends + 2 * (256 + tokens) + 2 * (tokens + 256)


def test_the_floor_is_the_slower_of_operations_and_bytes():
    work = floor.Work(row_operations=100, row_bytes=10, weight_bytes=1000)
    assert work.seconds(1, rate=100, bandwidth=10) == pytest.approx(101)
    assert work.seconds(1000, rate=100, bandwidth=1000) == pytest.approx(1000)
