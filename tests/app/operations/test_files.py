"""What clients send as files, over HTTP: whatever is wrong with one is a 4xx that names its field. Nothing is a 500."""

from __future__ import annotations

import asyncio
import base64
import io
import struct
import threading
import zipfile
from types import SimpleNamespace

import anyio
import numpy as np
import pytest
from PIL import Image

from app.errors import ImageTooLarge
from app.operations import files
from app.settings import Settings
from model import images
from model.checkpoint import load
from tests.app.api.test_bad_input import assert_problem
from tests.app.api.test_body import raw_form
from tests.engines import until
from tests.fuzz_uploads import npy, png, saved

pytestmark = pytest.mark.anyio

RNG = np.random.default_rng(0)
GREY = Image.fromarray(RNG.integers(0, 256, (8, 8), np.uint8))
PNG, JPEG, WEBP, GIF = (saved(GREY, form) for form in ("PNG", "JPEG", "WEBP", "GIF"))
HEIC, AVIF = (saved(GREY, form) for form in ("HEIF", "AVIF"))
NUMBERS = RNG.standard_normal((1, 8, 8)).astype(np.float32)
NPY = npy(NUMBERS)
INVERT = {"method": "ddim", "steps": 2, "check": False}
SAMPLE = {"steps": 2}


def text(fields: dict) -> dict:
    return {name: str(value).lower() for name, value in fields.items()}


def base64_of(content: bytes) -> str:
    return base64.b64encode(content).decode()


def archive(*, stored: bytes = b"hello") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("a.txt", stored)
    return buffer.getvalue()


async def invert_form(client, content, filename="a.png", **fields):
    return await client.post("/invert", data=text(INVERT | fields), files={"image": (filename, content)})


async def invert_json(client, content, **fields):
    return await client.post("/invert", json={**INVERT, "image": base64_of(content), **fields})


async def invert_bare(client, content, **fields):
    headers = {"content-type": "image/png"}
    return await client.post("/invert", params=text(INVERT | fields), content=content, headers=headers)


async def sample_form(client, content, **fields):
    files = {"latent": ("x_T.npy", content)}
    return await client.post("/sample", data=text(SAMPLE | fields), files=files)


async def sample_json(client, content, **fields):
    return await client.post("/sample", json={**SAMPLE, "latent": {"npy": base64_of(content)}, **fields})


async def interpolate_form(client, content):
    files = {"a": ("a.npy", content)}
    return await client.post("/interpolate", data={"steps": "2", "frames": "2", "b": "8"}, files=files)


async def interpolate_json(client, content):
    latents = [8, {"npy": base64_of(content)}]
    return await client.post("/interpolate", json={"steps": 2, "latents": latents, "weights": [1, 1]})


as_image = pytest.mark.parametrize("send", [invert_form, invert_json, invert_bare], ids=["form", "json", "bare"])
LATENT_FIELDS = {sample_form: "latent", sample_json: "latent", interpolate_form: "a", interpolate_json: "latents.1"}
as_latent = pytest.mark.parametrize("send", LATENT_FIELDS, ids=lambda send: send.__name__)


@pytest.fixture
async def client(shared_client):
    """Whatever it was sent, it is ready afterwards and answers what is good."""
    yield shared_client
    assert (await shared_client.get("/readyz")).status_code == 200
    for response in (await invert_form(shared_client, PNG), await sample_json(shared_client, NPY)):
        assert response.status_code == 200, response.text


@as_image
@pytest.mark.parametrize(
    "content", [PNG, JPEG, WEBP, GIF, HEIC, AVIF], ids=["png", "jpeg", "webp", "gif", "heic", "avif"]
)
async def test_good_images_are_taken(client, send, content):
    assert (await send(client, content)).status_code == 200


@as_latent
@pytest.mark.parametrize(
    "content",
    [NPY, npy(NUMBERS[None]), *(npy(NUMBERS.astype(kind)) for kind in ("<f2", ">f4", "f8"))],
    ids=["float32", "of one", "half", "big-endian", "double"],
)
async def test_good_latents_are_taken(client, send, content):
    """Half precision was compared to a limit beyond its range, which made numpy warn."""
    assert (await send(client, content)).status_code == 200


