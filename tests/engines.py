"""An engine without HTTP, and devices that fail or wait on purpose."""

from __future__ import annotations

import asyncio
import contextlib
import threading

import torch

from app.engine.engine import Engine
from app.engine.jobs import Lane
from app.engine.pending import PendingTick
from app.engine.scheduler import Forwards, Widths
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

    def forward(self, width: int, rows: int, seconds: float) -> None:
        self.forwards.append((width, rows))

    def cancelled(self, seconds: float) -> None:
        self.cancellations.append(seconds)

    def failed(self, kind: str) -> None:
        self.failures.append(kind)


class FakeDevice:
    """Advances cursors; the image is the seed. ``gate`` holds every forward until it is released."""

    ahead = 0

    def __init__(self, fail=None, gated: bool = False) -> None:
        self.fail = fail
        self.gate = threading.Semaphore(0) if gated else None
        self.seen: list[list[Lane]] = []
        self.entered = 0

    def advance(self, lanes: list[Lane], width: int, exact: bool) -> PendingTick:
        flight = PendingTick(torch.device("cpu"))
        self.entered += 1
        if self.gate:
            assert self.gate.acquire(timeout=10)
        self.seen.append(list(lanes))
        if self.fail:
            self.fail(lanes, width)
        for lane in lanes:
            lane.cursor += 1
        flight.depart()
        return flight

    def end(self, lane: Lane) -> torch.Tensor:
        return torch.full((1, 1, 2, 2), float(lane.seed))


class Ahead(FakeDevice):
    """Works by itself, like a card: cursors move at once, and what was done is there when its tick has landed.

    Attributes:
        told, over: ticks begun, and those of them that have landed.
        most: of the ticks that were under way at once.
    """

    ahead = 1

    def __init__(self, fail=None, gated: bool = False) -> None:
        super().__init__(fail)
        self.landings = threading.Semaphore(0) if gated else None
        self.told = self.over = self.most = 0
        self.land_error: Exception | None = None

    def advance(self, lanes: list[Lane], width: int, exact: bool) -> _Landing:
        super().advance(lanes, width, exact)
        self.told += 1
        self.most = max(self.most, self.told - self.over)
        return _Landing(self, self.told, [lane for lane in lanes if not lane.remaining])

    def end(self, lane: Lane) -> torch.Tensor:
        assert lane.state is not None, "asked for before it has landed"
        return lane.state


class _Landing:
    def __init__(self, device: Ahead, number: int, ended: list[Lane]) -> None:
        self.device, self.number, self.ended = device, number, ended

    def wait(self) -> float:
        if self.device.landings:
            assert self.device.landings.acquire(timeout=10)
        if self.device.land_error:
            raise self.device.land_error
        self.device.over += 1
        assert self.device.over == self.number, "ticks must land in their order"
        for lane in self.ended:
            lane.state = torch.full((1, 1, 2, 2), float(lane.seed))
        return 0.001


@contextlib.asynccontextmanager
async def engine_on(device, widths: Widths = WIDTHS, max_queue_seconds: float = 10.0, max_lanes: int = 100):
    engine = Engine(
        device, Forwards(widths, widths), max_queue_seconds=max_queue_seconds, max_lanes=max_lanes, observer=Log()
    )
    engine.open()
    threading.Thread(target=engine.work, daemon=True).start()
    try:
        yield engine
    finally:
        engine.close()


def plan(steps: int = 10):
    return samplers.ddim(SCHEDULE, steps, spacing="trailing")


async def ask(engine: Engine, lanes: list[Lane]):
    with engine.reserve(len(lanes), sum(lane.remaining for lane in lanes)) as ticket:
        return await ticket.run(lanes)


async def until(condition, seconds: float = 5.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.002)
