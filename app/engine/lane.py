"""Lanes, jobs and their results: plain data that the event loop and the device thread hand to each other."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Generator, Tensor

from model.plan import Plan


@dataclass(eq=False, slots=True)
class Lane:
    """One trajectory in flight: one picture.

    The first group is set by whoever asks, the second by the device thread alone; anyone may read ``cursor``.

    Attributes:
        label: class index, for a class-conditional network.
        reproducible: ride only in forwards of the one canonical width.
        guidance: weight of classifier-free guidance; 1 is none of it.
        cursor: steps done, 0..NFE.
        passed_over: ticks since the lane last advanced.
        state: [R, C, H, W] on the device; None until the first step.
        noise: z of the step under way, kept so that a step that is tried again sees the same.
    """

    plan: Plan
    seed: int
    label: int | None = None
    reproducible: bool = False
    guidance: float = 1.0

    cursor: int = 0
    passed_over: int = 0
    state: Tensor | None = None
    generator: Generator | None = None
    noise: Tensor | None = None

    @property
    def remaining(self) -> int:
        """Network evaluations still to be done."""
        return self.plan.nfe - self.cursor

    @property
    def rows(self) -> int:
        """Rows of a forward that it takes: with guidance, a second one without the class."""
        return 1 if self.guidance == 1 else 2


@dataclass(eq=False, slots=True)
class Job:
    """The lanes of one request; they are answered together.

    Attributes:
        submitted, started, ended: times in seconds on the engine's clock; 0 until they happen.
    """

    lanes: list[Lane]
    submitted: float = 0.0
    started: float = 0.0
    ended: float = 0.0
    pictures: dict[int, Tensor] = field(default_factory=dict)

    @property
    def remaining(self) -> int:
        """Row-steps still to be done."""
        return sum(lane.remaining * lane.rows for lane in self.lanes)


@dataclass(frozen=True, slots=True)
class Result:
    """What a job came to.

    Attributes:
        pictures: float32 [n, C, H, W] on the CPU, in the order of the lanes.
        queue_seconds: from submission to the first step.
        device_seconds: from the first step to the last.
    """

    pictures: Tensor
    queue_seconds: float
    device_seconds: float
