"""POST /interpolate, as its clients meet it."""

from __future__ import annotations

import base64
import io
import json
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from model import images
from model.checkpoint import load
from model.diffusion import interpolation, machine, samplers
from model.diffusion.noise import draw_noise, seeded_generator
from model.diffusion.plan import Clip
from tests.app.api.test_bad_input import assert_problem
from tests.conftest import FOLDED

pytestmark = pytest.mark.anyio
NPY, JSON = {"accept": "application/x-npy"}, {"accept": "application/json"}
PNGS = [images.png(np.random.default_rng(k).integers(0, 256, (8, 8, 1), np.uint8)) for k in range(3)]


@pytest.fixture
def client(shared_client):
    return shared_client


def opened(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content))


def decoded(text: str) -> np.ndarray:
    return np.load(io.BytesIO(base64.b64decode(text)))


def encoded(x: np.ndarray) -> str:
    buffer = io.BytesIO()
    np.save(buffer, x)
    return base64.b64encode(buffer.getvalue()).decode()


async def ask(client, headers: dict | None = None, path: str = "/interpolate", **request):
    response = await client.post(path, json=request, headers=headers)
    assert response.status_code == 200, response.text
    return response


async def numbers(client, path: str = "/interpolate", **request) -> np.ndarray:
    return np.load(io.BytesIO((await ask(client, NPY, path, **request)).content))


async def test_first_and_last_are_the_images_of_their_seeds(client):
    way = await numbers(client, a=7, b={"seed": 8}, frames=5, steps=6, label="circle", reproducible=True)
    assert way.shape == (5, 1, 8, 8)
    for end, seed in ((0, 7), (-1, 8)):
        alone = await numbers(client, "/sample", seed=seed, steps=6, label="circle", reproducible=True)
        assert np.array_equal(way[end], alone[0])
    shown = (await ask(client, JSON, a=7, b=8, frames=5, steps=6)).json()
    for end, seed in ((0, 7), (-1, 8)):
        x_T = draw_noise(seeded_generator(seed), (1, 8, 8)).numpy()
        assert np.array_equal(decoded(shown["latents"][end]), x_T)
    assert shown["weights"] == [[1, 0], [0.75, 0.25], [0.5, 0.5], [0.25, 0.75], [0, 1]]
    assert (shown["nfe"], shown["method"], len(shown["images"]), shown["warnings"]) == (6, "slerp", 5, [])


async def test_a_latent_from_a_file_goes_on_bit_for_bit(client):
    x = draw_noise(seeded_generator(1), (1, 8, 8)).numpy() * 1.5
    shown = (await ask(client, JSON, a={"npy": encoded(x)}, b=2, frames=3, steps=3)).json()
    assert np.array_equal(decoded(shown["latents"][0]), x)


@pytest.mark.parametrize("sampler", ["ddim", "obelm"])
async def test_images_are_encoded_first_and_returned_first_and_last(client, sampler):
    method = {"ddim": "fixed_point", "obelm": "obelm"}[sampler]
    parts = {"a": ("a.png", PNGS[0]), "b": ("b.png", PNGS[1])}
    fields = {"steps": 8, "frames": 3, "label": "square", "sampler": sampler, "reproducible": "true"}
    response = await client.post("/interpolate", files=parts, data=fields, headers=NPY)
    assert response.status_code == 200, response.text
    way = np.load(io.BytesIO(response.content))
    for end, content in ((0, PNGS[0]), (-1, PNGS[1])):
        options = {"steps": 8, "label": "square", "method": method, "reproducible": "true"}
        shown = (await client.post("/invert", files={"image": content}, data=options)).json()
        back = await numbers(client, "/sample", **shown["decode"], latent={"npy": shown["latent"]})
        assert np.array_equal(way[end], back[0])
    if sampler == "obelm":
        # This untrained network magnifies what is lost in rounding to 0.003, and half a step of 8 bits is 0.004.
        pixels = [images.to_uint8(torch.from_numpy(way[0])), images.decode(PNGS[0], 1)]
        assert np.abs(np.subtract(*pixels, dtype=int)).max() <= 1
    shown = (await client.post("/interpolate", files=parts, data=fields, headers=JSON)).json()
    assert shown["encode_nfe"] == {"ddim": 32, "obelm": 8}[sampler]
    assert shown["clip"] is False


