"""Traces by OpenTelemetry, where its API is installed; elsewhere nothing.

Which spans go where is the business of its SDK: ``opentelemetry-instrument unstir serve`` sets that up from the
environment, and without it a span costs next to nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from app.replies.formats import Outcome

try:
    from opentelemetry import propagate, trace
except ImportError:
    INSTALLED = False
else:
    INSTALLED = True


@contextmanager
def span(name: str, headers: Mapping[str, str], request_id: str) -> Iterator[None]:
    """A request, as part of the trace that its ``traceparent`` names, if it has one."""
    if not INSTALLED:
        yield
        return
    tracer = trace.get_tracer("unstir")
    context = propagate.extract(dict(headers))
    with tracer.start_as_current_span(
        name, context, kind=trace.SpanKind.SERVER, attributes={"unstir.request_id": request_id}
    ):
        yield


def tell(outcome: Outcome) -> None:
    """Note on the request's span what it took."""
    if not INSTALLED:
        return
    spent = outcome.spent
    trace.get_current_span().set_attributes(
        {
            "unstir.queue_seconds": spent.queue_seconds,
            "unstir.device_seconds": spent.device_seconds,
            "unstir.nfe": sum(spent.evaluations.values()),
            "unstir.samplers": list(spent.evaluations),
        }
    )
