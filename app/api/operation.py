"""One row for each endpoint that computes: everything else about it follows from the row."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from app.api.responses.results import OperationResult
from app.operations.context import RequestContext
from app.operations.service import Service
from model.checkpoint import Card


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
    """

    name: str
    summary: str
    description: str
    request: type[BaseModel]
    run: Callable[[Service, Any, RequestContext], Awaitable[Any]]
    result: Callable[[Any, Card], OperationResult]
    response: type[BaseModel]
    formats: tuple[str, ...]

    @property
    def path(self) -> str:
        return f"/{self.name}"
