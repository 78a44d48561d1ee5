"""The application: settings in, ASGI out."""

from __future__ import annotations

from collections.abc import Callable

from fastapi import FastAPI
from starlette.exceptions import HTTPException

from app import __version__
from app.api import openapi, problems
from app.api.job_store import JobStore
from app.api.lifespan import Lifecycle
from app.api.middleware import BodyLimitMiddleware, RequestMiddleware
from app.api.origins import OriginMiddleware
from app.api.routes import docs, jobs, operations, status
from app.api.routes.operations import OPERATIONS
from app.errors import UnstirError
from app.settings import Settings
from app.telemetry.metrics import Metrics
from model.diffusion.inversion.registry import INVERSIONS
from model.diffusion.samplers import SAMPLERS


def create_app(settings: Settings | None = None, on_failure: Callable[[], None] = lambda: None) -> FastAPI:
    """The service as an ASGI application. It answers at once; the network is loaded meanwhile.

    Args:
        settings: None reads them from the environment.
        on_failure: called when the network cannot be loaded.
    """
    settings = settings or Settings()
    job_store = JobStore(settings)
    metrics = Metrics([operation.path for operation in OPERATIONS], lambda: lifecycle.model, job_store.totals)
    metrics.initialize(
        {each.path: SAMPLERS if "sampler" in each.request.model_fields else INVERSIONS for each in OPERATIONS},
        [*SAMPLERS, *(f"inverse {inversion.sampler}" for inversion in INVERSIONS.values())],
    )
    lifecycle = Lifecycle(settings, metrics, on_failure)
    app = FastAPI(
        title="Unstir",
        version=__version__,
        summary="HTTP inference for pixel-space diffusion models.",
        lifespan=lifecycle.run,
        docs_url=None,  # ours needs no internet
        redoc_url=None,
        generate_unique_id_function=openapi.operation_id,
        redirect_slashes=False,  # a redirect would name the host that the client claims to have asked
    )
    app.state.lifecycle, app.state.job_store = lifecycle, job_store
    app.state.routers = (operations.router, jobs.router, status.router, docs.router)
    for router in app.state.routers:
        app.include_router(router)
    app.add_exception_handler(UnstirError, problems.on_unstir_error)
    app.add_exception_handler(HTTPException, problems.on_http_exception)
    app.add_middleware(BodyLimitMiddleware, limit=settings.max_body_bytes)
    app.add_middleware(OriginMiddleware, origins=settings.origins, costly={operation.path for operation in OPERATIONS})
    app.add_middleware(
        RequestMiddleware,
        metrics=metrics,
        root_path=settings.root_path,
        on_unexpected_error=problems.on_unexpected_error,
    )
    openapi.extend(app, OPERATIONS)
    return app
