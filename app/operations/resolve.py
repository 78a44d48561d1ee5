"""From fields to a compiled walk: every default of the checkpoint filled in, every impossible wish refused by name."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Generic, TypeVar

from app.engine.jobs import Lane, Result, SnapshotKind
from app.engine.reservation import Reservation, SubmitOptions
from app.errors import InvalidField
from app.operations.requests import Label, Walking
from app.operations.service import Service
from model.diffusion.inversion.registry import INVERSIONS, Inversion
from model.diffusion.plan import Clip, Plan
from model.diffusion.samplers import SAMPLERS, Sampler
from model.diffusion.schedule import ScheduleError

R = TypeVar("R", bound=Walking)
R_co = TypeVar("R_co", bound=Walking, covariant=True)


@dataclass(frozen=True)
class ResolvedRequest(Generic[R_co]):
    """A way from noise to image.

    Attributes:
        request: as the client could have sent it; sending it again gives the same images.
        paired: it begins with a pair of states.
    """

    request: R_co
    plan: Plan
    paired: bool = False

    @property
    def rows(self) -> int:
        """Rows of a forward that one image takes."""
        return 1 if self.request.guidance == 1 else 2

    @property
    def nfe(self) -> int:
        """Network evaluations of each image; guidance takes two a step."""
        return self.plan.nfe * self.rows


class RequestContext:
    """Who asks, on which terms, and how one can follow meanwhile how the story fares.

    Attributes:
        previews: how many looks at the first image on its way are wanted.
        ticket: the place in the engine, once all of the request was found to be good; ``placed`` is set then.
    """

    def __init__(self, terms: SubmitOptions | None = None, previews: int = 0) -> None:
        self.terms = terms or SubmitOptions()
        self.previews = previews
        self.ticket: Reservation | None = None
        self.placed = asyncio.Event()

    def place(self, ticket: Reservation) -> None:
        """Say that the story is under way."""
        self.ticket = ticket
        self.placed.set()


@dataclass(frozen=True)
class Usage:
    """What a story took.

    Attributes:
        evaluations: rows of forwards, by the name of the sampler or of the inversion.
    """

    results: Sequence[Result]
    evaluations: dict[str, int] = field(default_factory=dict)

    @property
    def queue_seconds(self) -> float:
        """From submission to the first step."""
        return self.results[0].queue_seconds

    @property
    def started(self) -> float:
        """When the first step began, on the engine's clock."""
        return self.results[0].started

    @property
    def device_seconds(self) -> float:
        """On the device, all jobs together."""
        return sum(result.device_seconds for result in self.results)


def resolve(service: Service, request: R, *, paired: bool = False, returning: bool = False) -> ResolvedRequest[R]:
    """Fill in the defaults of this checkpoint and compile the walk.

    Args:
        paired: begin with a pair of states.
        returning: it returns to an image that was encoded, so that clipping would be in the way.

    Raises:
        InvalidField: naming the field, its value and what to do.
    """
    sampler = SAMPLERS[request.sampler]
    T, habits = service.schedule.T, service.habits
    steps = request.steps or min(sampler.default_steps or T, T)
    options = _options(request, sampler)
    clip = request.clip
    if clip is None and returning:
        clip = False
    try:
        options = habits.options(sampler, steps, T) | options
        if clip is not None:
            options["clip"] = (habits.clip or Clip(habits.clip_limit)) if clip else None
        plan = _compile(service, sampler.name, steps, **options, **({"paired": True} if paired else {}))
    except ScheduleError as error:
        raise InvalidField(error.field, error.value, error.remedy) from error
    resolved = request.model_copy(
        update={
            "steps": steps,
            "eta": options.get("eta"),
            "order": options.get("order"),
            "warmup": options.get("warmup"),
            "spacing": options["spacing"],
            "clip": options["clip"] is not None,
        }
    )
    return ResolvedRequest(resolved, plan, paired)


DEFAULTS = {"eta": 0.0, "order": 2, "warmup": False}


def _options(request: Walking, sampler: Sampler) -> dict[str, Any]:
    """Those fields of the request that only some samplers take, and ``spacing`` if it was asked for."""
    options: dict[str, Any] = {}
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


