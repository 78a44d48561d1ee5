"""Every metric, once. Counters and histograms are told; gauges are read off the engine when somebody asks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric

from app.engine.engine import Engine

disable_created_metrics()  # type: ignore[no-untyped-call]  # a series a counter that nobody asks for

GAUGES = {
    "unstir_ready": "1 when /readyz says yes.",
    "unstir_draining": "1 while accepted work is being finished before the process ends.",
    "unstir_requests_in_flight": "Requests that hold a place in the engine.",
    "unstir_rows_waiting": "Pictures that have not had their first step.",
    "unstir_rows_running": "Pictures between their first step and their last.",
    "unstir_batch_capacity_rows": "Most rows of one forward.",
    "unstir_estimated_wait_seconds": "Time that the device needs for everything accepted.",
}


class Metrics:
    """The metrics of one server, on a registry of their own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.engine: Callable[[], Engine | None] = lambda: None
        registry.register(self)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"unstir_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: list[float], *labels: str) -> Histogram:
            return Histogram(f"unstir_{name}", text, labels, registry=registry, buckets=buckets)

        milliseconds = [0.001 * 2**k for k in range(18)]  # 1 ms to 131 s
        self.requests = counter("requests_total", "Answers, by path and status.", "endpoint", "code")
        self.finished = counter(
            "requests_finished_total", "How well-formed requests for pictures ended.", "endpoint", "outcome"
        )  # outcome: ok, client_gone, or the code of an error
        self.images = counter("images_total", "Pictures answered.", "endpoint")
        self.nfe = counter(
            "nfe_total",
            "Network evaluations of answered requests, rows times steps, by sampler or its inverse.",
            "sampler",
        )
        self.forwards = counter("forwards_total", "Forward passes, by width after padding.", "width")
        self.rows = counter("rows_total", "Rows of all forward passes that were somebody's.")
        self.padding = counter("padding_rows_total", "Rows of all forward passes that were padding.")
        self.duration = histogram("request_duration_seconds", "Whole time of a request.", milliseconds, "endpoint")
        self.queue_time = histogram(
            "queue_time_seconds", "From submission to the first step.", milliseconds, "endpoint"
        )
        self.forward_time = histogram("forward_duration_seconds", "One tick of the engine.", milliseconds)
        self._forwards_of = cache(self.forwards.labels)  # a label look-up costs more than the counting
        self.batch_rows = histogram("batch_rows", "Rows of one forward, without padding.", [2.0**k for k in range(11)])

    def forward(self, width: int, rows: int, seconds: float) -> None:
        """The engine's observer."""
        self._forwards_of(width).inc()
        self.rows.inc(rows)
        self.padding.inc(width - rows)
        self.forward_time.observe(seconds)
        self.batch_rows.observe(rows)

    def collect(self) -> Iterator[Metric]:
        """The gauges, derived from the engine's own book so that they cannot drift."""
        engine = self.engine()
        waiting, running = engine.lanes if engine else (0, 0)
        values = {
            "unstir_ready": engine is not None and engine.unready is None,
            "unstir_draining": engine is not None and engine.draining,
            "unstir_requests_in_flight": engine.requests if engine else 0,
            "unstir_rows_waiting": waiting,
            "unstir_rows_running": running,
            "unstir_batch_capacity_rows": engine.widths.cap if engine else 0,
            "unstir_estimated_wait_seconds": engine.wait_seconds if engine else 0,
        }
        for name, text in GAUGES.items():
            yield GaugeMetricFamily(name, text, float(values[name]))

    def exposition(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self.registry)
