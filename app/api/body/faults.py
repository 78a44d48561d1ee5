"""A request's fields as its model; faults are reported by field, value and remedy."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from app.errors import MAX_FAULTS, InvalidField

M = TypeVar("M", bound=BaseModel)


def validate(model: type[M], fields: Mapping[str, Any], *, strict: bool) -> M:
    """The model of these fields.

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
        raise InvalidField.many(_faults(error, model)) from None  # the cause would keep the body


def _faults(error: ValidationError, model: type[BaseModel]) -> Iterable[tuple[str, object, str]]:
    """One (field, value, remedy) for each field; a union reports a fault for each member, though one value was sent."""
    merged: dict[str, tuple[str, object, str]] = {}
    for fault in error.errors(include_url=False, include_context=False):
        # Of a nested field both names count; what follows are pydantic's names of a union's members.
        place = [part for part in fault["loc"] if not (isinstance(part, str) and part in ("int", "str"))]
        field = ".".join(map(str, place))[:200] or "body"
        remedy = str(fault["msg"]).removeprefix("Value error, ").removeprefix("Input ").partition(", unable")[0]
        if fault["type"] == "extra_forbidden":
            known = ", ".join(model.model_fields) if len(place) == 1 else "seed, npy, image"
            remedy = f"no such field; known are {known}"
        elif fault["type"] == "missing":
            remedy = "it is missing; send it"
        elif fault["type"] == "greater_than_equal" and place[-1] == "seed":  # elsewhere -1 asks for a random one
            remedy += "; leave it out, and one is drawn"
        before = merged.get(field)
        value = None if fault["type"] == "missing" else plain(fault.get("input"))
        merged[field] = (field, value, f"{before[2]} or {remedy}" if before else remedy)
    return merged.values()


def plain(value: object) -> object:
    """What can be echoed as JSON without risk: scalars as they are, the rest by type and size."""
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, str):
        return encodable(value if len(value) <= 200 else f"{value[:40]}… ({len(value)} characters)")
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    return {"list": "an array", "dict": "an object"}.get(type(value).__name__, "something else")


def encodable(text: str) -> str:
    """JSON may spell lone surrogates, which no encoding can send back."""
    return text.encode("utf-8", "replace").decode()
