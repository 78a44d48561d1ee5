"""The server over HTTP: how long it takes to be ready, and mixed requests beside bare forwards of the same widths."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from typing import Any

import torch

from app.cli.loadtest import load
from app.cli.loadtest.report import outcomes
from app.cli.mix import MIX, Mix
from bench import timing
from bench.gpu import engine
from bench.gpu.bench import Bench
from bench.gpu.engine import Loaded
from bench.gpu.networks import Network
from bench.server import Served, server

IMAGES = 16  # of a request: at thousands of images a second, one at a time would measure HTTP alone
START_SECONDS = 120.0


def measure_start(network: Network, bench: Bench, found: dict[str, Any]) -> None:
    """Seconds from the command to readiness: with nothing compiled or calibrated before, and again."""
    checkpoint, kept = network.folder(bench.folder, bench.device), bench.folder / "kept"
    options = ["--checkpoint", str(checkpoint), "--device", str(bench.device), "--cache", str(kept)]
    options += bench.pick([], ["--threads", "1", "--max-width", "4"])
    for which in ("first", "again"):
        bench.progress(f"{which} start")
        began = time.monotonic()
        with server(*options, within=START_SECONDS, TRITON_CACHE_DIR=str(kept / "triton")):
            found[f"{which}_seconds"] = round(time.monotonic() - began, 2)


def measure_load(network: Network, bench: Bench, found: dict[str, Any]) -> None:
    """Clients in a closed loop keep the server busy; in the midst of that its own counters are read twice."""
    loaded = engine.load(bench, network)
    images, mix = bench.pick(IMAGES, 2), bench.pick(MIX, "2:0.6,4:0.3,8:0.1")
    # Twice as many rows as one forward takes, so that the next one is always full.
    clients = max(4, 2 * loaded.widths[-1] // images)
    found |= {"width": loaded.widths[-1], "clients": clients, "images_of_a_request": images, "mix": mix}
    with _server(bench, loaded) as served:
        target = load.Target(
            f"{served.base}/sample",
            lambda steps, seed: {"sampler": "ddim", "steps": steps, "seed": seed * images, "n": images},
            "application/x-npy",
        )
        window = bench.pick(max(3.0, min(15.0, bench.left() / 3)), 1.0)
        bench.progress(f"{clients} clients")
        found |= asyncio.run(_measure(served, target, Mix.parse(mix), clients, window))
        forwards = {int(width): count for width, count in found["forwards"].items()}
        bare = _bare(bench, loaded, forwards)
    found |= compare(forwards, found["rows_per_second"], Mix.parse(mix).mean, bare)


def compare(
    forwards: dict[int, float], rows_per_second: float, steps: float, bare: dict[int, float]
) -> dict[str, float]:
    """The served rate over that of full bare forwards of the same widths.

    Args:
        forwards: how many of each width.
        steps: of an image, on average.
        bare: seconds of a forward by width.
    """
    rows = sum(width * count for width, count in forwards.items())
    most = rows / sum(bare[width] * count for width, count in forwards.items())
    return {
        "images_per_second": rows_per_second / steps,
        "bare_images_per_second": most / steps,
        "share": rows_per_second / most,
    }


def _server(bench: Bench, loaded: Loaded) -> Any:
    """With the same calibration, which it finds on the disk."""
    wanted = loaded.wanted
    options = {
        "checkpoint": loaded.folder,
        "device": bench.device,
        "dtype": wanted.dtype,
        "max-width": wanted.max_width,
        "reproducible-width": wanted.reproducible_width,
        "cache": bench.folder / "calibrations",
        "log-level": "warning",
        **({"threads": wanted.threads} if wanted.threads else {}),
    }
    return server(*(str(each) for name, value in options.items() for each in (f"--{name}", value)))


@torch.inference_mode()
def _bare(bench: Bench, loaded: Loaded, widths: Iterable[int]) -> dict[int, float]:
    """Seconds of a bare forward by width; the server idles."""
    found = {}
    for width in widths:
        forward = loaded.bare(width)
        once = timing.device_seconds(forward, 2, bench.device)
        found[width] = timing.device_seconds(forward, bench.pick(max(3, int(0.1 / once)), 2), bench.device)
    return found


async def _measure(served: Served, target: load.Target, mix: Mix, clients: int, window: float) -> dict[str, Any]:
    """Forwards by width and rows a second, between two moments at which all clients are busy."""

    async def read() -> tuple[dict[tuple[str, ...], float], float, float]:
        forwards = await asyncio.to_thread(served.series, "unstir_forwards_total")
        return forwards, await asyncio.to_thread(served.metric, "unstir_rows_total"), time.perf_counter()

    warm = window / 3
    async with load.connected(target) as client:
        running = asyncio.create_task(load.closed_loop(client, mix, clients, 2 * warm + window, seed=1))
        await asyncio.sleep(warm)
        earlier, first, began = await read()
        await asyncio.sleep(window)
        later, last, ended = await read()
        result = await running
    ends = outcomes(result.records)
    return {
        "seconds": ended - began,
        "forwards": {
            width: count - earlier.get((width,), 0.0)
            for (width,), count in later.items()
            if count > earlier.get((width,), 0.0)
        },
        "rows_per_second": (last - first) / (ended - began),
        "requests": sum(ends.values()),
        "answered": ends["ok"],
    }
