"""``config.json`` of the network: types, ranges, and whether its output can be an image."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import init
from torch.overrides import TorchFunctionMode

from model.checkpoint.facts import Facts
from model.checkpoint.pipeline import LATENT_DIFFUSION
from model.network.config import ConfigError, UNetConfig
from model.network.unet import UNet

MAX_SIDE = 4096
MAX_WIDTH = 2**16  # channels of a level


class _NoInitialization(TorchFunctionMode):
    """Leaves out the random numbers of new parameters.

    For parameters without storage torch would load its compiler to draw none, which takes seconds.
    """

    DRAWS = (init.kaiming_uniform_, init.uniform_, init.normal_, torch.Tensor.uniform_, torch.Tensor.normal_)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in self.DRAWS:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def read_network(file: Path) -> UNet:
    """The network with shapes and no weights.

    Raises:
        CheckpointError: an unsupported network.
    """
    facts = Facts.read(file)
    _check_image(facts)
    _check_levels(facts)
    for key, default in (("center_input_sample", False), ("flip_sin_to_cos", True), ("add_attention", True)):
        facts.flag(key, default)
    for key, usual, low, high in (
        ("layers_per_block", 2, 1, 64),
        ("norm_num_groups", 32, 1, MAX_WIDTH),
        ("freq_shift", 0, 0, 1),
        ("downsample_padding", 1, 0, 1),
    ):
        facts.integer(key, usual, low, high)
    for key in ("time_embedding_dim", "attention_head_dim", "attn_norm_num_groups", "num_class_embeds"):
        facts.integer(key, None, 1, MAX_WIDTH, null=True)
    facts.number("mid_block_scale_factor", 1.0, 0, 1000, above=True)
    facts.number("dropout", 0.0, 0, 1)
    facts.number("norm_eps", 1e-5, 0, 1, above=True)
    try:
        with torch.device("meta"), _NoInitialization():
            return UNet(UNetConfig.from_dict(facts.content))
    except ConfigError as error:
        raise facts.as_whole(str(error)) from error
    except (ValueError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise facts.as_whole(f"no network can be built of it: {error}") from error


def _check_image(facts: Facts) -> None:
    """Channels and size: the images that come in and go out."""
    inputs = facts.integer("in_channels", 3, 1, MAX_WIDTH)
    if inputs not in (1, 3):
        why = f"; {LATENT_DIFFUSION}" if inputs > 3 else ""
        raise facts.fault("in_channels", f"served are images of 1 channel (grey) or 3 (colour){why}")
    if facts.integer("out_channels", 3, 1, MAX_WIDTH) not in (inputs, 2 * inputs):
        raise facts.fault("out_channels", f"is neither in_channels {inputs}, nor twice that for a learned variance")
    size = facts.content.get("sample_size")
    if size is None:
        raise facts.fault("sample_size", "is missing; say how large the images are")
    sides = size if isinstance(size, list) and len(size) == 2 else [size]
    if not all(type(side) is int and 1 <= side <= MAX_SIDE for side in sides):
        raise facts.fault("sample_size", f"must be an integer of 1 to {MAX_SIDE}, or [height, width]")


def _check_levels(facts: Facts) -> None:
    for key, kind in (("down_block_types", str), ("up_block_types", str), ("block_out_channels", int)):
        if key not in facts.content:
            continue
        values = facts.content[key]
        if not (isinstance(values, list) and 1 <= len(values) <= 12 and all(type(value) is kind for value in values)):
            what = "names of blocks" if kind is str else "integers"
            raise facts.fault(key, f"must be a list of 1 to 12 {what}, one for each level")
        if kind is int and not all(1 <= value <= MAX_WIDTH for value in values):
            raise facts.fault(key, f"must have integers of 1 to {MAX_WIDTH}")
