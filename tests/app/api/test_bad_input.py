"""Bad input: each a 4xx in the one shape, which names the field, the value and the remedy. Nothing is a 500."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from app.api.app import create_app
from app.settings import Settings
from model import images
from tests.conftest import save_tiny, serving
from tests.metrics import metric

pytestmark = pytest.mark.anyio
PNG = images.png(np.zeros((8, 8, 1), np.uint8))


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
        ({"sampler": 5}, "sampler", "must be a string"),
        ({"steps": 0}, "steps", "must be an integer of 1 to 1000"),
        ({"steps": 1001}, "steps", "1..1000"),
        ({"sampler": "ddpm", "steps": 1001}, "steps", "1..1000"),
        ({"steps": 2.5}, "steps", "integer"),
        ({"eta": 2}, "eta", "must be a number of 0 to 1"),
        ({"eta": -0.1}, "eta", "must be a number of 0 to 1"),
        ({"sampler": "ddpm", "eta": 0.5}, "eta", "leave it out, or use ddim"),
        ({"spacing": "even"}, "spacing", ": choose one of leading, trailing, linspace"),
        ({"spacing": "leadnig"}, "spacing", "did you mean leading? choose one of leading, trailing"),
        ({"sampler": "ddmi"}, "sampler", "did you mean ddim? choose one of ddim, ddpm"),
        ({"sampler": "Unipc"}, "sampler", "did you mean unipc? choose one of"),
        ({"label": "Big stra"}, "label", "did you mean Big star? choose one of circle"),
        ({"stpes": 3}, "stpes", "no such field; did you mean steps? known are sampler, steps"),
        ({"spacing": "leading", "steps": 5}, "spacing", "use trailing"),
        ({"sampler": "pndm", "spacing": "karras"}, "spacing", "pndm takes leading, trailing, linspace"),
        ({"order": 4}, "order", "must be an integer of 1 to 3"),
        ({"order": 2}, "order", "leave it out, or use dpmpp_2m, dpmpp_2m_sde, unipc"),
        ({"sampler": "dpmpp_2m_sde", "order": 3}, "order", "this sampler has orders 1..2"),
        ({"warmup": True}, "warmup", "leave it out, or use pndm"),
        ({"sampler": "pndm", "warmup": True, "steps": 3}, "steps", "at least 4 steps"),
        ({"guidance": 2}, "guidance", "give a label, or leave guidance at 1"),
        ({"guidance": -1, "label": 0}, "guidance", "must be a number of 0 to 20"),
        ({"guidance": 21, "label": 0}, "guidance", "must be a number of 0 to 20"),
        ({"clip": "perhaps"}, "clip", "must be true or false"),
        ({"n": 0}, "n", "must be an integer of 1 to 16"),
        ({"n": 17}, "n", "at most 16"),
        ({"seed": -1}, "seed", "must be an integer of 0 to 9007199254740991; leave it out, and one is drawn"),
        ({"seed": 2**53}, "seed", "must be an integer of 0 to 9007199254740991"),
        ({"seed": 2**53 - 1, "n": 2}, "seed", "must not exceed"),
        ({"label": "Sombrero"}, "label", "circle, square, Big star, or an index of 0 to 2"),
        ({"label": 3}, "label", "0 to 2"),
        ({"label": -1}, "label", "0 to 2"),
        ({"label": ["circle"]}, "label", "must be an integer or a string"),
        ({"strength": 1}, "strength", "no such field; known are sampler, steps"),
        ({"n": None}, "n", "must be an integer of 1 to 16"),
        ({"n": True}, "n", "must be an integer of 1 to 16"),
        ({"steps": "2"}, "steps", "must be an integer of 1 to 1000"),
        ({"label": True}, "label", "must be an integer or a string"),
        ({"clip": "yes"}, "clip", "must be true or false"),
        ({"label": "9" * 5000}, "label", "0 to 2"),
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
    words = "at most 8192 are read (UNSTIR_MAX_BODY_BYTES); send smaller images, of which the network sees 8x8"
    assert_problem(response, 413, "body_too_large", words)


@pytest.mark.parametrize("media", ["text/plain", "application/xml", "image/png"])
async def test_other_media_types(client, media):
    response = await client.post("/sample", content=b"seed=7", headers={"content-type": media})
    assert_problem(response, 415, "unsupported_media_type", media, "send application/json")


async def test_no_media_type(client):
    response = await client.post("/sample", content=b"steps=2")
    assert_problem(response, 415, "unsupported_media_type", "send application/json, multipart/form-data or")


FORM = b'--x\r\nContent-Disposition: form-data; name="n"\r\n\r\n1\r\n--x--\r\n'


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"steps": 20}', "this looks like JSON; send it with content-type: application/json"),
        (b"\n [1]", "this looks like JSON"),
        (PNG, "this looks like a file; send it as multipart/form-data, as curl -F image=@file does"),
        (FORM, "this looks like multipart/form-data; send its content-type, with the boundary"),
    ],
)
async def test_a_body_under_another_content_type_is_recognized(client, content, words):
    """As curl -d sends whatever it is given as a form, and fetch a string as text."""
    for media, status, code in (
        ("application/x-www-form-urlencoded", 400, "invalid_form"),
        ("text/plain;charset=UTF-8", 415, "unsupported_media_type"),
        ("", 415, "unsupported_media_type"),
    ):
        headers = {"content-type": media} if media else {}
        response = await client.post("/invert", content=content, headers=headers)
        assert_problem(response, status, code, f"content-type = '{media.partition(';')[0]}': {words}")


@pytest.mark.parametrize(
    ("path", "request_", "detail"),
    [
        ("/sample", {"label": [1]}, "label (an array): must be an integer or a string"),
        ("/sample", {"latent": "x"}, 'latent = "x": must be a seed, {"npy": …} or {"image": …}'),
        (
            "/sample",
            {"latent": {"sed": 1}},
            "latent.sed = 1: no such field; did you mean seed? known are seed, npy, image",
        ),
        ("/invert", {}, "image is missing: send it"),
        ("/interpolate", {"a": 1}, "b is missing: give a and b; or latents"),
        ("/interpolate", {"a": 1, "latents": [1, 2], "grid": [2, 2]}, "a (a latent): latents are given already"),
        ("/interpolate", {"latents": [1]}, "latents (an array): must be a list of 2 to 8"),
        ("/interpolate", {"latents": [1, 2]}, "weights is missing: give latents either weights"),
        ("/interpolate", {"a": 1, "b": 2, "frames": 1}, "frames = 1: must be an integer of 2 to 16"),
    ],
)
async def test_what_is_missing_or_not_echoed_is_no_value(client, path, request_, detail):
    body = assert_problem(await client.post(path, json=request_), 422, "invalid_field")
    assert body["detail"].startswith(detail)
    given = re.match(r"[\w.]+ \((.*?)\): ", detail)
    [fault] = body["errors"]
    assert fault.get("given") == (given[1] if given else None)
    assert ("value" in fault) == (" = " in detail)


async def test_json_with_charset_and_suffix_are_json(client):
    for media in ("application/json; charset=utf-8", "application/vnd.thing+json"):
        response = await client.post("/sample", content=b'{"steps": 1}', headers={"content-type": media})
        assert response.status_code == 200, response.text


async def test_unwanted_formats(client):
    response = await client.post("/sample", json={"steps": 1}, headers={"accept": "image/tiff"})
    assert_problem(response, 406, "not_acceptable", "image/tiff", "image/png, image/webp, image/jpeg")


async def test_unknown_path_and_method(client):
    assert_problem(await client.get("/sampel"), 404, "not_found", "/sampel: did you mean /sample? see /docs for")
    assert_problem(await client.get("/x"), 404, "not_found", "GET /x: see /docs for")
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
