"""From a request's fields to a compiled plan: the checkpoint's defaults filled in, what cannot be refused by name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from app.engine.jobs import SnapshotKind
from app.errors import InvalidField
from app.operations.context import Phase
from app.operations.plans import check_evaluations
from app.operations.requests import SamplingRequest
from app.operations.service import Service
from model.diffusion.inversion.registry import INVERSIONS, Inversion
from model.diffusion.plan import Clip, Plan
from model.diffusion.samplers import SAMPLERS, Sampler
from model.diffusion.schedule import ScheduleError, Spacing

R = TypeVar("R", bound=SamplingRequest)
R_co = TypeVar("R_co", bound=SamplingRequest, covariant=True)
OPTION_DEFAULTS = {"eta": 0.0, "order": 2, "warmup": False}


@dataclass(frozen=True)
class ResolvedRequest(Generic[R_co]):
    """A request with every default filled in, and the plan that it compiles to.

    Attributes:
        request: sending it again gives the same images.
        paired: the plan starts from a pair of states.
    """

    request: R_co
    plan: Plan
    paired: bool = False

    def phase(self, images: int = 1) -> Phase:
        """The cost of so many images; with guidance, each takes two rows of a forward."""
        return Phase(self.request.sampler, self.plan.nfe, images, 1 if self.request.guidance == 1 else 2)

    @property
    def nfe(self) -> int:
        """Network evaluations of each image."""
        return self.phase().nfe


@contextmanager
def schedule_errors_as_fields() -> Iterator[None]:
    """The one place where a schedule's error becomes that of a request's field.

    Raises:
        InvalidField: for a :class:`ScheduleError`.
    """
    try:
        yield
    except ScheduleError as error:
        raise InvalidField(error.field, error.value, error.remedy) from error


async def resolve(service: Service, request: R, *, paired: bool = False, returning: bool = False) -> ResolvedRequest[R]:
    """Fill in the checkpoint's defaults and compile the plan.

    Args:
        paired: start from a pair of states.
        returning: the plan leads back to an image that was encoded, so x̂0 is not clipped by default.

    Raises:
        InvalidField: naming the field, its value and the remedy.
    """
    schedule, defaults = service.model.schedule, service.model.defaults
    sampler, T = SAMPLERS[request.sampler], schedule.T
    steps = request.steps or min(sampler.default_steps or T, T)
    given = _given_options(request, sampler)
    clip = False if request.clip is None and returning else request.clip
    with schedule_errors_as_fields():
        options = defaults.options(sampler, steps, T) | given
        if clip is not None:
            options["clip"] = (defaults.clip or Clip(defaults.clip_limit)) if clip else None
        per_step, more = sampler.evaluations
        check_evaluations(per_step * steps + more, "steps", steps, "ask for fewer steps")
        pair = {"paired": True} if paired else {}
        plan = await service.plans.compile(sampler.compile, schedule, steps, **options, **pair)
    changes = {name: options.get(name) for name in ("eta", "order", "warmup", "spacing")}
    changes |= {"steps": steps, "clip": options["clip"] is not None}
    return ResolvedRequest(request.model_copy(update=changes), plan, paired)


def _given_options(request: SamplingRequest, sampler: Sampler) -> dict[str, Any]:
    """Fields that only some samplers take, with their defaults, and ``spacing`` if it was given."""
    options: dict[str, Any] = {}
    for name, default in OPTION_DEFAULTS.items():
        value = getattr(request, name)
        if name in sampler.options:
            options[name] = default if value is None else value
        elif value is not None:
            others = ", ".join(other.name for other in SAMPLERS.values() if name in other.options)
            raise InvalidField(name, value, f"{sampler.name} takes no {name}; leave it out, or use {others}")
    if request.spacing is not None:
        if request.spacing not in sampler.spacings:
            raise InvalidField("spacing", request.spacing, f"{sampler.name} takes {', '.join(sampler.spacings)}")
        options["spacing"] = request.spacing
    return options


async def compile_inversion(
    service: Service, inversion: Inversion, steps: int, spacing: Spacing | None, **options: Any
) -> Plan:
    """The plan from image to latent.

    Raises:
        InvalidField: naming the field, its value and the remedy.
    """
    with schedule_errors_as_fields():
        return await service.plans.compile(inversion.compile, service.model.schedule, steps, spacing=spacing, **options)


def inversion_for(sampler: str) -> Inversion | None:
    """The inversion from which this sampler leads back; None if there is none."""
    return next((inversion for inversion in INVERSIONS.values() if inversion.sampler == sampler), None)


def trajectory_steps(nfe: int, count: int | None, look: SnapshotKind) -> list[int]:
    """The steps of a plan of which ``count`` frames are taken; NFE itself stands for the final state.

    Raises:
        InvalidField: the plan has not that many.
    """
    if count is None:
        return []
    if count > nfe:
        limit = f"at most {nfe}" if nfe > 1 else "none"
        remedy = f"this request has {nfe} evaluations; ask for {limit}, or more steps"
        raise InvalidField("trajectory", count, remedy)
    last = nfe - 1 if look == "x_0" else nfe
    return [round(i * last / (count - 1)) for i in range(count)]
