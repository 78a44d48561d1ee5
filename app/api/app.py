"""Wiring: settings in, an ASGI application out."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException

from app import __version__
from app.api import problems
from app.api.body import LATENTS
from app.api.job_store import JobStore
from app.api.middleware import BodyLimit, Frame
from app.api.openapi import complete
from app.api.routes import operations as routes
from app.api.routes import status
from app.errors import UnstirError
from app.operations.service import Service
from app.settings import Settings

log = logging.getLogger("unstir")
BODIES = {operation.path: operation.request for operation in (routes.SAMPLE, routes.INVERT, routes.INTERPOLATE)}


def create_app(settings: Settings | None = None, on_failure: Callable[[], None] = lambda: None) -> FastAPI:
    """The service as an ASGI application. It answers at once; the network is loaded behind it.

    Args:
        settings: None reads them from the environment.
        on_failure: called when the network cannot be loaded.
    """
    service = Service(settings or Settings())

    def failed(error: Exception) -> None:
        service.failure = str(error)
        log.critical("the network could not be loaded: %s", error, exc_info=log.isEnabledFor(logging.DEBUG) and error)
        on_failure()

    def loaded() -> None:
        service.start()
        log.info("ready")

    def device_thread(loop: asyncio.AbstractEventLoop) -> None:
        ending: Callable[[], None] = loaded
        try:
            service.load()
        except Exception as error:
            ending = partial(failed, error)
        with contextlib.suppress(RuntimeError):  # the loop is closed: the process was told to stop in the meantime
            loop.call_soon_threadsafe(ending)
        if ending is loaded:
            service.work()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        # A daemon, so that a process that is told to stop need not first finish loading.
        threading.Thread(target=device_thread, args=[asyncio.get_running_loop()], name="device", daemon=True).start()
        watching = asyncio.ensure_future(service.metrics.watch())
        yield
        await service.drain()
        watching.cancel()
        service.close()

    app = FastAPI(
        title="Unstir",
        version=__version__,
        summary="HTTP inference for pixel-space diffusion models.",
        lifespan=lifespan,
        redoc_url=None,
    )
    app.state.service = service
    app.state.jobs = jobs = JobStore(service.settings)
    service.metrics.jobs = lambda: jobs.held
    service.metrics.endpoints = BODIES
    describe = app.openapi

    def openapi() -> dict[str, Any]:
        """Complete, and made once."""
        if app.openapi_schema is None:
            app.openapi_schema = complete(describe(), BODIES, sorted(LATENTS | {"image"}))
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
    app.include_router(routes.router)
    app.include_router(status.router)
    app.add_exception_handler(UnstirError, problems.on_unstir_error)
    app.add_exception_handler(HTTPException, problems.on_http_exception)
    app.add_middleware(BodyLimit, limit=service.settings.max_body_bytes)
    app.add_middleware(Frame, metrics=service.metrics, on_defect=problems.on_defect)
    return app
