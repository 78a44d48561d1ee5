"""Wiring: settings in, an ASGI application out."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from app import __version__, routes
from app.errors import UnstirError
from app.middleware import BodyLimit, Frame
from app.service import Service
from app.settings import Settings

log = logging.getLogger("unstir")


def create_app(settings: Settings | None = None, on_failure: Callable[[], None] = lambda: None) -> FastAPI:
    """The service as an ASGI application. It answers at once; the network is loaded behind it.

    Args:
        settings: None reads them from the environment.
        on_failure: called when the network cannot be loaded.
    """
    service = Service(settings or Settings())

    async def load() -> None:
        try:
            await asyncio.to_thread(service.load)
        except Exception as error:
            service.failure = str(error)
            log.critical("the network could not be loaded: %s", error, exc_info=log.isEnabledFor(logging.DEBUG))
            on_failure()
        else:
            service.start()
            log.info("ready")

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        loading = asyncio.create_task(load())
        yield
        await loading
        await service.drain()
        service.close()

    app = FastAPI(
        title="Unstir",
        version=__version__,
        summary="HTTP inference for pixel-space diffusion models.",
        lifespan=lifespan,
        redoc_url=None,
    )
    app.state.service = service
    app.include_router(routes.router)
    app.add_exception_handler(UnstirError, routes.on_unstir_error)
    app.add_exception_handler(RequestValidationError, routes.on_validation_error)
    app.add_exception_handler(HTTPException, routes.on_http_exception)
    app.add_middleware(BodyLimit, limit=service.settings.max_body_bytes)
    app.add_middleware(Frame, metrics=service.metrics, on_defect=routes.on_defect)
    return app