@pytest.mark.parametrize("kind", ["<f4", ">f4", "f8"])
@pytest.mark.parametrize("order", ["C", "F"])
async def test_every_spelling_of_the_same_numbers_is_the_same_latent(client, kind, order):
    pair = np.stack([NUMBERS, 2 * NUMBERS])
    plain = await sample_json(client, npy(pair), sampler="obelm")
    other = await sample_json(client, npy(np.asarray(pair.astype(kind), order=order)), sampler="obelm")
    assert plain.status_code == other.status_code == 200
    with Image.open(io.BytesIO(plain.content)) as one, Image.open(io.BytesIO(other.content)) as two:
        assert np.array_equal(np.asarray(one), np.asarray(two))


def patched(content: bytes, at: int, new: bytes) -> bytes:
    return content[:at] + new + content[at + len(new) :]


BOMBS = {
    "png": png((60000, 60000), 8, 0, b"\0"),
    "png, thin": png((1, 1 << 30), 8, 0, b"\0"),
    "png, whole": png((5000, 5000), 1, 0, bytes(626 * 5000)),
    "jpeg": patched(JPEG, JPEG.index(b"\xff\xc0") + 5, struct.pack(">HH", 60000, 60000)),
    "webp": patched(WEBP, 26, struct.pack("<HH", 16383, 16383)),
    "gif": patched(GIF, 6, struct.pack("<HH", 60000, 60000)),
}


@as_image
@pytest.mark.parametrize("content", BOMBS.values(), ids=BOMBS)
async def test_bombs(client, send, content):
    assert_problem(
        await send(client, content),
        413,
        "image_too_large",
        "image (",
        "make it smaller (UNSTIR_MAX_PIXELS; the network sees 8x8)",
    )


NO_IMAGES = {
    "empty": (b"", "it is empty"),
    "text": (b"hello", "it is not a PNG, JPEG, WebP, GIF, HEIC or AVIF"),
    "svg": (b"<svg/>", "it is not a PNG, JPEG, WebP, GIF, HEIC or AVIF"),
    "tiff": (saved(GREY, "TIFF"), "it is not a PNG, JPEG, WebP, GIF, HEIC or AVIF"),
    "npy": (NPY, "it is not a PNG, JPEG, WebP, GIF, HEIC or AVIF"),
    "zip": (archive(), "it is not a PNG, JPEG, WebP, GIF, HEIC or AVIF"),
    "truncated png": (PNG[:-20], "truncated"),
    "truncated jpeg": (JPEG[:-20], "corrupt"),
    "truncated webp": (WEBP[:-20], "truncated"),
    "truncated gif": (GIF[:-20], "corrupt"),
    "png and zip": (PNG + archive(), "something else"),
    "jpeg and zip": (JPEG + archive(), "also an archive"),
    "gif and zip": (GIF + archive(), "also an archive"),
    "jpeg and zip of several disks": (
        JPEG + b"PK\x06\x07" + struct.pack("<LQL", 0, 0, 5) + b"PK\x05\x06" + bytes(18),
        "also an archive",
    ),
    "garbage": (PNG[:40] + RNG.bytes(200), "PNG"),
}


@as_image
@pytest.mark.parametrize(("content", "why"), NO_IMAGES.values(), ids=NO_IMAGES)
async def test_what_is_no_image(client, send, content, why):
    body = assert_problem(await send(client, content), 422, "invalid_field", why, "; send ")
    assert body["detail"].count(images.NAMES) == 1  # what is read is listed, and once
    assert [error["field"] for error in body["errors"]] == ["image"]


@as_image
async def test_an_image_of_another_size(client, send):
    other = saved(Image.new("L", (9, 8)), "PNG")
    words = ("image", "it is 9x8", "8x8", "resize, crop or pad")
    assert_problem(await send(client, other), 422, "invalid_field", *words)
    for fit in ("resize", "crop", "pad"):
        assert (await send(client, other, fit=fit)).status_code == 200
    assert_problem(
        await send(client, other, fit="stretch"),
        422,
        "invalid_field",
        "fit",
        ": choose one of exact, resize, crop, pad",
    )


