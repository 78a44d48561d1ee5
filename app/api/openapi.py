"""The OpenAPI document: what FastAPI cannot see of it, because bodies come in several forms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

REFERENCE = "#/components/schemas/{model}"


def complete(document: dict[str, Any], bodies: dict[str, type[BaseModel]], files: Sequence[str]) -> dict[str, Any]:
    """Declare the bodies, and problems as what they are answered as.

    Args:
        bodies: the model of each path's body.
        files: names of fields that a form may hold as files.
    """
    for operation in (operation for path in document["paths"].values() for operation in path.values()):
        for status, response in operation["responses"].items():
            content = response.get("content", {})
            if int(status) >= 400 and "Problem" in str(content.get("application/json")):
                content["application/problem+json"] = content.pop("application/json")
    _, schemas = models_json_schema([(model, "validation") for model in bodies.values()], ref_template=REFERENCE)
    known = document.setdefault("components", {}).setdefault("schemas", {})
    known |= schemas["$defs"]
    for path, model in bodies.items():
        reference = {"$ref": REFERENCE.format(model=model.__name__)}
        fields = dict(known[model.__name__]["properties"])
        binary = {"type": "string", "format": "binary"}
        form = {name: binary if name in files else schema for name, schema in fields.items()}
        content = {
            "application/json": {"schema": reference},
            "multipart/form-data": {"schema": {"type": "object", "properties": form}},
        }
        if "image" in fields:
            content["image/*"] = {"schema": binary}
        document["paths"][path]["post"]["requestBody"] = {"content": content, "required": "image" in fields}
    return document