async def test_a_strip_says_how_it_is_made_again(client):
    strip = await client.post(
        "/interpolate",
        files={"a": PNGS[0], "b": (None, "8")},
        data={"steps": 4, "labels": ["circle", "square"], "embed": "request_and_files"},
    )
    facts = json.loads(opened(strip.content).text["unstir"])
    assert facts["operation"] == "/interpolate"
    assert facts["request"]["b"] == {"seed": 8}
    assert "npy" in facts["request"]["a"]
    assert facts["request"]["labels"] == ["circle", "square"]
    assert (await ask(client, **facts["request"])).content == strip.content


async def test_a_blend_and_a_grid_are_those_of_the_formulas(client, tiny):
    ckpt = load(tiny)
    plan = samplers.ddim(ckpt.schedule, 5, clip=Clip(1.0), spacing="trailing")
    ends = [draw_noise(seeded_generator(seed), (1, 8, 8)) for seed in (1, 2, 3, 4)]

    def drawn(frames) -> np.ndarray:
        with torch.inference_mode():
            x_T = torch.stack([frame.latent for frame in frames])
            return machine.run(ckpt.net, plan, x_T, torch.full((len(frames),), 3)).numpy()

    blend = await numbers(client, latents=[1, 2, 3, 4], weights=[1, 0.5, 0, 2], steps=5)
    assert np.abs(blend - drawn([interpolation.blend(ends, [1, 0.5, 0, 2])])).max() < FOLDED
    grid = await numbers(client, latents=[1, 2, 3, 4], grid=[2, 3], steps=5)
    # Other widths, the same float32 operations but for the order of sums: 1e-6 a step.
    assert np.abs(grid - drawn(interpolation.grid(ends, 2, 3))).max() < FOLDED
    sheet = opened((await ask(client, latents=[1, 2, 3, 4], grid=[2, 3], steps=5)).content)
    assert sheet.size == (3 * 8 + 2 * 2, 2 * 8 + 2)


async def test_between_two_classes_the_embedding_is_mixed(client, tiny):
    ckpt = load(tiny)
    plan = samplers.ddim(ckpt.schedule, 5, clip=Clip(1.0), spacing="trailing")
    x_T = draw_noise(seeded_generator(1), (1, 8, 8))[None].expand(3, -1, -1, -1)
    y = torch.tensor([[1, 0, 0, 0], [0.5, 0, 0.5, 0], [0, 0, 1, 0]])
    with torch.inference_mode():
        expected = machine.run(ckpt.net, plan, x_T, y).numpy()
    found = await numbers(client, a=1, b=1, frames=3, steps=5, labels=["circle", "Big star"])
    assert np.abs(found - expected).max() < FOLDED
    one = await numbers(client, "/sample", seed=1, steps=5, label="circle")
    assert np.abs(found[0] - one[0]).max() < FOLDED
    assert np.abs(found[0] - found[1]).max() > 1e-3
    guided = await numbers(client, a=1, b=1, frames=3, steps=5, labels=[0, 2], guidance=2, reproducible=True)
    alone = await numbers(client, "/sample", seed=1, steps=5, label=2, guidance=2, reproducible=True)
    assert np.array_equal(guided[2], alone[0])


async def test_forms_hold_several_latents(client):
    fields = [("latents", (None, "1")), ("latents", ("x.png", PNGS[0])), ("latents", (None, "3"))]
    answer = await client.post("/interpolate", files=fields, data={"weights": "0.5,0.25,0.25", "steps": 3})
    assert answer.status_code == 200, answer.text
    again = await client.post("/interpolate", files=fields, data={"weights": ["0.5", "0.25", "0.25"], "steps": 3})
    assert again.content == answer.content
    corners = [("latents", (None, str(seed))) for seed in (1, 2, 3, 4)]
    grid = await client.post("/interpolate", files=corners, data={"grid": "[2, 4]", "steps": 3})
    assert opened(grid.content).size == (4 * 8 + 3 * 2, 2 * 8 + 2)
    for listed in ("1,2,3,4", "[1, 2, 3, 4]"):
        short = {"latents": (None, listed), "grid": (None, "2,4"), "steps": (None, "3")}
        assert (await client.post("/interpolate", files=short)).content == grid.content
    wrong = await client.post("/interpolate", files={"a": (None, "x.png"), "b": (None, "2")})
    assert_problem(wrong, 422, "invalid_field", 'a = "x.png"', "-F a=@x.png")
    unknown = await client.post("/interpolate", files={"img": ("x.png", PNGS[0])})
    assert_problem(unknown, 422, "invalid_field", "img (a file): no such field", "known are sampler")


