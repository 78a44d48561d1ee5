"""The OpenAPI document: what FastAPI cannot see of it, because bodies come in several forms and headers are read late.

Written so that generators of clients can use it: JSON is the first content of a response, bodies are named schemas, and
each operation has a short id. What is said of headers and tags is in ``descriptions``; all else follows from the
routes and their models.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import reduce
from operator import or_
from typing import Any, Literal

from fastapi import FastAPI
from fastapi.routing import APIRoute
from pydantic.json_schema import models_json_schema

from app.api.descriptions import REQUEST_HEADERS, RESPONSE_HEADERS, TAGS
from app.api.operation import Operation
from app.api.responses.formats import EVENTS, JSON
from app.operations.requests import file_fields, latent_fields

Schema = dict[str, Any]
REFERENCE = "#/components/schemas/{model}"
BINARY = {"type": "string", "format": "binary"}
MULTIPART, URLENCODED = "multipart/form-data", "application/x-www-form-urlencoded"
BARE_IMAGE = "image/*"
METHODS = ("get", "post", "put", "patch", "delete", "head", "options")


def operation_id(route: APIRoute) -> str:
    """The name of the function of a generated client."""
    return route.name


def result_response(operations: Sequence[Operation], description: str) -> dict[str, Any]:
    """What FastAPI shall say of a response with a result of any of these operations, in any of its formats."""
    formats = dict.fromkeys(media for operation in operations for media in operation.formats if media != JSON)
    model = reduce(or_, (operation.response for operation in operations))
    content = {media: {"schema": {"type": "string"} if media == EVENTS else BINARY} for media in formats}
    return {"description": description, "model": model, "content": content}


def extend(app: FastAPI, operations: Sequence[Operation]) -> None:
    """Let the application's document declare what FastAPI does not see; it is made once."""
    describe = app.openapi

    def openapi() -> Schema:
        if app.openapi_schema is None:
            app.openapi_schema = _complete(describe(), operations)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _complete(document: Schema, operations: Sequence[Operation]) -> Schema:
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    models = [(operation.request, "validation") for operation in operations]
    schemas |= models_json_schema(models, ref_template=REFERENCE)[1]["$defs"]  # type: ignore[arg-type]
    document["tags"] = [{"name": name, "description": text} for name, text in TAGS.items()]
    for operation in operations:
        declared = schemas[operation.request.__name__]
        schemas[_name(operation, "Form")] = _form(operation, declared, "Form")
        schemas[_name(operation, "Fields")] = _form(operation, declared, "Fields")
        for schema in (declared, schemas[_name(operation, "Form")], schemas[_name(operation, "Fields")]):
            _write_out_defaults(schema)
    _name_enums(schemas)
    for operation in operations:
        path, fields = document["paths"][operation.path], schemas[_name(operation, "Fields")]
        _describe_body(path["post"], operation, schemas)
        if "get" in path:
            path["get"].setdefault("parameters", []).extend(_query(fields))
    for endpoint in _endpoints(document):
        _drop_foreign_problem(endpoint)
        _describe_headers(endpoint)
        for status, response in endpoint["responses"].items():
            response["content"] = _order(_retype_problem(status, response.get("content", {})))
    for name in ("HTTPValidationError", "ValidationError"):  # FastAPI's own, which is never sent
        schemas.pop(name, None)
    return document


def _endpoints(document: Schema) -> Iterator[Schema]:
    for path in document["paths"].values():
        yield from (path[method] for method in METHODS if method in path)


def _describe_body(endpoint: Schema, operation: Operation, schemas: Schema) -> None:
    """JSON, a form whose files are files, and where the operation takes one image, that image with a query."""
    name = operation.request.__name__
    models = {JSON: name, MULTIPART: _name(operation, "Form"), URLENCODED: _name(operation, "Fields")}
    content = {media: {"schema": {"$ref": REFERENCE.format(model=model)}} for media, model in models.items()}
    if "image" in operation.request.model_fields:
        content[BARE_IMAGE] = {"schema": BINARY}
        fields = schemas[_name(operation, "Fields")]
        endpoint.setdefault("parameters", []).extend(_query(fields, "Only with a bare image as the body."))
    endpoint["requestBody"] = {"content": content, "required": bool(schemas[name].get("required"))}


def _name(operation: Operation, kind: str) -> str:
    return operation.request.__name__.removesuffix("Request") + kind


