"""The networks that are measured: two of DDPM's, with random weights, and the one that ships here.

What a forward costs depends on the shapes of its weights only. These are the shapes of google/ddpm-cifar10-32 and
google/ddpm-celebahq-256 (Ho et al. 2020, appendix B), as diffusers writes them down.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from app.settings import SHIPPED
from model import checkpoint
from model.checkpoint import Card
from model.network.config import UNetConfig
from model.network.unet import UNet
from model.training.recipe import SCHEDULER_CONFIG

MAIN, SHIPPED_NAME = "cifar10-32", "avatars-32"


def _google(size: int, channels: tuple[int, ...], attention: int, layers: int = 2, groups: int = 32) -> UNetConfig:
    """TensorFlow's padding, sines first, one attention head at the level of that index."""
    levels = range(len(channels))
    return UNetConfig(
        sample_size=size,
        freq_shift=1,
        flip_sin_to_cos=False,
        down_block_types=tuple("AttnDownBlock2D" if i == attention else "DownBlock2D" for i in levels),
        up_block_types=tuple("AttnUpBlock2D" if i == attention else "UpBlock2D" for i in reversed(levels)),
        block_out_channels=channels,
        layers_per_block=layers,
        downsample_padding=0,
        attention_head_dim=None,
        norm_num_groups=groups,
        norm_eps=1e-6,
    )


CIFAR = _google(32, (128, 256, 256, 256), attention=1)
CELEBAHQ = _google(256, (128, 128, 256, 256, 512, 512), attention=4)
TINY = _google(8, (8, 16), attention=1, layers=1, groups=4)


@dataclass(frozen=True)
class Network:
    """One network.

    Attributes:
        max_width: most rows of a forward that calibration may try.
        seed: of its random weights; None for a checkpoint in ``weights/``.
    """

    name: str
    title: str
    config: UNetConfig
    max_width: int
    seed: int | None = None

    def folder(self, parent: Path, device: torch.device) -> Path:
        """Its checkpoint; one of random weights is written to ``parent`` if it is not there yet."""
        if self.seed is None:
            return SHIPPED / self.name
        path = parent / self.name
        if not path.exists():
            net = random(self.config, self.seed, device)
            checkpoint.save(path, net, net.state_dict(), SCHEDULER_CONFIG, Card(self.name))
        return path


def shipped_config() -> UNetConfig:
    return UNetConfig.from_dict(json.loads((SHIPPED / SHIPPED_NAME / "unet" / "config.json").read_text()))


def networks(*, tiny: bool = False) -> dict[str, Network]:
    """All by name; ``tiny`` ones take milliseconds on a CPU."""
    each = [
        Network(MAIN, "DDPM for CIFAR-10", CIFAR, 512, seed=0),
        Network("celebahq-256", "DDPM for CelebA-HQ", CELEBAHQ, 32, seed=1),
        Network(SHIPPED_NAME, SHIPPED_NAME, shipped_config(), 1024),
    ]
    if tiny:
        configs = [replace(TINY, num_class_embeds=network.config.num_class_embeds) for network in each]
        each = [
            replace(network, config=config, max_width=4, seed=0) for network, config in zip(each, configs, strict=True)
        ]
    return {network.name: network for network in each}


@torch.inference_mode()
def random(config: UNetConfig, seed: int, device: torch.device | str = "cpu") -> UNet:
    """Random weights, scaled so that the output has about unit variance, as ε has."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = UNet(config).eval().requires_grad_(False)
        x = torch.randn(1, config.in_channels, *config.size)
    net.to(device)
    y = None if config.num_class_embeds is None else torch.zeros(1, dtype=torch.int64, device=device)
    output = net(x.to(device), torch.full((1,), 500.0, device=device), y)
    net.conv_out.weight /= output.std()
    torch.nn.init.zeros_(net.conv_out.bias)  # type: ignore[arg-type]
    return net


def parameters(config: UNetConfig) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in UNet(config).parameters())
