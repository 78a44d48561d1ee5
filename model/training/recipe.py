"""What to train: the recipe, the noise schedule, and the untrained network for some data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from model.data import Dataset
from model.network.config import UNetConfig
from model.network.unet import UNet


class TrainingError(ValueError):
    """Training cannot start as asked; the message says what to change."""


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Recipe:
    """How to train. Every field is an option of ``unstir train``, with the help text that stands beside it."""

    size: int = _option(32, "side of the square images, in pixels")
    channels: tuple[int, ...] = _option((32, 64, 128), "width of each resolution level")
    layers: int = _option(1, "residual blocks per level")
    attention: tuple[int, ...] = _option((8,), "sides of the feature maps that get attention")
    head_dim: int = _option(32, "channels per attention head")
    groups: int = _option(8, "groups of the group norms")
    dropout: float = _option(0.0, "share of activations dropped")
    steps: int | None = _option(None, "stop after so many optimizer steps")
    minutes: float | None = _option(None, "stop after so many minutes of training, all resumed runs together")
    batch: int = _option(64, "images per step")
    lr: float = _option(1e-3, "learning rate after warm-up; falls to 0 along a cosine over steps or minutes")
    warmup: int = _option(500, "steps over which the learning rate rises")
    ema: float = _option(0.999, "decay of the moving average of the weights, which is what is kept")
    flip: bool = _option(False, "mirror images at random")
    label_drop: float = _option(0.1, "share of labels replaced by the null class")
    precision: str = _option("auto", "fp32, bf16 (autocast), or auto: whichever is faster here")
    compile: str = _option("auto", "torch.compile: on, off, or auto: on for a CUDA device")
    weights: str = _option("float32", "of the checkpoint that is written: float32, or bfloat16 at half the size")
    grey: bool = _option(False, "read a folder of images as grey rather than colour")
    seed: int = _option(0, "of the weights, the order of the images and all noise")

    def __post_init__(self) -> None:
        attending = {
            self.channels[-1],
            *(w for i, w in enumerate(self.channels) if self.size // 2**i in self.attention),
        }
        multiple = 2 ** (len(self.channels) - 1)
        possible = {
            "precision": (self.precision in ("auto", "fp32", "bf16"), "choose auto, fp32 or bf16"),
            "compile": (self.compile in ("auto", "on", "off"), "choose auto, on or off"),
            "weights": (self.weights in ("float32", "bfloat16"), "choose float32 or bfloat16"),
            "steps": (self.steps is None or self.steps >= 1, "must be at least 1"),
            "minutes": (self.minutes is None or self.minutes > 0, "must be above 0"),
            "size": (
                self.size >= 1 and not self.size % multiple,
                f"must be a multiple of {multiple}, to be halved once a level",
            ),
            "layers": (self.layers >= 1, "must be at least 1"),
            "channels": (all(width >= 1 for width in self.channels), "must all be at least 1"),
            "groups": (
                self.groups >= 1 and not any(width % self.groups for width in self.channels),
                f"must be at least 1, and divide all channels, {_listed(self.channels)}",
            ),
            "head_dim": (
                self.head_dim >= 1 and not any(width % self.head_dim for width in attending),
                f"must be at least 1, and divide the channels of the levels that attend, {_listed(sorted(attending))}",
            ),
            "batch": (self.batch >= 1, "must be at least 1"),
            "lr": (self.lr > 0, "must be above 0"),
            "warmup": (self.warmup >= 0, "must not be negative"),
            "ema": (0 <= self.ema < 1, "must lie in [0, 1)"),
            "dropout": (0 <= self.dropout < 1, "must lie in [0, 1)"),
            "label_drop": (0 <= self.label_drop <= 1, "must lie in 0..1"),
            "seed": (self.seed >= 0, "must not be negative"),
        }
        for name, (fine, remedy) in possible.items():
            if not fine:
                raise TrainingError(f"{name} = {getattr(self, name)}: {remedy}")


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))


SCHEDULER_CONFIG: dict[str, Any] = {
    "_class_name": "DDPMScheduler",
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "prediction_type": "epsilon",
    "variance_type": "fixed_small",
    "clip_sample": True,
    "clip_sample_range": 1.0,
    "timestep_spacing": "leading",
}


def network(recipe: Recipe, dataset: Dataset) -> UNet:
    """An untrained UNet for this data; with classes, the last embedding is the null class."""
    levels = len(recipe.channels)
    attends = [recipe.size // 2**i in recipe.attention for i in range(levels)]
    channels = dataset.images.shape[-1]
    config = UNetConfig(
        sample_size=recipe.size,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=recipe.channels,
        layers_per_block=recipe.layers,
        down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attends),
        up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)),
        attention_head_dim=recipe.head_dim,
        norm_num_groups=recipe.groups,
        dropout=recipe.dropout,
        num_class_embeds=len(dataset.classes) + 1 if dataset.classes else None,
    )
    torch.manual_seed(recipe.seed)
    net = UNet(config)
    nn.init.zeros_(net.conv_out.weight)  # start from "no noise at all", as DDPM's code does
    return net
