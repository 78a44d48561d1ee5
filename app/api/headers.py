"""What a client asks for in headers, beside the work itself: how long, how urgently, how often, and whether to wait."""

from __future__ import annotations

import hashlib
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass

from fastapi import Request
from pydantic import BaseModel

from app.engine.reservation import SubmitOptions
from app.errors import InvalidHeader

LONGEST_MS = 7 * 24 * 3600 * 1000
ORDINARY = 3  # the urgency that requests have without a Priority (RFC 9218, section 4.1)
_KEY = re.compile(r"[\x21-\x7e]{1,200}")
_URGENCY = re.compile(r"(?:^|[,\s])u=(\d+)\s*(?:,|;|$)")


@dataclass(frozen=True)
class RequestHeaders:
    """The headers of a request for images.

    Attributes:
        seconds: that it may take; None if the client will wait.
        priority: 3 for the most urgent, -4 for the least.
        key: the same for requests of which one answer is wanted.
        asynchronous: answer at once, and keep the result.
    """

    seconds: float | None = None
    priority: int = 0
    key: str | None = None
    asynchronous: bool = False

    @classmethod
    def read(cls, headers: Mapping[str, str]) -> RequestHeaders:
        """From ``X-Request-Timeout-Ms``, ``Priority`` (RFC 9218), ``Idempotency-Key`` and ``Prefer`` (RFC 7240).

        Raises:
            InvalidHeader: naming the header, its value and the remedy.
        """
        timeout, key = headers.get("x-request-timeout-ms"), headers.get("idempotency-key")
        if timeout is not None and not 0 < _whole(timeout) <= LONGEST_MS:
            raise InvalidHeader(f"X-Request-Timeout-Ms = {timeout[:40]!r}: send whole milliseconds, 1 to {LONGEST_MS}")
        if key is not None and not _KEY.fullmatch(key):
            raise InvalidHeader(
                f"Idempotency-Key = {key[:40]!r}: send 1 to 200 printable characters, a UUID for instance"
            )
        urgency = _URGENCY.search(headers.get("priority", ""))
        if urgency and not 0 <= _whole(urgency[1]) <= 7:
            raise InvalidHeader(f"Priority = {headers['priority'][:40]!r}: u goes from 0, the most urgent, to 7")
        preferences = {part.strip().lower() for part in headers.get("prefer", "").split(",")}
        return cls(
            seconds=_whole(timeout) / 1e3 if timeout else None,
            priority=ORDINARY - _whole(urgency[1]) if urgency else 0,
            key=key,
            asynchronous="respond-async" in preferences,
        )

    def deadline(self, began: float, most_seconds: float | None) -> float | None:
        """When the answer must be ready, on the clock of ``began``; None if never."""
        allowed = [seconds for seconds in (self.seconds, most_seconds) if seconds is not None]
        return began + min(allowed) if allowed else None

    def terms(self, request: Request, deadline: float | None, digest: str) -> SubmitOptions:
        """For the engine."""
        host = request.client.host if request.client else ""
        return SubmitOptions(
            deadline=deadline,
            priority=self.priority,
            sender=f"{host} {self.key or digest}",
            endpoint=request.url.path,
        )


def _whole(text: str) -> int:
    """The number that these ASCII digits are; -1 for anything else, and for more of them than any header may need."""
    digits = text.lstrip("0")
    return int(digits or "0") if text and len(digits) <= 12 and text.isascii() and text.isdecimal() else -1


def digest_of(path: str, body: BaseModel) -> str:
    """The same for the same request, however it was written down."""
    return hashlib.blake2b(pickle.dumps((path, body.model_dump())), digest_size=16).hexdigest()
