"""The engine without HTTP: a network as it is served, and lanes that advance on its runner as fast as it can."""

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
from app.engine.networks import Networks
from app.engine.runner import Runner
from app.engine.worker import Device, TickHandle
from bench import timing
from bench.gpu.bench import Bench
from bench.gpu.networks import Network
from model import checkpoint
from model.checkpoint import Checkpoint
from model.diffusion.plan import Plan
from model.diffusion.samplers import SAMPLERS

CANONICAL = 4  # rows of a forward for reproducible lanes; the server's default


class LaneLoop:
    """Advances lanes as the device thread does: some ticks ahead of what the device has computed."""

    def __init__(self, runner: Device) -> None:
        self.runner = runner
        self._pending: deque[TickHandle] = deque()

    def tick(self, lanes: Sequence[Lane], width: int, *, exact: bool = False) -> None:
        """One step of every lane; it may not be computed yet when this returns."""
        self._pending.append(self.runner.advance(list(lanes), width, exact))
        while len(self._pending) > self.runner.ahead:
            self._pending.popleft().wait()

    def wait(self) -> None:
        while self._pending:
            self._pending.popleft().wait()

    def run(self, lanes: Sequence[Lane], width: int, *, exact: bool = False) -> list[Tensor]:
        """Finish all lanes at once; the outputs of each, [returns, C, H, W] on the CPU."""
        while batch := [lane for lane in lanes if lane.remaining]:
            self.tick(batch, width, exact=exact)
        self.wait()
        return [self.runner.read_output(lane) for lane in lanes]


@dataclass(frozen=True)
class Loaded:
    """A network as it is served; ``wanted`` is what its calibration was asked for."""

    folder: Path
    checkpoint: Checkpoint
    wanted: CalibrationOptions
    calibration: Calibration
    nets: Networks
    runner: Runner

    @property
    def widths(self) -> tuple[int, ...]:
        """Of its forwards, rising; the last is that of saturation."""
        return tuple(self.calibration.fast)

    @property
    def classes(self) -> int | None:
        """How many a label may name."""
        known = self.checkpoint.net.config.num_class_embeds
        return None if known is None else len(self.checkpoint.card.classes) or known

    def plan(self, sampler: str, steps: int, **options: Any) -> Plan:
        """With the defaults of the checkpoint's scheduler config."""
        found, schedule = SAMPLERS[sampler], self.checkpoint.schedule
        defaults = self.checkpoint.defaults
        return found.compile(schedule, steps, **defaults.options(found, steps, schedule.T), **options)

    def lane(self, plan: Plan, seed: int, **options: Any) -> Lane:
        """Of class ``seed`` modulo their number, where there are classes."""
        return Lane(plan, seed, None if self.classes is None else seed % self.classes, **options)

    def inputs(self, width: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """(x, t, y) of random images at different noise levels: x on the device, the others on the host."""
        T, index = self.checkpoint.schedule.T, torch.arange(width)
        x = torch.randn(width, *self.checkpoint.shape, generator=torch.Generator().manual_seed(0))
        y = None if self.classes is None else index.remainder(self.classes)
        return x.to(self.runner.device), index.mul(T // 8 + 1).remainder(T).float(), y

    def bare(self, width: int) -> Callable[[], Tensor]:
        """A forward of such rows, whose conditioning is computed already."""
        x, t, y = self.inputs(width)
        return partial(self.nets.fast.forward, x, self.nets.fast.conditioning(t, y))


def load(bench: Bench, network: Network, max_width: int | None = None) -> Loaded:
    """Read and calibrate it, as the server does at its start."""
    folder = network.folder(bench.folder, bench.device)
    loaded = checkpoint.load(folder, bench.device)
    most = max_width or network.max_width
    wanted = CalibrationOptions(most, min(CANONICAL, most), 1 if bench.tiny else None, "bfloat16")
    found = calibrate(loaded, bench.device, wanted, bench.folder / "calibrations")
    forms = build_networks(loaded, bench.device, found)
    return Loaded(folder, loaded, wanted, found, forms, Runner(loaded, bench.device, forms))


@torch.inference_mode()
def forwards(bench: Bench, loaded: Loaded, limit: float) -> dict[int, list[float]]:
    """Seconds of bare forwards by width; widths alternate."""
    measures = {}
    for width in loaded.widths:
        times = bench.pick(max(3, min(50, int(0.03 / loaded.calibration.fast[width]))), 2)
        measures[str(width)] = partial(timing.device_seconds, loaded.bare(width), times, bench.device)
    found = timing.alternate(measures, bench.pick(15, 2), limit)
    return {int(width): times for width, times in found.items()}


@torch.inference_mode()
def ticks(bench: Bench, loaded: Loaded, width: int, limit: float) -> dict[str, Any]:
    """Seconds of a tick in a long run, beside as many bare forwards of that width.

    Every lane has another number of steps, so that no two rows of a tick have the same coefficients.
    """
    loop, bare, steps = LaneLoop(loaded.runner), loaded.bare(width), bench.pick(40, 2)
    plans = [loaded.plan("ddim", 500 + i) for i in range(min(width, 64))]

    def tick() -> float:
        lanes = [loaded.lane(plans[i % len(plans)], i) for i in range(width)]
        loop.tick(lanes, width)  # draws the first noise
        loop.wait()

        def several() -> None:
            for _ in range(steps):
                loop.tick(lanes, width)
            loop.wait()

        found = timing.wall_seconds(several, bench.device) / steps
        for lane in lanes:
            lane.release()
        return found

    forward = partial(timing.device_seconds, bare, steps, bench.device)
    measures: dict[str, Callable[[], float]] = {"tick": tick, "forward": forward}
    found = timing.alternate(measures, bench.pick(15, 2), limit)
    over = [tick - forward for tick, forward in zip(found["tick"], found["forward"], strict=True)]
    return {
        "width": width,
        "tick": timing.summarize(found["tick"]),
        "forward": timing.summarize(found["forward"]),
        "overhead": timing.summarize(over),
        "share": timing.summarize_ratios(over, found["forward"]),
    }
