"""One network in Unstir and in diffusers: its forwards, one image alone, and as many as the card can batch."""

from __future__ import annotations

import time
from collections.abc import Callable, Container
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from bench import timing
from bench.gpu import engine, floor, pipelines
from bench.gpu.bench import Bench
from bench.gpu.engine import LaneLoop, Loaded
from bench.gpu.networks import Network, parameters
from bench.gpu.pipelines import LeftOut


def measure(network: Network, bench: Bench, found: dict[str, Any]) -> None:
    work = floor.work(network.config)
    found |= {
        "title": network.title,
        "parameters": parameters(network.config),
        "row_operations": work.row_operations,
        "row_bytes": work.row_bytes,
        "weight_bytes": work.weight_bytes,
        "steps": bench.pick(50, 3),
    }
    began = time.monotonic()
    loaded = engine.load(bench, network)
    widest = loaded.widths[-1]
    found |= {"start_seconds": time.monotonic() - began, "dtype": loaded.calibration.dtype, "width": widest}
    bench.progress("forwards")
    forwards = engine.forwards(bench, loaded, 0.15 * bench.left())
    found["forward"] = {str(width): timing.summarize(times) for width, times in forwards.items()}
    bench.progress("ticks")
    found["tick"] = {
        str(width): engine.ticks(bench, loaded, width, 0.06 * bench.left()) for width in sorted({1, widest})
    }
    bench.progress("diffusers")
    found["left_out"] = {}
    who = contestants(bench, loaded, found)
    bench.progress("one image")
    found["latency"] = _sample(bench, who, 1, found["steps"], 0.4 * bench.left())
    bench.progress("many images")
    found["saturated"] = _sample(bench, who, widest, found["steps"], 0.8 * bench.left())


@dataclass(frozen=True)
class Contestant:
    """``sample(width, steps)`` samples so many images at once, at the widths that it can."""

    sample: Callable[[int, int], object]
    widths: Container[int]


def contestants(bench: Bench, loaded: Loaded, found: dict[str, Any]) -> dict[str, Contestant]:
    """Unstir and diffusers; who cannot take part, or not at every width, is named under ``left_out``."""
    loop, widths, out = LaneLoop(loaded.runner), sorted({1, loaded.widths[-1]}), found["left_out"]
    plan = loaded.plan("ddim", found["steps"])

    @torch.inference_mode()
    def ours(width: int, _: int) -> object:
        return loop.run([loaded.lane(plan, seed) for seed in range(width)], width)

    who = {"unstir": Contestant(ours, widths)}
    try:
        plain = pipelines.eager(loaded)
    except LeftOut as error:
        out["diffusers"] = out["compiled"] = str(error)
        return who
    who["diffusers"] = Contestant(plain.sample, widths)
    bench.progress("torch.compile")
    limit = 0.6 * bench.left()
    try:
        quick, took = pipelines.compiled(bench, plain, widths, limit)
    except LeftOut as error:
        out["compiled"] = str(error)
        return who
    who["compiled"] = Contestant(quick.sample, took)
    found["compile_seconds"] = {str(width): each for width, each in took.items()}
    if missing := [width for width in widths if width not in took]:
        out["compiled"] = f"not compiled within {limit:.0f} s for {', '.join(map(str, missing))} rows"
    return who


def _sample(bench: Bench, who: dict[str, Contestant], width: int, steps: int, limit: float) -> dict[str, Any]:
    """Seconds from the request to its values on the host, and how many times longer the others take."""
    measures = {
        name: partial(timing.wall_seconds, partial(each.sample, width, steps), bench.device)
        for name, each in who.items()
        if width in each.widths
    }
    times = timing.alternate(measures, bench.pick(21, 2), limit)
    ratios = {name: timing.summarize_ratios(each, times["unstir"]) for name, each in times.items() if name != "unstir"}
    seconds = {name: timing.summarize(each) for name, each in times.items()}
    return {"width": width, "seconds": seconds, "times_faster": ratios}