@pytest.mark.parametrize("kind", ["gif", "webp", "apng"])
async def test_animations_rest_at_first_and_last(client, kind):
    request = {"a": 1, "b": 2, "frames": 6, "steps": 4}
    frames = images.to_uint8(torch.from_numpy(await numbers(client, **request)))
    answer = await ask(client, {"accept": f"image/{kind}"}, **request)
    assert answer.headers["content-type"] == f"image/{kind}"
    moving = opened(answer.content)
    assert (moving.n_frames, moving.info.get("loop", 0)) == (6, 0)
    durations = []
    for at in range(6):
        moving.seek(at)
        moving.load()
        durations.append(moving.info["duration"])
        assert np.array_equal(np.asarray(moving.convert("L"))[..., None], frames[at])
    assert durations == [900, 100, 100, 100, 100, 900]


async def test_an_archive_replays_itself(client):
    answer = await ask(client, {"accept": "application/zip"}, a=1, b=2, frames=3, steps=4)
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        assert archive.namelist() == ["000.png", "001.png", "002.png", "request.json"]
        replay = json.loads(archive.read("request.json"))
    again = await ask(client, {"accept": "application/zip"}, replay["operation"], **replay["request"])
    assert again.content == answer.content
    sample = await ask(client, {"accept": "application/zip"}, "/sample", n=2, steps=3, trajectory=2)
    with zipfile.ZipFile(io.BytesIO(sample.content)) as archive:
        assert "001-trajectory-001.png" in archive.namelist()
        assert opened(archive.read("001.png")).size == (8, 8)


async def test_opposite_latents_give_a_warning(client):
    x = draw_noise(seeded_generator(1), (1, 8, 8)).numpy()
    shown = (await ask(client, JSON, a=1, b={"npy": encoded(-x)}, frames=3, steps=3)).json()
    assert "opposite directions" in shown["warnings"][0]


PAIR = {"npy": encoded(np.zeros((2, 1, 8, 8), np.float32))}


