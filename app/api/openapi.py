"""The OpenAPI document: what FastAPI cannot see of it, because bodies come in several forms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from pydantic.json_schema import models_json_schema

from app.api.operation import Operation
from app.operations.requests import file_fields

REFERENCE = "#/components/schemas/{model}"
BINARY = {"type": "string", "format": "binary"}


def extend(app: FastAPI, operations: Sequence[Operation]) -> None:
    """Let the application's document declare the operations' bodies; it is made once."""
    describe = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _complete(describe(), operations)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _complete(document: dict[str, Any], operations: Sequence[Operation]) -> dict[str, Any]:
    _retype_problems(document)
    models = [(operation.request, "validation") for operation in operations]
    _, schemas = models_json_schema(models, ref_template=REFERENCE)  # type: ignore[arg-type]
    known = document.setdefault("components", {}).setdefault("schemas", {})
    known |= schemas["$defs"]
    for operation in operations:
        name, files = operation.request.__name__, file_fields(operation.request)
        fields = dict(known[name]["properties"])
        form = {field: BINARY if field in files else schema for field, schema in fields.items()}
        content = {
            "application/json": {"schema": {"$ref": REFERENCE.format(model=name)}},
            "multipart/form-data": {"schema": {"type": "object", "properties": form}},
        }
        if "image" in fields:
            content["image/*"] = {"schema": BINARY}
        body = {"content": content, "required": "image" in fields}
        document["paths"][operation.path]["post"]["requestBody"] = body
    return document


def _retype_problems(document: dict[str, Any]) -> None:
    """FastAPI declares every model as application/json; problems are application/problem+json."""
    for operation in (operation for path in document["paths"].values() for operation in path.values()):
        for status, response in operation["responses"].items():
            content = response.get("content", {})
            if int(status) >= 400 and "Problem" in str(content.get("application/json")):
                content["application/problem+json"] = content.pop("application/json")
