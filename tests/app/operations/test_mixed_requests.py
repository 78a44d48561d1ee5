"""Requests of all kinds at once: each gets what it would get alone, and they share forwards."""

from __future__ import annotations

import asyncio
import base64
import io

import numpy as np
import pytest

from app.api.app import create_app
from app.engine import networks as forms
from model import images
from model.diffusion.noise import draw_noise, seeded_generator
from model.network.inference import InferenceUNet
from tests.conftest import serving
from tests.metrics import metric

pytestmark = pytest.mark.anyio
SAMPLERS = ["ddim", "ddpm", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_2s", "unipc", "heun", "pndm", "obelm"]


class Moody(InferenceUNet):
    """Its last bits depend on the width of the forward, on every processor."""

    def forward(self, x, conditioning):
        return super().forward(x, conditioning) * (1 + 3e-7 * len(x))


@pytest.fixture
async def client(settings, monkeypatch):
    monkeypatch.setattr(forms, "InferenceUNet", Moody)
    async with serving(create_app(settings.model_copy(update={"cache": ""}))) as client:
        yield client


def npy(seed: int) -> str:
    buffer = io.BytesIO()
    np.save(buffer, draw_noise(seeded_generator(seed), (1, 8, 8)).numpy())
    return base64.b64encode(buffer.getvalue()).decode()


def png(seed: int) -> str:
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 1), np.uint8)
    return base64.b64encode(images.png(pixels)).decode()


def requests() -> list[tuple[str, str, dict]]:
    """64 of them: path, Accept and body."""
    found: list[tuple[str, str, dict]] = []
    for i in range(64):
        body: dict = {"label": i % 3, "steps": 4 + i % 9, "reproducible": True}
        match i % 4:
            case 0:
                body |= {"sampler": SAMPLERS[i // 4 % 9], "seed": i, "n": 1 + i % 3, "guidance": 1 + i // 4 % 2}
                found.append(("/sample", "application/x-npy", body))
            case 1:
                body |= {"image": png(i), "method": ("fixed_point", "ddim", "obelm")[i // 4 % 3], "check": i % 3 > 0}
                found.append(("/invert", "application/x-npy", body))
            case 2:
                body |= {"a": {"seed": i}, "b": ({"image": png(i)}, {"npy": npy(i)})[i // 4 % 2], "frames": 3}
                found.append(("/interpolate", "image/png", body))
            case _:
                del body["label"]
                body |= {"latents": [i, i + 1, i + 2, i + 3], "labels": [0, 1, 2, None], "method": "lerp"}
                body |= {"grid": [2, 3]} if i % 8 == 3 else {"weights": [1, 2, 3, 4]}
                found.append(("/interpolate", "application/x-npy", body))
    return found


async def ask(client, path: str, accept: str, body: dict) -> bytes:
    response = await client.post(path, json=body, headers={"accept": accept})
    assert response.status_code == 200, response.text
    return response.content


async def forwards(client) -> float:
    return await metric(client, "unstir_forwards_total")


async def test_64_mixed_requests_equal_their_solo_answers_and_share_forwards(client):
    alone = [await ask(client, *request) for request in requests()]
    solo = await forwards(client)
    together = await asyncio.gather(*(ask(client, *request) for request in requests()))
    shared = await forwards(client) - solo
    differing = [request for request, a, b in zip(requests(), alone, together, strict=True) if a != b]
    assert not differing
    assert shared < 0.6 * solo  # alone, too, the images of one request ride together
    assert {path for path, _, _ in requests()} == {"/sample", "/invert", "/interpolate"}


async def test_without_reproducible_the_last_bits_do_move(client):
    """The negative control: what rides in forwards of other widths differs, so the test above can fail."""
    assert (await client.get("/model")).json()["reproducible_widths"] == [4]
    plain = [(path, "application/x-npy", body | {"reproducible": False}) for path, _, body in requests()[::4]]
    alone = [await ask(client, *request) for request in plain]
    together = await asyncio.gather(*(ask(client, *request) for request in plain))
    assert any(a != b for a, b in zip(alone, together, strict=True))
