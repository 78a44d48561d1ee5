"""Requests to the service without a server: the same application, in this process."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import httpx
from tqdm import tqdm

from app.api.app import create_app
from app.cli.terminal import CommandError, fault, flag, print_status, shown
from app.settings import Settings


def request(settings: Settings, method: str, path: str, headers: dict[str, str], **body: Any) -> httpx.Response:
    """The answer, whatever its status.

    Raises:
        CommandError: the network could not be loaded.
    """

    async def run() -> httpx.Response:
        async with _service(settings) as client:
            return await client.request(method, path, headers=headers, **body)

    return asyncio.run(run())


def post(
    settings: Settings, path: str, accept: str, *, name: Callable[[str], str] = flag, **body: Any
) -> httpx.Response:
    """The answer to a POST, with a progress bar if somebody watches.

    Args:
        name: how the user knows a field.

    Raises:
        CommandError: the network could not be loaded, or the request was refused; with the service's reasons.
    """
    watched = sys.stderr.isatty()
    if watched:
        print_status(f"loading {shown(settings.checkpoint)}")

    async def run() -> httpx.Response:
        async with _service(settings) as client:
            send = partial(_post_and_watch, client) if watched else client.post
            return await send(path, headers={"accept": accept}, **body)

    answer = asyncio.run(run())
    if answer.is_success:
        return answer
    problem = answer.json()
    faults = [fault(name(each["field"]), each.get("value"), each["remedy"]) for each in problem.get("errors", [])]
    raise CommandError(*(faults or [problem["detail"]]))


@asynccontextmanager
async def _service(settings: Settings) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the service, once its network is loaded."""
    failed = asyncio.Event()
    app = create_app(settings, on_failure=failed.set)
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://unstir", timeout=None) as client,
    ):
        while (await client.get("/readyz")).status_code != 200:
            if failed.is_set():
                raise CommandError((await client.get("/readyz")).json()["status"], status=1)
            await asyncio.sleep(0.05)  # seldom, since forwards are being timed
        yield client


async def _post_and_watch(client: httpx.AsyncClient, path: str, headers: dict[str, str], **body: Any) -> httpx.Response:
    """As an asynchronous job, whose progress can be asked for."""
    accepted = await client.post(path, headers=headers | {"prefer": "respond-async"}, **body)
    if accepted.status_code != 202:
        return accepted
    job = accepted.headers["location"]
    with tqdm(
        total=accepted.json()["total"], leave=False, bar_format="{percentage:3.0f}%|{bar:40}| {remaining} left"
    ) as bar:
        while (found := (await client.get(job)).json())["state"] in ("waiting", "running"):
            bar.total = found["total"]
            bar.update(found["done"] - bar.n)
            await asyncio.sleep(0.1)
    return await client.get(f"{job}/result", headers=headers)
