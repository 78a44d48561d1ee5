"""Bad input: each a 4xx in the one shape, which names the field, the value and the remedy. Nothing is a 500."""

from __future__ import annotations

import json

import pytest

from app.api.app import create_app
from app.settings import Settings
from tests.conftest import save_tiny, serving
from tests.metrics import metric

pytestmark = pytest.mark.anyio


@pytest.fixture
def client(shared_client):
    return shared_client


def assert_problem(response, status: int, code: str, *words: str) -> dict:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    body = response.json()
    assert (body["status"], body["code"]) == (status, code)
    assert body["type"] == f"urn:unstir:problem:{code}"
    assert body["title"]
    assert body["request_id"] == response.headers["x-request-id"]
    for word in words:
        assert word in body["detail"], body["detail"]
    return body


@pytest.mark.parametrize(
    ("request_", "field", "remedy"),
    [
        ({"sampler": "euler"}, "sampler", "choose one of ddim, ddpm"),
        ({"sampler": 5}, "sampler", "valid string"),
        ({"steps": 0}, "steps", "greater than or equal to 1"),
        ({"steps": 1001}, "steps", "1..1000"),
        ({"sampler": "ddpm", "steps": 1001}, "steps", "1..1000"),
        ({"steps": 2.5}, "steps", "integer"),
        ({"eta": 2}, "eta", "less than or equal to 1"),
        ({"eta": -0.1}, "eta", "greater than or equal to 0"),
        ({"sampler": "ddpm", "eta": 0.5}, "eta", "leave it out, or use ddim"),
        ({"spacing": "even"}, "spacing", "'leading', 'trailing'"),
        ({"spacing": "leading", "steps": 5}, "spacing", "use trailing"),
        ({"sampler": "pndm", "spacing": "karras"}, "spacing", "pndm takes leading, trailing, linspace"),
        ({"order": 4}, "order", "less than or equal to 3"),
        ({"order": 2}, "order", "leave it out, or use dpmpp_2m, dpmpp_2m_sde, unipc"),
        ({"sampler": "dpmpp_2m_sde", "order": 3}, "order", "this sampler has orders 1..2"),
        ({"warmup": True}, "warmup", "leave it out, or use pndm"),
        ({"sampler": "pndm", "warmup": True, "steps": 3}, "steps", "at least 4 steps"),
        ({"guidance": 2}, "guidance", "give a label, or leave guidance at 1"),
        ({"guidance": -1, "label": 0}, "guidance", "greater than or equal to 0"),
        ({"guidance": 21, "label": 0}, "guidance", "less than or equal to 20"),
        ({"clip": "perhaps"}, "clip", "boolean"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 17}, "n", "at most 16"),
        ({"seed": -1}, "seed", "greater than or equal to 0; leave it out, and one is drawn"),
        ({"seed": 2**53}, "seed", "less than or equal to"),
        ({"seed": 2**53 - 1, "n": 2}, "seed", "must not exceed"),
        ({"label": "Sombrero"}, "label", "circle, square, Big star, or an index of 0..2"),
        ({"label": 3}, "label", "0..2"),
        ({"label": -1}, "label", "0..2"),
        ({"label": ["circle"]}, "label", "valid integer or"),
        ({"strength": 1}, "strength", "known are sampler, steps"),
        ({"n": None}, "n", "valid integer"),
        ({"n": True}, "n", "valid integer"),
        ({"steps": "2"}, "steps", "valid integer"),
        ({"label": True}, "label", "valid integer or"),
        ({"clip": "yes"}, "clip", "valid boolean"),
        ({"label": "9" * 5000}, "label", "0..2"),
    ],
    ids=lambda value: str(value)[:60] if isinstance(value, dict) else "",
)
async def test_impossible_fields(client, request_, field, remedy):
    body = assert_problem(await client.post("/sample", json=request_), 422, "invalid_field", field, remedy)
    assert [error["field"] for error in body["errors"]] == [field]
    if not isinstance(request_[field], list) and len(str(request_[field])) < 80:
        assert body["errors"][0].get("value") == request_[field]
        assert json.dumps(request_[field]) in body["detail"]


