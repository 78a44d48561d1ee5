"""What the engine costs: one DDIM picture through it, beside the same number of bare forwards of the same network.

Both run in this process on the same device, alternated, and the ratio is taken pair by pair, so that whatever else the
machine is doing weighs on both. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import time

import torch

from app import operations
from app.main import create_app
from app.schemas import SampleRequest
from app.settings import Settings


async def measure(settings: Settings, steps: int, repeats: int) -> dict[str, object]:
    app = create_app(settings)
    async with app.router.lifespan_context(app):
        service = app.state.service
        while service.unready:
            await asyncio.sleep(0.01)
        net, device = service.checkpoint.net, service.device
        x = torch.randn(1, *service.checkpoint.shape, device=device)
        t = torch.zeros(1, device=device)
        y = torch.zeros(1, dtype=torch.int64, device=device) if net.config.num_class_embeds else None

        @torch.inference_mode()
        def bare() -> float:
            began = time.perf_counter()
            for _ in range(steps):
                out = net(x, t, y)
            out.sum().item()  # waits for the device
            return time.perf_counter() - began

        async def served(request: SampleRequest) -> float:
            began = time.perf_counter()
            await operations.sample(service, request)
            return time.perf_counter() - began

        request = SampleRequest(sampler="ddim", steps=steps, seed=1)
        ratios, times = [], []
        for repeat in range(repeats + 1):
            # On a thread of its own, as the engine's forwards are.
            one = await asyncio.to_thread(bare)
            two = await served(request)
            three = await asyncio.to_thread(bare)
            if repeat:  # the first warms up
                ratios.append(two / ((one + three) / 2))
                times.append(two)
    return {
        "steps": steps,
        "repeats": repeats,
        "picture_ms": round(1e3 * statistics.median(times), 2),
        "ratio_median": round(statistics.median(ratios), 4),
        "ratio_quartiles": [round(q, 4) for q in statistics.quantiles(ratios, n=4)[::2]],
        "load_average": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
        "device": str(device),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=20)
    arguments = parser.parse_args()
    facts = asyncio.run(measure(Settings(), arguments.steps, arguments.repeats))
    print(f"one DDIM-{facts['steps']} picture through the engine: {facts['picture_ms']} ms")
    print(f"in bare forwards of the same network: {facts['ratio_median']}, quartiles {facts['ratio_quartiles']}")
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
