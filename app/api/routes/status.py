"""Routes that tell of the service itself: what it serves, whether it lives, whether it is ready, and its metrics."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from app import __version__
from app.api.problems import DECLARED
from app.api.responses.schemas import MethodInfo, ModelReply, SamplerInfo, Status
from app.operations.requests import SampleRequest
from app.operations.service import Service
from model.diffusion.inversion.registry import INVERSIONS
from model.diffusion.samplers import SAMPLERS, Sampler

router = APIRouter()


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


@router.get("/model", summary="What is being served", responses={503: DECLARED[503]})
async def model(request: Request) -> ModelReply:
    """The network, its classes and schedule, the samplers, the limits, and what a forward costs here."""
    service = _service(request)
    engine, found = service.engine, service.calibration
    loaded, settings = service.checkpoint, service.settings
    limits = ("max_images", "max_queue_seconds", "max_body_bytes", "max_pixels")
    return ModelReply(
        name=loaded.card.name,
        description=loaded.card.description,
        licence=loaded.card.licence,
        sha256=loaded.card.sha256,
        classes=list(loaded.card.classes),
        shape=list(loaded.shape),
        background=loaded.card.background,
        timesteps=service.schedule.T,
        schedule=loaded.scheduler_config,
        prediction=service.schedule.prediction,
        parameters=sum(p.numel() for p in loaded.net.parameters()),
        samplers=[_describe(sampler, service) for sampler in SAMPLERS.values()],
        methods=[
            MethodInfo(name=m.name, what=m.what, when=m.when, evaluations=m.evaluations, sampler=m.sampler)
            for m in INVERSIONS.values()
        ],
        device=str(service.device),
        dtype=found.dtype,
        layout=found.layout,
        threads=found.threads,
        dtype_error=found.error,
        forward_ms=_milliseconds(found.fast),
        exact_forward_ms=_milliseconds(found.exact),
        pace=round(engine.cost_ratio, 3),
        reproducible_width=settings.reproducible_width,
        reproducible_widths=list(found.bit_identical),
        guidance=loaded.card.null_class is not None,
        limits={name: getattr(settings, name) for name in limits},
        version=__version__,
    )


def _milliseconds(costs: dict[int, float]) -> dict[int, float]:
    return {width: round(seconds * 1e3, 3) for width, seconds in costs.items()}


def _describe(sampler: Sampler, service: Service) -> SamplerInfo:
    steps = sampler.default_steps or service.schedule.T
    first = service.habits.options(sampler, min(steps, service.schedule.T), service.schedule.T)["spacing"]
    return SamplerInfo(
        name=sampler.name,
        what=sampler.what,
        when=sampler.when,
        stochastic=sampler.stochastic,
        evaluations=sampler.nfe,
        good_steps=sampler.good_steps,
        default_steps=min(steps, service.schedule.T),
        options=sorted(sampler.options & SampleRequest.model_fields.keys()),
        spacings=[first, *(spacing for spacing in sampler.spacings if spacing != first)],
    )


@router.get("/healthz", summary="Is the process alive?")
async def healthz() -> Status:
    """Yes, if this is answered at all; it never looks at the queue."""
    return Status(status="alive")


@router.get("/readyz", summary="Should requests be sent here?", responses={503: {"model": Status}})
async def readyz(request: Request, response: Response) -> Status:
    """503 with the reason while loading, draining, stalled or dead."""
    unready = _service(request).unready
    if unready:
        response.status_code = 503
    return Status(status=unready or "ready")


@router.get("/metrics", summary="Metrics for Prometheus", response_class=Response)
async def metrics(request: Request) -> Response:
    """Every metric, in Prometheus' text format."""
    return Response(_service(request).metrics.exposition(), media_type="text/plain; version=0.0.4; charset=utf-8")
