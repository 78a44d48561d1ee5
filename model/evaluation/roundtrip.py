"""Held-out images inverted and decoded: how much of them each inversion recovers, with how many evaluations."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model import images
from model.checkpoint import Checkpoint
from model.data import Dataset
from model.diffusion import inversion, machine, samplers
from model.diffusion.plan import Plan
from model.diffusion.schedule import NoiseSchedule, covering_spacing
from model.output import ProgressBar, write_atomically

CHUNK = 32


@dataclass(frozen=True)
class RoundTrip:
    """An inversion, and the sampler that decodes its latent.

    Attributes:
        slots: of the latent; 2 where decoding needs a pair of states.
    """

    method: str
    steps: int
    encode: Plan
    decode: Plan
    slots: int = 1


def round_trips(schedule: NoiseSchedule, steps: Sequence[int], middle: int = 50) -> Iterator[RoundTrip]:
    """Every method with each number of steps; variants of less interest with ``middle`` steps only."""
    for n in steps:
        spacing = covering_spacing(schedule.T, n)
        decode = samplers.ddim(schedule, n, spacing=spacing)
        yield RoundTrip("ddim", n, inversion.ddim(schedule, n, spacing=spacing), decode)
        if n == middle:
            yield RoundTrip("ddim, source time", n, inversion.ddim(schedule, n, time="source", spacing=spacing), decode)
        for k in (1, 3, 10) if n == middle else (1, 3):
            plan = inversion.fixed_point(schedule, n, refinements=k, spacing=spacing)
            yield RoundTrip(f"fixed_point, {k} refinement{'s' * (k > 1)}", n, plan, decode)
        pair = inversion.obelm(schedule, n, spacing=spacing)
        yield RoundTrip("obelm, pair", n, pair, samplers.obelm(schedule, n, paired=True, spacing=spacing), slots=2)
        if n == middle:
            yield RoundTrip("obelm, decoded by ddim", n, pair, decode)


@torch.inference_mode()
def measure(
    checkpoint: Checkpoint, todo: Sequence[RoundTrip], held_out: Dataset, count: int, folder: Path, device: torch.device
) -> list[dict[str, Any]]:
    """Round trips of the first ``count`` images, or of all if there are fewer, in float32.

    Args:
        folder: keeps the results; its name must tell these images from others.
    """
    count = min(count, len(held_out.images))
    x_0 = images.from_uint8(held_out.images[:count])
    conditional = checkpoint.net.config.num_class_embeds is not None
    given = held_out.labels[:count] if held_out.labels is not None else np.full(count, checkpoint.card.null_class or 0)
    y = torch.from_numpy(given).to(device) if conditional else None
    rows = []
    missing = [trip for trip in todo if not _path(folder, trip, count).exists()]
    total = sum(trip.encode.nfe + trip.decode.nfe for trip in missing) * count
    with ProgressBar(total, "round trips", "NFE") as bar:
        for trip in todo:
            path = _path(folder, trip, count)
            if trip in missing:
                parts = []
                for first in range(0, count, CHUNK):
                    part = slice(first, first + CHUNK)
                    parts.append(_round_trip(checkpoint, trip, x_0[part].to(device), None if y is None else y[part]))
                    done = (trip.encode.nfe + trip.decode.nfe) * len(parts[-1]["psnr"])
                    bar.update(done, f"{trip.method}, {trip.steps} steps")
                write_atomically(path, json.dumps({key: [v for p in parts for v in p[key]] for key in parts[0]}))
            rows.append(_summary(trip, json.loads(path.read_text())))
    return rows


def _round_trip(checkpoint: Checkpoint, trip: RoundTrip, x_0: Tensor, y: Tensor | None) -> dict[str, list[float]]:
    slots = machine.run_slots(checkpoint.net, trip.encode, x_0[:, None], y)
    decoded = machine.run_slots(checkpoint.net, trip.decode, slots[:, : trip.slots], y)[:, 0]
    mse = (decoded - x_0).square().mean(dim=(1, 2, 3))
    wrong = (images.to_uint8(decoded) != images.to_uint8(x_0)).reshape(len(x_0), -1).any(axis=1)
    found = {
        "psnr": 10 * torch.log10(4 / mse.clamp(min=1e-20)),  # images are in -1..1, so the peak is 2
        "max_error": (decoded - x_0).abs().amax(dim=(1, 2, 3)),
        "norm": slots[:, 0].square().mean(dim=(1, 2, 3)),
        "exact": torch.from_numpy(~wrong).double(),
    }
    if trip.method.startswith("fixed_point"):
        found["residual"] = inversion.residual(slots)
    return {key: value.double().tolist() for key, value in found.items()}


def _summary(trip: RoundTrip, found: dict[str, list[float]]) -> dict[str, Any]:
    row = {
        "method": trip.method,
        "steps": trip.steps,
        "nfe": trip.encode.nfe,
        "decode_nfe": trip.decode.nfe,
        "images": len(found["psnr"]),
        "psnr": {
            "median": round(float(np.median(found["psnr"])), 2),
            "low": round(float(np.percentile(found["psnr"], 5)), 2),
            "least": round(min(found["psnr"]), 2),
        },
        "max_error": float(f"{max(found['max_error']):.3g}"),
        "exact": round(float(np.mean(found["exact"])), 4),
        "norm": round(float(np.median(found["norm"])), 3),
    }
    if "residual" in found:
        row["residual"] = float(f"{np.median(found['residual']):.3g}")
    return row


def _path(folder: Path, trip: RoundTrip, count: int) -> Path:
    return folder / f"{trip.encode.digest}-{trip.decode.digest}-{trip.slots}-{count}.json"
