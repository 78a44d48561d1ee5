"""What the OpenAPI document says of headers and tags: one row each, and where it applies.

``tests/app/api/test_openapi.py`` compares the rows with what the service sends and with what its code writes.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from app.api.headers import DEFAULT_URGENCY, MAX_TIMEOUT_MS

TAGS = {
    "images": "Sample, invert, interpolate.",
    "jobs": "Asynchronous jobs: their state, their results, and how to cancel them.",
    "service": "The service about itself: what it serves, whether it is alive and ready, and its metrics.",
}
TEXT: dict[str, Any] = {"type": "string"}


@dataclass(frozen=True)
class Header:
    """A header of requests or of responses.

    Attributes:
        text: what it means.
        schema: of its value.
        tags: of the endpoints that have it; None for all.
        statuses: of the responses that have it; None for all.
    """

    text: str
    schema: dict[str, Any]
    tags: Collection[str] | None = None
    statuses: Collection[int] | None = None

    def applies(self, tag: str, status: int | None = None) -> bool:
        """Whether an endpoint with this tag, or its response of this status, has it."""
        return (self.tags is None or tag in self.tags) and (self.statuses is None or status in self.statuses)

    def describe(self) -> dict[str, Any]:
        """The members that parameters and headers of a document share."""
        return {"description": self.text, "schema": self.schema}


COMPUTE = ("images",)
RESULTS = ("images", "jobs")

REQUEST_HEADERS = {
    "X-Request-Timeout-Ms": Header(
        "Milliseconds within which the response is wanted, else 504; at once if the work is known to take longer.",
        {"type": "integer", "minimum": 1, "maximum": MAX_TIMEOUT_MS},
        COMPUTE,
    ),
    "Priority": Header(
        f"Urgency of RFC 9218: u=0 is the most urgent, u=7 the least, u={DEFAULT_URGENCY} the default.",
        {**TEXT, "examples": ["u=1"]},
        COMPUTE,
    ),
    "Idempotency-Key": Header(
        "A retry with the same key gets the first request's response, in progress or done.",
        {**TEXT, "minLength": 1, "maxLength": 200, "pattern": "^[!-~]+$"},
        COMPUTE,
    ),
    "Prefer": Header(
        "respond-async (RFC 7240): 202 at once, and the result from the job.",
        {**TEXT, "examples": ["respond-async"]},
        COMPUTE,
    ),
    "If-None-Match": Header(
        "ETags of responses that the client has: 304, without work, where the present one is among them.", TEXT, COMPUTE
    ),
    "traceparent": Header(
        "The trace (W3C Trace Context) that the request's span joins, where OpenTelemetry is installed.", TEXT, COMPUTE
    ),
    "X-Request-Id": Header("Used instead of a new id, if printable; it is in every log line of the request.", TEXT),
}

RESPONSE_HEADERS = {
    "X-Request-Id": Header("The id of the request.", TEXT),
    "Server-Timing": Header("Milliseconds in the queue, on the device, in encode, and in total.", TEXT),
    "X-NFE": Header("Network evaluations of each image.", {"type": "integer", "minimum": 0}, RESULTS, (200,)),
    "X-Seed": Header(
        "Of /sample, the seed of the first image, drawn if none was given.",
        {"type": "integer", "minimum": 0},
        RESULTS,
        (200,),
    ),
    "Vary": Header("For caches: the response depends on Accept.", TEXT, RESULTS, (200, 304)),
    "Cache-Control": Header("no-store; with an ETag no-cache, which lets a cache ask again with it.", TEXT),
    "ETag": Header("Of a response that is a function of its request, for If-None-Match.", TEXT, COMPUTE, (200, 304)),
    "Content-Disposition": Header("A name for the file.", TEXT, RESULTS, (200,)),
    "Connection": Header("close, where the rest of the request is not read.", TEXT, None, (400, 408, 503)),
    "Accept-Encoding": Header("Codings of bodies that are taken: identity.", TEXT, COMPUTE, (415,)),
    "X-Accel-Buffering": Header("Of event streams, no: proxies pass each event on at once.", TEXT, RESULTS, (200,)),
    "Idempotent-Replayed": Header(
        "true where the key of the request was known, and the response is that of the first request.",
        TEXT,
        COMPUTE,
        (200, 202),
    ),
    "Location": Header("The job, for GET and DELETE.", {**TEXT, "format": "uri-reference"}, COMPUTE, (202,)),
    "Preference-Applied": Header("respond-async.", TEXT, COMPUTE, (202,)),
    "Retry-After": Header(
        "Seconds after which to send the request again; of a job that is not done, when to ask again.",
        {"type": "integer", "minimum": 1},
        statuses=(409, 429, 503),
    ),
}
