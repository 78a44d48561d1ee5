"""The stories: what happens to a request, in the order in which it happens, for HTTP and command line alike."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor

from app.engine.lane import Lane, Result
from app.errors import InvalidField
from app.schemas import MAX_SEED, SampleRequest
from app.service import Service
from model.plan import Clip, Plan
from model.samplers import SAMPLERS
from model.schedule import ScheduleError, covering_spacing


@dataclass(frozen=True)
class Walk:
    """A request for pictures with every default filled in.

    Attributes:
        request: as the client could have sent it; sending it again gives the same pictures.
        seeds: of each picture.
        label: class index, or None for a network without classes.
    """

    request: SampleRequest
    plan: Plan
    seeds: list[int]
    label: int | None


@dataclass(frozen=True)
class Sampled:
    """An answered walk."""

    walk: Walk
    result: Result

    @property
    def pictures(self) -> Tensor:
        """float32 [n, C, H, W] in about [-1, 1]."""
        return self.result.pictures


async def sample(service: Service, request: SampleRequest) -> Sampled:
    """Noise in, pictures out.

    Raises:
        InvalidField: a value that this checkpoint cannot take.
        Starting, Draining, Overloaded, EngineDead, NotFinite: see :mod:`app.errors`.
    """
    engine = service.engine
    walk = resolve(service, request)
    lanes = [Lane(walk.plan, seed, walk.label, walk.request.reproducible) for seed in walk.seeds]
    with engine.reserve(len(lanes), walk.plan.nfe) as ticket:
        result = await ticket.run(lanes)
    return Sampled(walk, result)


def resolve(service: Service, request: SampleRequest) -> Walk:
    """Fill in the defaults of this checkpoint and compile the walk.

    Raises:
        InvalidField: naming the field, its value and what to do.
    """
    limit = service.settings.max_pictures
    if request.n > limit:
        raise InvalidField("n", request.n, f"at most {limit} pictures per request; send several requests")
    sampler = SAMPLERS[request.sampler]
    steps = request.steps or sampler.default_steps or service.schedule.T
    steps = min(steps, service.schedule.T) if request.steps is None else steps
    if request.eta is not None and "eta" not in sampler.options:
        raise InvalidField("eta", request.eta, f"{sampler.name} takes no eta; leave it out, or use ddim")
    label, name = _label(service, request.label)
    clip = service.habits.clip
    if request.clip is not None:
        clip = (clip or Clip(service.habits.clip_limit)) if request.clip else None
    options: dict[str, object] = {}
    if "eta" in sampler.options:
        options["eta"] = request.eta or 0.0
    if "variance" in sampler.options:
        options["variance"] = service.habits.variance_for(steps, service.schedule.T)
    try:
        spacing = request.spacing or covering_spacing(service.schedule.T, steps, service.habits.spacing)
        plan = _compile(service, sampler.name, steps, spacing=spacing, clip=clip, **options)
    except ScheduleError as error:
        raise InvalidField(error.field, error.value, error.remedy) from error

    seed = secrets.randbelow(2**32) if request.seed is None else request.seed
    if seed + request.n - 1 > MAX_SEED:
        raise InvalidField("seed", seed, f"picture i uses seed + i, which must not exceed {MAX_SEED}")
    resolved = request.model_copy(
        update={
            "steps": steps,
            "eta": options.get("eta"),
            "spacing": spacing,
            "clip": clip is not None,
            "seed": seed,
            "label": name,
        }
    )
    return Walk(resolved, plan, [seed + i for i in range(request.n)], label)


@lru_cache(maxsize=256)
def _compile(service: Service, sampler: str, steps: int, **options: object) -> Plan:
    return SAMPLERS[sampler].compile(service.schedule, steps, **options)


def _label(service: Service, label: int | str | None) -> tuple[int | None, str | None]:
    """The class index, and the name that it goes by."""
    card = service.checkpoint.card
    embeddings = service.checkpoint.net.config.num_class_embeds
    if embeddings is None:
        if label is not None:
            raise InvalidField("label", label, "this checkpoint has no classes; leave it out")
        return None, None
    if label is None:
        if card.null_class is None:
            raise InvalidField("label", None, f"this checkpoint knows no 'any'; choose one of {_names(card.classes)}")
        return card.null_class, None
    names = {name.casefold(): k for k, name in enumerate(card.classes)}
    index = names.get(label.casefold()) if isinstance(label, str) else label
    if index is None and isinstance(label, str) and label.isascii() and label.isdecimal() and len(label) < 10:
        index = int(label)
    count = len(card.classes) or embeddings
    if index is None or not 0 <= index < count:
        raise InvalidField("label", label, f"choose one of {_names(card.classes)}, or an index of 0..{count - 1}")
    return index, card.classes[index] if card.classes else str(index)


def _names(classes: tuple[str, ...]) -> str:
    return ", ".join(classes) or "the class indices"
