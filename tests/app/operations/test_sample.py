"""POST /sample, as its clients meet it."""

from __future__ import annotations

import base64
import io
import json

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from model.checkpoint import load
from model.diffusion import machine, samplers
from model.diffusion.defaults import SamplingDefaults
from model.diffusion.noise import draw_noise, seeded_generator
from model.diffusion.plan import Clip
from tests import rounding
from tests.conftest import FOLDED
from tests.oracles import guided

pytestmark = pytest.mark.anyio
JSON = {"accept": "application/json"}
NPY = {"accept": "application/x-npy"}


@pytest.fixture
def client(shared_client):
    return shared_client


async def sample(client: httpx.AsyncClient, headers: dict | None = None, **request) -> httpx.Response:
    response = await client.post("/sample", json=request, headers=headers)
    assert response.status_code == 200, response.text
    return response


async def pixels(client, **request) -> np.ndarray:
    response = await sample(client, NPY, **request)
    assert response.headers["content-type"] == "application/x-npy"
    return np.load(io.BytesIO(response.content))


def image(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content))


async def test_same_request_gives_same_bytes(client):
    first = await sample(client, label="circle", seed=7, steps=5)
    again = await sample(client, label="circle", seed=7, steps=5)
    other = await sample(client, label="circle", seed=8, steps=5)
    assert first.headers["content-type"] == "image/png"
    assert image(first.content).size == (8, 8)
    assert first.content == again.content
    assert first.content != other.content


async def test_result_is_that_of_the_plain_loop(client, tiny):
    """The server adds nothing to the plan: one image equals machine.sample with the same network."""
    ckpt = load(tiny)
    plan = samplers.ddim(ckpt.schedule, 12, eta=0.5, clip=Clip(1.0), spacing="leading")
    expected = machine.sample(ckpt.net, plan, [3], (1, 8, 8), torch.tensor([1]))
    served = await pixels(client, label="square", seed=3, steps=12, eta=0.5, spacing="leading")
    assert np.abs(served - expected.numpy()).max() < FOLDED


async def test_ddpm_is_another_sampler(client):
    a = await pixels(client, sampler="ddim", seed=1, steps=10)
    b = await pixels(client, sampler="ddpm", seed=1, steps=10)
    assert np.abs(a - b).max() > 0.01


async def test_image_i_is_drawn_from_seed_plus_i(client):
    together = await pixels(client, n=3, seed=5, steps=4, reproducible=True)
    alone = [await pixels(client, n=1, seed=5 + i, steps=4, reproducible=True) for i in range(3)]
    assert together.shape == (3, 1, 8, 8)
    assert together.dtype == np.float32
    assert np.array_equal(together, np.concatenate(alone))


async def test_contact_sheet(client):
    sheet = image((await sample(client, n=5, seed=0, steps=2)).content)
    assert sheet.size == (3 * 8 + 2 * 2, 2 * 8 + 2)  # three columns, two rows, gaps of two


async def test_json_has_everything(client):
    body = (await sample(client, JSON, n=2, seed=9, steps=4, label="Big star", eta=0.25)).json()
    assert body["seeds"] == [9, 10]
    assert (body["sampler"], body["steps"], body["eta"], body["label"]) == ("ddim", 4, 0.25, "Big star")
    assert body["nfe"] == 4
    assert set(body["timing"]) == {"queue_ms", "device_ms", "encode_ms"}
    assert (body["model"], len(body["sha256"])) == ("tiny", 64)
    x_T = np.load(io.BytesIO(base64.b64decode(body["latents"][1])))
    assert np.array_equal(x_T, draw_noise(seeded_generator(10), (1, 8, 8)).numpy())
    png = base64.b64decode(body["images"][1])
    assert image(png).size == (8, 8)


async def test_image_carries_its_request(client):
    first = await sample(client, n=3, steps=3, label="square")
    facts = json.loads(image(first.content).text["unstir"])
    assert facts["operation"] == "/sample"
    assert facts["request"]["seed"] == int(first.headers["x-seed"])
    assert facts["nfe"] == int(first.headers["x-nfe"]) == 3
    again = await sample(client, **facts["request"])
    assert again.content == first.content


async def test_images_inside_json_replay_alone(client):
    body = (await sample(client, JSON, n=2, seed=4, steps=3, reproducible=True)).json()
    png = base64.b64decode(body["images"][1])
    again = await sample(client, **json.loads(image(png).text["unstir"])["request"])
    assert again.content == png


async def test_empty_body_draws_something(client):
    response = await client.post("/sample")
    assert response.status_code == 200
    assert json.loads(image(response.content).text["unstir"])["request"]["steps"] == 50


async def test_drawn_seeds_differ(client):
    seeds = {(await sample(client, steps=1)).headers["x-seed"] for _ in range(4)}
    assert len(seeds) == 4  # a collision has probability 6 / 2^32


@pytest.mark.parametrize("label", ["Big star", "big STAR", 2, "2"])
async def test_label_by_name_or_index(client, label):
    body = (await sample(client, JSON, steps=2, seed=1, label=label)).json()
    assert body["label"] == "Big star"


