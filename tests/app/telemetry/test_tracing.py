"""Traces, where OpenTelemetry is installed: one span a request, part of the caller's trace."""

from __future__ import annotations

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from app.telemetry import tracing

pytestmark = pytest.mark.anyio
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture(scope="module")
def spans():
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    return exporter


def ours(spans):
    """Those of Unstir; newer versions of FastAPI add some of their own."""
    return [span for span in spans.get_finished_spans() if span.instrumentation_scope.name == "unstir"]


async def test_a_request_is_a_span_of_its_callers_trace(client, spans):
    spans.clear()
    headers = {"traceparent": PARENT, "x-request-id": "mine"}
    assert (await client.post("/sample", json={"steps": 3, "n": 2}, headers=headers)).status_code == 200
    [span] = ours(spans)
    assert span.name == "/sample"
    assert f"{span.context.trace_id:032x}" == PARENT.split("-")[1]
    above = {each.context.span_id: each.parent.span_id for each in spans.get_finished_spans()}
    root = span.context.span_id
    while root in above:
        root = above[root]
    assert f"{root:016x}" == PARENT.split("-")[2]
    seen = dict(span.attributes)
    assert (seen["unstir.request_id"], seen["unstir.nfe"], seen["unstir.samplers"]) == ("mine", 6, ("ddim",))
    assert seen["unstir.device_seconds"] > 0


async def test_a_refusal_is_on_the_span(client, spans):
    spans.clear()
    body = {"steps": 3, "sampler": "ddpm", "eta": 0.5}  # impossible for this sampler, which only the operation knows
    assert (await client.post("/sample", json=body)).status_code == 422
    [span] = ours(spans)
    assert not span.status.is_ok


async def test_without_the_library_nothing_changes(client, spans, monkeypatch):
    spans.clear()
    monkeypatch.setattr(tracing, "INSTALLED", False)
    assert (await client.post("/sample", json={"steps": 3})).status_code == 200
    assert not ours(spans)
