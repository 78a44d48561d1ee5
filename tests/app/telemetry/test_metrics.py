"""Every metric has the value of the events that it counts, or of the engine that it is read from."""

from __future__ import annotations

import asyncio
import re
import time
from collections import Counter
from types import SimpleNamespace

import prometheus_client
import pytest
import torch

from app.telemetry import metrics as module
from app.telemetry.metrics import GAUGES, Metrics
from tests.engines import until
from tests.metrics import declared, metric, read_samples


def loaded_model(device: str = "cpu", unready: str | None = None, draining: bool = False):
    """Stands in for a LoadedModel: a number of its own for each gauge."""
    engine = SimpleNamespace(
        unready=unready,
        draining=draining,
        requests=Counter({("/sample", False): 2, ("/sample", True): 3, ("/invert", True): 4}),
        lanes=(5, 6),
        promised=7,
        forwards=SimpleNamespace(fast=SimpleNamespace(cap=8), exact=SimpleNamespace(cap=4)),
        wait_seconds=9.5,
        cost_ratio=1.25,
    )
    card = SimpleNamespace(name="tiny", sha256="abc")
    return SimpleNamespace(
        engine=engine,
        checkpoint=SimpleNamespace(card=card),
        device=torch.device(device),
        calibration=SimpleNamespace(dtype="bfloat16"),
    )


def samples(metrics: Metrics) -> dict[str, float]:
    return samples_of(metrics.exposition().decode())


def samples_of(text: str) -> dict[str, float]:
    """All but the buckets of histograms, as ``name{label=value,...}``."""
    found = {}
    for (name, labels), value in read_samples(text).items():
        if not name.endswith("_bucket"):
            pairs = ",".join(f"{label}={word}" for label, word in sorted(labels))
            found[f"{name}{{{pairs}}}" if pairs else name] = value
    return found


def histogram(name: str, count: int, total: float, labels: str = "") -> dict[str, float]:
    return {f"{name}_count{labels}": count, f"{name}_sum{labels}": pytest.approx(total)}


def test_every_metric_has_the_value_of_its_events():
    metrics = Metrics(["/sample", "/invert"], loaded_model, lambda: (3, 4096))
    metrics.on_forward(8, 5, 0.1)
    metrics.on_forward(8, 7, 0.2)
    metrics.on_forward(2, 2, 0.05)
    metrics.on_cancel(0.03)
    for kind in ("oom", "nan", "nan"):
        metrics.on_failure(kind)
    metrics.record_usage("/sample", {"ddim": 30, "inverse ddim": 20}, 0.25)
    metrics.record_usage("/sample", {"ddim": 10}, 0.5)
    metrics.requests.labels("/sample", "ddim", 200).inc()
    metrics.finished.labels("/sample", "ok").inc()
    metrics.rejections.labels("overloaded").inc()
    metrics.images.labels("/sample").inc(4)
    metrics.duration.labels("/sample", "ddim", 200).observe(1.5)
    metrics.first_step_time.observe(0.75)
    metrics.encode_time.observe(0.004)
    expected = {
        "unstir_ready": 1,
        "unstir_draining": 0,
        "unstir_requests_waiting{endpoint=/sample}": 2,
        "unstir_requests_waiting{endpoint=/invert}": 0,
        "unstir_requests_running{endpoint=/sample}": 3,
        "unstir_requests_running{endpoint=/invert}": 4,
        "unstir_requests_promised": 7,
        "unstir_jobs": 3,
        "unstir_job_bytes": 4096,
        "unstir_images_waiting": 5,
        "unstir_images_running": 6,
        "unstir_batch_capacity_rows": 8,
        "unstir_estimated_wait_seconds": 9.5,
        "unstir_forward_cost_ratio": 1.25,
        "unstir_event_loop_lag_seconds": 0,
        "unstir_model_info{device=cpu,dtype=bfloat16,model=tiny,sha256=abc}": 1,
        "unstir_requests_total{code=200,endpoint=/sample,sampler=ddim}": 1,
        "unstir_requests_finished_total{endpoint=/sample,outcome=ok}": 1,
        "unstir_rejections_total{reason=overloaded}": 1,
        "unstir_images_total{endpoint=/sample}": 4,
        "unstir_nfe_total{sampler=ddim}": 40,
        "unstir_nfe_total{sampler=inverse ddim}": 20,
        "unstir_forwards_total{width=8}": 2,
        "unstir_forwards_total{width=2}": 1,
        "unstir_rows_total": 14,
        "unstir_padding_rows_total": 4,
        "unstir_forward_errors_total{kind=oom}": 1,
        "unstir_forward_errors_total{kind=nan}": 2,
        **histogram("unstir_request_duration_seconds", 1, 1.5, "{code=200,endpoint=/sample,sampler=ddim}"),
        **histogram("unstir_queue_time_seconds", 2, 0.75, "{endpoint=/sample}"),
        **histogram("unstir_time_to_first_step_seconds", 1, 0.75),
        **histogram("unstir_image_encode_seconds", 1, 0.004),
        **histogram("unstir_cancel_latency_seconds", 1, 0.03),
        **histogram("unstir_request_nfe", 2, 60),
        **histogram("unstir_forward_duration_seconds", 3, 0.35),
        **histogram("unstir_batch_rows", 3, 14),
    }
    assert samples(metrics) == expected
    names = {re.sub(r"\{.*", "", name) for name in expected}
    on_a_card = {"unstir_gpu_memory_bytes"}
    assert names | on_a_card == {name for name in declared() if not name.endswith("_bucket")}


