"""Multipart forms: how many parts, which, and what is broken; every fault is a 4xx that says how to send it."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

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
    assert_problem(response, 422, "invalid_field", 'image = "2 values"', "send it once")
    response = await raw_form(client, "/invert", image, ('name="steps"', b"2"), ('name="steps"', b"3"))
    assert_problem(response, 422, "invalid_field", 'steps = "2 values"', "send it once")


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
