"""From records to numbers, and from numbers to a table.

Slowdown is latency over the time that the same request takes alone: what sharing the server costs, with short and long
requests on the same scale.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from app.cli.loadtest.load import Record


def outcomes(records: Sequence[Record]) -> dict[str, int]:
    """How many requests were answered (``ok``), refused (``429``), too late (``504``), and so on; with zeros."""
    counts: Counter[str] = Counter()
    for record in records:
        if record.ok:
            counts["ok"] += 1
        elif record.status in (429, 504):
            counts[str(record.status)] += 1
        elif record.unanswered:
            counts["unanswered"] += 1
        else:
            counts["other" if record.status and not record.error else "errors"] += 1
    return {name: counts[name] for name in ("ok", "429", "504", "other", "errors", "unanswered")}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean and percentiles; empty for none."""
    if not len(values):
        return {}
    p50, p95, p99 = np.percentile(values, (50, 95, 99)).tolist()
    return {"mean": float(np.mean(values)), "p50": p50, "p95": p95, "p99": p99}


def summarize(records: Sequence[Record], seconds: float, alone: Mapping[int, float]) -> dict[str, Any]:
    """The numbers of a run; times in seconds.

    Latencies are those of answered requests, and of those that the client gave up on, as a lower bound. Refusals and
    errors are only counted.

    Args:
        seconds: from the start to the last answer.
        alone: seconds of a request of each class on the idle server; a class that is missing has no slowdown.
    """
    answered = [record for record in records if record.ok]
    waited = [record for record in records if record.ok or record.unanswered]
    by_class = {}
    for steps in sorted({record.steps for record in records}):
        latencies = [record.latency for record in waited if record.steps == steps]
        by_class[str(steps)] = {
            "requests": sum(record.steps == steps for record in records),
            "alone": alone.get(steps),
            "latency": spread(latencies),
            "slowdown": spread([latency / alone[steps] for latency in latencies]) if steps in alone else {},
        }
    retried = [record for record in records if record.retried]
    return {
        "requests": len(records),
        "seconds": seconds,
        "outcomes": outcomes(records),
        "requests_per_second": len(answered) / seconds if seconds else 0.0,
        "row_steps_per_second": sum(record.steps for record in answered) / seconds if seconds else 0.0,
        "slowdown": spread([record.latency / alone[record.steps] for record in waited if record.steps in alone]),
        "classes": by_class,
        "retried": {"requests": len(retried), "admitted": sum(record.ok for record in retried)},
        "late_sends": spread([record.start - record.arrival for record in records]),
    }


def table(summary: Mapping[str, Any]) -> str:
    lines = [f"{'steps':>6} {'requests':>9} {'alone':>8} {'mean':>8} {'p50':>8} {'p95':>8} {'p99':>8} {'slowdown':>9}"]
    for steps, found in summary["classes"].items():
        latency = found["latency"]
        cells = [_ms(found["alone"]), *(_ms(latency.get(name)) for name in ("mean", "p50", "p95", "p99"))]
        mean = found["slowdown"].get("mean")
        lines.append(
            f"{steps:>6} {found['requests']:>9} "
            + " ".join(f"{cell:>8}" for cell in cells)
            + f" {'-' if mean is None else format(mean, '.2f'):>9}"
        )
    lines.append("times in ms; slowdown: mean of latency over the time alone")
    if summary["slowdown"]:
        all_of_them = ", ".join(f"{name} {value:.2f}" for name, value in summary["slowdown"].items())
        lines.append(f"slowdown of all: {all_of_them}")
    lines.append(
        f"{summary['requests_per_second']:.2f} requests/s, {summary['row_steps_per_second']:.1f} steps/s; "
        + ", ".join(f"{count} {name}" for name, count in summary["outcomes"].items() if count)
    )
    if summary["retried"]["requests"]:
        lines.append("retries after Retry-After: {requests}, then answered: {admitted}".format(**summary["retried"]))
    return "\n".join(lines)


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e3 * seconds:.1f}"
