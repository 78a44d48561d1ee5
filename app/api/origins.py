"""Which sites' pages may use the service from a browser (the Fetch standard, section 3.3).

A page of any site can make a visitor's browser send forms, and ask for images, anywhere, the visitor's own machine
included. CORS keeps it from reading the response, and not from spending the device. So what a foreign page sends is
refused, unless the settings name its site.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from app.errors import ForeignOrigin
from app.settings import is_origin

METHODS = ("GET", "HEAD", "POST", "DELETE", "OPTIONS")
REQUEST_HEADERS = (
    "Accept",
    "Authorization",
    "Content-Type",
    "Idempotency-Key",
    "If-None-Match",
    "Prefer",
    "Priority",
    "X-Request-Id",
    "X-Request-Timeout-Ms",
)
RESPONSE_HEADERS = (
    "Content-Disposition",
    "ETag",
    "Idempotent-Replayed",
    "Location",
    "Preference-Applied",
    "Retry-After",
    "Server-Timing",
    "X-NFE",
    "X-Request-Id",
    "X-Seed",
)


def allow_origins(app: ASGIApp, origins: Collection[str]) -> CORSMiddleware:
    """Answer preflights of these sites, and let their pages read responses."""
    return CORSMiddleware(
        app,
        allow_origins=list(origins),
        allow_methods=METHODS,
        allow_headers=REQUEST_HEADERS,
        expose_headers=RESPONSE_HEADERS,
        max_age=7200,
    )


class OriginMiddleware:
    """Refuses what a foreign page sends.

    Args:
        origins: sites that may.
        costly: paths for which a GET is refused, too; other pages may be linked and embedded as any.
    """

    def __init__(self, app: ASGIApp, origins: Collection[str], costly: Collection[str]) -> None:
        self.app = allow_origins(app, origins) if origins else app
        self.origins = origins
        self.costly = costly

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (scope["method"] not in ("GET", "HEAD") or self._is_costly(scope)):
            sender = find_foreign_sender(Headers(scope=scope))
            if sender is not None and not self._allows(sender.origin):
                raise ForeignOrigin(sender.describe())
        await self.app(scope, receive, send)

    def _is_costly(self, scope: Scope) -> bool:
        return scope["path"].removeprefix(scope.get("root_path", "")) in self.costly

    def _allows(self, origin: str) -> bool:
        return "*" in self.origins or origin.lower() in self.origins


@dataclass(frozen=True)
class ForeignSender:
    """A page of another site that has sent a request.

    Attributes:
        header: that says so.
        value: what it says.
        origin: of the page; null where it has none, or does not say which.
    """

    header: str
    value: str
    origin: str

    def describe(self) -> str:
        """What was sent, and what can be done; only sites that the setting takes are to be named there."""
        sent = f"{self.header.title()} = {self.value[:200]}"
        if is_origin(self.origin):
            remedy = f"name {self.origin[:200]} in UNSTIR_CORS_ORIGINS, or send the request from a program"
            return f"{sent}: pages of this site may not use the service; {remedy}"
        anyone = "allow all pages with UNSTIR_CORS_ORIGINS=*"
        if self.header == "sec-fetch-site":
            return (
                f"{sent}: a page of another site sent this, and neither Origin nor Referer says which; serve it over "
                f'http, set referrerpolicy="origin" there and name its site in UNSTIR_CORS_ORIGINS, or {anyone}'
            )
        return f"{sent}: the page has no site, as a file has none; serve it over http, or {anyone}"


def find_foreign_sender(headers: Headers) -> ForeignSender | None:
    """The page of another site that has sent a request; None for all else.

    A form or a script says its ``Origin``; an image says only that its site is another, in ``Sec-Fetch-Site``. What is
    opened as a page of its own, by a link or a bookmark, is no foreign page's request.
    """
    origin, site = headers.get("origin"), headers.get("sec-fetch-site")
    if site in ("same-origin", "none"):  # which no script can set, and which a proxy that renames hosts leaves as it is
        return None
    if origin is not None:
        host = _host_of(origin)
        return None if host and host == headers.get("host", "").lower() else ForeignSender("origin", origin, origin)
    opened = (headers.get("sec-fetch-mode"), headers.get("sec-fetch-dest")) == ("navigate", "document")
    if site != "cross-site" or opened:
        return None
    referer = headers.get("referer", "")
    host = _host_of(referer)
    if not host:
        return ForeignSender("sec-fetch-site", site, "null")
    return ForeignSender("referer", referer, f"{referer.partition(':')[0].lower()}://{host}")


def _host_of(url: str) -> str:
    """Host and port; empty if it cannot be read."""
    try:
        return urlsplit(url).netloc.lower()
    except ValueError:
        return ""