@pytest.mark.parametrize(
    ("request_", "field", "remedy"),
    [
        ({}, "a", "give a and b; or latents"),
        ({"a": 1}, "b", "give a and b; or latents"),
        ({"a": 1, "b": 2, "latents": [1, 2]}, "a", "latents are given already"),
        ({"a": 1, "b": 2, "weights": [1, 2]}, "weights", "goes with latents"),
        ({"a": 1, "b": 2, "grid": [2, 2]}, "grid", "goes with latents"),
        ({"a": 1, "b": 2, "frames": 1}, "frames", "an integer of 2 to 16"),
        ({"a": 1, "b": 2, "frames": 17}, "frames", "at most 16"),
        ({"latents": [1, 2]}, "weights", "either weights, or as four corners a grid"),
        ({"latents": [1]}, "latents", "a list of 2 to 8"),
        ({"latents": [1] * 9, "weights": [1] * 9}, "latents", "a list of 2 to 8"),
        ({"latents": [1, 2], "weights": [1, 1], "grid": [2, 2]}, "weights", "either"),
        ({"latents": [1, 2], "weights": [1, 1], "frames": 3}, "frames", "goes with a and b"),
        ({"latents": [1, 2], "weights": [1]}, "weights", "one for each of the 2"),
        ({"latents": [1, 2], "weights": [0, 0]}, "weights", "not all zero"),
        ({"latents": [1, 2], "weights": [-1, 2]}, "weights", "from 0"),
        ({"latents": [1, 2, 3], "grid": [2, 2]}, "grid", "four corners"),
        ({"latents": [1, 2, 3, 4], "grid": [1, 2]}, "grid", "2 or more"),
        ({"latents": [1, 2, 3, 4], "grid": [5, 5]}, "grid", "at most 16"),
        ({"latents": [1, 2, 3, 4], "grid": [2]}, "grid", "a list of 2"),
        ({"a": 1, "b": 2, "label": 0, "labels": [0, 1]}, "label", "labels are given already"),
        ({"a": 1, "b": 2, "labels": [0]}, "labels", "one for each of the 2"),
        ({"a": 1, "b": 2, "labels": [0, "Hat"]}, "labels.1", "circle, square, Big star"),
        ({"a": 1, "b": 2, "sampler": "ddpm"}, "sampler", "fresh noise"),
        ({"a": 1, "b": 2, "sampler": "dpmpp_2m_sde"}, "sampler", "deterministic"),
        ({"a": 1, "b": 2, "eta": 0.5}, "eta", "eta 0"),
        ({"a": 1, "b": PAIR}, "sampler", "only obelm"),
        ({"a": 1, "b": PAIR, "sampler": "obelm"}, "sampler", "the others are not"),
        ({"a": 1, "b": {"image": "aaaa"}, "sampler": "heun"}, "sampler", "ddim or obelm"),
        ({"a": {"seed": 1, "npy": ""}, "b": 2}, "a", "one of seed, npy and image"),
        ({"a": {}, "b": 2}, "a", "one of seed, npy and image"),
        ({"a": {"seed": -1}, "b": 2}, "a.seed", "an integer of 0 to 9007199254740991"),
        ({"a": {"sed": 1}, "b": 2}, "a.sed", "known are seed, npy, image"),
        ({"a": "1", "b": 2}, "a", "must be a seed"),
        ({"a": 1, "b": 2, "method": "cubic"}, "method", "choose one of slerp, lerp"),
        ({"a": 1, "b": 2, "guidance": 2}, "guidance", "give a label"),
    ],
    ids=lambda value: str(value)[:60] if isinstance(value, dict) else "",
)
async def test_impossible_requests(client, request_, field, remedy):
    response = await client.post("/interpolate", json=request_)
    body = assert_problem(response, 422, "invalid_field", field, remedy)
    assert body["errors"][0]["field"] == field


@pytest.mark.parametrize(
    ("request_", "field", "remedy"),
    [
        ({"latent": 7, "seed": 1}, "seed", "the latent takes its place"),
        ({"latent": 7, "n": 2}, "n", "one image"),
        ({"latent": PAIR}, "sampler", "only obelm"),
        ({"latent": {"image": "aaaa"}, "sampler": "ddpm"}, "sampler", "ddim or obelm"),
    ],
)
async def test_impossible_latents_of_a_sample(client, request_, field, remedy):
    response = await client.post("/sample", json=request_)
    body = assert_problem(response, 422, "invalid_field", remedy)
    assert body["errors"][0]["field"] == field


async def test_a_latent_takes_the_place_of_a_seed(client):
    by_seed = await numbers(client, "/sample", seed=7, steps=5)
    assert np.array_equal(await numbers(client, "/sample", latent=7, steps=5), by_seed)
    x_T = draw_noise(seeded_generator(7), (1, 8, 8)).numpy()
    assert np.array_equal(await numbers(client, "/sample", latent={"npy": encoded(x_T)}, steps=5), by_seed)
    # With fresh noise the seed goes on deciding it, so its own x_T makes no difference.
    noisy = await numbers(client, "/sample", seed=7, n=2, steps=5, eta=1)
    given = await numbers(client, "/sample", seed=7, latent={"npy": encoded(x_T)}, n=2, steps=5, eta=1)
    assert np.array_equal(given[0], noisy[0])
    assert not np.array_equal(given[1], noisy[1])
    blank = [("latent", (None, "7"))]
    form = await client.post("/sample", files=blank, data={"steps": "5"}, headers=NPY)
    assert np.array_equal(np.load(io.BytesIO(form.content)), by_seed)
