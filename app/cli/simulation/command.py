"""The options of ``unstir simulate``, and its report."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, Field, model_validator

from app.cli.flags import flags_of, read, with_flags
from app.cli.mix import MIX, Mix, MixText
from app.cli.simulation.policies import POLICIES
from app.cli.simulation.report import Summary, as_json, summarize, table
from app.cli.simulation.simulate import simulate as run
from app.cli.simulation.traffic import (
    SimulatedRequest,
    SimulationError,
    capacity,
    draw_requests,
    read_trace,
    scale_arrivals,
)
from app.cli.terminal import ExistingPath, explain
from app.engine.widths import Widths

LOADS = [0.6, 0.9, 1.2]


def parse_widths(text: str) -> Widths:
    """Read ``1:10.4,2:15``: widths, and milliseconds of a forward of each.

    Raises:
        ValueError: a part is not ``width:milliseconds``, or comes twice.
    """
    seconds: dict[int, float] = {}
    for part in text.split(","):
        try:
            width, milliseconds = map(float, part.split(":"))
        except ValueError:
            raise ValueError(f"{part!r} is not width:milliseconds, as in 1:10.4,2:15") from None
        if not (width.is_integer() and width >= 1 and 0 < milliseconds < math.inf):
            raise ValueError(f"{part!r} needs a whole width from 1 and a positive time")
        if int(width) in seconds:
            raise ValueError(f"width {int(width)} comes twice")
        seconds[int(width)] = milliseconds / 1000
    sizes = tuple(sorted(seconds))
    return Widths(sizes, tuple(seconds[size] for size in sizes))


def _check_widths(text: str) -> str:
    parse_widths(text)
    return text


class SimulateOptions(BaseModel):
    trace: ExistingPath | None = Field(
        None, description="JSON lines, one a request: at (seconds), steps; n, priority, timeout_ms where wanted."
    )
    mix: MixText = Field(MIX, description="Without a trace: step counts of Poisson arrivals, and the share of each.")
    load: list[Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)]] | None = Field(
        None,
        description="Offered work over what the device can do at full width; "
        f"by default {','.join(map(str, LOADS))}, and a trace as recorded.",
    )
    requests: int = Field(2000, ge=1, description="Requests of each run, drawn from the mix.")
    seed: int = Field(1, description="Of the first run's arrivals.")
    repeats: int = Field(3, ge=1, description="Runs of the mix, each with the next seed.")
    forward: Annotated[str, AfterValidator(_check_widths)] = Field(
        "1:10.4,2:15,4:26,8:48", description="Widths, and milliseconds of a forward of each."
    )
    policy: list[Literal[tuple(POLICIES)]] = Field(list(POLICIES), description="Policies to compare.")  # type: ignore[valid-type]

    @model_validator(mode="after")
    def _one_kind_of_traffic(self) -> Self:
        if {"trace", "mix"} <= self.model_fields_set:
            raise ValueError("give one of --trace and --mix")
        return self


@with_flags(flags_of(SimulateOptions))
def simulate(**flags: Any) -> int:
    """Simulate, and print a table and one line of JSON."""
    options = read(SimulateOptions, flags)
    widths = parse_widths(options.forward)
    summaries: list[Summary] = []
    with explain(SimulationError):
        for load, repeats in _traffic(options, widths):
            summaries += [
                summarize(policy, load, [run(requests, POLICIES[policy](), widths) for requests in repeats])
                for policy in options.policy
            ]
    facts = {name: getattr(options, name) for name in ("mix", "requests", "seed", "repeats")}
    if options.trace:
        facts = {"trace": options.trace.name}
    print(table(summaries))
    print(as_json(summaries, widths, **facts))
    return 0


def _traffic(options: SimulateOptions, widths: Widths) -> list[tuple[float, list[list[SimulatedRequest]]]]:
    """For each load, the requests of each repeat."""
    if options.trace:
        recorded = read_trace(options.trace)
        if options.load is None:
            work, lasts = sum(request.work for request in recorded), recorded[-1].at
            offered = work * widths.seconds_per_row / lasts if lasts else 0.0
            return [(offered, [recorded])]
        return [(load, [scale_arrivals(recorded, load, widths)]) for load in options.load]
    mix = Mix.parse(options.mix)
    seeds = range(options.seed, options.seed + options.repeats)
    return [
        (load, [draw_requests(mix, options.requests, load * capacity(widths, mix.mean), seed) for seed in seeds])
        for load in options.load or LOADS
    ]
