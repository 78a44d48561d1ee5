"""The OpenAPI document: whole, in agreement with the code and with what the service sends, and fit for generators."""

from __future__ import annotations

import asyncio
import base64
import json
import re
from collections import Counter
from pathlib import Path

import httpx
import pytest
from jsonschema import Draft202012Validator, FormatChecker

from app.api.app import create_app
from app.api.body.faults import validate
from app.api.body.json_text import parse_json
from app.api.body.read import IMAGE_TYPES
from app.api.descriptions import REQUEST_HEADERS, RESPONSE_HEADERS, TAGS
from app.api.openapi import METHODS
from app.api.responses.formats import EVENTS, JSON
from app.api.routes.operations import OPERATIONS
from app.errors import InvalidField
from app.operations.requests import InterpolateRequest, InvertRequest, SampleRequest
from app.settings import Settings
from tests.conftest import CLASSES, serving
from tests.test_docs import ROOT

DOCUMENT = create_app(Settings()).openapi()
SCHEMAS = DOCUMENT["components"]["schemas"]
ENDPOINTS = {
    f"{method.upper()} {path}": endpoint
    for path, found in DOCUMENT["paths"].items()
    for method, endpoint in found.items()
    if method in METHODS
}
OF_PAGES = {"Allow", "Content-Security-Policy"}  # of /docs, and of a path that has no such method
OF_CONTENT = {"Content-Length", "Content-Type"}  # which OpenAPI leaves to the content

CHECKER = FormatChecker()


@CHECKER.checks("byte", raises=ValueError)
def is_base64(value):
    return not isinstance(value, str) or base64.b64decode(value, validate=True) is not None


def check(value, schema):
    """Whether it is valid, with references into the document."""
    Draft202012Validator({**schema, "components": DOCUMENT["components"]}, format_checker=CHECKER).validate(value)


def read(model, content):
    """A body in JSON."""
    return validate(model, parse_json(content), strict=True)


