"""Requests to the service: to the same application in this process, without a server, or to one that runs."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import Any

import httpx
from tqdm import tqdm

from app.api.app import create_app
from app.cli.terminal import CommandError, fault, flag, print_status, shown
from app.settings import Settings


def request(service: Settings | str, method: str, path: str, headers: dict[str, str], **body: Any) -> httpx.Response:
    """The answer, whatever its status.

    Args:
        service: settings of one in this process, or the address of one that runs.

    Raises:
        CommandError: the network could not be loaded, or nobody answers at the address.
    """

    async def run() -> httpx.Response:
        async with _connect(service) as client:
            return await client.request(method, path, headers=headers, **body)

    return _run(service, run())


def post(
    service: Settings | str, path: str, accept: str, *, name: Callable[[str], str] = flag, **body: Any
) -> httpx.Response:
    """The answer to a POST, with a progress bar if somebody watches.

    Args:
        service: as in :func:`request`.
        name: how the user knows a field.

    Raises:
        CommandError: as :func:`request`, or the request was refused; with the service's reasons.
    """
    watched = sys.stderr.isatty()
    if watched and isinstance(service, Settings):
        print_status(f"loading {shown(service.checkpoint)}")

    async def run() -> httpx.Response:
        async with _connect(service) as client:
            send = partial(_post_and_watch, client) if watched else client.post
            return await send(path, headers={"accept": accept}, **body)

    answer = _run(service, run())
    if answer.is_success:
        return answer
    try:
        problem = answer.json()
    except ValueError:
        raise CommandError(f"{service}: status {answer.status_code} without a reason; is this Unstir?") from None
    faults = [_word(name(each["field"]), each) for each in problem.get("errors", [])]
    raise CommandError(*(faults or [problem["detail"]]))


def _word(name: str, problem: Mapping[str, Any]) -> str:
    """A line about one invalid field."""
    if "value" in problem:
        return fault(name, problem["value"], problem["remedy"])
    return f"{name} ({problem['given']}): {problem['remedy']}" if "given" in problem else f"{name}: {problem['remedy']}"


def _run(service: Settings | str, asking: Coroutine[Any, Any, httpx.Response]) -> httpx.Response:
    try:
        return asyncio.run(asking)
    except (httpx.TransportError, httpx.InvalidURL) as error:
        raise CommandError(
            fault("--url", service, f"{error or 'it does not answer'}; is the server running?")
        ) from error


def _connect(service: Settings | str) -> AbstractAsyncContextManager[httpx.AsyncClient]:
    """A client of the service."""
    if isinstance(service, Settings):
        return _start(service)
    return httpx.AsyncClient(base_url=service.rstrip("/"), timeout=httpx.Timeout(10, read=None), trust_env=False)


@asynccontextmanager
async def _start(settings: Settings) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the service in this process, once its network is loaded."""
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
    # A path of the server; the client puts its own prefix before paths.
    job = accepted.headers["location"].removeprefix(client.base_url.path.rstrip("/"))
    with tqdm(
        total=accepted.json()["total"], leave=False, bar_format="{percentage:3.0f}%|{bar:40}| {remaining} left"
    ) as bar:
        while (answer := await client.get(job)).is_success:
            found = answer.json()
            if found["state"] not in ("waiting", "running"):
                break
            bar.total = found["total"]
            bar.update(found["done"] - bar.n)
            await asyncio.sleep(0.1)
    return await client.get(f"{job}/result", headers=headers)
