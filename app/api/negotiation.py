"""Which format a response has (RFC 9110, section 12.5.1), and whether the client has it already (section 13.1.2)."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from urllib.request import parse_http_list

from app import __version__
from app.errors import NotAcceptable

_MEDIA = re.compile(r"[\w!#$&^.+-]+/[\w!#$&^.+*-]+|\*/\*", re.ASCII)
_QUALITY = re.compile(r"[01]?\.\d+|[01]\.?")


def negotiate(accept: Sequence[str], formats: Sequence[str], why_not: str = "") -> str:
    """The format with the highest quality in the lines of Accept; among equals, the first of ours.

    A member that cannot be read is ignored; ``*`` is what some old clients send for ``*/*``.

    Args:
        formats: those that this request can have.
        why_not: why it cannot have the others, for the error.

    Raises:
        NotAcceptable: none of ours is accepted.
    """
    weights = _parse_accept(", ".join(accept)) or {"*/*": 1.0}

    def weight(media: str) -> float:
        family = f"{media.partition('/')[0]}/*"
        return next((weights[name] for name in (media, family, "*/*") if name in weights), 0.0)

    best = max(formats, key=weight)
    if weight(best) <= 0:
        reason = f" ({why_not})" if why_not else ""
        raise NotAcceptable(f"Accept = {', '.join(accept)[:200]!r}: choose one of {', '.join(formats)}{reason}")
    return best


def _parse_accept(line: str) -> dict[str, float]:
    weights: dict[str, float] = {}
    for member in parse_http_list(line):
        media, *parameters = (piece.strip() for piece in member.lower().split(";"))
        media = "*/*" if media == "*" else media
        quality = 1.0
        for parameter in parameters:
            name, _, value = (piece.strip() for piece in parameter.partition("="))
            if name == "q":
                quality = min(1.0, float(value)) if _QUALITY.fullmatch(value) else -1.0
        if _MEDIA.fullmatch(media) and quality >= 0:
            weights[media] = max(quality, weights.get(media, 0.0))
    return weights


def make_etag(digest: str, media_type: str, network: str, *, weak: bool) -> str:
    """An entity tag of the response to a request that has only one.

    Args:
        digest: of the request.
        network: all else that the bytes depend on.
        weak: the bytes have times in them.
    """
    facts = "\n".join((digest, media_type, network, __version__))
    tag = hashlib.blake2b(facts.encode(), digest_size=16).hexdigest()
    return f'W/"{tag}"' if weak else f'"{tag}"'


def matches_etag(lines: Sequence[str], etag: str) -> bool:
    """Whether the lines of If-None-Match name this tag; they compare weakly."""
    return any(tag.strip().removeprefix("W/") == etag.removeprefix("W/") for tag in parse_http_list(", ".join(lines)))