async def test_a_thin_image_is_cropped_at_once(client):
    """A million pixels in a row took gigabytes."""
    thin = saved(Image.new("L", (1, 1 << 20)), "PNG")
    assert (await invert_form(client, thin, fit="crop")).status_code == 200


async def test_bad_images_where_latents_are_wanted(client):
    files = {"a": ("a.png", PNG), "b": ("b.png", PNG[:-20])}
    response = await client.post("/interpolate", data={"steps": "2"}, files=files)
    assert_problem(response, 422, "invalid_field", "b.image", "truncated")
    response = await client.post("/sample", data={"steps": "2"}, files={"latent": ("a.png", BOMBS["png"])})
    assert_problem(response, 413, "image_too_large", "latent.image")


def header(text_: str, content: bytes = NUMBERS.tobytes()) -> bytes:
    padded = text_.encode() + b"\n"
    return b"\x93NUMPY\x01\0" + struct.pack("<H", len(padded)) + padded + content


def claimed(shape: str, descr: str = "'<f4'") -> bytes:
    return header(f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}")


PICKLED = npy(np.array([{"a": 1}], object))
NO_LATENTS = {
    "nan": (npy(np.where(NUMBERS > 1, np.nan, NUMBERS)), "not finite"),
    "infinite": (npy(np.full((1, 8, 8), np.inf, np.float32)), "not finite"),
    "beyond single": (npy(np.full((1, 8, 8), 1e300)), "not finite"),
    "huge": (npy(NUMBERS * 1e7), "beyond"),
    "shape": (npy(NUMBERS[:, :7]), "float32 [1, 7, 8]"),
    "three": (npy(np.stack([NUMBERS] * 3)), "float32 [3, 1, 8, 8]"),
    "flat": (npy(NUMBERS.ravel()), "float32 [64]"),
    "scalar": (npy(np.float32(1)), "float32 []"),
    "none": (npy(NUMBERS[:0]), "float32 [0, 8, 8]"),
    "negative": (claimed("(-1, -8, 8)"), "send a .npy"),
    "true": (claimed("(True, 8, 8)"), "its shape is not of integers"),
    "true and more": (claimed("(2, True, 8, 8)"), "its shape is not of integers"),
    "false": (claimed("(False, 8, 8)", "'<f8'"), "its shape is not of integers"),
    "fractions": (claimed("(1.0, 8.0, 8.0)"), "header cannot be read"),
    "nested": (claimed("((1, 8, 8),)"), "header cannot be read"),
    "text in it": (claimed("('1', 8, 8)"), "header cannot be read"),
    "nothing in it": (claimed("(None, 8, 8)"), "header cannot be read"),
    "no tuple": (claimed("[1, 8, 8]"), "header cannot be read"),
    "thousands": (claimed(f"({'1, ' * 900})"), "send a .npy"),
    "integers": (npy(NUMBERS.astype(np.int32)), "int32"),
    "complex": (npy(NUMBERS.astype(np.complex64)), "complex64"),
    "text": (npy(NUMBERS.astype("U1")), "send a .npy"),
    "pickled": (PICKLED, "object"),
    "pickled, claiming the shape": (claimed("(1, 8, 8)", "'|O'"), "object"),
    "records": (claimed("(1, 8, 8)", "[('a', '<f4')]"), "send a .npy"),
    "records within": (claimed("(1, 8, 8)", "('<f4', (1000000, 1000000))"), "send a .npy"),
    "unpacked": (claimed("(1, 8, 8)", "__import__('os').getcwd()"), "header cannot be read"),
    "a million million": (claimed("(1000000, 1000000)"), "[1000000, 1000000]"),
    "beyond any integer": (claimed("(1" + "0" * 100 + ",)"), "send a .npy"),
    "deep": (header("(" * 5000), "header cannot be read"),
    "long header": (header("{" + " " * 5000 + "}", b""), "header cannot be read"),
    "truncated": (NPY[:-1], "its length"),
    "trailing": (NPY + b"x", "its length"),
    "zip behind": (NPY + archive(), "its length"),
    "only its magic": (b"\x93NUMPY", "header cannot be read"),
    "version": (patched(NPY, 6, b"\x09\0"), "header cannot be read"),
    "version 3": (patched(NPY, 6, b"\x03\0"), "header cannot be read"),
    "garbage": (NPY[:10] + RNG.bytes(400), "header cannot be read"),
}