async def test_several_faults_are_reported_together(client):
    response = await client.post("/sample", json={"steps": 0, "eta": 7, "colour": "red"})
    body = assert_problem(response, 422, "invalid_field", "steps = 0", "eta = 7", 'colour = "red"')
    assert len(body["errors"]) == 3


@pytest.mark.parametrize("body", [rb'{"label": "\ud800"}', rb'{"sampler": "\ud800"}', rb'{"\ud800": 1}'])
async def test_lone_surrogates_are_answered(client, body):
    response = await client.post("/sample", content=body, headers={"content-type": "application/json"})
    assert_problem(response, 422, "invalid_field")


async def test_an_answer_never_dwarfs_its_request(client):
    many = await client.post("/sample", json={f"field{i}": 1 for i in range(250)})
    body = assert_problem(many, 422, "invalid_field", "and 230 more faults")
    assert len(body["errors"]) == 20
    long = await client.post("/sample", json={"label": "x" * 3500})
    assert len(long.content) < 1500


async def test_nan_is_no_eta(client):
    response = await client.post("/sample", content=b'{"eta": NaN}', headers={"content-type": "application/json"})
    assert_problem(response, 422, "invalid_field", "eta")


@pytest.mark.parametrize("content", [b'{"seed": 7', b"{seed: 7}", b"\xff\xfe", b"{'seed': 7}"])
async def test_broken_json(client, content):
    response = await client.post("/sample", content=content, headers={"content-type": "application/json"})
    assert_problem(response, 400, "invalid_json", "send one JSON object")


@pytest.mark.parametrize("content", [b"[]", b"7", b'"ddim"', b"[[[[[[[[[[" + b"[" * 1500 + b"]" * 1510])
async def test_json_that_is_no_object(client, content):
    response = await client.post("/sample", content=content, headers={"content-type": "application/json"})
    assert response.status_code in (400, 422)
    assert_problem(response, response.status_code, response.json()["code"], "send one JSON object")


@pytest.mark.parametrize("declared", [True, False], ids=["content-length", "chunked"])
async def test_ten_megabytes(client, declared):
    async def chunks():
        for _ in range(160):
            yield b" " * 65536

    content = b" " * (160 * 65536) if declared else chunks()
    response = await client.post("/sample", content=content, headers={"content-type": "application/json"})
    assert_problem(response, 413, "body_too_large", "at most 8192")


@pytest.mark.parametrize("media", ["text/plain", "application/xml", "image/png"])
async def test_other_media_types(client, media):
    response = await client.post("/sample", content=b"seed=7", headers={"content-type": media})
    assert_problem(response, 415, "unsupported_media_type", media, "send application/json")


async def test_no_media_type(client):
    assert_problem(await client.post("/sample", content=b"{}"), 415, "unsupported_media_type", "send application/json")


async def test_json_with_charset_and_suffix_are_json(client):
    for media in ("application/json; charset=utf-8", "application/vnd.thing+json"):
        response = await client.post("/sample", content=b'{"steps": 1}', headers={"content-type": media})
        assert response.status_code == 200, response.text


async def test_unwanted_formats(client):
    response = await client.post("/sample", json={"steps": 1}, headers={"accept": "image/tiff"})
    assert_problem(response, 406, "not_acceptable", "image/tiff", "image/png, image/webp, image/jpeg")


async def test_unknown_path_and_method(client):
    assert_problem(await client.get("/sampel"), 404, "not_found", "/sampel", "/docs")
    response = await client.put("/sample")
    assert_problem(response, 405, "method_not_allowed", "POST")
    assert response.headers["allow"] == "GET, HEAD, OPTIONS, POST"


async def test_label_for_a_network_without_classes(tmp_path):
    settings = Settings(checkpoint=save_tiny(tmp_path, classes=()), device="cpu", max_width=4)
    async with serving(create_app(settings)) as client:
        assert (await client.post("/sample", json={"steps": 2})).status_code == 200
        response = await client.post("/sample", json={"label": "circle"})
        assert_problem(response, 422, "invalid_field", 'label = "circle"', "no classes")


async def test_errors_are_counted_under_known_paths_only(settings):
    async with serving(create_app(settings)) as client:
        for path in ("/a", "/b", "/c"):
            await client.get(path)
        assert await metric(client, "unstir_requests_total", code="404", endpoint="other", sampler="") == 3
