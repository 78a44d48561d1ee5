"""A tiny checkpoint with random weights, and the service around it: what HTTP tests need, in milliseconds."""

from __future__ import annotations

import os

import torch

# Without a card Triton's kernels run in its interpreter. It has to know before they are decorated, so before imports.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import httpx
import numpy as np
import pytest
from fastapi import FastAPI

from app.api.app import create_app
from app.engine import calibration
from app.settings import Settings
from model import checkpoint
from model.checkpoint import Card, Checkpoint
from model.data import Dataset
from model.training.recipe import SCHEDULER_CONFIG, Recipe, network

torch.set_num_threads(1)  # the networks here are too small to share, and threads that wait for a busy core cost seconds

# The ε of the server's network differs from the plain one's by about 1e-6, and the first steps divide that by √ᾱ,
# which is 0.006 at t = T - 1; later steps carry it on: 2e-5 in the images of these tests.
FOLDED = 1e-4
calibration.MIN_SHARE = 0.0  # tests run beside each other, and use one calibration of the tiny network
CLASSES = ("circle", "square", "Big star")


LONGEST = ("test_readme", "test_gpu_check")  # files that take minutes


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that two processes end at about the same time."""
    items.sort(key=lambda item: item.path.stem not in LONGEST)


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


def save_tiny(path: Path, classes: tuple[str, ...] = CLASSES, broken: bool = False) -> Path:
    """A checkpoint of 8x8 greys; a broken one answers NaN for the last class."""
    recipe = Recipe(size=8, channels=(8, 8), attention=(4,), head_dim=4, groups=4)
    with torch.random.fork_rng():
        torch.manual_seed(0)  # whichever tests came before
        net = network(recipe, Dataset(np.zeros((1, 8, 8, 1), np.uint8), None, classes))
        torch.nn.init.normal_(net.conv_out.weight, std=0.2)
    null = len(classes) if classes else None
    checkpoint.save(path, net, net.state_dict(), SCHEDULER_CONFIG, Card("tiny", classes=classes, null_class=null))
    return path


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_ckpt(tiny: Path) -> Checkpoint:
    return checkpoint.load(tiny)


def settings_of(tiny: Path) -> Settings:
    return Settings(
        checkpoint=tiny,
        device="cpu",
        threads=1,
        dtype="float32",
        cache=str(tiny / "cache"),
        max_width=8,
        max_images=16,
        max_body_bytes=8192,
    )


@pytest.fixture
def settings(tiny: Path) -> Settings:
    return settings_of(tiny)


@asynccontextmanager
async def serving(app: FastAPI, ready: bool = True) -> AsyncIterator[httpx.AsyncClient]:
    """The application in process, started and stopped as uvicorn would."""
    transport = httpx.ASGITransport(app, raise_app_exceptions=True)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://test") as client,
    ):
        while ready and app.state.lifecycle.unready:
            await anyio.sleep(0.005)
        yield client


@pytest.fixture
async def client(settings: Settings) -> AsyncIterator[httpx.AsyncClient]:
    """A service of its own for each test, which costs a fifth of a second."""
    async with serving(create_app(settings)) as client:
        yield client


@pytest.fixture(scope="module")
async def shared_client(tiny: Path) -> AsyncIterator[httpx.AsyncClient]:
    """One service for a whole file of tests, where none changes it or counts what it did."""
    async with serving(create_app(settings_of(tiny))) as client:
        yield client
