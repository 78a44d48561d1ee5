"""The engine without HTTP: a network as it is served, and lanes that ride on its runner as fast as it takes them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from app.engine.calibration import Calibration, CalibrationOptions, build_networks, calibrate
from app.engine.jobs import Lane
from app.engine.networks import Dtype, Networks
from app.engine.runner import Runner
from app.engine.worker import Device, TickHandle
from bench.gpu import clock
from bench.gpu.bench import Bench
from model import checkpoint
from model.checkpoint import Checkpoint
from model.diffusion.defaults import SamplingDefaults
from model.diffusion.plan import Plan
from model.diffusion.samplers import SAMPLERS

CANONICAL = 4  # rows of a forward that reproducible lanes ride in; what the server has by default


class Rides:
    """Takes lanes through their walks as the device thread does: some ticks ahead of what the device has done."""

    def __init__(self, runner: Device) -> None:
        self.runner = runner
        self._flights: deque[TickHandle] = deque()

    def tick(self, lanes: Sequence[Lane], width: int, *, exact: bool = False) -> None:
        """One step of every lane; it may not have been taken yet when this returns."""
        self._flights.append(self.runner.advance(list(lanes), width, exact))
        while len(self._flights) > self.runner.ahead:
            self._flights.popleft().wait()

    def land(self) -> None:
        """Wait for all ticks."""
        while self._flights:
            self._flights.popleft().wait()

    def walk(self, lanes: Sequence[Lane], width: int, *, exact: bool = False) -> list[Tensor]:
        """Take all lanes to their ends at once; what each came to, [returns, C, H, W] on the CPU."""
        while riders := [lane for lane in lanes if lane.remaining]:
            self.tick(riders, width, exact=exact)
        self.land()
        return [self.runner.read_output(lane) for lane in lanes]


@dataclass(frozen=True)
class Served:
    """A network as it is served.

    Attributes:
        wanted: what its calibration was asked for.
    """

    folder: Path
    checkpoint: Checkpoint
    wanted: CalibrationOptions
    calibration: Calibration
    networks: Networks
    runner: Runner

    @property
    def widths(self) -> tuple[int, ...]:
        """That its forwards may have; the last is that of saturation."""
        return tuple(self.calibration.fast)

    @property
    def classes(self) -> int | None:
        """That a label may name."""
        known = self.checkpoint.net.config.num_class_embeds
        return None if known is None else len(self.checkpoint.card.classes) or known

    def plan(self, sampler: str, steps: int, **options: Any) -> Plan:
        """The walk as the checkpoint's habits have it."""
        found, schedule = SAMPLERS[sampler], self.checkpoint.schedule
        habits = SamplingDefaults.from_config(self.checkpoint.scheduler_config)
        return found.compile(schedule, steps, **habits.options(found, steps, schedule.T), **options)

    def lane(self, plan: Plan, seed: int, **options: Any) -> Lane:
        """An image of some class, where there are classes."""
        return Lane(plan, seed, None if self.classes is None else seed % self.classes, **options)

    def rows(self, width: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """(x, t, y) of made-up images at levels that differ: x on the device, the others on the host."""
        T, index = self.checkpoint.schedule.T, torch.arange(width)
        x = torch.randn(width, *self.checkpoint.shape, generator=torch.Generator().manual_seed(0))
        y = None if self.classes is None else index.remainder(self.classes)
        return x.to(self.runner.device), index.mul(T // 8 + 1).remainder(T).float(), y

    def bare(self, width: int) -> Callable[[], Tensor]:
        """A forward of such rows, of which nothing but the network is left: what t and y say is known already."""
        x, t, y = self.rows(width)
        return partial(self.networks.fast.forward, x, self.networks.fast.conditioning(t, y))


def load(bench: Bench, folder: Path, max_width: int, *, fast: Dtype = "bfloat16") -> Served:
    """Read and calibrate it, as the server does at its start."""
    loaded = checkpoint.load(folder, bench.device)
    threads = 1 if bench.tiny else None
    wanted = CalibrationOptions(max_width, min(CANONICAL, max_width), threads, fast)
    found = calibrate(loaded, bench.device, wanted, bench.folder / "calibrations")
    forms = build_networks(loaded, bench.device, found)
    return Served(folder, loaded, wanted, found, forms, Runner(loaded, bench.device, forms))


@torch.inference_mode()
def forwards(bench: Bench, served: Served, limit: float) -> dict[int, list[float]]:
    """Seconds of bare forwards by width; widths take turns."""
    contestants = {}
    for width in served.widths:
        times = bench.of(max(3, min(50, int(0.03 / served.calibration.fast[width]))), 2)
        contestants[str(width)] = partial(clock.seconds, served.bare(width), times, bench.device)
    found = clock.in_rounds(contestants, bench.of(15, 2), limit)
    return {int(width): times for width, times in found.items()}


@torch.inference_mode()
def ticks(bench: Bench, served: Served, width: int, limit: float) -> dict[str, Any]:
    """What a tick of unlike lanes takes in the long run, beside as many bare forwards of that width, in turns.

    Every lane walks another number of steps, so that no two rows of a tick have the same coefficients.
    """
    rides, bare, steps = Rides(served.runner), served.bare(width), bench.of(40, 2)
    plans = [served.plan("ddim", 500 + i) for i in range(min(width, 64))]

    def riding() -> float:
        lanes = [served.lane(plans[i % len(plans)], i) for i in range(width)]
        rides.tick(lanes, width)  # draws what the walks begin with
        rides.land()

        def some() -> None:
            for _ in range(steps):
                rides.tick(lanes, width)
            rides.land()

        found = clock.elapsed(some, bench.device) / steps
        for lane in lanes:
            lane.release()
        return found

    turns: dict[str, Callable[[], float]] = {
        "tick": riding,
        "forward": partial(clock.seconds, bare, steps, bench.device),
    }
    found = clock.in_rounds(turns, bench.of(15, 2), limit)
    over = [tick - forward for tick, forward in zip(found["tick"], found["forward"], strict=True)]
    return {
        "width": width,
        "tick": clock.summary(found["tick"]),
        "forward": clock.summary(found["forward"]),
        "overhead": clock.summary(over),
        "share": clock.ratios(over, found["forward"]),
    }