def test_before_the_network_is_loaded_gauges_are_zero_and_the_model_is_unknown():
    metrics = Metrics(["/sample"])
    found = samples(metrics)
    assert found["unstir_requests_waiting{endpoint=/sample}"] == found["unstir_requests_running{endpoint=/sample}"] == 0
    assert set(found.values()) == {0}
    assert {name for name in GAUGES if name not in found} == {
        "unstir_requests_waiting",
        "unstir_requests_running",
        "unstir_model_info",
        "unstir_gpu_memory_bytes",
    }


def test_ready_and_draining_are_those_of_the_engine():
    metrics = Metrics(model=lambda: loaded_model(unready="draining", draining=True))
    assert (metric(metrics, "unstir_ready"), metric(metrics, "unstir_draining")) == (0, 1)


def test_memory_is_that_of_the_card_that_serves(monkeypatch):
    for kind, size in (("allocated", 3), ("reserved", 5)):
        monkeypatch.setattr(torch.cuda, f"memory_{kind}", lambda device, size=size: {"cuda:1": size}[str(device)])
    found = samples(Metrics(model=lambda: loaded_model("cuda:1")))
    assert found["unstir_gpu_memory_bytes{kind=allocated}"] == 3
    assert found["unstir_gpu_memory_bytes{kind=reserved}"] == 5
    assert found["unstir_model_info{device=cuda:1,dtype=bfloat16,model=tiny,sha256=abc}"] == 1


def test_buckets_span_what_requests_take():
    metrics = Metrics()
    metrics.first_step_time.observe(0.003)
    metrics.batch_rows.observe(1024)
    metrics.request_nfe.observe(80_000)
    for name, below, above in (
        ("unstir_time_to_first_step_seconds_bucket", "0.002", "0.004"),
        ("unstir_batch_rows_bucket", "512.0", "1024.0"),
        ("unstir_request_nfe_bucket", "40960.0", "81920.0"),
    ):
        assert (metric(metrics, name, le=below), metric(metrics, name, le=above)) == (0, 1)
    assert metric(metrics, "unstir_time_to_first_step_seconds_bucket", le="131.072") == 1


