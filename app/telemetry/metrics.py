"""Every metric, declared once. Counters and histograms record events; gauges are read at each scrape."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from itertools import product

import torch
from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric

from app import errors
from app.engine.loading import LoadedModel

GAUGES = {
    "unstir_ready": "1 if /readyz answers 200.",
    "unstir_draining": "1 while admitted work is finished before the process ends.",
    "unstir_requests_waiting": "Admitted requests before their first step.",
    "unstir_requests_running": "Requests between their first step and their last.",
    "unstir_requests_promised": "Refused requests that will be admitted if they return after their Retry-After.",
    "unstir_jobs": "Stored asynchronous jobs and results under a key, done or not.",
    "unstir_job_bytes": "Memory that their results take.",
    "unstir_images_waiting": "Admitted images before their first step.",
    "unstir_images_running": "Images between their first step and their last.",
    "unstir_batch_capacity_rows": "Most rows of one forward.",
    "unstir_estimated_wait_seconds": "Time that the device needs for everything admitted.",
    "unstir_forward_cost_ratio": "Recent time of a tick over the time of its forward at the start.",
    "unstir_event_loop_lag_seconds": "Delay of the event loop, measured twice a second.",
    "unstir_model_info": "1; its labels are the network's name, hash, device and dtype.",
    "unstir_gpu_memory_bytes": "Memory of the CUDA device, allocated and reserved; absent on a CPU.",
}
LABELS = {
    "unstir_requests_waiting": ("endpoint",),
    "unstir_requests_running": ("endpoint",),
    "unstir_model_info": ("model", "sha256", "device", "dtype"),
    "unstir_gpu_memory_bytes": ("kind",),
}
ALERTING = (200, 429, 500, 503, 504)  # statuses that exist for each endpoint and sampler from the start
FAILURES = ("oom", "nan", "exception")
LAG_SECONDS = 0.5  # between two measurements of the event loop's delay
Values = Mapping[tuple[str, ...], float]  # by the values of the labels


class Metrics:
    """The metrics of one server, in a registry of their own; they are the engine's observer."""

    def __init__(
        self,
        endpoints: Iterable[str] = (),
        model: Callable[[], LoadedModel | None] = lambda: None,
        jobs: Callable[[], tuple[int, int]] = lambda: (0, 0),
    ) -> None:
        """Args:
        endpoints: paths of operations, so that their gauges exist from the start.
        model: None until it is loaded.
        jobs: how many are stored, and the bytes of their results.
        """
        self.registry = registry = _Registry()
        self._endpoints, self._model, self._jobs = tuple(endpoints), model, jobs
        self._lag = 0.0
        registry.register(self)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"unstir_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: list[float], *labels: str) -> Histogram:
            return Histogram(f"unstir_{name}", text, labels, registry=registry, buckets=buckets)

        milliseconds = [0.001 * 2**k for k in range(20)]  # 1 ms to 524 s, beyond the longest queue
        self.requests = counter(
            "requests_total", "Responses, by path, sampler if there is one, and status.", "endpoint", "sampler", "code"
        )
        self.finished = counter(
            "requests_finished_total",
            "Requests with a valid body, by how they ended: ok, client_gone or the code of an error.",
            "endpoint",
            "outcome",
        )
        self.rejections = counter(
            "rejections_total", "Requests refused for lack of capacity or time, by the code of the error.", "reason"
        )
        self.images = counter("images_total", "Images of requests that ended well.", "endpoint")
        self.nfe = counter(
            "nfe_total",
            "Network evaluations of requests that ended well, rows times steps, by sampler or its inverse.",
            "sampler",
        )
        self.forwards = counter("forwards_total", "Forward passes, by width after padding.", "width")
        self.rows = counter("rows_total", "Non-padding rows of all forward passes.")
        self.padding = counter("padding_rows_total", "Padding rows of all forward passes.")
        self.forward_errors = counter(
            "forward_errors_total", "Failed forward passes and results: oom, nan or exception.", "kind"
        )
        self.duration = histogram(
            "request_duration_seconds",
            "From a request's arrival to the end of its response.",
            milliseconds,
            "endpoint",
            "sampler",
            "code",
        )
        self.queue_time = histogram(
            "queue_time_seconds",
            "Of requests that ended well: from submission to the engine to the first step.",
            milliseconds,
            "endpoint",
        )
        self.first_step_time = histogram(
            "time_to_first_step_seconds",
            "Of requests that ended well: from arrival to the first step, with uploads.",
            milliseconds,
        )
        self.encode_time = histogram("image_encode_seconds", "Encoding the body of a response.", milliseconds)
        self.cancel_time = histogram(
            "cancel_latency_seconds", "From a disconnect, deadline or DELETE until the lanes are dropped.", milliseconds
        )
        self.request_nfe = histogram(
            "request_nfe", "Network evaluations of one request, all its images.", [10.0 * 2**k for k in range(14)]
        )
        self.forward_time = histogram("forward_duration_seconds", "One tick of the engine.", milliseconds)
        self.batch_rows = histogram("batch_rows", "Non-padding rows of one forward.", [2.0**k for k in range(11)])
        self._forwards_of_width = cache(self.forwards.labels)  # finding a label costs more than counting

    def initialize(self, samplers: Mapping[str, Iterable[str]], phases: Iterable[str]) -> None:
        """Let series exist before their first event, so that ``increase()`` sees it; and those of the process.

        Args:
            samplers: of each endpoint.
            phases: names of what network evaluations are counted by.
        """
        for endpoint in self._endpoints:
            for sampler, code in product(samplers[endpoint], ALERTING):
                self.requests.labels(endpoint, sampler, code)
            for outcome in ("ok", *(kind.code for kind in errors.catalogue())):
                self.finished.labels(endpoint, outcome)
            self.images.labels(endpoint)
            self.queue_time.labels(endpoint)
        for phase in phases:
            self.nfe.labels(phase)
        for rejection in errors.REJECTIONS:
            self.rejections.labels(rejection.code)
        for failure in FAILURES:
            self.forward_errors.labels(failure)
        ProcessCollector(registry=self.registry)

    def initialize_widths(self, widths: Iterable[int]) -> None:
        """The same for each width of a forward."""
        for width in widths:
            self._forwards_of_width(width)

    def on_forward(self, width: int, rows: int, seconds: float) -> None:
        """See :class:`app.engine.worker.Observer`."""
        self._forwards_of_width(width).inc()
        self.rows.inc(rows)
        self.padding.inc(width - rows)
        self.forward_time.observe(seconds)
        self.batch_rows.observe(rows)

    def on_cancel(self, seconds: float) -> None:
        """See :class:`app.engine.worker.Observer`."""
        self.cancel_time.observe(seconds)

    def on_failure(self, kind: str) -> None:
        """See :class:`app.engine.worker.Observer`."""
        self.forward_errors.labels(kind).inc()

    def record_usage(self, endpoint: str, evaluations: Mapping[str, int], queue_seconds: float) -> None:
        """Of a request that ended well: its network evaluations by sampler, and its time in the queue."""
        for sampler, count in evaluations.items():
            self.nfe.labels(sampler).inc(count)
        self.request_nfe.observe(sum(evaluations.values()))
        self.queue_time.labels(endpoint).observe(queue_seconds)

    async def measure_lag(self) -> None:
        """Measure the event loop's delay until cancelled."""
        while True:
            due = time.monotonic() + LAG_SECONDS
            await asyncio.sleep(LAG_SECONDS)
            self._lag = max(0.0, time.monotonic() - due)

    def collect(self) -> Iterator[Metric]:
        """The gauges, read where their values are, so that none can be out of date."""
        model = self._model()
        values = self._server_values() | ({} if model is None else self._model_values(model))
        for name, text in GAUGES.items():
            family = GaugeMetricFamily(name, text, labels=LABELS.get(name, ()))
            value = values.get(name, {} if name in LABELS else 0)
            for labels, number in (value if isinstance(value, Mapping) else {(): value}).items():
                family.add_metric(labels, float(number))
            yield family

    def _server_values(self) -> dict[str, float | Values]:
        """Those that exist before the network is loaded; the others are 0, or absent if they have labels."""
        jobs, job_bytes = self._jobs()
        none: Values = {(path,): 0 for path in self._endpoints}
        return {
            "unstir_requests_waiting": none,
            "unstir_requests_running": none,
            "unstir_jobs": jobs,
            "unstir_job_bytes": job_bytes,
            "unstir_event_loop_lag_seconds": self._lag,
        }

    def _model_values(self, model: LoadedModel) -> dict[str, float | Values]:
        engine, card, device = model.engine, model.checkpoint.card, str(model.device)
        images_waiting, images_running = engine.lanes
        requests = engine.requests
        memory: Values = {}
        if model.device.type == "cuda":
            allocated, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
            memory = {("allocated",): allocated, ("reserved",): reserved}
        return {
            "unstir_ready": engine.unready is None,
            "unstir_draining": engine.draining,
            "unstir_requests_waiting": {(path,): requests[path, False] for path in self._endpoints},
            "unstir_requests_running": {(path,): requests[path, True] for path in self._endpoints},
            "unstir_requests_promised": engine.promised,
            "unstir_images_waiting": images_waiting,
            "unstir_images_running": images_running,
            "unstir_batch_capacity_rows": engine.forwards.fast.cap,
            "unstir_estimated_wait_seconds": engine.wait_seconds,
            "unstir_forward_cost_ratio": engine.cost_ratio,
            "unstir_model_info": {(card.name, card.sha256, device, model.calibration.dtype): 1},
            "unstir_gpu_memory_bytes": memory,
        }

    def exposition(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self.registry)


class _Registry(CollectorRegistry):
    """Without the ``_created`` series that the library adds to every counter and histogram."""

    def collect(self) -> Iterator[Metric]:
        for metric in super().collect():
            metric.samples = [sample for sample in metric.samples if not sample.name.endswith("_created")]
            yield metric
