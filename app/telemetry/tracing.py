"""Traces by OpenTelemetry, where its API is installed; elsewhere nothing.

Which spans go where is the business of its SDK: ``opentelemetry-instrument unstir serve`` sets that up from the
environment, and without it a span costs next to nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

try:
    from opentelemetry import context, propagate, trace
except ImportError:
    INSTALLED = False
else:
    INSTALLED = True


@contextmanager
def join_trace(headers: Mapping[str, str]) -> Iterator[None]:
    """Within it, spans belong to the trace that ``traceparent`` names, or to the span that the framework has begun."""
    if not INSTALLED or trace.get_current_span().get_span_context().is_valid:
        yield
        return
    token = context.attach(propagate.extract(dict(headers)))
    try:
        yield
    finally:
        context.detach(token)


@contextmanager
def span(name: str, request_id: str) -> Iterator[None]:
    """An operation, from its start to its end."""
    if not INSTALLED:
        yield
        return
    tracer = trace.get_tracer("unstir")
    with tracer.start_as_current_span(name, attributes={"unstir.request_id": request_id}):
        yield


def set_usage(queue_seconds: float, device_seconds: float, evaluations: Mapping[str, int]) -> None:
    """Put what the request cost on the current span."""
    if not INSTALLED:
        return
    trace.get_current_span().set_attributes(
        {
            "unstir.queue_seconds": queue_seconds,
            "unstir.device_seconds": device_seconds,
            "unstir.nfe": sum(evaluations.values()),
            "unstir.samplers": list(evaluations),
        }
    )
