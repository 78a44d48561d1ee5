"""Every metric, once. Counters and histograms are told; gauges are read off the engine when somebody asks."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache

import torch
from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric

from app.engine.engine import Engine

disable_created_metrics()  # type: ignore[no-untyped-call]  # a series a counter that nobody asks for

GAUGES = {
    "unstir_ready": "1 when /readyz says yes.",
    "unstir_draining": "1 while accepted work is being finished before the process ends.",
    "unstir_requests_waiting": "Requests that hold a place in the engine and have not had their first step.",
    "unstir_requests_running": "Requests between their first step and their last.",
    "unstir_requests_promised": "Requests that were refused for now, and for which a place is kept.",
    "unstir_jobs": "Asynchronous jobs and answers under a key that are kept, done or not.",
    "unstir_job_bytes": "Memory that their results take.",
    "unstir_images_waiting": "Images that have not had their first step.",
    "unstir_images_running": "Images between their first step and their last.",
    "unstir_batch_capacity_rows": "Most rows of one forward.",
    "unstir_estimated_wait_seconds": "Time that the device needs for everything accepted.",
    "unstir_forward_cost_ratio": "What a tick takes of late, over what its forward took at the start.",
    "unstir_event_loop_lag_seconds": "How late the event loop was when it was last looked at.",
    "unstir_model_info": "1, with the network's name, hash, device and dtype as labels.",
    "unstir_gpu_memory_bytes": "Memory of the CUDA device, allocated and reserved; none on a CPU.",
}
LABELS = {
    "unstir_requests_waiting": ("endpoint",),
    "unstir_requests_running": ("endpoint",),
    "unstir_model_info": ("model", "sha256", "device", "dtype"),
    "unstir_gpu_memory_bytes": ("kind",),
}


class Metrics:
    """The metrics of one server, on a registry of their own."""

    def __init__(
        self,
        endpoints: Iterable[str] = (),
        engine: Callable[[], Engine | None] = lambda: None,
        jobs: Callable[[], tuple[int, int]] = lambda: (0, 0),
    ) -> None:
        """Args:
        endpoints: paths of operations, so that their gauges are there from the start.
        jobs: how many are kept, and the bytes of their results.
        """
        self.registry = registry = CollectorRegistry()
        self.endpoints, self.engine, self.jobs = endpoints, engine, jobs
        self.lag = 0.0
        self._model: tuple[str, ...] | None = None
        registry.register(self)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"unstir_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: list[float], *labels: str) -> Histogram:
            return Histogram(f"unstir_{name}", text, labels, registry=registry, buckets=buckets)

        milliseconds = [0.001 * 2**k for k in range(18)]  # 1 ms to 131 s
        self.requests = counter(
            "requests_total", "Answers, by path, sampler where there is one, and status.", "endpoint", "sampler", "code"
        )
        self.finished = counter(
            "requests_finished_total", "How well-formed requests for images ended.", "endpoint", "outcome"
        )  # outcome: ok, client_gone, or the code of an error
        self.rejections = counter(
            "rejections_total", "Requests refused for want of room or time, by the code of the error.", "reason"
        )
        self.images = counter("images_total", "Images answered.", "endpoint")
        self.nfe = counter(
            "nfe_total",
            "Network evaluations of answered requests, rows times steps, by sampler or its inverse.",
            "sampler",
        )
        self.forwards = counter("forwards_total", "Forward passes, by width after padding.", "width")
        self.rows = counter("rows_total", "Rows of all forward passes that were somebody's.")
        self.padding = counter("padding_rows_total", "Rows of all forward passes that were padding.")
        self.forward_errors = counter(
            "forward_errors_total", "Forwards and walks that came to nothing: oom, nan, exception.", "kind"
        )
        self.duration = histogram(
            "request_duration_seconds", "Whole time of a request.", milliseconds, "endpoint", "sampler"
        )
        self.queue_time = histogram(
            "queue_time_seconds", "From submission to the first step.", milliseconds, "endpoint"
        )
        self.first_step_time = histogram(
            "time_to_first_step_seconds", "From the request's arrival to its first step.", milliseconds
        )
        self.encode_time = histogram("image_encode_seconds", "Giving the answer its form.", milliseconds)
        self.cancel_time = histogram(
            "cancel_latency_seconds", "From a hang-up, deadline or DELETE to the lanes' leaving.", milliseconds
        )
        self.request_nfe = histogram(
            "request_nfe", "Network evaluations of one request, all its images.", [10.0 * 2**k for k in range(14)]
        )
        self.forward_time = histogram("forward_duration_seconds", "One tick of the engine.", milliseconds)
        self._forwards_of = cache(self.forwards.labels)  # a label look-up costs more than the counting
        self.batch_rows = histogram("batch_rows", "Rows of one forward, without padding.", [2.0**k for k in range(11)])

    def on_forward(self, width: int, rows: int, seconds: float) -> None:
        """The engine's observer."""
        self._forwards_of(width).inc()
        self.rows.inc(rows)
        self.padding.inc(width - rows)
        self.forward_time.observe(seconds)
        self.batch_rows.observe(rows)

    def on_cancel(self, seconds: float) -> None:
        """The engine's observer."""
        self.cancel_time.observe(seconds)

    def on_failure(self, kind: str) -> None:
        """The engine's observer."""
        self.forward_errors.labels(kind).inc()

    def record_usage(self, endpoint: str, evaluations: Mapping[str, int], queue_seconds: float) -> None:
        """Of a request that was answered: its network evaluations by sampler, and its time in the queue."""
        for sampler, count in evaluations.items():
            self.nfe.labels(sampler).inc(count)
        self.request_nfe.observe(sum(evaluations.values()))
        self.queue_time.labels(endpoint).observe(queue_seconds)

    def tell_model(self, *labels: str) -> None:
        """Name the network: model, sha256, device, dtype."""
        self._model = labels

    async def watch(self) -> None:
        """Look twice a second how late the event loop is; it is told to each who asks meanwhile."""
        while True:
            due = time.monotonic() + 0.5
            await asyncio.sleep(0.5)
            self.lag = max(0.0, time.monotonic() - due)

    def collect(self) -> Iterator[Metric]:
        """The gauges, derived from the engine's own book so that they cannot drift."""
        engine = self.engine()
        waiting, running = engine.lanes if engine else (0, 0)
        jobs, job_bytes = self.jobs()
        requests = engine.requests if engine else {}
        memory = {"allocated": torch.cuda.memory_allocated, "reserved": torch.cuda.memory_reserved}
        card = self._model[2] if self._model is not None and self._model[2] != "cpu" else None
        values: dict[str, float | dict[tuple[str, ...], float]] = {
            "unstir_ready": engine is not None and engine.unready is None,
            "unstir_draining": engine is not None and engine.draining,
            "unstir_requests_waiting": {(path,): requests.get((path, False), 0) for path in self.endpoints},
            "unstir_requests_running": {(path,): requests.get((path, True), 0) for path in self.endpoints},
            "unstir_requests_promised": engine.promised if engine else 0,
            "unstir_jobs": jobs,
            "unstir_job_bytes": job_bytes,
            "unstir_images_waiting": waiting,
            "unstir_images_running": running,
            "unstir_batch_capacity_rows": engine.forwards.fast.cap if engine else 0,
            "unstir_estimated_wait_seconds": engine.wait_seconds if engine else 0,
            "unstir_forward_cost_ratio": engine.cost_ratio if engine else 0,
            "unstir_event_loop_lag_seconds": self.lag,
            "unstir_model_info": {self._model: 1} if self._model else {},
            "unstir_gpu_memory_bytes": {(kind,): ask(card) for kind, ask in memory.items()} if card else {},
        }
        for name, text in GAUGES.items():
            value = values[name]
            family = GaugeMetricFamily(name, text, labels=LABELS.get(name, ()))
            for labels, number in (value if isinstance(value, dict) else {(): value}).items():
                family.add_metric(labels, float(number))
            yield family

    def exposition(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self.registry)
