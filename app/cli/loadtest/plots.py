"""The cumulative distribution of latency, as a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from app.cli.loadtest.load import Record


def latencies(path: Path, records: Sequence[Record], title: str) -> None:
    """Write the cumulative distribution of each class's latencies to a PNG.

    Requests that the client gave up on count as unanswered: the curve of their class ends below 1.

    Raises:
        ImportError: there is no matplotlib.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415 - few need it, and it takes a second

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for steps in sorted({record.steps for record in records}):
        waited = [record for record in records if record.steps == steps and (record.ok or record.unanswered)]
        answered = sorted(record.latency for record in waited if record.ok)
        if answered:
            shares = [(i + 1) / len(waited) for i in range(len(answered))]
            axes.step(answered, shares, where="post", label=f"{steps} steps ({len(waited)})")
    axes.set(xlabel="latency, s", ylabel="share answered", xscale="log", ylim=(0, 1.02), title=title)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
