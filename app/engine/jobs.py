"""Lanes, jobs and their results: plain data that the event loop and the device thread hand to each other."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Generator, Tensor

from model.diffusion.plan import Plan

Look = Literal["x_0", "x_t"]


@dataclass(eq=False, slots=True)
class Lane:
    """One trajectory in flight: one image.

    The first group is set by whoever asks, the second by the device thread alone; anyone may read ``cursor`` and
    ``frames``.

    Attributes:
        seed: of all its noise; of x_T, too, unless ``start`` is given.
        label: class index, or the weight of each class embedding, for a class-conditional network.
        reproducible: ride only in exact forwards of widths that give the same bits.
        exact: ride only in float32, as what must lead back somewhere needs.
        guidance: weight of classifier-free guidance; 1 is none of it.
        start: [1..R, C, H, W], the first slots where the walk begins; None draws x_T from the seed.
        returns: how many slots are wanted of its end.
        keep: steps of which ``frames`` gets what they look like.
        look: ``x_0`` keeps what the network makes of the state, ``x_t`` the state before the step.
        job: the one that it belongs to, once that was made.
        cursor: steps done, 0..NFE.
        passed_over: ticks since the lane last advanced.
        state: [R, C, H, W] on the device; None until the first step.
        noise: z of the step under way, kept so that a step that is tried again sees the same.
        frames: of each step in ``keep`` that is done, [C, H, W] on the CPU.
    """

    plan: Plan
    seed: int
    label: int | tuple[float, ...] | None = None
    reproducible: bool = False
    exact: bool = False
    guidance: float = 1.0
    start: Tensor | None = None
    returns: int = 1
    keep: frozenset[int] = frozenset()
    look: Look = "x_0"

    job: Job | None = None
    cursor: int = 0
    passed_over: int = 0
    state: Tensor | None = None
    generator: Generator | None = None
    noise: Tensor | None = None
    frames: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.exact |= self.reproducible

    def let_go(self) -> None:
        """Give up what takes memory; it will not advance any more."""
        self.state = self.generator = self.noise = self.start = None

    @property
    def work(self) -> int:
        """Row-steps that the whole job still needs."""
        return self.remaining * self.rows if self.job is None else self.job.work

    @property
    def total(self) -> int:
        """Row-steps that the whole job needed at the start."""
        return self.plan.nfe * self.rows if self.job is None else self.job.total

    @property
    def since(self) -> float:
        """When the job was submitted, on the engine's clock."""
        return 0.0 if self.job is None else self.job.submitted

    @property
    def priority(self) -> int:
        """Of the job; higher goes first."""
        return 0 if self.job is None else self.job.priority

    @property
    def deadline(self) -> float | None:
        """Of the job, on the engine's clock."""
        return None if self.job is None else self.job.deadline

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
    """Lanes that were submitted together; they are answered together.

    Attributes:
        priority: -4..3, higher goes first.
        deadline: when it must be done, in seconds on the engine's clock.
        total: row-steps at the start.
        work: row-steps still to be done; the device thread counts it down.
        submitted, started, ended: times in seconds on the engine's clock; 0 until they happen.
        ends: what the lanes that are done came to.
    """

    lanes: list[Lane]
    priority: int = 0
    deadline: float | None = None
    total: int = 0
    work: int = 0
    submitted: float = 0.0
    started: float = 0.0
    ended: float = 0.0
    ends: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.total = self.work = sum(lane.remaining * lane.rows for lane in self.lanes)
        for lane in self.lanes:
            lane.job = self


@dataclass(frozen=True, slots=True)
class Result:
    """What a job came to.

    Attributes:
        ends: of each lane, in their order, its first slots at the end of the walk: float32 [returns, C, H, W] on the
            CPU.
        frames: of each lane, what it was asked to keep.
        queue_seconds: from submission to the first step.
        device_seconds: from the first step to the last.
        started: when the first step began, on the engine's clock.
    """

    ends: list[Tensor]
    frames: list[dict[int, Tensor]]
    queue_seconds: float
    device_seconds: float
    started: float = 0.0

    @property
    def images(self) -> Tensor:
        """What most walks are taken for: S_0 of every lane, float32 [n, C, H, W]."""
        return torch.stack([end[0] for end in self.ends])
