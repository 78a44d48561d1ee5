"""Loading and saving a checkpoint's folder."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as serialize
from torch import Tensor

from model.checkpoint.card import CARD, UNKNOWN, Card, read_card
from model.checkpoint.facts import CheckpointError
from model.checkpoint.network import read_network
from model.checkpoint.pipeline import INDEX, check_pipeline, find_parts
from model.checkpoint.scheduler import complete, read_scheduler
from model.checkpoint.weights import WEIGHTS, hash_weights, read_weights
from model.diffusion.defaults import SamplingDefaults
from model.diffusion.schedule import NoiseSchedule
from model.network.unet import UNet


@dataclass(frozen=True)
class Checkpoint:
    """The network, its noise schedule and its card.

    Attributes:
        scheduler_config: as it is written.
        note: what could not be known of the network, and what follows; "" if nothing.
    """

    net: UNet
    scheduler_config: dict[str, Any]
    card: Card
    note: str = ""

    @property
    def schedule(self) -> NoiseSchedule:
        """The noise schedule that the network was trained on."""
        return NoiseSchedule.from_config(complete(self.scheduler_config))

    @property
    def defaults(self) -> SamplingDefaults:
        """The options of samplers that the scheduler's config asks for."""
        return SamplingDefaults.from_config(complete(self.scheduler_config))

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
            the card's hash; a card that does not fit the network; a network, schedule or pipeline that is not served
            here, or whose output is not finite.
    """
    check_pipeline(path)
    unet, scheduler = find_parts(path)
    net = read_network(unet / "config.json")
    config = net.config
    scheduler_config = read_scheduler(scheduler / "scheduler_config.json", (config.in_channels, config.out_channels))
    weights = unet / WEIGHTS
    card = read_card(path, hash_weights(weights), config.num_class_embeds)
    net.load_state_dict(read_weights(weights, net), assign=True)
    note = UNKNOWN if config.num_class_embeds and not (path / CARD).is_file() else ""
    found = Checkpoint(net.to(device).eval().requires_grad_(False), scheduler_config, card, note)
    _check_output(found, weights)
    return found


@torch.inference_mode()
def _check_output(loaded: Checkpoint, weights: Path) -> None:
    """One forward at each of a few timesteps, row by row.

    Raises:
        CheckpointError: naming the timestep at which the output is not finite.
    """
    device = next(loaded.net.parameters()).device
    generator = torch.Generator().manual_seed(0)
    classes, T = loaded.net.config.num_class_embeds, loaded.schedule.T
    for i, t in enumerate(sorted({0, T // 2, T - 1})):
        x = torch.randn(1, *loaded.shape, generator=generator).to(device)
        label = i % (classes or 1)
        y = torch.tensor([label], device=device) if classes else None
        if not loaded.net(x, torch.tensor([t], device=device), y).isfinite().all():
            of = f" and class {label}" if classes else ""
            raise CheckpointError(weights, f"the network's output at t = {t}{of} is not finite; convert it anew")


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
        path / INDEX,
        {
            "_class_name": "DDPMPipeline",
            "unet": ["diffusers", "UNet2DModel"],
            "scheduler": ["diffusers", scheduler_config["_class_name"]],
        },
    )
    _write_json(path / CARD, asdict(card))
    return card


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
