"""One network, ours beside diffusers': its forwards, one image alone, and as many as the card can take."""

from __future__ import annotations

import time
from collections.abc import Callable, Container
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from bench.gpu import clock, engine, floor, pipelines
from bench.gpu.bench import Bench
from bench.gpu.engine import Rides, Served
from bench.gpu.networks import Network, parameters
from bench.gpu.pipelines import LeftOut

STEPS = 50


def measure(network: Network, bench: Bench, found: dict[str, Any]) -> None:
    """Everything about one network; each figure is there as soon as it is known."""
    work = floor.work(network.config)
    found |= {
        "parameters": parameters(network.config),
        "row_operations": work.row_operations,
        "row_bytes": work.row_bytes,
        "weight_bytes": work.weight_bytes,
        "steps": bench.of(STEPS, 3),
    }
    began = time.monotonic()
    served = load(bench, network)
    widest = served.widths[-1]
    found |= {"start_seconds": time.monotonic() - began, "dtype": served.calibration.dtype, "width": widest}
    bench.tell("forwards")
    forwards = engine.forwards(bench, served, 0.15 * bench.left())
    found["forward"] = {str(width): clock.summary(times) for width, times in forwards.items()}
    bench.tell("ticks")
    found["tick"] = {
        str(width): engine.ticks(bench, served, width, 0.06 * bench.left()) for width in sorted({1, widest})
    }
    bench.tell("diffusers")
    found["left_out"] = {}
    walks = contestants(bench, served, found)
    bench.tell("one image")
    found["latency"] = _walks(bench, walks, 1, found["steps"], 0.4 * bench.left())
    bench.tell("many images")
    found["saturated"] = _walks(bench, walks, widest, found["steps"], 0.8 * bench.left())


def load(bench: Bench, network: Network) -> Served:
    """As the server would."""
    return engine.load(bench, network.folder(bench.folder, bench.device), network.max_width)


@dataclass(frozen=True)
class Contestant:
    """One who takes so many images through so many steps: ``walk(width, steps)``, at the widths that it can."""

    walk: Callable[[int, int], object]
    widths: Container[int]


def contestants(bench: Bench, served: Served, found: dict[str, Any]) -> dict[str, Contestant]:
    """Ours and diffusers'; who cannot take part, or not at every width, is named under ``left_out``."""
    rides, widths, out = Rides(served.runner), sorted({1, served.widths[-1]}), found["left_out"]
    plan = served.plan("ddim", found["steps"])

    @torch.inference_mode()
    def ours(width: int, _: int) -> object:
        return rides.walk([served.lane(plan, seed) for seed in range(width)], width)

    who = {"unstir": Contestant(ours, widths)}
    try:
        plain = pipelines.eager(served)
    except LeftOut as error:
        out["diffusers"] = out["compiled"] = str(error)
        return who
    who["diffusers"] = Contestant(plain.walk, widths)
    bench.tell("torch.compile")
    limit = 0.6 * bench.left()
    try:
        quick, took = pipelines.compiled(bench, plain, widths, limit)
    except LeftOut as error:
        out["compiled"] = str(error)
        return who
    who["compiled"] = Contestant(quick.walk, took)
    found["compile_seconds"] = {str(width): each for width, each in took.items()}
    if missing := [width for width in widths if width not in took]:
        out["compiled"] = f"not compiled within {limit:.0f} s for {', '.join(map(str, missing))} rows"
    return who


def _walks(bench: Bench, who: dict[str, Contestant], width: int, steps: int, limit: float) -> dict[str, Any]:
    """Seconds from the request to its numbers on the host, and how many times longer the others take than ours."""
    turns = {
        name: partial(clock.elapsed, partial(each.walk, width, steps), bench.device)
        for name, each in who.items()
        if width in each.widths
    }
    times = clock.in_rounds(turns, bench.of(21, 2), limit)
    return {
        "width": width,
        "seconds": {name: clock.summary(each) for name, each in times.items()},
        "times_faster": {name: clock.ratios(each, times["unstir"]) for name, each in times.items() if name != "unstir"},
    }