async def test_label_matters_and_none_is_the_null_class(client, tiny):
    ckpt = load(tiny)
    plan = samplers.ddim(ckpt.schedule, 3, clip=Clip(1.0), spacing="trailing")
    expected = machine.sample(ckpt.net, plan, [1], (1, 8, 8), torch.tensor([3]))
    unlabelled = await pixels(client, steps=3, seed=1)
    assert np.abs(unlabelled - expected.numpy()).max() < FOLDED
    assert np.abs(unlabelled - await pixels(client, steps=3, seed=1, label=0)).max() > 1e-4


async def test_few_steps_switch_to_trailing_and_say_so(client):
    assert (await sample(client, JSON, steps=5)).json()["spacing"] == "trailing"
    assert (await sample(client, JSON, steps=20)).json()["spacing"] == "leading"


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpmpp_2m"])
async def test_clip_can_be_turned_off(client, sampler):
    assert np.abs(await pixels(client, sampler=sampler, steps=3, seed=2)).max() <= 1
    assert np.abs(await pixels(client, sampler=sampler, steps=3, seed=2, clip=False)).max() > 1


async def test_every_sampler_answers_as_the_plain_loop_does(client, tiny):
    ckpt = load(tiny)
    defaults = SamplingDefaults.from_config(ckpt.scheduler_config)
    answers = {}
    for sampler in samplers.SAMPLERS.values():
        plan = sampler.compile(ckpt.schedule, 12, **defaults.options(sampler, 12, 1000))

        def run_plan(net, dtype, copies, plan=plan):
            return rounding.run_plan(net, plan, [3] * copies, torch.tensor([1] * copies), (1, 8, 8), dtype)

        exact, most = rounding.bound(ckpt.net, run_plan)
        response = await sample(client, NPY, sampler=sampler.name, label="square", seed=3, steps=12)
        served = np.load(io.BytesIO(response.content))
        assert np.abs(served - exact.numpy()).max() < most, sampler.name
        assert int(response.headers["x-nfe"]) == plan.nfe
        answers[sampler.name] = served.tobytes()
    assert len(set(answers.values())) == len(samplers.SAMPLERS)


async def test_options_of_samplers(client):
    base = await pixels(client, sampler="dpmpp_2m", steps=12, seed=1)
    assert np.array_equal(await pixels(client, sampler="dpmpp_2m", steps=12, seed=1, order=2, spacing="karras"), base)
    for change in ({"order": 1}, {"order": 3}, {"spacing": "linspace"}):
        assert not np.array_equal(await pixels(client, sampler="dpmpp_2m", steps=12, seed=1, **change), base)
    plain = await sample(client, JSON, sampler="pndm", steps=12, seed=1)
    warm = await sample(client, JSON, sampler="pndm", steps=12, seed=1, warmup=True)
    assert (plain.json()["nfe"], warm.json()["nfe"]) == (13, 21)
    assert (plain.json()["warmup"], warm.json()["warmup"]) == (False, True)
    assert plain.json()["images"] != warm.json()["images"]
    assert (await sample(client, JSON, sampler="unipc", steps=2)).json()["order"] == 2


async def test_guidance_is_two_rows(client, tiny):
    ckpt = load(tiny)
    plan = samplers.ddim(ckpt.schedule, 12, clip=Clip(1.0), spacing="leading")
    expected = machine.sample(guided(ckpt.net, [3.0], null=3), plan, [5], (1, 8, 8), torch.tensor([1])).numpy()
    response = await sample(client, NPY, label="square", seed=5, steps=12, guidance=3)
    served = np.load(io.BytesIO(response.content))
    assert np.abs(served - expected).max() < FOLDED * max(1, np.abs(expected).max())
    assert response.headers["x-nfe"] == "24"
    assert np.abs(served - await pixels(client, label="square", seed=5, steps=12)).max() > 1e-3
    together = await pixels(client, n=5, label="square", seed=5, steps=12, guidance=3, reproducible=True)
    alone = await pixels(client, label="square", seed=9, steps=12, guidance=3, reproducible=True)
    assert np.array_equal(together[4], alone[0])


@pytest.mark.parametrize("steps", [1, 1000])
async def test_fewest_and_most_steps(client, steps):
    assert (await sample(client, JSON, steps=steps)).json()["nfe"] == steps


async def test_request_id_is_echoed_or_made(client):
    mine = await client.post("/sample", json={"steps": 1}, headers={"x-request-id": "order-17"})
    assert mine.headers["x-request-id"] == "order-17"
    made = [
        await client.post("/sample", json={"steps": 1}, headers={"x-request-id": bad}) for bad in ("", "a b", "x" * 999)
    ]
    assert all(len(response.headers["x-request-id"]) == 32 for response in made)


async def test_server_timing(client):
    timing = (await sample(client, steps=1)).headers["server-timing"]
    assert [part.split(";")[0].strip() for part in timing.split(",")] == ["queue", "device", "encode", "total"]


@pytest.mark.parametrize(
    ("accept", "got"),
    [
        ("*/*", "image/png"),
        ("image/*", "image/png"),
        ("application/json", "application/json"),
        ("application/*;q=0.5, image/png;q=0.1", "application/json"),
        ("text/html,application/xhtml+xml,image/webp,*/*;q=0.8", "image/webp"),
        ("image/png;q=0, application/x-npy", "application/x-npy"),
    ],
)
async def test_accept_decides_the_format(client, accept, got):
    response = await sample(client, {"accept": accept}, steps=1)
    assert response.headers["content-type"] == got
    assert "Accept" in response.headers["vary"]
