"""The service about itself: what it serves, whether it is alive and ready, and its metrics."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse

from app import __version__
from app.api.problems import DECLARED
from app.api.responses.schemas import InversionInfo, ModelInfo, SamplerInfo, Status
from app.engine.loading import LoadedModel
from app.operations.requests import SampleRequest
from app.operations.service import Service
from model.diffusion.inversion.registry import INVERSIONS
from model.diffusion.samplers import SAMPLERS, Sampler

router = APIRouter(tags=["service"])
LIMITS = ("max_images", "max_queue_seconds", "max_body_bytes", "max_pixels")


@router.get(
    "/model",
    name="get_model",
    summary="The served network",
    responses={status: DECLARED[status] for status in (500, 503)},
)
async def model(request: Request) -> ModelInfo:
    """The network, its classes and schedule, the samplers, the limits, and what a forward costs here."""
    service: Service = request.app.state.lifecycle.get_service()
    loaded, settings, engine = service.model, service.settings, service.engine
    card, calibration = loaded.checkpoint.card, loaded.calibration
    return ModelInfo(
        name=card.name,
        description=card.description,
        licence=card.licence,
        sha256=card.sha256,
        classes=list(card.classes),
        shape=list(loaded.checkpoint.shape),
        background=card.background,
        timesteps=loaded.schedule.T,
        schedule=loaded.checkpoint.scheduler_config,
        prediction=loaded.schedule.prediction,
        parameters=sum(p.numel() for p in loaded.checkpoint.net.parameters()),
        samplers=[_describe_sampler(sampler, loaded) for sampler in SAMPLERS.values()],
        methods=[
            InversionInfo(name=m.name, what=m.what, when=m.when, evaluations=m.nfe_formula, sampler=m.sampler)
            for m in INVERSIONS.values()
        ],
        device=str(loaded.device),
        dtype=calibration.dtype,
        layout=calibration.layout,
        threads=calibration.threads,
        dtype_error=calibration.error,
        forward_ms=_milliseconds(calibration.fast),
        exact_forward_ms=_milliseconds(calibration.exact),
        cost_ratio=round(engine.cost_ratio, 3),
        reproducible_width=settings.reproducible_width,
        reproducible_widths=list(calibration.bit_identical),
        guidance=card.null_class is not None,
        limits={name: getattr(settings, name) for name in LIMITS},
        version=__version__,
    )


def _milliseconds(costs: dict[int, float]) -> dict[int, float]:
    return {width: round(seconds * 1e3, 3) for width, seconds in costs.items()}


def _describe_sampler(sampler: Sampler, loaded: LoadedModel) -> SamplerInfo:
    T = loaded.schedule.T
    steps = min(sampler.default_steps or T, T)
    default = loaded.defaults.options(sampler, steps, T)["spacing"]
    return SamplerInfo(
        name=sampler.name,
        what=sampler.what,
        when=sampler.when,
        stochastic=sampler.stochastic,
        evaluations=sampler.nfe_formula,
        good_steps=sampler.good_steps,
        default_steps=steps,
        options=sorted(sampler.options & SampleRequest.model_fields.keys()),
        spacings=[default, *(spacing for spacing in sampler.spacings if spacing != default)],
    )


@router.get("/healthz", name="get_health", summary="Is the process alive?")
async def healthz() -> Status:
    """Yes, if this is answered at all; it never looks at the queue."""
    return Status(status="alive")


@router.get(
    "/readyz", name="get_readiness", summary="Should requests be sent here?", responses={503: {"model": Status}}
)
async def readyz(request: Request, response: Response) -> Status:
    """503 with the reason while loading, draining, stalled or dead."""
    unready = request.app.state.lifecycle.unready
    if unready:
        response.status_code = 503
    return Status(status=unready or "ready")


@router.get("/metrics", name="get_metrics", summary="Metrics for Prometheus", response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    """Every metric, in Prometheus' text format."""
    return Response(
        request.app.state.lifecycle.metrics.exposition(), media_type="text/plain; version=0.0.4; charset=utf-8"
    )