def _form(operation: Operation, declared: Schema, kind: Literal["Form", "Fields"]) -> Schema:
    """The same fields as text and, in a Form, as files: a latent is a seed or a file, and nothing is null."""
    files, latents = file_fields(operation.request), latent_fields(operation.request)
    properties = {}
    for name, found in declared["properties"].items():
        schema = _without_null(found)
        if name in latents:
            seed = {"type": "integer", "minimum": 0, "title": "Seed"}
            latent: Schema = {"anyOf": [{**BINARY, "title": "File"}, seed]} if kind == "Form" else seed
            several = schema.get("type") == "array"
            kept = {key: value for key, value in schema.items() if key not in ("$ref", "oneOf")}
            schema = {**kept, "items": latent} if several else {**kept, **latent}
        elif name in files and kind == "Form":
            schema = {**BINARY, "description": schema["description"]}
        properties[name] = schema
    described = {"type": "object", "title": _name(operation, kind)}
    required = {"required": declared["required"]} if "required" in declared else {}
    return {**described, "description": declared["description"], "properties": properties, **required}


def _without_null(schema: Schema) -> Schema:
    """A field as it is where it is sent; a copy."""
    kept = {name: value for name, value in schema.items() if name != "anyOf" and (name, value) != ("default", None)}
    members = [member for member in schema.get("anyOf", []) if member.get("type") != "null"]
    if "items" in kept:
        kept["items"] = _without_null(kept["items"])
    if len(members) == 1:
        return _without_null({**members[0], **kept})
    return {**kept, "anyOf": members} if members else kept


def _write_out_defaults(schema: Schema) -> None:
    """Defaults as text: as members, some generators send them all, and others make the fields required."""
    for name, declared in schema["properties"].items():
        default = declared.pop("default", None)
        if default is not None:
            first, blank, rest = str(declared.get("description", "")).partition("\n\n")
            shown = f"Default: {default if isinstance(default, str) else json.dumps(default)}."
            schema["properties"][name] = {**declared, "description": f"{first} {shown}".strip() + blank + rest}


def _name_enums(schemas: Schema) -> None:
    """Choices that several schemas have as a schema of its own, named as the field: clients have one type for it.

    Where a field name stands for different choices, the name of the operation comes first: InvertMethod.
    """
    found = [
        (model, field, place)
        for model, schema in schemas.items()
        for field, declared in schema.get("properties", {}).items()
        for place in (declared, *declared.get("anyOf", []))
        if "enum" in place
    ]
    uses = Counter((field, *place["enum"]) for _, field, place in found)
    for model, field, place in found:
        if uses[field, *place["enum"]] == 1:
            continue
        alone = sum(name == field for name, *_ in uses) == 1
        words = [field] if alone else [re.sub(r"(Request|Form|Fields|Response)$", "", model), field]
        name = "".join(part[:1].upper() + part[1:] for word in words for part in word.split("_"))
        schemas[name] = {"type": "string", "title": name, "enum": place.pop("enum")}
        del place["type"]
        place["$ref"] = REFERENCE.format(model=name)


def _query(fields: Schema, when: str = "") -> Iterator[Schema]:
    """The fields of a GET, or the other fields of a bare image."""
    for name, schema in fields["properties"].items():
        if name != "image":
            text = f"{when} {schema.get('description', '')}".strip()
            bare = {key: value for key, value in schema.items() if key != "description"}
            yield {"name": name, "in": "query", "required": False, "description": text, "schema": bare}


def _describe_headers(endpoint: Schema) -> None:
    tag = endpoint.get("tags", [""])[0]
    parameters = [
        {"name": name, "in": "header", "required": False, **header.describe()}
        for name, header in REQUEST_HEADERS.items()
        if header.applies(tag)
    ]
    endpoint.setdefault("parameters", []).extend(parameters)
    for status, response in endpoint["responses"].items():
        response["headers"] = {
            name: header.describe() for name, header in RESPONSE_HEADERS.items() if header.applies(tag, int(status))
        }


def _drop_foreign_problem(endpoint: Schema) -> None:
    """FastAPI declares its own 422 wherever there is a parameter; a path that does not fit is a 404 here."""
    if "HTTPValidationError" in str(endpoint["responses"].get("422")):
        del endpoint["responses"]["422"]


def _retype_problem(status: str, content: Schema) -> Schema:
    """FastAPI declares every model as application/json; problems are application/problem+json."""
    if int(status) >= 400 and "Problem" in str(content.get(JSON)):
        return {"application/problem+json": content[JSON]}
    return content


def _order(content: Schema) -> Schema:
    """JSON first, which generators take, and event streams last, which few of them know."""
    return {media: content[media] for media in sorted(content, key=lambda media: (media != JSON, media == EVENTS))}
