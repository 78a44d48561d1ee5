"""Lanes, jobs and their results: plain data that the event loop and the device thread hand to each other."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Generator, Tensor

from model.diffusion.plan import Plan

SnapshotKind = Literal["x_0", "x_t"]


@dataclass(eq=False, slots=True)
class Progress:
    """What the lanes of a job have in common. It refers to neither, so that lanes and job are no cycle of references.

    Attributes:
        total: row-steps at the start.
        work: row-steps still to be done; the device thread counts it down.
        submitted: when the job was, in seconds on the engine's clock; 0 until then.
    """

    total: int
    work: int
    submitted: float = 0.0


@dataclass(eq=False, slots=True, weakref_slot=True)
class Lane:
    """One image on its trajectory.

    The first group is set by whoever submits it, the second by its job, the third by the device thread alone; anyone
    may read ``cursor`` and ``snapshots``.

    Attributes:
        seed: of all its noise; of x_T, too, unless ``initial_state`` is given.
        label: class index, or the weight of each class embedding, for a class-conditional network.
        reproducible: advance only in exact forwards of bit-identical widths.
        exact: advance only in float32 forwards, as a trajectory that leads back to an image needs.
        guidance: scale w of classifier-free guidance; 1 is none.
        initial_state: [1..R, C, H, W], the first slots at the start; None draws x_T from the seed.
        output_slots: how many slots of the final state are the output.
        snapshot_steps: steps that leave a snapshot.
        snapshot_kind: ``x_0`` is the step's prediction of x_0, ``x_t`` the state before the step.
        rows: of a forward, that a step takes: with guidance a second one, without the class.
        progress: of its job; total row-steps, priority and deadline are the job's, too.
        cursor: steps done, 0..NFE.
        passed_over: ticks since the lane last advanced.
        state: [R, C, H, W] on the device; None until the first step.
        noise: z of the current step, kept so that a step that is repeated draws the same.
        snapshots: of the steps done, [C, H, W] on the CPU.
    """

    plan: Plan
    seed: int
    label: int | tuple[float, ...] | None = None
    reproducible: bool = False
    exact: bool = False
    guidance: float = 1.0
    initial_state: Tensor | None = None
    output_slots: int = 1
    snapshot_steps: frozenset[int] = frozenset()
    snapshot_kind: SnapshotKind = "x_0"

    rows: int = field(init=False)
    progress: Progress | None = None
    total: int = field(init=False)
    priority: int = 0
    deadline: float | None = None

    cursor: int = 0
    passed_over: int = 0
    state: Tensor | None = None
    generator: Generator | None = None
    noise: Tensor | None = None
    snapshots: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.exact |= self.reproducible
        self.rows = 1 if self.guidance == 1 else 2
        self.total = self.plan.nfe * self.rows

    def release(self) -> None:
        """Free its tensors but for the snapshots; it will not advance any more."""
        self.state = self.generator = self.noise = self.initial_state = None

    @property
    def work(self) -> int:
        """Row-steps that the whole job still needs."""
        return self.remaining * self.rows if self.progress is None else self.progress.work

    @property
    def since(self) -> float:
        """When the job was submitted, on the engine's clock."""
        return 0.0 if self.progress is None else self.progress.submitted

    @property
    def remaining(self) -> int:
        """Network evaluations still to be done."""
        return self.plan.nfe - self.cursor


@dataclass(eq=False, slots=True, weakref_slot=True)
class Job:
    """Lanes that are submitted, and answered, together.

    Attributes:
        priority: one of the scheduler's ``PRIORITIES``.
        deadline: when it must be done, in seconds on the engine's clock.
        progress: work and time that its lanes share.
        started, ended: times in seconds on the engine's clock; 0 until they happen.
        outputs: of the lanes that are done, by their place; emptied once they are published, or will not be.
    """

    lanes: list[Lane]
    priority: int = 0
    deadline: float | None = None
    progress: Progress = field(init=False)
    started: float = 0.0
    ended: float = 0.0
    outputs: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        total = sum(lane.remaining * lane.rows for lane in self.lanes)
        self.progress = Progress(total, total)
        for lane in self.lanes:
            lane.progress, lane.total, lane.priority, lane.deadline = self.progress, total, self.priority, self.deadline

    @property
    def work(self) -> int:
        """Row-steps still to be done."""
        return self.progress.work

    def release(self) -> None:
        """Free all that it holds, as there will be no result."""
        self.outputs.clear()
        for lane in self.lanes:
            lane.release()
            lane.snapshots = {}


@dataclass(frozen=True, slots=True)
class Result:
    """What a job gave.

    Attributes:
        outputs: of each lane, in their order, the first slots of its final state: float32 [output_slots, C, H, W] on
            the CPU.
        snapshots: of each lane, by step.
        queue_seconds: from submission to the first step.
        device_seconds: from the first step to the last.
        started: when the first step began, on the engine's clock.
    """

    outputs: list[Tensor]
    snapshots: list[dict[int, Tensor]]
    queue_seconds: float
    device_seconds: float
    started: float = 0.0

    @property
    def images(self) -> Tensor:
        """S_0 of every lane, float32 [n, C, H, W]."""
        return torch.stack([output[0] for output in self.outputs])
