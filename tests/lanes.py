"""Lanes for tests of the scheduler, kinds of forwards, and a tick of the engine around a decision."""

from __future__ import annotations

from dataclasses import dataclass

from app.engine.scheduler import Choice, choose
from app.engine.widths import Forwards, Widths

SIZES = (1, 2, 4, 8)
CPU = Widths(SIZES, (0.0265, 0.044, 0.079, 0.149), (4,))  # 9 + 17.5 w ms: nearly linear
GPU = Widths(SIZES, (0.010, 0.010, 0.010, 0.0101), (4,))  # flat
LINE = Widths(SIZES, (1.0, 2.0, 4.0, 8.0), (4,))  # a row costs the same at every width
EXACT = Widths(SIZES, (0.030, 0.030, 0.030, 0.031), (4,))
TWO = Forwards(GPU, EXACT)


@dataclass(eq=False)
class Toy:
    """A lane; of a job of its own unless ``others`` says how much work the rest of it has left."""

    remaining: int
    reproducible: bool = False
    passed_over: int = 0
    rows: int = 1
    exact: bool = False
    priority: int = 0
    deadline: float | None = None
    since: float = 0.0
    others: int = 0
    worst: int = 0
    most: int = 0

    progress: object = None

    def __post_init__(self):
        self.exact = self.exact or self.reproducible
        self.total = self.work

    @property
    def work(self):
        return self.remaining * self.rows + self.others


def one(widths: Widths) -> Forwards:
    return Forwards(widths, widths)


def tick(lanes: list[Toy], forwards: Forwards, now: float = 0.0, favoured: int = 0) -> Choice[Toy]:
    """The engine around a decision: advance the batch, age the others, drop the lanes that are done."""
    choice = choose(lanes, forwards, now, favoured)
    for lane in lanes:
        lane.passed_over += 1
        lane.worst = max(lane.worst, lane.passed_over)
        lane.most = max(lane.most, len(lanes))
    for lane in choice.batch:
        lane.passed_over = 0
        lane.remaining -= 1
    lanes[:] = [lane for lane in lanes if lane.remaining]
    return choice


def remaining(batch: list[Toy]) -> list[int]:
    return [lane.remaining for lane in batch]
