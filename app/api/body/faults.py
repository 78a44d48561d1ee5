"""A request's fields as its model; faults are reported by field, value and remedy."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from app.errors import MAX_FAULTS, InvalidField
from app.errors.wording import MISSING, MUST_BE, Unquoted, find_bounds, suggest, word_remedy
from app.operations.fields import Latent

M = TypeVar("M", bound=BaseModel)


def validate(model: type[M], fields: Mapping[str, Any], *, strict: bool, highest: Mapping[str, int] | None = None) -> M:
    """The model of these fields.

    Args:
        highest: of fields, that the service has a limit for; named in messages, not judged.

    Raises:
        InvalidField: with every fault, up to ``MAX_FAULTS`` of them; unknown fields are judged before any other.
    """
    unknown = [name for name in fields if name not in model.model_fields]
    if len(unknown) > MAX_FAULTS:
        remedy = f"no such field; known are {', '.join(model.model_fields)}"
        raise InvalidField.many((name, plain(fields[name]), remedy) for name in unknown)
    try:
        return model.model_validate(fields, strict=strict)
    except ValidationError as error:
        raise InvalidField.many(_faults(error, model, highest or {})) from None  # the cause would keep the body


def _faults(
    error: ValidationError, model: type[BaseModel], highest: Mapping[str, int]
) -> Iterable[tuple[str, object, str]]:
    """One (field, value, remedy) for each field; a union reports a fault for each member, though one value was sent."""
    merged: dict[str, tuple[str, object, str]] = {}
    for fault in error.errors(include_url=False):
        # Of a nested field both names count; what follows are pydantic's names of a union's members.
        place = [part for part in fault["loc"] if not (isinstance(part, str) and part in ("int", "str"))]
        field = ".".join(map(str, place))[:200] or "body"
        remedy = _remedy(fault, model, place, highest)
        before = merged.get(field)
        value = MISSING if fault["type"] == "missing" else plain(fault.get("input"))
        merged[field] = (field, value, f"{before[2]} or {remedy.removeprefix(MUST_BE)}" if before else remedy)
    return merged.values()


def _remedy(fault: ErrorDetails, model: type[BaseModel], place: Sequence[int | str], highest: Mapping[str, int]) -> str:
    kind = fault["type"]
    if kind == "extra_forbidden":
        known = list(model.model_fields if len(place) == 1 else Latent.model_fields)
        return f"no such field; {suggest(place[-1], known)}known are {', '.join(known)}"
    if kind == "missing":
        return "send it"
    fields = model.model_fields if len(place) == 1 else Latent.model_fields  # an item of a list is none of them
    bounds, integer = find_bounds(fields.get(str(place[-1])) if place else None, fault)
    if len(place) == 1 and place[0] in highest and "ge" in bounds:
        bounds["le"] = highest[str(place[0])]
    negative = kind == "greater_than_equal" and place == ["seed"]  # elsewhere -1 asks for a random one
    return word_remedy(fault, bounds, integer=integer) + ("; leave it out, and one is drawn" if negative else "")


def plain(value: object) -> object:
    """What can be echoed as JSON without risk: scalars as they are, the rest by type and size."""
    if value is None or isinstance(value, bool | int | Unquoted):
        return value
    if isinstance(value, str):
        return encodable(value if len(value) <= 200 else f"{value[:40]}… ({len(value)} characters)")
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, bytes):
        return Unquoted(f"{len(value)} bytes")
    return Unquoted({"list": "an array", "dict": "an object"}.get(type(value).__name__, "something else"))


def encodable(text: str) -> str:
    """JSON may spell lone surrogates, which no encoding can send back."""
    return text.encode("utf-8", "replace").decode()
