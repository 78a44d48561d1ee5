"""Around every request: its id, its size, its duration, its log line. Plain ASGI: nothing is buffered."""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import Callable

from fastapi import HTTPException, Request, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.errors import InvalidHTTP
from app.telemetry.logs import REQUEST_ID
from app.telemetry.metrics import Metrics

log = logging.getLogger("unstir.http")
MAX_PATH = 500  # characters of a path in the log
_SAFE_ID = re.compile(r"[\w.:/+=-]{1,128}", re.ASCII)


class RequestMiddleware:
    """Gives each request an id (the client's own, if it sent a printable one), and measures and logs its response.

    An exception that nobody else has caught is answered by ``on_unexpected_error``.
    """

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        root_path: str,
        on_unexpected_error: Callable[[Request, Exception], Response],
    ) -> None:
        self.app = app
        self.metrics = metrics
        self.root_path = root_path
        self.on_unexpected_error = on_unexpected_error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, method, path = time.perf_counter(), scope["method"], scope["path"]
        if path.startswith(("http://", "https://")):  # absolute form (RFC 9112, section 3.2.2)
            path = "/" + path.partition("://")[2].partition("/")[2]
        # Some proxies strip the prefix, some do not; in ASGI the path begins with it.
        prefix = "" if path.startswith(f"{self.root_path}/") else self.root_path
        # HEAD is GET without the body (RFC 9110, section 9.3.2).
        scope = {
            **scope,
            "method": "GET" if method == "HEAD" else method,
            "path": prefix + path,
            "root_path": self.root_path,
        }
        sent = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        request_id = sent if _SAFE_ID.fullmatch(sent) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        REQUEST_ID.set(request_id)
        status = 0

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                duration = f"total;dur={(time.perf_counter() - began) * 1e3:.3f}".encode()
                headers = ((b"x-request-id", request_id.encode()), (b"server-timing", duration))
                message["headers"] = [*message["headers"], *headers]
            elif method == "HEAD":
                message = {**message, "body": b""}
            await send(message)

        try:
            _refuse_two_lengths(scope)
            await self.app(scope, receive, send_with_headers)
        except Exception as error:
            if status:  # the response has begun: only the connection can be closed
                raise
            await self.on_unexpected_error(Request(scope), error)(scope, receive, send_with_headers)
        finally:
            seconds = time.perf_counter() - began
            # Unknown paths share one label, or a scanner could make the metrics grow without end.
            endpoint = getattr(scope.get("route"), "path", "other")
            sampler = scope["state"].get("sampler", "")
            self.metrics.requests.labels(endpoint, sampler, status).inc()
            self.metrics.duration.labels(endpoint, sampler, status).observe(seconds)
            path, took = path[:MAX_PATH], round(seconds * 1e3, 1)
            fields = {"method": method, "path": path, "status": status, "ms": took, "sampler": sampler}
            log.info("%s %s %d %.1f ms", method, path, status, took, extra=fields)


def _refuse_two_lengths(scope: Scope) -> None:
    """Where a proxy believes one length and this server the other, what is body to one is a request to the other.

    Raises:
        InvalidHTTP: the body has both a length and chunks (RFC 9112, section 6.3, item 3).
    """
    names = {name for name, _ in scope["headers"]}
    if {b"content-length", b"transfer-encoding"} <= names:
        raise InvalidHTTP("the headers have Content-Length and Transfer-Encoding; send one of them")


class BodyLimitMiddleware:
    """Refuses bodies over a limit: by their Content-Length before a byte is read, or when the count passes it."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self.app = app
        self.limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            if declared.isdigit() and int(declared) > self.limit:
                raise HTTPException(413, f"{int(declared)} bytes")
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self.limit:
                raise HTTPException(413, f"more than {self.limit} bytes")
            return message

        await self.app(scope, counted, send)
