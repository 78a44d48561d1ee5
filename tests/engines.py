"""An engine without HTTP, and devices that fail or wait on purpose."""

from __future__ import annotations

import asyncio
import contextlib
import threading

import torch

from app.engine.engine import Engine
from app.engine.jobs import Lane
from app.engine.pending import PendingTick
from app.engine.widths import Forwards, Widths
from model.diffusion import samplers
from model.diffusion.schedule import NoiseSchedule

WIDTHS = Widths((1, 2, 4, 8), (0.001, 0.001, 0.001, 0.001), (4,))
SCHEDULE = NoiseSchedule.from_config({})


class Log:
    """An observer that remembers (width, rows) of each forward."""

    def __init__(self) -> None:
        self.forwards: list[tuple[int, int]] = []
        self.cancellations: list[float] = []
        self.failures: list[str] = []

    def on_forward(self, width: int, rows: int, seconds: float) -> None:
        self.forwards.append((width, rows))

    def on_cancel(self, seconds: float) -> None:
        self.cancellations.append(seconds)

    def on_failure(self, kind: str) -> None:
        self.failures.append(kind)


class FakeDevice:
    """Advances cursors; the image is the seed. ``gate`` holds every forward until it is released."""

    ahead = 0

    def __init__(self, fail=None, gated: bool = False) -> None:
        self.fail = fail
        self.gate = threading.Semaphore(0) if gated else None
        self.seen: list[list[Lane]] = []
        self.kinds: list[tuple[int, bool]] = []  # (width, exact) of each forward
        self.entered = 0

    def advance(self, lanes: list[Lane], width: int, exact: bool) -> PendingTick:
        pending = PendingTick(torch.device("cpu"))
        self.entered += 1
        if self.gate:
            assert self.gate.acquire(timeout=10)
        self.seen.append(list(lanes))
        self.kinds.append((width, exact))
        if self.fail:
            self.fail(lanes, width)
        for lane in lanes:
            lane.cursor += 1
        pending.record()
        return pending

    def check(self) -> None:
        if self.fail:
            self.fail([], 1)

    def read_output(self, lane: Lane) -> torch.Tensor:
        return torch.full((1, 1, 2, 2), float(lane.seed))


class Ahead(FakeDevice):
    """Asynchronous, like a card: cursors move at once, and outputs are there when their tick is complete.

    Attributes:
        begun, completed: ticks.
        most: ticks that were pending at once.
    """

    ahead = 1

    def __init__(self, fail=None, gated: bool = False) -> None:
        super().__init__(fail)
        self.completions = threading.Semaphore(0) if gated else None
        self.begun = self.completed = self.most = 0
        self.completion_error: Exception | None = None

    def advance(self, lanes: list[Lane], width: int, exact: bool) -> _Handle:
        super().advance(lanes, width, exact)
        self.begun += 1
        self.most = max(self.most, self.begun - self.completed)
        return _Handle(self, self.begun, [lane for lane in lanes if not lane.remaining])

    def check(self) -> None:
        super().check()
        if self.completion_error:
            raise self.completion_error

    def read_output(self, lane: Lane) -> torch.Tensor:
        assert lane.state is not None, "read before its tick was complete"
        return lane.state


class _Handle:
    def __init__(self, device: Ahead, number: int, ended: list[Lane]) -> None:
        self.device, self.number, self.ended = device, number, ended

    def wait(self) -> float:
        if self.device.completions:
            assert self.device.completions.acquire(timeout=10)
        if self.device.completion_error:
            raise self.device.completion_error
        self.device.completed += 1
        assert self.device.completed == self.number, "ticks must complete in their order"
        for lane in self.ended:
            lane.state = torch.full((1, 1, 2, 2), float(lane.seed))
        return 0.001


@contextlib.asynccontextmanager
async def engine_on(device, widths: Widths | Forwards = WIDTHS, max_queue_seconds: float = 10.0, max_lanes: int = 100):
    forwards = widths if isinstance(widths, Forwards) else Forwards(widths, widths)
    engine = Engine(device, forwards, max_queue_seconds=max_queue_seconds, max_lanes=max_lanes, observer=Log())
    engine.open()
    threading.Thread(target=engine.work, daemon=True).start()
    try:
        yield engine
    finally:
        engine.close()


def plan(steps: int = 10):
    return samplers.ddim(SCHEDULE, steps, spacing="trailing")


async def ask(engine: Engine, lanes: list[Lane]):
    with engine.reserve(len(lanes), sum(lane.remaining for lane in lanes)) as reservation:
        return await reservation.run(lanes)


async def until(condition, seconds: float = 5.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.002)