@as_latent
@pytest.mark.parametrize(("content", "why"), NO_LATENTS.values(), ids=NO_LATENTS)
async def test_what_is_no_latent(client, send, content, why):
    response = await send(client, content)
    body = assert_problem(response, 422, "invalid_field", why, "send a .npy of float32 [1, 8, 8]")
    assert [error["field"] for error in body["errors"]] == [f"{LATENT_FIELDS[send]}.npy"]


@pytest.mark.parametrize("send", [sample_json, interpolate_json])
@pytest.mark.parametrize("content", [b"", b"hello", archive(), PNG, npy(NUMBERS).replace(b"NUMPY", b"NUMPI")])
async def test_files_in_json_that_are_no_npy_at_all(client, send, content):
    assert_problem(await send(client, content), 422, "invalid_field", ".npy (", "header cannot be read")


@pytest.mark.parametrize("send", [sample_form, interpolate_form])
async def test_files_in_forms_that_are_neither_npy_nor_image(client, send):
    arrays = io.BytesIO()
    np.savez(arrays, NUMBERS)
    for content in (b"", b"hello", arrays.getvalue(), PICKLED[1:]):
        assert_problem(
            await send(client, content), 422, "invalid_field", ".image (", "PNG, JPEG, WebP, GIF, HEIC or AVIF"
        )


@pytest.mark.parametrize("name", ["../../etc/passwd", "a/b.png", "c:/x.png", "/etc/passwd", "..", ".", "a\\\\..\\\\b"])
async def test_names_of_files_have_no_path(client, name):
    response = await raw_form(client, "/invert", (f'name="image"; filename="{name}"', PNG), ('name="steps"', b"2"))
    assert_problem(response, 422, "invalid_field", "image", "has no path here")


async def test_a_windows_path_is_cut_to_its_name(client):
    """By python-multipart, as old browsers sent such paths; neither is ever used."""
    response = await raw_form(client, "/invert", ('name="image"; filename="c:\\x.png"', PNG), ('name="steps"', b"2"))
    assert response.status_code == 200


@pytest.mark.parametrize("name", ["a.png", "image", "Größe.png", "a.b..c.png", "x.exe", " ", "a" * 300])
async def test_names_of_files_do_not_matter_otherwise(client, name):
    assert (await invert_form(client, PNG, name)).status_code == 200


@pytest.mark.parametrize(
    "value",
    ["/etc/passwd", "../../etc/passwd", "etc/pass", "file:///etc/passwd", "http://127.0.0.1:9/a.png", "data:,/etc/x"],
)
async def test_paths_and_addresses_are_not_followed(client, value):
    for response in (
        await client.post("/invert", json={**INVERT, "image": value}),
        await client.post("/invert", data=text(INVERT) | {"image": value}, files={"x": ("", b"")}),
        await client.post("/sample", json={**SAMPLE, "latent": {"image": value}}),
        await client.post("/sample", json={**SAMPLE, "latent": {"npy": value}}),
        await client.post("/sample", json={**SAMPLE, "latent": value}),
    ):
        assert_problem(response, 422, "invalid_field")


@pytest.mark.parametrize(
    "value", ["*", "abc", "YWJj YWJj", "ＹＷＪｊ", "=", "data:image/png;base64,***", 7, None, [], {}]
)
async def test_what_is_no_base64(client, value):
    response = await client.post("/invert", json={**INVERT, "image": value})
    assert_problem(response, 422, "invalid_field", "image")


async def test_a_data_url_is_what_a_browser_sends(client):
    url = "data:image/png;base64," + base64_of(PNG)
    assert (await client.post("/invert", json={**INVERT, "image": url})).status_code == 200


