"""What the engine costs, and what batching saves.

Cost: one DDIM image through the engine, beside as many bare forwards of the same network. Saving: eight unlike requests
at once, beside the same eight one after another. Each pair alternates in this process on one device, and ratios are
taken pair by pair, so that other load on the machine affects both. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import time
from collections.abc import Awaitable, Callable

import torch

from app.api.app import create_app
from app.engine.calibration import build_networks
from app.engine.jobs import Lane
from app.engine.worker import Device, TickHandle
from app.operations.requests import SampleRequest
from app.operations.sample import sample
from app.operations.service import Service
from app.settings import Settings
from bench.timing import summarize, summarize_ratios

MIXED = [
    SampleRequest(sampler=sampler, steps=steps, seed=seed)
    for seed, (sampler, steps) in enumerate([("ddim", 10), ("ddim", 20), ("ddim", 50), ("ddpm", 200)] * 2)
]


class BareLoopFirst:
    """A device that runs and times the bare loop on the device thread, just before the first step of each image."""

    def __init__(self, device: Device, bare: Callable[[], None]) -> None:
        self.device = device
        self.ahead = device.ahead
        self.bare = bare
        self.seconds = 0.0

    def advance(self, lanes: list[Lane], width: int, exact: bool) -> TickHandle:
        if not lanes[0].cursor:
            began = time.perf_counter()
            self.bare()
            self.seconds = time.perf_counter() - began
        return self.device.advance(lanes, width, exact)

    def check(self) -> None:
        """As the device that it stands before."""
        self.device.check()

    def read_output(self, lane: Lane) -> torch.Tensor:
        return self.device.read_output(lane)


def bare_loop(service: Service, count: int) -> Callable[[], None]:
    """So many forwards of one row of the network as the engine has it."""
    model, device = service.model, service.model.device
    net = build_networks(model.checkpoint, device, model.calibration).fast
    x = torch.randn(1, *model.checkpoint.shape, device=device)
    t = torch.zeros(1, device=device)
    y = torch.zeros(1, dtype=torch.int64, device=device) if model.checkpoint.net.config.num_class_embeds else None

    @torch.inference_mode()
    def run() -> None:
        for _ in range(count):
            out = net(x, t, y)
        out.sum().item()  # waits for the device

    return run


async def measure_cost(service: Service, steps: int, repeats: int) -> tuple[list[float], list[float]]:
    """Seconds of an image, and of the bare loop just before it; the first pair warms up."""
    request = SampleRequest(sampler="ddim", steps=steps, seed=1)
    worker = service.engine.worker
    device = worker.device = BareLoopFirst(worker.device, bare_loop(service, steps))
    images, loops = [], []
    for _ in range(repeats + 1):
        seconds = await timed(lambda: sample(service, request))
        images.append(seconds - device.seconds)
        loops.append(device.seconds)
    worker.device = device.device
    return images[1:], loops[1:]


async def timed(work: Callable[[], Awaitable[object]]) -> float:
    began = time.perf_counter()
    await work()
    return time.perf_counter() - began


async def measure_saving(service: Service, repeats: int) -> list[float]:
    """Ratios of the requests at once to those one after another, each between two runs of the latter."""

    async def sequential() -> None:
        for mixed in MIXED:
            await sample(service, mixed)

    async def concurrent() -> None:
        await asyncio.gather(*(sample(service, mixed) for mixed in MIXED))

    ratios = []
    for _ in range(repeats + 1):
        before, middle, after = await timed(sequential), await timed(concurrent), await timed(sequential)
        ratios.append(2 * middle / (before + after))
    return ratios[1:]


async def measure(settings: Settings, steps: int, repeats: int) -> dict[str, object]:
    app = create_app(settings)
    async with app.router.lifespan_context(app):
        while app.state.lifecycle.unready:
            await asyncio.sleep(0.01)
        service = app.state.lifecycle.get_service()
        images, loops = await measure_cost(service, steps, repeats)
        saving = await measure_saving(service, max(3, repeats // 6))
        widths = service.engine.forwards.fast
        return {
            "checkpoint": service.model.checkpoint.card.name,
            "dtype": service.model.calibration.dtype,
            "threads": service.model.calibration.threads,
            "steps": steps,
            "image_ms": round(1e3 * statistics.median(images), 1),
            "cost": summarize_ratios(images, loops),
            "saving": summarize(saving),
            "forward_ms": {w: round(1e3 * s, 2) for w, s in zip(widths.sizes, widths.seconds, strict=True)},
            "load_average": round(os.getloadavg()[0], 2),
            "torch": torch.__version__,
            "device": str(service.model.device),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=20)
    arguments = parser.parse_args()
    facts = asyncio.run(measure(Settings(), arguments.steps, arguments.repeats))
    print(f"one DDIM-{facts['steps']} image, ms:                           {facts['image_ms']}")
    print(f"  beside as many bare forwards, ratio:           {facts['cost']}")
    print(f"eight unlike requests at once, beside in sequence:  {facts['saving']}")
    print(f"forward by width, ms:                            {facts['forward_ms']}")
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
