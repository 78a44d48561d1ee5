"""Who asks for an operation, what it costs, and how its progress can be followed."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from app.engine.jobs import Lane, Result
from app.engine.reservation import Reservation, SubmitOptions
from app.operations.service import Service


class RequestContext:
    """The side of a request that an operation does not compute with.

    Attributes:
        options: deadline, priority and sender, for the engine.
        previews: how many previews of the first image are wanted while it is sampled.
        reservation: the admitted work; ``admitted`` is set together with it, once the whole request is valid.
    """

    def __init__(self, options: SubmitOptions | None = None, previews: int = 0) -> None:
        self.options = options or SubmitOptions()
        self.previews = previews
        self.reservation: Reservation | None = None
        self.admitted = asyncio.Event()

    def admit(self, reservation: Reservation) -> None:
        """Publish the reservation to those who follow the request."""
        self.reservation = reservation
        self.admitted.set()

    def latest_preview(self) -> tuple[int, Tensor | None]:
        """The last snapshot of the first image, [C, H, W], and its step; (-1, None) while there is none."""
        job = self.reservation.job if self.reservation is not None else None
        frames = dict(job.lanes[0].snapshots) if job is not None else {}
        step = max(frames, default=-1)
        return step, frames.get(step)

    def add_previews(self, lanes: list[Lane]) -> list[Lane]:
        """Let the first lane keep ``previews`` evenly spaced snapshots."""
        lane = lanes[0]
        count = min(self.previews, lane.plan.nfe)
        lane.snapshot_steps |= {round((i + 1) * lane.plan.nfe / (count + 1)) for i in range(count)} - {lane.plan.nfe}
        return lanes


@dataclass(frozen=True, slots=True)
class Phase:
    """Lanes that an operation submits together.

    Attributes:
        name: of the sampler, or "inverse" and the sampler that leads back.
        steps: network evaluations of each image without guidance.
        rows: of a forward, that one image takes.
    """

    name: str
    steps: int
    images: int = 1
    rows: int = 1

    @property
    def nfe(self) -> int:
        """Network evaluations of each image."""
        return self.steps * self.rows

    @property
    def evaluations(self) -> int:
        """Network evaluations of all images."""
        return self.images * self.nfe


@dataclass(frozen=True, slots=True)
class Usage:
    """What an operation took.

    Attributes:
        evaluations: network evaluations, by the name of the phase.
        queue_seconds: from submission to the first step.
        device_seconds: on the device, all phases together.
        started: when the first step began, on the engine's clock.
    """

    evaluations: dict[str, int]
    queue_seconds: float
    device_seconds: float
    started: float

    @classmethod
    def measure(cls, phases: Sequence[Phase], results: Sequence[Result]) -> Usage:
        """Of phases that are done, with a result for each."""
        return cls(
            {phase.name: phase.evaluations for phase in phases},
            results[0].queue_seconds,
            sum(result.device_seconds for result in results),
            results[0].started,
        )


@contextmanager
def reserve(
    service: Service, context: RequestContext, phases: Sequence[Phase], *, exact: bool
) -> Iterator[Reservation]:
    """Reserve the engine's time for phases that run one after another.

    Raises:
        Draining, EngineDead, Overloaded, TooLate: see :mod:`app.errors`.
    """
    reservation = service.engine.reserve(
        max(phase.images for phase in phases),
        sum(phase.evaluations for phase in phases),
        steps=sum(phase.steps for phase in phases),
        exact=exact,
        options=context.options,
    )
    with reservation:
        reservation.on_submit = lambda: context.admit(reservation)
        yield reservation