@pytest.mark.anyio
async def test_the_event_loop_s_lag_is_how_long_it_was_blocked(monkeypatch):
    monkeypatch.setattr(module, "LAG_SECONDS", 0.01)
    metrics = Metrics()
    measuring = asyncio.create_task(metrics.measure_lag())
    await asyncio.sleep(0)
    time.sleep(0.2)
    await until(lambda: metric(metrics, "unstir_event_loop_lag_seconds") > 0.1)
    assert metric(metrics, "unstir_event_loop_lag_seconds") < 5
    await until(lambda: metric(metrics, "unstir_event_loop_lag_seconds") < 0.1)
    measuring.cancel()


def test_metrics_of_two_servers_do_not_mix():
    one, two = Metrics(), Metrics()
    one.on_forward(4, 3, 0.01)
    assert (metric(one, "unstir_rows_total"), metric(two, "unstir_rows_total")) == (3, 0)


def test_created_series_are_left_out_of_ours_and_nobody_else_s():
    ours, theirs = Metrics(), prometheus_client.CollectorRegistry()
    prometheus_client.Counter("other_total", "of another library in the process", registry=theirs)
    assert b"_created" not in ours.exposition()
    assert b"other_created" in prometheus_client.generate_latest(theirs)


@pytest.mark.anyio
async def test_gauges_of_a_server_are_those_of_its_engine(client, tiny_ckpt):
    info = (await client.get("/model")).json()
    labels = {"model": "tiny", "sha256": tiny_ckpt.card.sha256, "device": "cpu", "dtype": info["dtype"]}
    assert await metric(client, "unstir_model_info", **labels) == 1
    assert await metric(client, "unstir_batch_capacity_rows") == max(map(int, info["forward_ms"]))
    assert await metric(client, "unstir_forward_cost_ratio") == 1  # no tick has corrected it yet
    await client.post("/sample", json={"steps": 5, "n": 3})
    ratio = await metric(client, "unstir_forward_cost_ratio")
    assert ratio != 1
    assert 1 / 4 <= ratio <= 4
    rows, padding = await metric(client, "unstir_rows_total"), await metric(client, "unstir_padding_rows_total")
    widths = {width: await metric(client, "unstir_forwards_total", width=width) for width in info["forward_ms"]}
    assert rows == 15
    assert rows + padding == sum(int(width) * count for width, count in widths.items())


@pytest.mark.parametrize(
    ("name", "labels"), [("unstir_requests_in_flight", {}), ("unstir_images_total", {"path": "/sample"})]
)
def test_the_tests_reader_refuses_what_is_not_declared(name, labels):
    with pytest.raises(AssertionError, match=r"unstir_requests_in_flight|endpoint.*path"):
        metric(Metrics(), name, **labels)


@pytest.mark.anyio
async def test_series_exist_before_their_first_event(client):
    """Or the first error would be no increase."""
    found = samples_of((await client.get("/metrics")).text)
    for name in (
        "unstir_requests_total{code=500,endpoint=/sample,sampler=ddim}",
        "unstir_requests_total{code=503,endpoint=/invert,sampler=fixed_point}",
        "unstir_requests_finished_total{endpoint=/interpolate,outcome=engine_dead}",
        "unstir_rejections_total{reason=overloaded}",
        "unstir_rejections_total{reason=image_too_large}",
        "unstir_images_total{endpoint=/invert}",
        "unstir_nfe_total{sampler=inverse ddim}",
        "unstir_forward_errors_total{kind=oom}",
        "unstir_forwards_total{width=8}",
    ):
        assert found[name] == 0, name
    assert found["process_open_fds"] > 0
    assert found["process_resident_memory_bytes"] > 1e6


@pytest.mark.anyio
async def test_durations_have_the_status_and_a_bucket_beyond_the_longest_queue(client, settings):
    await client.post("/sample", json={"steps": 0})
    text = (await client.get("/metrics")).text
    assert 'unstir_request_duration_seconds_count{code="422",endpoint="/sample",sampler=""} 1' in text
    bounds = [float(bound) for bound in re.findall(r'request_duration_seconds_bucket\{.*?le="([\d.]+)"', text)]
    assert max(bounds) > settings.max_queue_seconds
