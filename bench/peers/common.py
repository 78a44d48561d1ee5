"""What all peers share, so that they differ in how they serve and in nothing else: network, walk, noise and answer.

The walk is DDIM by the row machine, one forward a step for however many rows there are, each at its own step of its own
plan. Request-level peers take a batch to its end with it, step-level ones a step at a time.
"""

from __future__ import annotations

import base64
import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from app.engine.calibration import CalibrationOptions, build_networks, calibrate
from model.checkpoint import Checkpoint, load
from model.diffusion import machine
from model.diffusion.defaults import SamplingDefaults
from model.diffusion.noise import draw_noise, seeded_generator
from model.diffusion.samplers import SAMPLERS
from model.images.convert import to_uint8
from model.images.encode import png

CAP = 8  # rows of a forward, for every server that batches
PATIENCE = 3600  # seconds; more than any run takes, for servers that limit a request's time
KEPT = Path("~/.cache/unstir").expanduser()
CPU = torch.device("cpu")
CHECKPOINT = Path(os.environ.get("UNSTIR_CHECKPOINT", Path(__file__).resolve().parents[2] / "weights" / "avatars-32"))

FORM = "BENCH_FORM"  # names the variable that says png where answers are to be that
PNG = b"\x89PNG"

Network = Callable[[Tensor, Tensor, Tensor | None], Tensor]


@cache
def checkpoint() -> Checkpoint:
    """The checkpoint, once a process."""
    return load(CHECKPOINT)


@cache
def network() -> Network:
    """(x [B, C, H, W], t [B], y int64 [B] or None) to what the network says: float32, on one CPU thread.

    It is the network in the very form in which Unstir serves it, so that none is ahead by its forward alone.
    """
    wanted = CalibrationOptions(max_width=CAP, reproducible_width=4, threads=1, dtype="float32")
    return build_networks(checkpoint(), CPU, calibrate(checkpoint(), CPU, wanted, KEPT)).exact


def null_class(rows: int) -> Tensor | None:
    """The class that stands for none, for so many rows; None for a network without classes."""
    if checkpoint().net.config.num_class_embeds is None:
        return None
    return torch.full((rows,), checkpoint().card.null_class or 0)


@cache
def table(steps: int) -> np.ndarray:
    """The walk in so many steps, one line each, as the checkpoint's scheduler config would have it."""
    found, ddim = checkpoint(), SAMPLERS["ddim"]
    options = SamplingDefaults.from_config(found.scheduler_config).options(ddim, steps, found.schedule.T)
    return ddim.compile(found.schedule, steps, **options).table(1)


@dataclass(eq=False)
class Row:
    """One image under way.

    Attributes:
        state: [1, C, H, W].
        cursor: steps done.
    """

    lines: np.ndarray
    state: Tensor
    cursor: int = 0

    @classmethod
    def of(cls, request: Mapping[str, Any]) -> Row:
        """The beginning of what ``{"steps": 20, "seed": 7}`` asks for."""
        noise = draw_noise(seeded_generator(int(request.get("seed", 0))), checkpoint().shape)
        return cls(table(int(request["steps"])), noise[None])

    @property
    def done(self) -> bool:
        """Whether the walk has ended."""
        return self.cursor == len(self.lines)

    @property
    def reply(self) -> dict[str, str]:
        """The image, as all peers answer."""
        return reply(self.state[0])


@torch.inference_mode()
def advance(net: Network, rows: Sequence[Row]) -> None:
    """Take every row one step, in one forward; none of them may be done."""
    state = torch.stack([row.state for row in rows])
    lines = np.array([row.lines[row.cursor] for row in rows])
    after = machine.advance(net, state, lines, null_class(len(rows)))
    for row, new in zip(rows, after, strict=True):
        row.state = new
        row.cursor += 1


def finish(net: Network, rows: Sequence[Row]) -> None:
    """Take every row to its end; those that get there take no more of the forwards."""
    while left := [row for row in rows if not row.done]:
        advance(net, left)


def answer_all(net: Network, requests: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """A whole batch at once: what servers that batch requests are given to call."""
    rows = [Row.of(request) for request in requests]
    finish(net, rows)
    return [row.reply for row in rows]


def warm_up(net: Network) -> None:
    """Run forwards of every width, so that the first requests do not pay for what is prepared once."""
    for width in range(1, CAP + 1):
        answer_all(net, [{"steps": 10, "seed": seed} for seed in range(width)])


def reply(image: Tensor) -> dict[str, str]:
    """An image in base64: raw little-endian float32, or PNG where :func:`in_png`."""
    content = png(to_uint8(image)) if in_png() else image.numpy().astype("<f4").tobytes()
    return {"image": base64.b64encode(content).decode()}


def in_png() -> bool:
    """Whether answers are PNG rather than numbers."""
    return os.environ.get(FORM) == "png"


def image(content: bytes) -> np.ndarray:
    """The numbers in an answer of a peer, flat."""
    found = base64.b64decode(json.loads(content)["image"])
    return pixels(found) if found.startswith(PNG) else np.frombuffer(found, "<f4")


def pixels(content: bytes) -> np.ndarray:
    """The numbers in a PNG, flat."""
    return np.asarray(Image.open(io.BytesIO(content))).ravel()
