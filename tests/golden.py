"""Plans written out as JSON, so that a diff shows which coefficient moved.

``python -m tests.golden`` rewrites the files; no test ever writes them.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from model.diffusion import inversion
from model.diffusion.plan import Clip, Plan
from model.diffusion.samplers import ddim, ddpm, dpmpp_2m, dpmpp_2m_sde, heun, obelm, pndm, unipc
from model.diffusion.schedule import NoiseSchedule

PLANS = Path(__file__).parent / "golden" / "plans.json"


def plans() -> dict[str, Plan]:
    """A few plans that between them use every kind of coefficient."""
    linear = NoiseSchedule.from_config({})
    velocity = NoiseSchedule.from_config({"prediction_type": "v_prediction"})
    return {
        "ddim, 5 steps, trailing": ddim(linear, 5, spacing="trailing"),
        "ddim, 10 steps, eta 0.5, clipped": ddim(linear, 10, eta=0.5, clip=Clip(1.0)),
        "ddpm, 10 steps, fixed_small": ddpm(linear, 10),
        "ddpm, 10 steps, fixed_large": ddpm(linear, 10, variance="fixed_large"),
        "ddim, 5 steps, trailing, v_prediction": ddim(velocity, 5, spacing="trailing"),
        "ddpm, 10 steps, learned_range, thresholded": ddpm(
            linear, 10, variance="learned_range", clip=Clip(1.5, quantile=0.995)
        ),
        "dpmpp_2m, 6 steps, order 3, trailing": dpmpp_2m(linear, 6, order=3, spacing="trailing"),
        "dpmpp_2m_sde, 4 steps, karras": dpmpp_2m_sde(linear, 4, spacing="karras"),
        "unipc, 5 steps, karras": unipc(linear, 5, spacing="karras"),
        "heun, 3 steps, trailing, clipped": heun(linear, 3, spacing="trailing", clip=Clip(1.0)),
        "pndm, 5 steps, warmup, trailing": pndm(linear, 5, warmup=True, spacing="trailing"),
        "obelm, 4 steps, trailing, paired": obelm(linear, 4, spacing="trailing", paired=True),
        "inversion obelm, 4 steps, trailing": inversion.obelm(linear, 4, spacing="trailing"),
        "inversion fixed_point, 3 steps, 2 refinements, trailing": inversion.fixed_point(
            linear, 3, refinements=2, spacing="trailing"
        ),
    }


def readable(plan: Plan) -> list[dict[str, Any]]:
    """Every coefficient of every step, by its letter."""
    steps: list[dict[str, Any]] = json.loads(json.dumps([asdict(step) for step in plan.steps]))
    return steps


if __name__ == "__main__":
    PLANS.parent.mkdir(exist_ok=True)
    content = {name: readable(plan) for name, plan in plans().items()}
    lines = [
        f"{json.dumps(name)}: [\n" + ",\n".join(f"  {json.dumps(step)}" for step in steps) + "\n]"
        for name, steps in content.items()
    ]
    PLANS.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"{PLANS.name}: {len(content)} plans")
