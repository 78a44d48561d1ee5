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
from model.samplers import SAMPLERS, Sampler
from model.schedule import ScheduleError


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

    @property
    def nfe(self) -> int:
        """Network evaluations of each picture; guidance takes two a step."""
        return self.plan.nfe * (1 if self.request.guidance == 1 else 2)


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
    lanes = [Lane(walk.plan, seed, walk.label, walk.request.reproducible, walk.request.guidance) for seed in walk.seeds]
    with engine.reserve(len(lanes), walk.nfe) as ticket:
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
    T, habits = service.schedule.T, service.habits
    steps = request.steps or min(sampler.default_steps or T, T)
    label, name = _label(service, request.label)
    _check_guidance(service, request, label)
    options = _options(request, sampler)
    try:
        options = habits.options(sampler, steps, T) | options
        if request.clip is not None:
            options["clip"] = (habits.clip or Clip(habits.clip_limit)) if request.clip else None
        plan = _compile(service, sampler.name, steps, **options)
    except ScheduleError as error:
        raise InvalidField(error.field, error.value, error.remedy) from error

    seed = secrets.randbelow(2**32) if request.seed is None else request.seed
    if seed + request.n - 1 > MAX_SEED:
        raise InvalidField("seed", seed, f"picture i uses seed + i, which must not exceed {MAX_SEED}")
    resolved = request.model_copy(
        update={
            "steps": steps,
            "eta": options.get("eta"),
            "order": options.get("order"),
            "warmup": options.get("warmup"),
            "spacing": options["spacing"],
            "clip": options["clip"] is not None,
            "seed": seed,
            "label": name,
        }
    )
    return Walk(resolved, plan, [seed + i for i in range(request.n)], label)


DEFAULTS = {"eta": 0.0, "order": 2, "warmup": False}


def _options(request: SampleRequest, sampler: Sampler) -> dict[str, object]:
    """Those fields of the request that only some samplers take, and ``spacing`` if it was asked for."""
    options: dict[str, object] = {}
    for name, default in DEFAULTS.items():
        asked = getattr(request, name)
        if name in sampler.options:
            options[name] = default if asked is None else asked
        elif asked is not None:
            takers = ", ".join(other.name for other in SAMPLERS.values() if name in other.options)
            raise InvalidField(name, asked, f"{sampler.name} takes no {name}; leave it out, or use {takers}")
    if request.spacing is not None:
        if request.spacing not in sampler.spacings:
            raise InvalidField("spacing", request.spacing, f"{sampler.name} takes {', '.join(sampler.spacings)}")
        options["spacing"] = request.spacing
    return options


def _check_guidance(service: Service, request: SampleRequest, label: int | None) -> None:
    if request.guidance == 1:
        return
    if service.checkpoint.card.null_class is None:
        raise InvalidField("guidance", request.guidance, "this checkpoint has no null class to guide away from; use 1")
    if label == service.checkpoint.card.null_class:
        raise InvalidField(
            "guidance", request.guidance, "it weighs a label against none; give a label, or leave guidance at 1"
        )


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