def resolve(schema):
    return SCHEMAS[schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema


# What the document says of itself.


@pytest.mark.parametrize("endpoint", ENDPOINTS.values(), ids=ENDPOINTS)
def test_every_endpoint_is_described(endpoint):
    assert re.fullmatch(r"[a-z]+(_[a-z]+){0,2}", endpoint["operationId"])
    assert len(endpoint["tags"]) == 1
    assert endpoint["tags"][0] in TAGS
    assert endpoint["summary"]
    assert endpoint["description"]
    for parameter in endpoint.get("parameters", []):
        assert parameter["schema"]
        assert parameter["in"] == "path" or parameter["description"], parameter["name"]
    for status, response in endpoint["responses"].items():
        assert response["description"], status
        assert response["headers"].keys() >= {"X-Request-Id", "Server-Timing"}
        for name, header in response["headers"].items():
            assert header["description"], name
            assert header["schema"], name
        for media, content in response["content"].items():
            assert content["schema"], media


def test_ids_are_unique_and_tags_are_used():
    assert not [name for name, count in Counter(e["operationId"] for e in ENDPOINTS.values()).items() if count > 1]
    assert {tag for endpoint in ENDPOINTS.values() for tag in endpoint["tags"]} == TAGS.keys()
    assert [tag["name"] for tag in DOCUMENT["tags"]] == list(TAGS)


def test_json_is_the_first_content_and_events_the_last():
    results = []
    for endpoint in ENDPOINTS.values():
        for status, response in endpoint["responses"].items():
            media = list(response["content"])
            assert JSON not in media[1:]
            if EVENTS in media:
                assert media[-1] == EVENTS
                assert response["content"][EVENTS]["schema"] == {"type": "string"}
                results.append(endpoint["operationId"])
            if status >= "400" and endpoint["operationId"] != "get_readiness":
                assert media == ["application/problem+json"]
    computing = {endpoint["operationId"] for endpoint in ENDPOINTS.values() if endpoint["tags"] == ["images"]}
    assert set(results) == computing | {"get_job_result"}


def test_a_result_of_a_job_is_any_operation_s():
    content = ENDPOINTS["GET /jobs/{identifier}/result"]["responses"]["200"]["content"]
    assert content.keys() == {media for operation in OPERATIONS for media in operation.formats}
    found = {reference["$ref"].rpartition("/")[2] for reference in content[JSON]["schema"]["anyOf"]}
    assert found == {operation.response.__name__ for operation in OPERATIONS}


def test_schemas_are_schemas_and_all_are_used():
    text = json.dumps(DOCUMENT)
    for name, schema in SCHEMAS.items():
        Draft202012Validator.check_schema(schema)
        assert f'"#/components/schemas/{name}"' in text, name
    assert not [name for name in SCHEMAS if "ValidationError" in name]


def test_no_field_has_a_default_that_a_client_would_send():
    """Some generators send every default, and others make its field required."""
    for name, schema in SCHEMAS.items():
        for field, declared in schema.get("properties", {}).items():
            assert "default" not in declared, (name, field)
    assert SCHEMAS["SampleRequest"]["properties"]["n"]["description"].endswith("Default: 1.")
    assert SCHEMAS["SampleForm"]["properties"]["sampler"]["description"].startswith("The sampler. Default: ddim.\n\n")


def test_files_are_base64_in_json_and_binary_in_forms():
    for operation in OPERATIONS:
        name = operation.request.__name__
        form = SCHEMAS[name.replace("Request", "Form")]
        assert form["properties"].keys() == operation.request.model_fields.keys()
        assert form.get("required") == SCHEMAS[name].get("required")
        assert "null" not in json.dumps(form)
    latent = {
        "anyOf": [
            {"type": "string", "format": "binary", "title": "File"},
            {"type": "integer", "minimum": 0, "title": "Seed"},
        ]
    }
    latents = SCHEMAS["InterpolateForm"]["properties"]["latents"]
    assert (latents["type"], latents["items"], latents["maxItems"]) == ("array", latent, 8)
    assert SCHEMAS["InterpolateForm"]["properties"]["a"]["anyOf"] == latent["anyOf"]
    assert SCHEMAS["InvertForm"]["properties"]["image"]["format"] == "binary"
    image = SCHEMAS["InvertRequest"]["properties"]["image"]
    assert (image["format"], image["contentEncoding"]) == ("byte", "base64")
    images = SCHEMAS["SampleResponse"]["properties"]["images"]["items"]
    assert (images["format"], images["contentMediaType"]) == ("byte", "image/png")


def test_a_latent_is_one_of_forms_that_can_be_told_apart():
    number, *forms = SCHEMAS["Latent"]["oneOf"]
    assert number["type"] == "integer"
    assert [(form["title"], form["required"]) for form in forms] == [
        ("SeedLatent", ["seed"]),
        ("NpyLatent", ["npy"]),
        ("ImageLatent", ["image"]),
    ]
    assert all(form["additionalProperties"] is False for form in forms)
    validator = Draft202012Validator(SCHEMAS["Latent"])
    for latent in (7, 7.0, {"seed": 7}, {"npy": "AA=="}, {"image": "AA=="}):
        assert validator.is_valid(latent), latent
    for latent in ({}, "7", -1, True, {"seed": 7, "npy": "AA=="}, {"sed": 7}, {"seed": "7"}):
        assert not validator.is_valid(latent), latent


def test_a_bare_image_has_the_other_fields_in_the_query():
    for operation in OPERATIONS:
        endpoint = ENDPOINTS[f"POST {operation.path}"]
        query = {each["name"] for each in endpoint["parameters"] if each["in"] == "query"}
        bare = "image" in operation.request.model_fields
        assert query == (operation.request.model_fields.keys() - {"image"} if bare else set())
        assert ("image/*" in endpoint["requestBody"]["content"]) == bare


def test_a_get_has_all_fields_in_the_query():
    for operation in OPERATIONS:
        endpoint = ENDPOINTS.get(f"GET {operation.path}")
        assert (endpoint is not None) == operation.gettable
        if endpoint is not None:
            query = {each["name"]: each for each in endpoint["parameters"] if each["in"] == "query"}
            assert query.keys() == operation.request.model_fields.keys()
            assert "binary" not in json.dumps(query)
            assert "bare" not in json.dumps(query)
            assert "requestBody" not in endpoint


def test_choices_are_named_once():
    """A client has one type for each, and the same in requests, forms and responses."""
    for name in ("SampleRequest", "SampleForm", "SampleResponse", "DecodeFields"):
        assert SCHEMAS[name]["properties"]["sampler"]["$ref"].endswith("/Sampler"), name
    inversion = SCHEMAS["InvertMethod"]["enum"]
    assert inversion != SCHEMAS["InterpolateMethod"]["enum"]
    assert resolve(SCHEMAS["InvertResponse"]["properties"]["method"])["enum"] == inversion


# What the code says.


def sources() -> str:
    found = [
        *(ROOT / "app" / "api").rglob("*.py"),
        *(ROOT / "app" / "errors").glob("*.py"),
        ROOT / "app" / "telemetry" / "tracing.py",
    ]
    return "".join(Path(path).read_text() for path in found if path.name != "descriptions.py")


def test_every_header_that_the_code_writes_is_described():
    headers = set(re.findall(r'"([A-Z][A-Za-z]*(?:-[A-Z][A-Za-z]*)+|Allow|ETag|Location|Vary)"', sources()))
    assert {"X-NFE", "Retry-After", "Location"} <= headers
    assert headers <= RESPONSE_HEADERS.keys() | REQUEST_HEADERS.keys() | OF_PAGES | OF_CONTENT


def test_every_header_that_is_described_is_in_the_code():
    text = sources().lower()
    for name in {*RESPONSE_HEADERS, *REQUEST_HEADERS} - {"traceparent"}:  # which OpenTelemetry reads
        assert f'"{name.lower()}"' in text, name


# What the service does.


@pytest.fixture
async def described(settings):
    """A service whose every response must be as the document says."""
    seen = set()

    async def compare(response: httpx.Response) -> None:
        path = re.sub(r"^/jobs/\w+", "/jobs/{identifier}", response.request.url.path)
        name = f"{response.request.method} {path}"
        found = ENDPOINTS[name]["responses"][str(response.status_code)]
        media = response.headers.get("content-type", "").partition(";")[0]
        undescribed = response.headers.keys() - {header.lower() for header in {*found["headers"], *OF_CONTENT}}
        assert not undescribed, (name, response.status_code)
        assert media in (found["content"] or [""]), (name, response.status_code)
        if media.endswith("json"):
            await response.aread()
            check(response.json(), found["content"][media]["schema"])
        seen.add((ENDPOINTS[name]["operationId"], response.status_code, media))

    async with serving(create_app(settings.model_copy(update={"max_images": 64}))) as client:
        client.event_hooks["response"].append(compare)
        client.seen = seen
        yield client


@pytest.mark.anyio
async def test_examples_are_valid_and_work(described):
    count = 0
    for operation in OPERATIONS:
        schema = SCHEMAS[operation.request.__name__]
        for example in schema["examples"]:
            check(example, schema)
            here = {"steps": 3} | ({"label": CLASSES[0]} if "label" in example else {})
            response = await described.post(operation.path, json={**example, **here}, headers={"accept": JSON})
            assert response.status_code == 200, response.text
            count += 1
    assert count >= 6
    for header in (*REQUEST_HEADERS.values(), *RESPONSE_HEADERS.values()):
        for example in header.schema.get("examples", []):
            check(example, header.schema)


@pytest.mark.anyio
async def test_responses_are_as_described(described):
    image = base64.b64decode(SCHEMAS["InvertRequest"]["examples"][0]["image"])
    for path in ("/model", "/healthz", "/readyz", "/metrics"):
        await described.get(path)
    # Each format, and each kind of body.
    for operation in OPERATIONS:
        for media in operation.formats:
            fields = {"sample": {"steps": 2, "trajectory": 2}, "interpolate": {"a": 1, "b": 2, "frames": 2, "steps": 2}}
            upload = {"files": {"image": image}, "data": {"fit": "resize", "steps": 2, "trajectory": 2}}
            body = {"json": fields[operation.name]} if operation.name in fields else upload
            answer = await described.post(operation.path, headers={"accept": media}, **body)
            assert answer.status_code == 200, answer.text
    for media in IMAGE_TYPES:
        bare = {"content": image, "headers": {"content-type": media}, "params": {"fit": "resize", "steps": 2}}
        assert (await described.post("/invert", **bare)).status_code == 200
    await described.post("/invert", files={"image": image}, data={"fit": "resize", "steps": 2, "check": "false"})
    # By a query, and not again what the client has.
    for path, latents in (("/sample", {"latent": 1}), ("/interpolate", {"latents": [1, 2], "weights": "1,2"})):
        params = {**latents, "steps": 2, "reproducible": True}
        first = await described.get(path, params=params)
        same = await described.get(path, params=params, headers={"if-none-match": first.headers["etag"]})
        assert (first.status_code, same.status_code) == (200, 304)
    # Jobs: accepted, found again by their key, not done, cancelled, done.
    later = {"prefer": "respond-async", "idempotency-key": "a", "x-request-timeout-ms": "60000", "priority": "u=1"}
    for _ in range(2):
        job = (await described.post("/sample", json={"sampler": "ddpm", "n": 4}, headers=later)).json()
    assert (await described.get(f"/jobs/{job['id']}/result")).status_code == 409
    await described.delete(f"/jobs/{job['id']}")
    assert (await described.get(f"/jobs/{job['id']}/result")).status_code == 410
    place = (await described.post("/sample", json={"steps": 1}, headers={"prefer": "respond-async"})).headers[
        "location"
    ]
    while (await described.get(place)).json()["state"] != "done":
        await asyncio.sleep(0.005)
    for accept in (JSON, "image/png", EVENTS):
        await described.get(f"{place}/result", headers={"accept": accept})
    # Problems.
    await described.post("/sample", json={"steps": 0, "n": "1", "x": None})
    await described.post("/sample", content=b"{", headers={"content-type": JSON})
    await described.post("/sample", content=b"x", headers={"content-type": "text/csv"})
    await described.post("/sample", json={}, headers={"content-encoding": "gzip"})
    await described.post("/sample", json={}, headers={"origin": "http://elsewhere"})
    await described.delete(place, headers={"origin": "http://elsewhere"})
    await described.post("/sample", json={}, headers={"accept": "text/csv"})
    await described.post("/sample", json={}, headers={"x-request-timeout-ms": "0"})
    await described.post("/sample", json={"steps": 2}, headers={"idempotency-key": "a"})
    await described.post("/sample", content=b" " * 9000)
    await described.post("/sample", json={"sampler": "ddpm", "n": 64}, headers={"x-request-timeout-ms": "1"})
    await described.get("/jobs/unknown")
    statuses = {status for _, status, _ in described.seen}
    assert statuses == {200, 202, 304, 400, 403, 404, 406, 409, 410, 413, 415, 422, 504}
    assert {name for name, _, _ in described.seen} == {endpoint["operationId"] for endpoint in ENDPOINTS.values()}


@pytest.mark.anyio
async def test_bodies_are_as_described(client):
    """The types that a 415 names are those of the document."""
    for operation in OPERATIONS:
        refused = await client.post(operation.path, content=b"x", headers={"content-type": "text/csv"})
        named = set(re.findall(r"[a-z]+/[\w*-]+", refused.json()["detail"])) - {"text/csv"}
        declared = ENDPOINTS[f"POST {operation.path}"]["requestBody"]["content"].keys()
        assert {re.sub("^image/.*", "image/*", media) for media in named} == set(declared)


# Integers with a fraction of zero are integers in JSON schema.


@pytest.mark.parametrize("model", [SampleRequest, InvertRequest, InterpolateRequest], ids=lambda model: model.__name__)
def test_whole_numbers_may_have_a_fraction(model):
    """Every field that the document calls an integer takes 2.0 and 2e0 as it takes 2."""
    found = []
    for name, declared in SCHEMAS[model.__name__]["properties"].items():
        kinds = [resolve(kind) for kind in (declared, *declared.get("anyOf", []))]
        kinds += [form for kind in kinds for form in kind.get("oneOf", [])]
        if any(kind.get("type") == "integer" for kind in kinds):
            found.append(name)
    assert {"steps"} <= set(found)
    required = {"image": "AA=="} if model is InvertRequest else {}
    for name in found:
        for text in ("2.0", "2e0", "20.0E-1"):
            parsed = read(model, json.dumps({**required, name: "@"}).replace('"@"', text).encode())
            assert parsed == read(model, json.dumps({**required, name: 2}).encode()), (name, text)


def test_whole_numbers_in_lists():
    parsed = read(InterpolateRequest, b'{"latents": [1.0, {"seed": 2.0}], "weights": [1.0, 0.5], "labels": [1.0, "a"]}')
    assert parsed == InterpolateRequest(latents=[1, {"seed": 2}], weights=[1.0, 0.5], labels=[1, "a"])
    assert read(InterpolateRequest, b'{"grid": [2.0, 3.0]}').grid == [2, 3]


@pytest.mark.parametrize("text", ["2.5", "1e300", "9007199254740993.0", "1e999", "-1.0", '"2.0"'])
def test_other_numbers_are_no_integers(text):
    with pytest.raises(InvalidField) as refused:
        read(SampleRequest, b'{"seed": %s}' % text.encode())
    assert refused.value.detail.startswith("seed = ")


# The page.


@pytest.mark.anyio
async def test_the_page_needs_nothing_from_elsewhere(client):
    page = await client.get("/docs")
    assert page.headers["content-type"].startswith("text/html")
    policy = dict(part.strip().split(" ", 1) for part in page.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["connect-src"] == "'self'"
    assert not re.findall(r"https?:|//|<script>|\son\w+=", page.text)  # no other origin, no script in the page
    types = {"css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
    references = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert len(references) == 4
    for reference in references:
        found = await client.get(httpx.URL("http://test/docs").join(reference))
        assert found.status_code == 200, reference
        assert found.headers["content-type"].partition(";")[0] == types[reference.rpartition(".")[2]]
        assert len(found.content) > 100
    style = (await client.get("/docs/swagger-ui.css")).text
    assert all(target.startswith("data:") for target in re.findall(r"url\([\"']?([^\"')]*)", style))
    start = (await client.get("/docs/start.js")).text
    assert "SwaggerUIBundle" in (await client.get("/docs/swagger-ui-bundle.js")).text
    assert "validatorUrl: null" in start  # else the document's address is sent to a service of its makers
    assert (await client.get(re.search(r'url: "([^"]+)"', start)[1])).json()["paths"].keys() == DOCUMENT["paths"].keys()
