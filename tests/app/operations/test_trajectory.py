"""Trajectories of /sample: the coffee unstirring."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

from model import images
from model.checkpoint import load
from model.diffusion import machine, samplers
from model.diffusion.noise import draw_noise, seeded_generator
from model.diffusion.plan import Clip
from tests.app.api.test_bad_input import assert_problem
from tests.conftest import FOLDED

pytestmark = pytest.mark.anyio
NPY = {"accept": "application/x-npy"}


async def frames(client, **request) -> np.ndarray:
    response = await client.post("/sample", json=request, headers=NPY)
    assert response.status_code == 200, response.text
    return np.load(io.BytesIO(response.content))


async def test_frames_are_those_of_the_plain_loop(client, tiny):
    ckpt = load(tiny)
    plan = samplers.ddim(ckpt.schedule, 6, clip=Clip(1.0), spacing="trailing")
    state = draw_noise(seeded_generator(3), (1, 8, 8))[None, None]
    states, seen = [state[0, 0]], []
    with torch.inference_mode():
        for line in plan.table(1):
            state = machine.advance(
                ckpt.net, state, line[None], torch.tensor([1]), observe=lambda x_0: seen.append(x_0[0])
            )
            states.append(state[0, 0])
    request = {"label": "square", "seed": 3, "steps": 6, "spacing": "trailing"}
    x_0 = await frames(client, trajectory=6, **request)
    x_t = await frames(client, trajectory=4, trajectory_of="x_t", **request)
    assert x_0.shape == (1, 6, 1, 8, 8)
    assert np.abs(x_0[0] - torch.stack(seen).numpy()).max() < FOLDED
    assert np.abs(x_t[0] - torch.stack([states[at] for at in (0, 2, 4, 6)]).numpy()).max() < FOLDED


async def test_looking_on_changes_nothing_and_the_last_frame_is_the_image(client):
    request = {"seed": 5, "n": 3, "steps": 8, "sampler": "heun", "reproducible": True}
    plain = await frames(client, **request)
    watched = await frames(client, trajectory=4, **request)
    assert watched.shape == (3, 4, 1, 8, 8)
    assert np.array_equal(watched[:, -1], plain)


async def test_strips_and_animations(client):
    request = {"seed": 5, "n": 2, "steps": 8, "trajectory": 5}
    strip = Image.open(io.BytesIO((await client.post("/sample", json=request)).content))
    assert strip.size == (5 * 8 + 4 * 2, 2 * 8 + 2)
    for kind in ("gif", "webp", "apng"):
        answer = await client.post("/sample", json=request, headers={"accept": f"image/{kind}"})
        assert answer.headers["content-type"] == f"image/{kind}"
        moving = Image.open(io.BytesIO(answer.content))
        assert (moving.n_frames, moving.size) == (5, (2 * 8 + 2, 8))
        moving.seek(4)
        last = await frames(client, seed=5, n=2, steps=8)
        assert np.array_equal(
            np.asarray(moving.convert("L"))[..., None], images.sheet(images.to_uint8(torch.from_numpy(last)))
        )
    shown = (await client.post("/sample", json=request, headers={"accept": "application/json"})).json()
    assert [len(row) for row in shown["trajectory"]] == [5, 5]
    last = Image.open(io.BytesIO(base64.b64decode(shown["trajectory"][1][-1])))
    image = Image.open(io.BytesIO(base64.b64decode(shown["images"][1])))
    assert np.array_equal(np.asarray(last), np.asarray(image))


async def test_what_stands_still_is_no_animation(client):
    response = await client.post("/sample", json={"steps": 2}, headers={"accept": "image/gif"})
    assert_problem(response, 406, "not_acceptable", "image/gif", "trajectory")
    webp = await client.post("/sample", json={"steps": 2}, headers={"accept": "image/webp"})
    assert Image.open(io.BytesIO(webp.content)).n_frames == 1


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({"trajectory": 1}, "an integer of 2 to 100"),
        ({"trajectory": 101}, "an integer of 2 to 100"),
        ({"steps": 3, "trajectory": 4}, "at most 3"),
        ({"steps": 1, "trajectory": 2}, "more steps"),
    ],
)
async def test_how_many_frames_there_can_be(client, request_, words):
    body = assert_problem(await client.post("/sample", json=request_), 422, "invalid_field", words)
    assert body["errors"][0]["field"] == "trajectory"
