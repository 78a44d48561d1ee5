"""What all peers share, so that they differ only in how they serve: network, DDIM, noise and response format.

Every step of a batch is one forward, each row at its own step of its own plan. Request-level peers finish a whole batch
with it, step-level ones advance it by a step at a time.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from app.engine.calibration import CalibrationOptions, build_networks, calibrate
from app.settings import SHIPPED
from model.checkpoint import Checkpoint, load
from model.diffusion import machine
from model.diffusion.noise import draw_noise, seeded_generator
from model.diffusion.samplers import SAMPLERS

CAP = 8  # rows of a forward, for every server that batches
PATIENCE = 3600  # seconds; longer than any run, for servers that limit the time of a request
CACHE = Path("~/.cache/unstir").expanduser()
CPU = torch.device("cpu")
CHECKPOINT = Path(os.environ.get("UNSTIR_CHECKPOINT", SHIPPED / "avatars-32"))

Network = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def port() -> int:
    """``--port``; other options are ignored."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    return int(parser.parse_known_args()[0].port)


@cache
def checkpoint() -> Checkpoint:
    return load(CHECKPOINT)


@cache
def network() -> Network:
    """ε(x [B, C, H, W], t [B], y int64 [B] or None), float32, on one CPU thread: the network as Unstir serves it."""
    wanted = CalibrationOptions(max_width=CAP, reproducible_width=4, threads=1, dtype="float32")
    return build_networks(checkpoint(), CPU, calibrate(checkpoint(), CPU, wanted, CACHE)).exact


def null_class(rows: int) -> Tensor | None:
    """The null class for so many rows; None for a network without classes."""
    if checkpoint().net.config.num_class_embeds is None:
        return None
    return torch.full((rows,), checkpoint().card.null_class or 0)


@cache
def table(steps: int) -> np.ndarray:
    """Coefficients of DDIM, a line for each step, with the defaults of the checkpoint's scheduler config."""
    found, ddim = checkpoint(), SAMPLERS["ddim"]
    options = found.defaults.options(ddim, steps, found.schedule.T)
    return ddim.compile(found.schedule, steps, **options).table(1)


@dataclass(eq=False)
class Row:
    """One image being sampled.

    Attributes:
        state: [1, C, H, W].
        cursor: steps done.
    """

    lines: np.ndarray
    state: Tensor
    cursor: int = 0

    @classmethod
    def start(cls, request: Mapping[str, Any]) -> Row:
        """From a request such as ``{"steps": 20, "seed": 7}``."""
        noise = draw_noise(seeded_generator(int(request.get("seed", 0))), checkpoint().shape)
        return cls(table(int(request["steps"])), noise[None])

    @property
    def done(self) -> bool:
        return self.cursor == len(self.lines)

    @property
    def reply(self) -> dict[str, str]:
        return reply(self.state[0])


@torch.inference_mode()
def advance(net: Network, rows: Sequence[Row]) -> None:
    """Advance every row by one step, in one forward; none of them may be done."""
    state = torch.stack([row.state for row in rows])
    lines = np.array([row.lines[row.cursor] for row in rows])
    after = machine.advance(net, state, lines, null_class(len(rows)))
    for row, new in zip(rows, after, strict=True):
        row.state = new
        row.cursor += 1


def answer_all(net: Network, requests: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """The responses to a whole batch, for servers that batch requests; rows that are done leave the forwards."""
    rows = [Row.start(request) for request in requests]
    while left := [row for row in rows if not row.done]:
        advance(net, left)
    return [row.reply for row in rows]


def warm_up(net: Network) -> None:
    """Run forwards of every width, so that the first requests do not pay for one-time preparations."""
    for width in range(1, CAP + 1):
        answer_all(net, [{"steps": 10, "seed": seed} for seed in range(width)])


def reply(image: Tensor) -> dict[str, str]:
    """The response with an image: little-endian float32 in base64."""
    return {"image": base64.b64encode(image.numpy().astype("<f4").tobytes()).decode()}


def read_reply(content: bytes) -> np.ndarray:
    """The values of the image in a response, flat."""
    return np.frombuffer(base64.b64decode(json.loads(content)["image"]), "<f4")
