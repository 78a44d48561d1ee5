"""Before the first request on a card: every kind of plan once, so that no request waits for a kernel to be compiled."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from app.engine.jobs import Lane
from app.engine.runner import Runner
from app.engine.widths import Forwards
from model.checkpoint import Checkpoint
from model.diffusion.inversion.registry import INVERSIONS
from model.diffusion.plan import Plan
from model.diffusion.samplers import SAMPLERS
from model.diffusion.schedule import ScheduleError

WARMUP_STEPS = 6


def warm_up(runner: Runner, forwards: Forwards) -> None:
    """Execute a short plan of every sampler and inversion, by the fast and by the exact network."""
    loaded = runner.checkpoint
    conditional = loaded.net.config.num_class_embeds is not None
    guidance = 2.0 if conditional and loaded.card.null_class is not None else 1.0
    for exact, widths in ((False, forwards.fast), (True, forwards.exact)):
        for plan in short_plans(loaded):
            lane = Lane(plan, 0, 0 if conditional else None, guidance=guidance, snapshot_steps=frozenset({0}))
            width = widths.narrowest(lane.rows, reproducible=False)
            while width is not None and lane.remaining:
                runner.advance([lane], width, exact).wait()


def short_plans(loaded: Checkpoint) -> Iterator[Plan]:
    """A plan of a few steps of each sampler, at every order, and of each inversion."""
    schedule, defaults = loaded.schedule, loaded.defaults
    steps = min(WARMUP_STEPS, schedule.T)
    for sampler in SAMPLERS.values():
        options = defaults.options(sampler, steps, schedule.T)
        for order in ({"order": order} for order in (1, 2, 3)) if "order" in sampler.options else ({},):
            with contextlib.suppress(ScheduleError):  # of an order or a length that it does not have
                yield sampler.compile(schedule, steps, **options, **order)
    for inversion in INVERSIONS.values():
        spacing = defaults.options(SAMPLERS[inversion.sampler], steps, schedule.T)["spacing"]
        with contextlib.suppress(ScheduleError):
            yield inversion.compile(schedule, steps, spacing=spacing)
