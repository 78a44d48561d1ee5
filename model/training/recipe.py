"""What to train: the recipe, the noise schedule, and the initial network."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from torch import nn

from model.data import Dataset
from model.network.config import UNetConfig
from model.network.unet import UNet
from model.output import counted


class TrainingError(ValueError):
    """Training cannot start; the message says what to change."""


class DivergedError(ArithmeticError):
    """Training went wrong beyond repair.

    Attributes:
        step: the first whose loss, gradient or weights are not finite, or whose loss is absurd; from 1.
        loss: smoothed, at the time it was noticed; of no dimension, may be nan.
    """

    def __init__(self, step: int, loss: float, remedy: str = "") -> None:
        super().__init__(f"training diverged at step {step}, the loss is {loss:.4g}{remedy and '; '}{remedy}")
        self.step, self.loss = step, loss


class RecipeError(TrainingError):
    """An invalid field of a recipe."""

    def __init__(self, field: str, value: object, remedy: str) -> None:
        super().__init__(f"{field} = {value}: {remedy}")
        self.field, self.value, self.remedy = field, value, remedy


BOUNDS: dict[str, tuple[Callable[[Any, Any], bool], str]] = {
    "ge": (operator.ge, "at least"),
    "gt": (operator.gt, "above"),
    "le": (operator.le, "at most"),
    "lt": (operator.lt, "below"),
}


def _option(default: Any, text: str, **bounds: float) -> Any:
    return field(default=default, metadata={"help": text, "bounds": bounds})


@dataclass(frozen=True)
class Recipe:
    """How to train. Every field is an option of ``unstir train``, with its help text and bounds.

    Raises:
        RecipeError: an invalid field, or fields that do not fit together.
    """

    size: int = _option(32, "side of the square images, in pixels", ge=1)
    channels: tuple[int, ...] = _option((32, 64, 128), "width of each resolution level")
    layers: int = _option(1, "residual blocks per level", ge=1)
    attention: tuple[int, ...] = _option((8,), "sides of the feature maps that get attention")
    head_dim: int = _option(32, "channels per attention head", ge=1)
    groups: int = _option(8, "groups of the group norms", ge=1)
    dropout: float = _option(0.0, "share of activations dropped", ge=0, lt=1)
    steps: int | None = _option(None, "stop after this many optimizer steps", ge=1)
    minutes: float | None = _option(None, "stop after this many minutes of training, including resumed runs", gt=0)
    batch: int = _option(64, "images per step", ge=1)
    lr: float = _option(1e-3, "learning rate after warm-up; falls to 0 along a cosine over steps or minutes", gt=0)
    warmup: int = _option(500, "steps over which the learning rate rises", ge=0)
    ema: float = _option(0.999, "decay of the moving average of the weights, which the checkpoint holds", ge=0, lt=1)
    flip: bool = _option(False, "mirror images at random")
    label_drop: float = _option(0.1, "share of labels replaced by the null class", ge=0, le=1)
    precision: Literal["auto", "fp32", "bf16"] = _option("auto", "bf16 is autocast; auto takes whichever is faster")
    compile: Literal["auto", "on", "off"] = _option("auto", "torch.compile; auto is on for a CUDA device")
    weights: Literal["float32", "bfloat16"] = _option("float32", "of the checkpoint; bfloat16 at half the size")
    grey: bool = _option(False, "read a folder of images as grey rather than colour")
    seed: int = _option(0, "of the weights, the order of the images and all noise", ge=0)

    def __post_init__(self) -> None:
        choices = get_type_hints(type(self))
        for each in fields(self):
            value = getattr(self, each.name)
            if get_origin(choices[each.name]) is Literal and value not in get_args(choices[each.name]):
                raise RecipeError(each.name, value, f"choose one of {_join(get_args(choices[each.name]))}")
            if isinstance(value, float) and math.isinf(value):
                raise RecipeError(each.name, value, "must be finite")
            for bound, limit in each.metadata["bounds"].items():
                holds, words = BOUNDS[bound]
                if value is not None and not holds(value, limit):
                    raise RecipeError(each.name, value, f"must be {words} {limit}")
        self._check_network()

    def _check_network(self) -> None:
        """Widths, groups and heads must divide each other."""
        if not self.channels or min(self.channels) < 1:
            raise RecipeError("channels", self.channels, "must all be at least 1")
        multiple = 2 ** (len(self.channels) - 1)
        if self.size % multiple:
            raise RecipeError("size", self.size, f"must be a multiple of {multiple}, to be halved at each level")
        if any(width % self.groups for width in self.channels):
            raise RecipeError("groups", self.groups, f"must divide all channels, {_join(self.channels)}")
        levels = enumerate(self.channels)
        with_attention = {self.channels[-1], *(width for i, width in levels if self.size // 2**i in self.attention)}
        if any(width % self.head_dim for width in with_attention):
            remedy = f"must divide the channels of levels with attention, {_join(sorted(with_attention))}"
            raise RecipeError("head_dim", self.head_dim, remedy)


LOW_RATE = 0.5  # share of --lr that a run should at least reach


def advise_batch(recipe: Recipe, images: int) -> str:
    """What follows of a batch larger than the data; empty where it is not."""
    if recipe.batch <= images:
        return ""
    return (
        f"--batch {recipe.batch} is more than the number of images, {images}: each step has some of them several "
        "times; lower --batch, or give more images"
    )


def advise_warmup(recipe: Recipe, steps: int) -> str:
    """What follows of a warm-up that is long for a run of so many steps; empty where it is not."""
    if (peak := highest_rate(recipe.warmup, steps)) >= LOW_RATE:
        return ""
    share = "takes all" if steps <= recipe.warmup else "takes most"
    return (
        f"the warm-up (--warmup {recipe.warmup}) {share} of this run of {counted(steps, 'step')}, so that the learning "
        f"rate never exceeds {max(1, round(100 * peak))} % of --lr; lower --warmup, such as to {steps // 10}"
    )


def rate(step: int, warmup: int, progress: float) -> float:
    """Learning rate of a step from 0, as a share of ``lr``: a linear rise, and half a cosine over the run."""
    return min(1.0, (step + 1) / max(1, warmup)) * 0.5 * (1 + math.cos(math.pi * progress))


def highest_rate(warmup: int, steps: int) -> float:
    """The share of ``lr`` that is reached in a run of so many steps, to about 1 %."""
    stride = max(1, steps // 1000)
    return max(rate(step, warmup, step / steps) for step in range(0, steps, stride))


def _join(values: Iterable[object]) -> str:
    return ", ".join(map(str, values))


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
    """A freshly initialized UNet for this data; with classes, the last embedding is the null class."""
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
    nn.init.zeros_(net.conv_out.weight)  # predict zeros at first, as DDPM's code does
    return net
