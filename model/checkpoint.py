"""A trained noise predictor on disk: a diffusers directory with a card.

    model_index.json                                so that diffusers' DDPMPipeline opens the folder too
    unet/config.json                                the network's shape
    unet/diffusion_pytorch_model.safetensors        its weights
    scheduler/scheduler_config.json                 the noise schedule that it was trained on
    card.json                                       classes, licence, data, training recipe, numbers, hash

Flat directories (``config.json``, weights and ``scheduler_config.json`` side by side) are read as well. Weights are
read from safetensors only: a pickle can run code when it is opened.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file
from safetensors.torch import save as serialize
from torch import Tensor

from model.diffusion.schedule import NoiseSchedule
from model.network.config import UNetConfig
from model.network.unet import UNet

WEIGHTS = "diffusion_pytorch_model.safetensors"


class CheckpointError(ValueError):
    """A folder without a usable checkpoint; the message names the file and what is wrong with it."""


@dataclass(frozen=True)
class Card:
    """What the weights do not say.

    Attributes:
        classes: names of the labels, in the order of their indices.
        null_class: index of "no label", or None if none was trained.
        background: "#rrggbb", behind uploaded images that are transparent or too small.
        training: the recipe, and what came of it.
        numbers: measurements.
        sha256: of the weights file; checked when it is loaded.
    """

    name: str
    description: str = ""
    licence: str = "unknown"
    data: str = ""
    classes: tuple[str, ...] = ()
    null_class: int | None = None
    background: str = "#000000"
    training: dict[str, Any] = field(default_factory=dict)
    numbers: dict[str, Any] = field(default_factory=dict)
    sha256: str = ""


@dataclass(frozen=True)
class Checkpoint:
    """The network, its noise schedule and its card."""

    net: UNet
    scheduler_config: dict[str, Any]
    card: Card

    @property
    def schedule(self) -> NoiseSchedule:
        """The noise schedule that the network was trained on."""
        return NoiseSchedule.from_config(self.scheduler_config)

    @property
    def background(self) -> tuple[int, int, int]:
        """RGB of the card's background."""
        red, green, blue = bytes.fromhex(self.card.background[1:])
        return red, green, blue

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        config = self.net.config
        height, width = config.size
        return (config.in_channels, height, width)


def load(path: Path, device: torch.device | str = "cpu") -> Checkpoint:
    """Read a checkpoint folder, in evaluation mode on ``device``.

    Raises:
        CheckpointError: files missing or corrupt; weights that do not fit the config, are not finite, or do not match
            the card's hash; an unsupported network or schedule.
    """
    unet, scheduler = (path / "unet", path / "scheduler") if (path / "unet").is_dir() else (path, path)
    config = _read_json(unet / "config.json")
    scheduler_config = _read_json(scheduler / "scheduler_config.json")
    weights = unet / WEIGHTS
    if not weights.is_file():
        raise CheckpointError(f"{weights} is missing; other formats must first be converted to safetensors")
    card = _read_card(path, hashlib.sha256(weights.read_bytes()).hexdigest())
    try:
        NoiseSchedule.from_config(scheduler_config)
        net_config = UNetConfig.from_dict(config)
        with torch.device("meta"):
            net = UNet(net_config)
    except (ValueError, TypeError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    if not net_config.size:
        raise CheckpointError(f"{unet / 'config.json'}: sample_size is missing; say how large the images are")
    if net_config.out_channels not in (net_config.in_channels, 2 * net_config.in_channels):
        raise CheckpointError(
            f"{unet / 'config.json'}: out_channels {net_config.out_channels} is neither in_channels "
            f"{net_config.in_channels}, nor twice that for a learned variance"
        )
    if card.classes and net_config.num_class_embeds is None:
        raise CheckpointError(f"{path / 'card.json'}: names classes, but the network is not class-conditional")
    try:
        state = load_file(weights)
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{weights}: {error}") from error
    _check(weights, state := _modern_names(state), net)
    net.load_state_dict(state, assign=True)
    return Checkpoint(net.float().to(device).eval().requires_grad_(False), scheduler_config, card)


def save(path: Path, net: UNet, state: dict[str, Tensor], scheduler_config: dict[str, Any], card: Card) -> Card:
    """Write a checkpoint folder; returns the card with the hash of the weights.

    Args:
        net: for its config.
        state: the weights to write, with ``net``'s keys; usually its moving average.
    """
    for folder in ("unet", "scheduler"):
        (path / folder).mkdir(parents=True, exist_ok=True)
    weights = path / "unet" / WEIGHTS
    content = serialize({key: value.detach().cpu().contiguous() for key, value in state.items()}, {"format": "pt"})
    # save_file makes the file readable by its owner only, who is not the user of a container.
    weights.write_bytes(content)
    card = replace(card, sha256=hashlib.sha256(content).hexdigest())
    _write_json(path / "unet" / "config.json", net.config.to_dict())
    _write_json(path / "scheduler" / "scheduler_config.json", scheduler_config)
    _write_json(
        path / "model_index.json",
        {
            "_class_name": "DDPMPipeline",
            "unet": ["diffusers", "UNet2DModel"],
            "scheduler": ["diffusers", scheduler_config["_class_name"]],
        },
    )
    _write_json(path / "card.json", asdict(card))
    return card


def _read_card(path: Path, sha256: str) -> Card:
    if not (path / "card.json").is_file():
        return Card(name=path.resolve().name, sha256=sha256)
    facts = _read_json(path / "card.json")
    try:
        card = Card(**{**facts, "classes": tuple(facts.get("classes", ()))})
    except TypeError as error:
        raise CheckpointError(f"{path / 'card.json'}: {error}") from error
    if not re.fullmatch("#[0-9a-fA-F]{6}", str(card.background)):
        raise CheckpointError(f"{path / 'card.json'}: background {card.background!r} is no colour of the form #rrggbb")
    if card.sha256 not in ("", sha256):
        raise CheckpointError(f"{path}: the weights' sha256 is {sha256}, the card says {card.sha256}")
    return replace(card, sha256=sha256)


# Attention layers had other names before diffusers 0.15.
_LEGACY = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def _modern_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    def rename(key: str) -> str:
        head, dot, tail = key.rpartition(".")
        stem, _, last = head.rpartition(".")
        return f"{stem}.{_LEGACY[last]}{dot}{tail}" if "attentions" in key and last in _LEGACY else key

    return {rename(key): value for key, value in state.items()}


def _check(weights: Path, state: dict[str, Tensor], net: UNet) -> None:
    wanted = {key: tuple(value.shape) for key, value in net.state_dict().items()}
    if missing := sorted(wanted.keys() - state.keys()):
        raise CheckpointError(f"{weights}: lacks {len(missing)} tensors of the config, such as {missing[0]}")
    if extra := sorted(state.keys() - wanted.keys()):
        raise CheckpointError(f"{weights}: has {len(extra)} tensors that are not in the config, such as {extra[0]}")
    for key, value in state.items():
        if tuple(value.shape) != wanted[key]:
            raise CheckpointError(f"{weights}: {key} is {list(value.shape)}, in the config {list(wanted[key])}")
        if not value.isfinite().all():
            raise CheckpointError(f"{weights}: {key} is not finite")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; a checkpoint is a diffusers folder") from None
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected an object, found {type(content).__name__}")
    return content


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
