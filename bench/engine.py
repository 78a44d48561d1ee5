"""What the engine costs, and what it saves.

Cost: one DDIM image through the engine, beside the same number of bare forwards of the same network. Saving: eight
unlike requests at once, beside the same eight one after another. Each pair runs in this process on one device,
alternated, and ratios are taken pair by pair, so that whatever else the machine is doing weighs on both. The last line
is JSON.
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

MIXED = [
    SampleRequest(sampler=sampler, steps=steps, seed=seed)
    for seed, (sampler, steps) in enumerate([("ddim", 10), ("ddim", 20), ("ddim", 50), ("ddpm", 200)] * 2)
]


class BeforeEachImage:
    """A device that runs the bare loop on the device thread just before each image's first step, and times it."""

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

    def read_output(self, lane: Lane) -> torch.Tensor:
        return self.device.read_output(lane)


def bare_forwards(service: Service, count: int) -> Callable[[], None]:
    """Of the network as the engine has it."""
    device = service.model.device
    net = build_networks(service.model.checkpoint, device, service.model.calibration).fast
    x = torch.randn(1, *service.model.checkpoint.shape, device=device)
    t = torch.zeros(1, device=device)
    y = (
        torch.zeros(1, dtype=torch.int64, device=device)
        if service.model.checkpoint.net.config.num_class_embeds
        else None
    )

    @torch.inference_mode()
    def run() -> None:
        for _ in range(count):
            out = net(x, t, y)
        out.sum().item()  # waits for the device

    return run


async def cost_of_an_image(service: Service, steps: int, repeats: int) -> tuple[list[float], list[float]]:
    """Ratios of an image's time to that of its bare forwards, run just before it; and the times."""
    request = SampleRequest(sampler="ddim", steps=steps, seed=1)
    worker = service.engine.worker
    device = worker.device = BeforeEachImage(worker.device, bare_forwards(service, steps))
    ratios, times = [], []
    for _ in range(repeats + 1):
        seconds = await timed(lambda: sample(service, request)) - device.seconds
        ratios.append(seconds / device.seconds)
        times.append(seconds)
    worker.device = device.device
    return ratios[1:], times[1:]


async def timed(work: Callable[[], Awaitable[object]]) -> float:
    began = time.perf_counter()
    await work()
    return time.perf_counter() - began


async def alternate(
    one: Callable[[], Awaitable[object]], other: Callable[[], Awaitable[object]], repeats: int
) -> list[float]:
    """Ratios one / other, each between two runs of the other. The first round warms up."""
    ratios = []
    for _ in range(repeats + 1):
        before, middle, after = await timed(other), await timed(one), await timed(other)
        ratios.append(2 * middle / (before + after))
    return ratios[1:]


async def measure(settings: Settings, steps: int, repeats: int) -> dict[str, object]:
    app = create_app(settings)
    async with app.router.lifespan_context(app):
        while app.state.lifecycle.unready:
            await asyncio.sleep(0.01)
        service = app.state.lifecycle.get_service()

        async def sequential() -> None:
            for mixed in MIXED:
                await sample(service, mixed)

        async def concurrent() -> None:
            await asyncio.gather(*(sample(service, mixed) for mixed in MIXED))

        cost, image = await cost_of_an_image(service, steps, repeats)
        saving = await alternate(concurrent, sequential, max(3, repeats // 6))
        widths = service.engine.forwards.fast
        return {
            "checkpoint": service.checkpoint.card.name,
            "dtype": service.calibration.dtype,
            "threads": service.calibration.threads,
            "steps": steps,
            "image_ms": round(1e3 * statistics.median(image), 1),
            "cost": summary(cost),
            "saving": summary(saving),
            "forward_ms": {w: round(1e3 * s, 2) for w, s in zip(widths.sizes, widths.seconds, strict=True)},
            "load_average": round(os.getloadavg()[0], 2),
            "torch": torch.__version__,
            "device": str(service.device),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
        }


def summary(ratios: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {"median": round(middle, 3), "q1": round(low, 3), "q3": round(high, 3), "repeats": len(ratios)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=20)
    arguments = parser.parse_args()
    facts = asyncio.run(measure(Settings(), arguments.steps, arguments.repeats))
    print(f"one DDIM-{facts['steps']} image, ms:                        {facts['image_ms']}")
    print(f"  beside as many bare forwards, ratio:          {facts['cost']}")
    print(f"eight unlike requests at once, beside in turn:  {facts['saving']}")
    print(f"forward by width, ms:                           {facts['forward_ms']}")
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