@lru_cache(maxsize=256)
def _compile(service: Service, sampler: str, steps: int, **options: Any) -> Plan:
    return SAMPLERS[sampler].compile(service.schedule, steps, **options)


@lru_cache(maxsize=256)
def compile_upward(service: Service, method: str, steps: int, **options: Any) -> Plan:
    """The way from image to noise.

    Raises:
        InvalidField: naming the field, its value and what to do.
    """
    try:
        return INVERSIONS[method].compile(service.schedule, steps, **options)
    except ScheduleError as error:
        raise InvalidField(error.field, error.value, error.remedy) from error


def inversion_for(sampler: str) -> Inversion | None:
    """The inversion that images are encoded by for this sampler to return from; None if it has none."""
    return next((method for method in INVERSIONS.values() if method.sampler == sampler), None)


def check_guidance(service: Service, guidance: float, labels: Sequence[int | None]) -> None:
    """Guidance weighs a label against none.

    Raises:
        InvalidField: there is no label, or no "none".
    """
    if guidance == 1:
        return
    null = service.checkpoint.card.null_class
    if null is None:
        raise InvalidField("guidance", guidance, "this checkpoint has no null class to guide away from; use 1")
    if null in labels:
        raise InvalidField("guidance", guidance, "it weighs a label against none; give a label, or leave guidance at 1")


def class_of(service: Service, label: Label, name: str = "label") -> tuple[int | None, str | None]:
    """The class index (None for a network without classes), and the name that it goes by.

    Raises:
        InvalidField: naming ``name``.
    """
    card = service.checkpoint.card
    embeddings = service.checkpoint.net.config.num_class_embeds
    if embeddings is None:
        if label is not None:
            raise InvalidField(name, label, "this checkpoint has no classes; leave it out")
        return None, None
    if label is None:
        if card.null_class is None:
            raise InvalidField(name, None, f"this checkpoint knows no 'any'; choose one of {_names(card.classes)}")
        return card.null_class, None
    names = {known.casefold(): k for k, known in enumerate(card.classes)}
    index = names.get(label.casefold()) if isinstance(label, str) else label
    if index is None and isinstance(label, str) and label.isascii() and label.isdecimal() and len(label) < 10:
        index = int(label)
    count = len(card.classes) or embeddings
    if index is None or not 0 <= index < count:
        raise InvalidField(name, label, f"choose one of {_names(card.classes)}, or an index of 0..{count - 1}")
    return index, card.classes[index] if card.classes else str(index)


def _names(classes: tuple[str, ...]) -> str:
    return ", ".join(classes) or "the class indices"


def moments(plan: Plan, count: int | None, look: SnapshotKind) -> list[int]:
    """The steps of which ``count`` frames are taken; the number of steps itself stands for the walk's end.

    Raises:
        InvalidField: there are not that many.
    """
    if count is None:
        return []
    if count > plan.nfe:
        most = f"at most {plan.nfe}" if plan.nfe > 1 else "none"
        raise InvalidField("trajectory", count, f"this walk has {plan.nfe} evaluations; ask for {most}, or more steps")
    last = plan.nfe - 1 if look == "x_0" else plan.nfe
    return [round(i * last / (count - 1)) for i in range(count)]


def watched(lanes: list[Lane], caller: RequestContext) -> list[Lane]:
    """Let the caller see the first of the lanes, at moments of its walk that are evenly spaced."""
    lane = lanes[0]
    count = min(caller.previews, lane.plan.nfe)
    lane.snapshot_steps |= {round((i + 1) * lane.plan.nfe / (count + 1)) for i in range(count)} - {lane.plan.nfe}
    return lanes


@contextmanager
def placed(
    service: Service, caller: RequestContext, lanes: int, row_steps: int, *, steps: int, exact: bool
) -> Iterator[Reservation]:
    """A place in the engine for the length of a story, see :meth:`app.engine.engine.Engine.reserve`.

    Raises:
        Starting, Draining, EngineDead, Overloaded, TooLate: see :mod:`app.errors`.
    """
    with service.engine.reserve(lanes, row_steps, steps=steps, exact=exact, options=caller.terms) as ticket:
        ticket.on_submit = lambda: caller.place(ticket)
        yield ticket
