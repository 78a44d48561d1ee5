"""One row for each endpoint that computes: everything else about it follows from the row."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from app.api.negotiation import negotiate
from app.api.responses.formats import ANIMATIONS, STILLS
from app.api.responses.results import OperationResult
from app.operations.context import RequestContext
from app.operations.service import Service
from model.checkpoint import Card


@dataclass(frozen=True)
class Formats:
    """Media types of a response; the first is the default.

    Attributes:
        why_not: why it has no others.
    """

    media_types: tuple[str, ...]
    why_not: str = ""

    def choose(self, accept: Sequence[str]) -> str:
        """The one that the lines of Accept ask for.

        Raises:
            NotAcceptable: none of them.
        """
        return negotiate(accept, self.media_types, self.why_not)


@dataclass(frozen=True)
class Operation:
    """An endpoint.

    Attributes:
        name: the path without its slash, and the command.
        request: model of the body.
        run: computes; raises UnstirError.
        result: of what ``run`` returned and the checkpoint's card, what can be shown.
        response: model of the JSON response.
        formats: media types of the response; the first is the default.
        repeatable: whether a request always has the same response.
        no_animation: why a request has none; None if it has one.
        no_image: the same of still images.
    """

    name: str
    summary: str
    description: str
    request: type[BaseModel]
    run: Callable[[Service, Any, RequestContext], Awaitable[Any]]
    result: Callable[[Any, Card], OperationResult]
    response: type[BaseModel]
    formats: tuple[str, ...]
    repeatable: Callable[[Any], bool]
    no_animation: Callable[[Any], str | None]
    no_image: Callable[[Any], str | None] = lambda _: None

    @property
    def path(self) -> str:
        return f"/{self.name}"

    @property
    def gettable(self) -> bool:
        """Whether a query string is enough for a request."""
        return not any(field.is_required() for field in self.request.model_fields.values())

    def list_formats(self, body: BaseModel) -> Formats:
        """Those that this very request can have."""
        reasons = dict.fromkeys(ANIMATIONS, self.no_animation(body)) | dict.fromkeys(STILLS, self.no_image(body))
        possible = tuple(media_type for media_type in self.formats if reasons.get(media_type) is None)
        missing = [reason for media_type, reason in reasons.items() if reason and media_type in self.formats]
        return Formats(possible, "; ".join(dict.fromkeys(missing)))
