"""Request headers beside the work itself: deadline, priority, idempotency key, and whether to respond at once."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any
from urllib.request import parse_http_list

import http_sf
from fastapi import Request
from pydantic import BaseModel
from starlette.datastructures import Headers

from app.engine.reservation import SubmitOptions
from app.engine.scheduler import PRIORITIES
from app.errors import InvalidHeader

MAX_TIMEOUT_MS = 7 * 24 * 3600 * 1000
DEFAULT_URGENCY = PRIORITIES[-1]  # of requests without a Priority: 3 of 0..7, 0 first (RFC 9218, section 4.1)
_KEY = re.compile(r"[\x21-\x7e]{1,200}")


@dataclass(frozen=True)
class RequestHeaders:
    """What a client asks for in headers.

    Attributes:
        timeout_seconds: None if the client will wait.
        priority: see :class:`SubmitOptions`.
        idempotency_key: the same for requests that shall be done once.
        respond_async: respond at once, and keep the result.
    """

    timeout_seconds: float | None = None
    priority: int = 0
    idempotency_key: str | None = None
    respond_async: bool = False

    @classmethod
    def parse(cls, headers: Headers) -> RequestHeaders:
        """From ``X-Request-Timeout-Ms``, ``Priority`` (RFC 9218), ``Idempotency-Key`` and ``Prefer`` (RFC 7240).

        A ``Priority`` or ``Prefer`` that cannot be read is ignored, as the RFCs have it.

        Raises:
            InvalidHeader: naming the header, its value and the remedy.
        """
        timeout, key = headers.get("x-request-timeout-ms"), headers.get("idempotency-key")
        if timeout is not None and not 0 < _parse_digits(timeout) <= MAX_TIMEOUT_MS:
            remedy = f"send whole milliseconds, 1 to {MAX_TIMEOUT_MS}"
            raise InvalidHeader(f"X-Request-Timeout-Ms = {timeout[:40]!r}: {remedy}")
        if key is not None and not _KEY.fullmatch(key):
            remedy = "send 1 to 200 printable characters, a UUID for instance"
            raise InvalidHeader(f"Idempotency-Key = {key[:40]!r}: {remedy}")
        return cls(
            timeout_seconds=_parse_digits(timeout) / 1e3 if timeout else None,
            priority=DEFAULT_URGENCY - _urgency(headers),
            idempotency_key=key,
            respond_async=_prefers(headers, "respond-async"),
        )

    def deadline(self, began: float, max_seconds: float | None) -> float | None:
        """When the response must be ready, on the clock of ``began``; None if never."""
        limits = [seconds for seconds in (self.timeout_seconds, max_seconds) if seconds is not None]
        return began + min(limits) if limits else None

    def submit_options(self, request: Request, deadline: float | None, digest: str) -> SubmitOptions:
        """For the engine."""
        caller = identify_caller(request)
        return SubmitOptions(
            deadline=deadline,
            priority=self.priority,
            sender=f"{caller} {self.idempotency_key or digest}",
            caller=caller,
            endpoint=request.scope["route"].path,
        )


def identify_caller(request: Request) -> str:
    """Whose request it is: the same for all with these credentials, else from this address."""
    credentials = request.headers.get("authorization")
    if credentials:
        return hashlib.blake2b(credentials.encode(), digest_size=16).hexdigest()
    return request.client.host if request.client else ""


def digest_request(path: str, body: BaseModel) -> str:
    """The same for requests whose canonical JSON is the same, in whatever form they were sent."""
    content = json.dumps([path, body.model_dump(mode="json")], sort_keys=True)
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


def _prefers(headers: Headers, preference: str) -> bool:
    """Whether a line of ``Prefer`` has it: a token; an empty value is none (RFC 7240, section 2)."""
    for item in parse_http_list(", ".join(headers.getlist("prefer"))):
        token, _, value = item.partition(";")[0].partition("=")
        if token.strip().lower() == preference and value.strip() in ("", '""'):
            return True
    return False


def _urgency(headers: Headers) -> int:
    """Of ``Priority``, whose lines are together one structured field (RFC 9218, RFC 9651)."""
    text = ", ".join(headers.getlist("priority"))
    try:
        members: dict[str, Any] = dict(http_sf.parse(text.encode("latin-1"), tltype="dictionary"))  # type: ignore[arg-type]
    except ValueError:
        return DEFAULT_URGENCY
    urgency, _ = members.get("u", (DEFAULT_URGENCY, {}))
    whole = isinstance(urgency, int) and not isinstance(urgency, bool)
    return urgency if whole and DEFAULT_URGENCY - urgency in PRIORITIES else DEFAULT_URGENCY


def _parse_digits(text: str) -> int:
    """The number that these ASCII digits are; -1 for anything else, and for more of them than a header may need."""
    digits = text.lstrip("0")
    return int(digits or "0") if text and len(digits) <= 12 and text.isascii() and text.isdecimal() else -1
