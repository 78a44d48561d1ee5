"""Multipart forms: how many parts, which, and what is broken; every fault is a 4xx that says how to send it."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from app.api.body.json_text import parse_json
from tests.app.api.test_bad_input import assert_problem
from tests.fuzz_uploads import saved

pytestmark = pytest.mark.anyio

PNG = saved(Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8), np.uint8)), "PNG")


@pytest.fixture
async def client(client):
    """Whatever it was sent, it is ready afterwards and answers what is good."""
    yield client
    assert (await client.get("/readyz")).status_code == 200
    response = await client.post("/invert", data={"steps": "2", "check": "false"}, files={"image": ("a.png", PNG)})
    assert response.status_code == 200, response.text


async def raw_form(client, path: str, *parts: tuple[str, bytes], end: bytes = b"--x--\r\n"):
    lines = [b"--x\r\nContent-Disposition: form-data; %b\r\n\r\n%b\r\n" % (kind.encode(), body) for kind, body in parts]
    headers = {"content-type": "multipart/form-data; boundary=x"}
    return await client.post(path, content=b"".join(lines) + end, headers=headers)


async def test_forms_have_so_many_parts_and_no_more(client):
    files = [('name="image"; filename="a.png"', b"")] * 17
    assert_problem(await raw_form(client, "/invert", *files), 400, "invalid_form", "files", "16")
    fields = [(f'name="field{i}"', b"1") for i in range(65)]
    assert_problem(await raw_form(client, "/invert", *fields), 400, "invalid_form", "fields", "64")
    assert_problem(await raw_form(client, "/invert", *fields[:64]), 422, "invalid_field", "field0", "no such field")


async def test_a_field_that_is_sent_twice(client):
    image = ('name="image"; filename="a.png"', PNG)
    response = await raw_form(client, "/invert", image, image)
    assert_problem(response, 422, "invalid_field", "image (2 values): send it once")
    response = await raw_form(client, "/invert", image, ('name="steps"', b"2"), ('name="steps"', b"3"))
    assert_problem(response, 422, "invalid_field", "steps (2 values): send it once")


async def test_files_where_none_is_wanted(client):
    response = await client.post("/invert", files={"image": ("a.png", PNG), "steps": ("steps.txt", b"2")})
    assert_problem(response, 422, "invalid_field", "steps", "send it as text")
    response = await client.post("/sample", files={"seed": ("seed", b"7")})
    assert_problem(response, 422, "invalid_field", "seed", "send it as text")


@pytest.mark.parametrize(
    ("content", "media"),
    [
        (b"", "multipart/form-data"),
        (b"--x\r\n", "multipart/form-data"),
        (b"rubbish", "multipart/form-data; boundary=x"),
        (b"--y\r\n\r\n--y--\r\n", "multipart/form-data; boundary=x"),
        (b"--x\r\nContent-Disposition: form-data\r\n\r\n1\r\n--x--\r\n", "multipart/form-data; boundary=x"),
        (b"--x\r\nno header\r\n\r\n1\r\n--x--\r\n", "multipart/form-data; boundary=x"),
        (b"--x\r\n" + b"a" * 5000, "multipart/form-data; boundary=x"),
        (b"--x--\r\n", "multipart/form-data; boundary=" + "x" * 3000),
    ],
    ids=["no boundary", "no boundary but a body", "rubbish", "another", "no name", "no header", "long header", "long"],
)
async def test_broken_forms(client, content, media):
    response = await client.post("/invert", content=content, headers={"content-type": media})
    assert_problem(response, 400, "invalid_form", "curl -F")


# Starlette leaves the file of a part that does not end to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("cut", [20, 70, 100, -40, -8], ids=str)
async def test_truncated_forms(client, cut):
    whole = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n' + PNG + b"\r\n--x--\r\n"
    headers = {"content-type": "multipart/form-data; boundary=x"}
    response = await client.post("/invert", content=whole[:cut], headers=headers)
    assert response.status_code in (400, 422), response.text
    assert_problem(response, response.status_code, response.json()["code"], "send")


@pytest.mark.parametrize("cut", [1, 4, 6, 30])
async def test_a_form_that_ends_early_is_refused(client, cut):
    """Its last field would be dropped, and another image drawn."""
    whole = b"--x\r\n" + b"\r\n--x\r\n".join(
        b'Content-Disposition: form-data; name="%b"\r\n\r\n%b' % field for field in ((b"seed", b"7"), (b"steps", b"1"))
    )
    headers = {"content-type": "multipart/form-data; boundary=x"}
    complete = await client.post("/sample", content=whole + b"\r\n--x--", headers=headers)  # without a last newline
    assert complete.status_code == 200
    response = await client.post("/sample", content=(whole + b"\r\n--x--")[:-cut], headers=headers)
    assert_problem(response, 400, "invalid_form", "ends before its closing boundary")


async def test_the_charset_of_a_form_is_utf_8_whatever_it_says(client):
    for charset in ("undefined", "utf-16", "nonsense"):
        headers = {"content-type": f"multipart/form-data; boundary=x; charset={charset}"}
        content = b'--x\r\nContent-Disposition: form-data; name="steps"\r\n\r\n1\r\n--x--\r\n'
        assert (await client.post("/sample", content=content, headers=headers)).status_code == 200


async def test_fields_of_an_untouched_form_are_absent(client):
    form = {"steps": "2", "label": "", "eta": "", "seed": "", "trajectory": ""}
    assert (await client.post("/sample", data=form)).status_code == 200  # urlencoded
    response = await raw_form(
        client,
        "/sample",
        *[(f'name="{name}"', value.encode()) for name, value in form.items()],
        ('name="latent"; filename=""', b""),
    )
    assert response.status_code == 200, response.text
    assert_problem(await raw_form(client, "/sample", ('name="colour"', b"")), 422, "invalid_field", "no such field")


async def test_urlencoded_forms(client):
    form = {"steps": "2", "label": "Big star", "reproducible": "true", "seed": "7"}
    response = await client.post("/sample", data=form)
    as_json = {"steps": 2, "label": "Big star", "reproducible": True, "seed": 7}
    assert response.content == (await client.post("/sample", json=as_json)).content
    both = await client.post("/interpolate", data={"latents": ["1", "2"], "weights": "0.5,0.5", "steps": "2"})
    assert both.status_code == 200, both.text
    headers = {"content-type": "application/x-www-form-urlencoded"}
    many = await client.post("/sample", content=b"&".join(b"a=1" for _ in range(65)), headers=headers)
    assert_problem(many, 400, "invalid_form", "64 fields")
    bare = await client.post("/sample", content="label=caf\xe9".encode("latin-1"), headers=headers)
    assert_problem(bare, 400, "invalid_form", "percent-encoded")
    wrong = await client.post("/sample", content=b"label=%E9", headers=headers)
    assert_problem(wrong, 422, "invalid_field", "label", "no UTF-8")


async def test_a_file_without_a_name_is_a_file(client):
    response = await raw_form(client, "/invert", ('name="image"', PNG), ('name="steps"', b"2"))
    assert response.status_code == 200, response.text


async def test_lists_of_a_form_are_short_and_flat(client):
    for text, words in (
        ("1," * 64, "64"),
        ("[[1], 2]", "as 1,2,3"),
        ("[" * 99, "as 1,2,3"),
        ('[{"a": 1}]', "as 1,2,3"),
    ):
        response = await client.post("/interpolate", data={"latents": "1,2", "weights": text})
        assert_problem(response, 422, "invalid_field", "weights", words)
    twice = await client.get("/interpolate?" + "latents=1&" * 65)
    assert_problem(twice, 422, "invalid_field", "latents", "65 values")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"seed": 1, "seed": 2}', ["seed", "send it once"]),
        (b'{"latent": {"seed": 1, "seed": 2}}', ["seed", "send it once"]),
        (b'{"steps": 1' + b"0" * 70 + b"}", ["steps", "64 characters"]),
        (b'{"eta": 0.' + b"0" * 70 + b"1}", ["eta", "64 characters"]),
        (b'{"' + b"k" * 300 + b'": 1}', ["a name of more than 200 bytes"]),
        (b'{"label": ' + b"[" * 20 + b"]" * 20 + b"}", ["label", "16 levels"]),
        (b'{"trajectory": [' + b"1," * 1000 + b"1]}", ["trajectory", "1024 values"]),
    ],
)
async def test_json_that_is_larger_than_any_request(client, content, words):
    response = await client.post("/sample", content=content, headers={"content-type": "application/json"})
    assert_problem(response, 422, "invalid_field", *words)


async def test_json_with_a_byte_order_mark(client):
    content = b"\xef\xbb\xbf" + b'{"steps": 1}'
    response = await client.post("/sample", content=content, headers={"content-type": "application/json"})
    assert response.status_code == 200


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=8),
        lambda x: st.lists(x) | st.dictionaries(st.text(max_size=8), x),
        max_leaves=12,
    )
)
def test_whatever_json_there_is_is_parsed_as_json_does(value):
    content = json.dumps({"a": value}).encode()
    assert parse_json(content) == {"a": value}
    assert parse_json(json.dumps({"a": value}, ensure_ascii=False, indent=1).encode()) == {"a": value}