@as_image
async def test_unknown_fields(client, send):
    assert_problem(await send(client, PNG, colour="red"), 422, "invalid_field", "colour", "no such field")


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/invert", {}, "image"),
        ("/sample", {"latent": {}}, "latent"),
        ("/sample", {"latent": {"seed": 1, "npy": base64_of(NPY)}}, "latent"),
        ("/sample", {"latent": {"path": "/etc/passwd"}}, "latent.path"),
        ("/interpolate", {"a": {"npy": base64_of(NPY)}}, "b"),
    ],
    ids=["no image", "nothing", "two forms", "path", "one end"],
)
async def test_missing_and_contradictory_files(client, path, body, field):
    found = assert_problem(await client.post(path, json=body), 422, "invalid_field", field)
    assert field in [error["field"] for error in found["errors"]]


async def test_a_query_goes_with_a_bare_image_only(client):
    response = await client.post("/invert?steps=2", json={"image": base64_of(PNG)})
    assert_problem(response, 422, "invalid_field", "query", "steps=2")
    response = await client.post("/invert?steps=2", files={"image": ("a.png", PNG)})
    assert_problem(response, 422, "invalid_field", "query", "steps=2")
    response = await client.post("/invert?image=a.png", content=PNG, headers={"content-type": "image/png"})
    assert response.status_code == 200  # the body is the image; nothing is read by name
    response = await client.post("/sample", content=PNG, headers={"content-type": "image/png"})
    assert_problem(response, 415, "unsupported_media_type", "image/png")


@as_image
async def test_bodies_that_are_too_large(client, send):
    assert_problem(await send(client, PNG + bytes(9000)), 413, "body_too_large", "8192")


async def test_a_bare_body_of_another_kind(client):
    for media in ("image/tiff", "image/svg+xml", "image/jxl", "application/octet-stream"):
        response = await client.post("/invert", content=PNG, headers={"content-type": media})
        assert_problem(response, 415, "unsupported_media_type", media, "image/png", "multipart/form-data")


@pytest.mark.parametrize(("media", "content"), [("heic", HEIC), ("heif", HEIC), ("avif", AVIF)])
async def test_bare_bodies_of_a_phone(client, media, content):
    response = await client.post("/invert?steps=2", content=content, headers={"content-type": f"image/{media}"})
    assert response.status_code == 200


async def test_a_jpeg_of_more_pixels_than_allowed_is_decoded_at_a_fraction(tiny):
    """fit says what is done to images of another size, so that the fraction is only one of its means."""
    photo = saved(Image.new("L", (160, 120), 200), "JPEG")
    settings = Settings(checkpoint=tiny, max_pixels=1200)
    for fit in ("resize", "crop", "pad"):
        x = files.read_image(load(tiny), settings.max_pixels, "image", photo, fit)
        assert x.shape == (1, 8, 8)
        assert float(x[0, 4, 4]) == pytest.approx(200 / 127.5 - 1, abs=0.02)
    for content, fit in ((photo, "exact"), (saved(Image.new("L", (160, 120)), "PNG"), "resize")):
        with pytest.raises(ImageTooLarge, match="160x120 pixels, at most 1200"):
            files.read_image(load(tiny), settings.max_pixels, "image", content, fit)


async def test_whoever_hangs_up_leaves_his_place_when_his_image_is_decoded(monkeypatch):
    """A thread cannot be stopped, so that many who hang up must not have more images decoded at once."""
    go, service = (
        threading.Event(),
        SimpleNamespace(
            decoders=anyio.CapacityLimiter(2),
            model=SimpleNamespace(checkpoint=None),
            settings=SimpleNamespace(max_pixels=1),
        ),
    )
    monkeypatch.setattr(files, "read_image", lambda *_: go.wait(10))
    asking = [asyncio.ensure_future(files.decode_image(service, "image", b"", "exact")) for _ in range(3)]
    await until(lambda: service.decoders.statistics().tasks_waiting == 1)
    for each in asking:
        each.cancel()
    await asyncio.wait(asking)
    assert service.decoders.borrowed_tokens == 2
    go.set()
    await until(lambda: service.decoders.borrowed_tokens == 0)
