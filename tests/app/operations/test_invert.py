"""POST /invert, as its clients meet it. The network here is random, so images come back badly, but predictably."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from dataclasses import replace

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from model import images
from model.checkpoint import load
from model.diffusion import inversion, machine
from model.diffusion.inversion.registry import INVERSIONS
from tests import rounding
from tests.app.api.test_bad_input import assert_problem

pytestmark = pytest.mark.anyio
PIXELS = np.random.default_rng(7).integers(0, 256, (8, 8, 1), np.uint8)
PNG = images.png(PIXELS)
NPY = {"accept": "application/x-npy"}


def decoded(text: str) -> np.ndarray:
    return np.load(io.BytesIO(base64.b64decode(text)))


async def invert(client: httpx.AsyncClient, **fields) -> dict:
    response = await client.post("/invert", files={"image": PNG}, data=fields)
    assert response.status_code == 200, response.text
    return response.json()


async def test_a_file_a_body_base64_and_a_data_url_are_the_same_image(client):
    text = base64.b64encode(PNG).decode()
    fields = {"steps": 5, "label": "square"}
    answers = [
        await client.post("/invert", files={"image": ("x.png", PNG)}, data=fields, headers=NPY),
        await client.post("/invert", content=PNG, params=fields, headers=NPY | {"content-type": "image/png"}),
        await client.post("/invert", json=fields | {"image": text}, headers=NPY),
        await client.post("/invert", json=fields | {"image": f"data:image/png;base64,{text}"}, headers=NPY),
        await client.post("/invert", files={"image": (None, text)}, data=fields, headers=NPY),
        await client.post("/invert", json=fields | {"image": f"{text}\n"}, headers=NPY),
        await client.post("/invert", json=fields | {"image": base64.encodebytes(PNG).decode()}, headers=NPY),
        await client.post("/invert", json=fields | {"image": re.sub("(.{20})", "\\1\r\n\t", text)}, headers=NPY),
        await client.post("/invert", files={"image": (None, base64.encodebytes(PNG))}, data=fields, headers=NPY),
        await client.post("/invert", files={"image": (None, PNG)}, data=fields, headers=NPY),  # a file without a name
    ]
    assert [answer.status_code for answer in answers] == [200] * 10
    assert len({answer.content for answer in answers}) == 1
    assert answers[0].headers["x-nfe"] == "20"


@pytest.mark.parametrize("method", INVERSIONS)
async def test_the_latent_is_that_of_the_plain_loop(client, tiny, method):
    ckpt = load(tiny)
    found = INVERSIONS[method]
    plan = found.compile(ckpt.schedule, 12, spacing="leading")
    x_0 = images.from_uint8(PIXELS)[None, None]

    def run_plan(net, dtype, copies):
        return machine.run_slots(net, plan, x_0.to(dtype).repeat(copies, 1, 1, 1, 1), torch.tensor([1] * copies))

    exact, most = rounding.bound(ckpt.net, run_plan)
    inverted = await invert(client, steps=12, label="square", method=method)
    latent = decoded(inverted["latent"])
    expected = exact[0, : found.slots].numpy()
    assert latent.shape == ((1, 8, 8) if found.slots == 1 else (2, 1, 8, 8))
    assert np.abs(latent.reshape(expected.shape) - expected).max() < most
    assert (inverted["nfe"], inverted["plan"], inverted["label"]) == (plan.nfe, plan.digest, "square")
    assert inverted["norm"] == pytest.approx(float(np.square(expected[0]).mean()), rel=1e-3)
    if method == "fixed_point":
        assert inverted["residual"] == pytest.approx(float(inversion.residual(exact)), rel=1e-2)
    else:
        assert "residual" not in inverted


@pytest.mark.parametrize("embed", ["request_and_files", "none"])
@pytest.mark.parametrize("method", INVERSIONS)
async def test_latent_and_decode_give_the_reconstruction_bit_for_bit(client, method, embed):
    inverted = await invert(client, steps=9, method=method, label="Big star", embed=embed)
    sent = {**inverted["decode"], "latent": {"npy": inverted["latent"]}, "embed": embed}
    again = await client.post("/sample", json=sent)
    assert again.status_code == 200, again.text
    assert again.content == base64.b64decode(inverted["reconstruction"])
    assert int(again.headers["x-nfe"]) == inverted["decode_nfe"]
    assert "x-seed" not in again.headers

    image = images.from_uint8(PIXELS).numpy()
    back = np.load(io.BytesIO((await client.post("/sample", json=sent, headers=NPY)).content))[0]
    error = (back - image).astype(np.float64)
    mse = float(np.square(error).mean())
    assert inverted["mse"] == pytest.approx(mse, rel=1e-5)  # told in six digits
    assert inverted["psnr"] == pytest.approx(10 * np.log10(4 / mse), rel=1e-5)
    assert inverted["max_error"] == pytest.approx(np.abs(error).max(), rel=1e-5)
    shown = np.asarray(Image.open(io.BytesIO(again.content)))[..., None]
    assert inverted["exact"] == pytest.approx((shown == PIXELS).mean(), rel=1e-5)
    if method == "obelm":
        assert inverted["exact"] == 1


async def test_a_reconstruction_names_the_image_that_came_and_does_not_hold_it(client):
    """Neither as bytes nor as a latent, in any form of the answer; sent again with the image, it is the same file."""
    came, fields, accept = PNG, {"steps": 6, "method": "obelm", "trajectory": 3}, {"accept": "image/png"}
    inverted = await invert(client, **fields)
    alone = Image.open(io.BytesIO(base64.b64decode(inverted["reconstruction"])))
    body = {**fields, "image": base64.b64encode(came).decode()}
    strip = (await client.post("/invert", json=body, headers=accept)).content
    for shown, trajectory in ((alone, None), (Image.open(io.BytesIO(strip)), 3)):
        facts = json.loads(shown.text["unstir"])
        assert facts["operation"] == "/invert"
        assert facts["request"].get("trajectory") == trajectory
        assert facts["request"]["image"] == {"sha256": hashlib.sha256(came).hexdigest(), "bytes": len(came)}
        sent = {**facts["request"], "image": base64.b64encode(came).decode()}
        again = Image.open(io.BytesIO((await client.post("/invert", json=sent, headers=accept)).content))
        assert np.array_equal(np.asarray(again), np.asarray(shown))
        assert again.text == shown.text


async def test_a_file_named_by_its_hash_is_to_be_sent(client):
    named = {"sha256": "0" * 64, "bytes": 1}
    for path, body, field in (
        ("/invert", {"image": named}, "image"),
        ("/sample", {"latent": {"npy": named}}, "latent.npy"),
        ("/interpolate", {"a": {"image": named}, "b": 1}, "a.image"),
    ):
        assert_problem(await client.post(path, json=body), 422, "invalid_field", field, "send the file itself")


async def test_other_forms_of_the_answer(client):
    inverted = await invert(client, steps=4)
    for accept in ("image/png", "image/webp"):
        form = await client.post("/invert", files={"image": PNG}, data={"steps": 4}, headers={"accept": accept})
        assert form.headers["content-type"] == accept
        shown = Image.open(io.BytesIO(form.content)).convert("L")
        expected = Image.open(io.BytesIO(base64.b64decode(inverted["reconstruction"])))
        assert np.array_equal(np.asarray(shown), np.asarray(expected))


async def test_without_check_nothing_is_decoded(client):
    inverted = await invert(client, steps=4, check="false")
    assert not {"psnr", "mse", "max_error", "exact", "reconstruction"} & inverted.keys()
    assert inverted["decode"]["steps"] == 4
    response = await client.post(
        "/invert", files={"image": PNG}, data={"steps": 4, "check": "false"}, headers={"accept": "image/png"}
    )
    assert_problem(response, 406, "not_acceptable", "check = false", "application/x-npy")


async def test_fields_are_honoured_and_returned(client):
    inverted = await invert(client, steps=10, refinements=5, spacing="trailing", reproducible="true")
    assert (inverted["steps"], inverted["refinements"], inverted["nfe"], inverted["spacing"]) == (10, 5, 60, "trailing")
    assert inverted["decode"] == {
        "sampler": "ddim", "steps": 10, "spacing": "trailing", "clip": False, "reproducible": True,
    }  # fmt: skip
    assert "refinements" not in await invert(client, steps=3, method="ddim")
    assert (await invert(client))["nfe"] == 200
    label = await invert(client, steps=5, label="0")
    assert label["label"] == label["decode"]["label"] == "circle"
    assert label["latent"] != (await invert(client, steps=5, label="1"))["latent"]


async def test_what_is_odd_is_said_in_words(client, monkeypatch):
    inverted = await invert(client, steps=10)
    assert any(warning.startswith("psnr = ") for warning in inverted["warnings"])  # a random network
    monkeypatch.setattr("app.operations.invert.HIGH_RESIDUAL", 0.0)
    monkeypatch.setattr("app.operations.invert.LOW_PSNR", -1e9)
    inverted = await invert(client, steps=10)
    assert any(warning.startswith("residual = ") for warning in inverted["warnings"])
    assert not any(warning.startswith("psnr = ") for warning in inverted["warnings"])
    low, high = INVERSIONS["fixed_point"].ordinary
    norm = inverted["norm"]
    assert any(warning.startswith("norm = ") for warning in inverted["warnings"]) == (not low < norm < high)


async def test_an_unusual_norm_names_what_helps(client, monkeypatch):
    monkeypatch.setattr("app.operations.invert.MANY_STEPS", 4)
    monkeypatch.setitem(INVERSIONS, "ddim", replace(INVERSIONS["ddim"], ordinary=(-2, -1)))
    likely = "this one is probably far from the training data, and blends with it may not look like images"
    for fields, advice in (
        ({"steps": 3}, "take more steps, and give the image's label; if that does not help, "),
        ({"steps": 3, "label": "0"}, "take more steps; if that does not help, "),
        ({"steps": 4}, "give the image's label; if that does not help, "),
        ({"steps": 4, "label": "0"}, ""),
    ):
        inverted = await invert(client, method="ddim", check="false", **fields)
        (warning,) = inverted["warnings"]
        assert warning == f"norm = {inverted['norm']:.2f}: ordinary images have -2 to -1 with ddim; {advice}{likely}"


@pytest.mark.parametrize(
    ("fields", "field", "remedy"),
    [
        ({"method": "edict"}, "method", "choose one of fixed_point, ddim, obelm"),
        ({"steps": 0}, "steps", "an integer of 1 to 1000"),
        ({"steps": 1001}, "steps", "1..1000"),
        ({"method": "obelm", "steps": 1}, "steps", "at least 2"),
        ({"refinements": 0}, "refinements", "an integer of 1 to 50"),
        ({"method": "ddim", "refinements": 2}, "refinements", "leave it out, or use fixed_point"),
        ({"label": "Sombrero"}, "label", "circle, square, Big star"),
        ({"spacing": "even"}, "spacing", "choose one of leading, trailing"),
        ({"fit": "squeeze"}, "fit", "choose one of exact, resize, crop, pad"),
        ({"check": "perhaps"}, "check", "true or false"),
        ({"trajectory": 1}, "trajectory", "an integer of 2 to 100"),
        ({"steps": 2, "method": "ddim", "trajectory": 3}, "trajectory", "at most 2"),
        ({"trajectory_of": "eps"}, "trajectory_of", "choose one of x_0, x_t"),
        ({"seed": 7}, "seed", "known are image, method"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
async def test_impossible_fields(client, fields, field, remedy):
    response = await client.post("/invert", files={"image": PNG}, data=fields)
    body = assert_problem(response, 422, "invalid_field", field, remedy)
    assert [error["field"] for error in body["errors"]] == [field]


async def test_no_image_at_all(client):
    assert_problem(await client.post("/invert", json={"steps": 5}), 422, "invalid_field", "image", "missing")
    assert_problem(await client.post("/invert"), 422, "invalid_field", "image", "missing")


@pytest.mark.parametrize(("k", "of"), [(2, "x_0"), (5, "x_0"), (5, "x_t")])
async def test_the_way_up_can_be_watched(client, k, of):
    inverted = await invert(client, steps=4, trajectory=k, trajectory_of=of)
    assert len(inverted["trajectory"]) == k
    fields = {"steps": 4, "trajectory": k, "trajectory_of": of}
    strip = await client.post("/invert", files={"image": PNG}, data=fields, headers={"accept": "image/png"})
    assert Image.open(io.BytesIO(strip.content)).size == (k * 8 + (k - 1) * 2, 8)
    for kind in ("gif", "webp", "apng"):
        moving = await client.post("/invert", files={"image": PNG}, data=fields, headers={"accept": f"image/{kind}"})
        assert Image.open(io.BytesIO(moving.content)).n_frames == k
    if of == "x_t":  # from the image to its latent
        first, last = (np.asarray(Image.open(io.BytesIO(base64.b64decode(inverted["trajectory"][i])))) for i in (0, -1))
        assert np.array_equal(first[..., None], PIXELS)
        latent = torch.from_numpy(decoded(inverted["latent"]))
        assert np.array_equal(last[..., None], images.to_uint8(latent))


@pytest.mark.parametrize("fit", ["resize", "crop", "pad"])
async def test_an_image_of_another_size(client, fit):
    content = images.png(np.random.default_rng(1).integers(0, 256, (12, 20, 3), np.uint8))
    expected = images.fit(images.decode(content, 1), 8, 8, fit)
    fields = {"steps": 3, "fit": fit}
    fitted = await client.post("/invert", files={"image": content}, data=fields, headers=NPY)
    direct = await client.post("/invert", files={"image": images.png(expected)}, data={"steps": 3}, headers=NPY)
    assert fitted.status_code == direct.status_code == 200
    assert fitted.content == direct.content
    refused = await client.post("/invert", files={"image": content}, data={"steps": 3})
    assert_problem(refused, 422, "invalid_field", "20x12", "8x8", "resize, crop or pad")
