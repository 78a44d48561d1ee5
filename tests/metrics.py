"""Reads metrics, and refuses names and labels that are not declared: a typo would read as 0."""

from __future__ import annotations

from collections.abc import Awaitable
from functools import cache
from typing import overload

import httpx
from prometheus_client import Counter, Histogram
from prometheus_client.parser import text_string_to_metric_families

from app.telemetry.metrics import GAUGES, LABELS, Metrics


@overload
def metric(source: httpx.AsyncClient, name: str, **labels: str) -> Awaitable[float]: ...
@overload
def metric(source: httpx.Client | Metrics | str, name: str, **labels: str) -> float: ...
def metric(source, name, **labels):
    """The sum of a metric's samples with these labels; 0 if there is none yet.

    Args:
        source: a client to ask, the metrics themselves, or their text.
    """
    assert name in declared(), f"no metric {name}"
    assert labels.keys() <= declared()[name], f"{name} has the labels {sorted(declared()[name])}, not {sorted(labels)}"
    if isinstance(source, httpx.AsyncClient):
        return _ask(source, name, labels)
    if isinstance(source, httpx.Client):
        source = source.get("/metrics").text
    elif isinstance(source, Metrics):
        source = source.exposition().decode()
    return sum(value for sample, value in read_samples(source).items() if _matches(sample, name, labels))


@cache
def declared() -> dict[str, set[str]]:
    """The labels of every sample that ``/metrics`` can have, by its name."""
    names = {name: set(LABELS.get(name, ())) for name in GAUGES}
    for collector in vars(Metrics()).values():
        if isinstance(collector, Counter):
            names[f"{collector._name}_total"] = set(collector._labelnames)
        if isinstance(collector, Histogram):
            names |= {f"{collector._name}_{part}": set(collector._labelnames) for part in ("count", "sum")}
            names[f"{collector._name}_bucket"] = {*collector._labelnames, "le"}
    return names


def read_samples(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """All samples of Prometheus' text format, by name and labels."""
    families = text_string_to_metric_families(text)
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }


async def _ask(client: httpx.AsyncClient, name: str, labels: dict[str, str]) -> float:
    return metric((await client.get("/metrics")).text, name, **labels)


def _matches(sample: tuple[str, frozenset[tuple[str, str]]], name: str, labels: dict[str, str]) -> bool:
    return sample[0] == name and labels.items() <= sample[1]
