"""The results of a simulation, as a table and as one line of JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from app.cli.simulation.simulate import SimulatedRun, percentile
from app.engine.widths import Widths


@dataclass(frozen=True, slots=True)
class Summary:
    """One policy at one load, over all repeats; a percentile is the mean of the repeats' percentiles.

    Attributes:
        load: offered work over capacity.
        slowdown: mean, p50, p95 and p99 of time in the system over time alone, of the requests that were served.
        p95_ms: by steps, the 95th percentile of the latency.
        width: mean rows of a forward, without padding.
        utilisation: share of the time that the device computes.
        missed: share of the requests that were dropped at their timeout.
    """

    policy: str
    load: float
    slowdown: dict[str, float]
    p95_ms: dict[int, float]
    width: float
    utilisation: float
    missed: float


def summarize(policy: str, load: float, runs: Sequence[SimulatedRun]) -> Summary:
    """Pool the repeats of one policy at one load."""
    slowdowns = [[record.slowdown for record in run.records if not record.missed] for run in runs]
    kept = [values for values in slowdowns if values]
    lengths = sorted({record.request.steps for run in runs for record in run.records})
    return Summary(
        policy=policy,
        load=load,
        slowdown={
            "mean": _mean([fmean(values) for values in kept]),
            **{f"p{share}": _mean([percentile(values, share / 100) for values in kept]) for share in (50, 95, 99)},
        },
        p95_ms={steps: _mean([_p95_ms(run, steps) for run in runs]) for steps in lengths},
        width=sum(run.rows for run in runs) / max(1, sum(run.ticks for run in runs)),
        utilisation=sum(run.busy for run in runs) / sum(run.ended for run in runs),
        missed=fmean(fmean(record.missed for record in run.records) for run in runs),
    )


def table(summaries: Sequence[Summary]) -> str:
    """Plain text, a line for each summary; at most eight lengths get a column."""
    lengths = sorted({steps for summary in summaries for steps in summary.p95_ms})
    if len(lengths) > 8:
        lengths = [lengths[round(index * (len(lengths) - 1) / 7)] for index in range(8)]
    head = ["load", "policy", "mean", "p50", "p95", "p99", *(f"{steps} steps" for steps in lengths)]
    rows = [[*head, "width", "busy", "missed"]]
    for summary in summaries:
        rows.append(
            [
                f"{summary.load:.0%}",
                summary.policy,
                *(f"{value:.2f}" for value in summary.slowdown.values()),
                *(f"{summary.p95_ms.get(steps, math.nan):.0f}" for steps in lengths),
                f"{summary.width:.2f}",
                f"{summary.utilisation:.0%}",
                f"{summary.missed:.1%}",
            ]
        )
    across = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if column == 1 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, across, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join(["slowdown = time in the system over time alone; N steps = p95 of their latency in ms", *lines])


def as_json(summaries: Sequence[Summary], widths: Widths, **facts: Any) -> str:
    """One line; null where no request gives a number."""
    results = [
        {
            "policy": summary.policy,
            "load": summary.load,
            "slowdown": {name: _finite(value) for name, value in summary.slowdown.items()},
            "p95_ms": {str(steps): _finite(value) for steps, value in summary.p95_ms.items()},
            "width": summary.width,
            "utilisation": summary.utilisation,
            "missed": summary.missed,
        }
        for summary in summaries
    ]
    forward = {str(size): time * 1000 for size, time in zip(widths.sizes, widths.seconds, strict=True)}
    return json.dumps({"forward_ms": forward, **facts, "results": results}, allow_nan=False)


def _p95_ms(run: SimulatedRun, steps: int) -> float:
    served = [record.latency for record in run.records if record.request.steps == steps and not record.missed]
    return 1000 * percentile(served, 0.95)


def _mean(values: Sequence[float]) -> float:
    """Of the numbers among them; nan if there is none."""
    numbers = [value for value in values if not math.isnan(value)]
    return fmean(numbers) if numbers else math.nan


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
