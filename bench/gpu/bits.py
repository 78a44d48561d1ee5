"""Whether a reproducible walk has the same bits in any company, and what that costs."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from app.engine import networks as forms
from app.engine.jobs import Lane
from bench.gpu import beside, clock
from bench.gpu.bench import Bench
from bench.gpu.engine import Rides, Served
from bench.gpu.networks import Network


def measure(network: Network, bench: Bench, found: dict[str, Any]) -> None:
    """Walks of one seed, alone and in several companies; and what exact forwards cost beside those of any algorithm."""
    served = beside.load(bench, network)
    found |= company(served, bench.of(6, 3)) | {"alike": list(served.calibration.bit_identical)}
    found["control"] = fast_differs(served)
    found["determinism"] = price(bench, served)


def company(served: Served, steps: int) -> dict[str, Any]:
    """Where the same walk rides otherwise than alone in the narrowest width, and comes out with other bits.

    Of the narrow widths that calibration found to give the same bits, and of the widest: with others, in another slot,
    and joining others that are half-way. The walk draws noise at every step.
    """
    plan, others = served.plan("ddim", steps, eta=1.0), served.plan("dpmpp_2m", 2 * steps)
    rides, narrowest = Rides(served.runner), served.calibration.bit_identical[0]

    def mine() -> Lane:
        return served.lane(plan, 7, reproducible=True)

    def strangers(count: int) -> list[Lane]:
        return [served.lane(others, 100 + i, reproducible=True) for i in range(count)]

    (alone,) = rides.walk([mine()], narrowest, exact=True)
    ends: dict[str, Tensor] = {"again": rides.walk([mine()], narrowest, exact=True)[0]}
    alike = served.calibration.bit_identical
    for width in [width for width in alike if width <= 4 * served.wanted.reproducible_width or width == alike[-1]]:
        (ends[f"alone, width {width}"],) = rides.walk([mine()], width, exact=True)
        ends[f"in company, width {width}"] = rides.walk([mine(), *strangers(width - 1)], width, exact=True)[0]
        ends[f"in the last slot, width {width}"] = rides.walk([*strangers(width - 1), mine()], width, exact=True)[-1]
        before = strangers(width - 1)
        for _ in range(steps if before else 0):
            rides.tick(before, width, exact=True)
        rides.land()
        late = mine()
        for _ in range(steps):
            rides.tick([*before, late], width, exact=True)
        rides.land()
        ends[f"joining later, width {width}"] = served.runner.read_output(late)
    return {"compared": len(ends), "differing": [name for name, end in ends.items() if not torch.equal(end, alone)]}


@torch.inference_mode()
def fast_differs(served: Served) -> bool:
    """Whether forwards that promise nothing do differ by width: if not, equality elsewhere would prove nothing."""
    x, t, y = served.rows(served.widths[-1])

    def first(width: int) -> Tensor:
        return served.networks.fast(x[:width], t[:width], None if y is None else y[:width])[0]

    alone = first(1)
    return any(not torch.equal(first(width), alone) for width in served.widths)


@torch.inference_mode()
def price(bench: Bench, served: Served) -> dict[str, Any]:
    """Seconds of a float32 forward whose algorithms are deterministic, and of one that may have any, in turns.

    In both float32 is multiplied as such. On a CPU they are the same.
    """
    width, layout = served.wanted.reproducible_width, served.calibration.layout
    x, t, y = served.rows(width)
    turns = {}
    for name, exact in (("deterministic", True), ("any", False)):
        net = forms.build_network(served.checkpoint, bench.device, layout, "float32", exact=exact)
        forms.capture(net, [width])
        turns[name] = partial(
            clock.seconds, partial(net.forward, x, net.conditioning(t, y)), bench.of(20, 2), bench.device
        )
    times = clock.in_rounds(turns, bench.of(15, 2), 0.5 * bench.left())
    return {
        "width": width,
        **{name: clock.summary(each) for name, each in times.items()},
        "price": clock.ratios(times["deterministic"], times["any"]),
    }
