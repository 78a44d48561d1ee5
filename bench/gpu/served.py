"""Mixed requests over HTTP, beside the bare network at the widths that the server used for them."""

from __future__ import annotations

import asyncio
import re
import time
from collections import Counter
from collections.abc import Iterable
from typing import Any

import httpx
import torch

from app.cli.loadtest import load
from app.cli.loadtest.report import outcomes
from app.cli.mix import MIX, Mix
from bench import server
from bench.gpu import beside, clock
from bench.gpu.bench import Bench
from bench.gpu.engine import Served
from bench.gpu.networks import Network

IMAGES = 16  # of a request: at thousands of images a second, one at a time would measure HTTP alone
NPY = "application/x-npy"


def measure(network: Network, bench: Bench, found: dict[str, Any]) -> None:
    """Clients who ask again at once keep the server busy; in the midst of that its own counters are read twice."""
    ours = beside.load(bench, network)
    images = bench.of(IMAGES, 2)
    # Twice as many rows as one forward takes, so that there is always somebody for the next.
    clients = max(4, 2 * ours.widths[-1] // images)
    mix = bench.of(MIX, "2:0.6,4:0.3,8:0.1")
    found |= {"width": ours.widths[-1], "clients": clients, "images_of_a_request": images, "mix": mix}
    with _server(bench, ours) as served:
        target = load.Target(
            f"{served.base}/sample",
            lambda steps, seed: {"sampler": "ddim", "steps": steps, "seed": seed * images, "n": images},
            NPY,
        )
        bench.tell("bare forwards")
        before = _bare(bench, ours, ours.widths)
        window = bench.of(max(3.0, min(15.0, bench.left() / 3)), 1.0)
        bench.tell(f"{clients} clients")
        found |= asyncio.run(_loaded(served.base, target, Mix.parse(mix), clients, window))
        forwards = {int(width): count for width, count in found["forwards"].items()}
        after = _bare(bench, ours, forwards)
    bare = {width: (before.get(width, each) + each) / 2 for width, each in after.items()}
    found |= beside_bare(forwards, found["rows_per_second"], Mix.parse(mix).mean, bare)


def beside_bare(
    forwards: dict[int, float], rows_per_second: float, steps: float, bare: dict[int, float]
) -> dict[str, float]:
    """What was served over what full forwards of the same widths, one after another, would have done.

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


def _server(bench: Bench, ours: Served) -> Any:
    """Calibrated as ours was: it finds that on the disk."""
    wanted = ours.wanted
    options = {
        "checkpoint": ours.folder,
        "device": bench.device,
        "dtype": wanted.dtype,
        "max-width": wanted.max_width,
        "reproducible-width": wanted.reproducible_width,
        "cache": bench.folder / "calibrations",
        "log-level": "warning",
        **({"threads": wanted.threads} if wanted.threads else {}),
    }
    return server.server(*(str(each) for name, value in options.items() for each in (f"--{name}", value)))


@torch.inference_mode()
def _bare(bench: Bench, ours: Served, widths: Iterable[int]) -> dict[int, float]:
    """Seconds of a bare forward by width; the server idles."""
    found = {}
    for width in widths:
        forward = ours.bare(width)
        once = clock.seconds(forward, 2, bench.device)
        found[width] = clock.seconds(forward, bench.of(max(3, int(0.1 / once)), 2), bench.device)
    return found


async def _loaded(base: str, target: load.Target, mix: Mix, clients: int, window: float) -> dict[str, Any]:
    """Forwards by width and rows a second, between two moments at which all clients are at it."""
    warm = window / 3
    async with load.connected(target) as client, httpx.AsyncClient(base_url=base, trust_env=False) as http:
        running = asyncio.create_task(load.closed_loop(client, mix, clients, 2 * warm + window, seed=1))
        await asyncio.sleep(warm)
        first, began = (await http.get("/metrics")).text, time.perf_counter()
        await asyncio.sleep(window)
        last, seconds = (await http.get("/metrics")).text, time.perf_counter() - began
        result = await running
    forwards, earlier = _forwards(last), _forwards(first)
    ends = outcomes(result.records)
    return {
        "seconds": seconds,
        "forwards": {str(width): count - earlier[width] for width, count in forwards.items() if count > earlier[width]},
        "rows_per_second": (_total(last, "rows_total") - _total(first, "rows_total")) / seconds,
        "requests": sum(ends.values()),
        "answered": ends["ok"],
    }


def _forwards(metrics: str) -> Counter[int]:
    found = re.findall(r'^unstir_forwards_total\{width="(\d+)"\} (\S+)$', metrics, re.MULTILINE)
    return Counter({int(width): int(float(count)) for width, count in found})


def _total(metrics: str, name: str) -> float:
    return sum(map(float, re.findall(rf"^unstir_{name}(?:\{{.*\}})? (\S+)$", metrics, re.MULTILINE)))
