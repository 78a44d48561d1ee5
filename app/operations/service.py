"""What is loaded once and lives as long as the process: the checkpoint, the runner and the engine around it."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator

import anyio
import torch

from app.engine.engine import Engine
from app.engine.jobs import Lane
from app.engine.loading import load
from app.engine.runner import Runner
from app.engine.widths import Forwards
from app.errors import EngineDead, Starting
from app.settings import Settings
from app.telemetry.metrics import Metrics
from model.checkpoint import Checkpoint
from model.diffusion.defaults import SamplingDefaults
from model.diffusion.inversion.registry import INVERSIONS
from model.diffusion.plan import Plan
from model.diffusion.samplers import SAMPLERS
from model.diffusion.schedule import ScheduleError

log = logging.getLogger("unstir")
WARM_STEPS = 6  # of the walks that are taken at the start on a card


class DeviceError(ValueError):
    """A setting that asks for a device that this machine does not have, or for what that device cannot do."""

    def __init__(self, setting: str, value: object, remedy: str) -> None:
        super().__init__(f"{setting} = {value}: {remedy}")
        self.setting, self.value, self.remedy = setting, value, remedy


class Service:
    """The served network. Created empty, filled by :meth:`load`, emptied by :meth:`close`.

    Attributes:
        failure: why loading failed, or None.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.metrics.engine = lambda: self._engine
        self.failure: str | None = None
        self._engine: Engine | None = None

    def load(self) -> None:
        """Read the checkpoint onto the device, warm it up and time it, on the thread that will then :meth:`work`.

        OpenMP gives each thread that computes a team of its own, and once there are more threads than cores, it puts
        idle ones to sleep between operations: a small network's forward is then more than twice as slow. So one thread
        does all the heavy work, from the first forward on, and all others compute alone.

        Raises:
            CheckpointError, DeviceError: there is no usable checkpoint, or no such device.
            TooSmallError: the device has no room for the network.
        """
        model = load(self.settings, device_of(self.settings), self.metrics)
        self.checkpoint, self.schedule, self.habits = model.checkpoint, model.schedule, model.defaults
        self.calibration, self.device, self._loaded = model.calibration, model.device, model.engine
        if model.device.type == "cuda":
            warm_up(model.runner, model.engine.forwards)
        card = model.checkpoint.card
        self.metrics.tell_model(card.name, card.sha256, str(model.device), model.calibration.dtype)

    def start(self) -> None:
        """Open for work; call it on the event loop, after :meth:`load`."""
        self.decoders = anyio.CapacityLimiter(2)  # images that are decoded at once, however many are sent
        torch.set_num_threads(1)  # of this thread and those that come; the device thread keeps its own
        self._loaded.open()
        self._engine = self._loaded

    def work(self) -> None:
        """Be the device thread until :meth:`close`."""
        self._loaded.work()

    @property
    def engine(self) -> Engine:
        """The engine.

        Raises:
            Starting: it is not there yet.
            EngineDead: it never will be.
        """
        if self._engine is not None:
            return self._engine
        if self.failure:
            raise EngineDead(f"the network could not be loaded: {self.failure}")
        raise Starting("the network is being loaded and warmed up; try again in a moment", retry_after=2)

    @property
    def loading(self) -> bool:
        """Whether :meth:`load` is still at work."""
        return self._engine is None and self.failure is None

    @property
    def unready(self) -> str | None:
        """Why nothing should be sent here now, or None."""
        if self.failure:
            return f"the network could not be loaded: {self.failure}"
        return "starting: the network is being loaded" if self._engine is None else self._engine.unready

    async def drain(self) -> None:
        """Take nothing new, and wait until accepted work is answered or ``drain_seconds`` have passed."""
        if self._engine is not None and not self._engine.failure:
            cut_off = await self._engine.drain(self.settings.drain_seconds)
            log.info("drained" if not cut_off else f"drain time is over, {cut_off} requests are cut off")

    def close(self) -> None:
        """End the device thread."""
        if self._engine is not None:
            self._engine.close()


def warm_up(runner: Runner, forwards: Forwards) -> None:
    """Take every kind of walk to its end once, so that no request waits for a kernel to be compiled or loaded."""
    loaded = runner.checkpoint
    conditional = loaded.net.config.num_class_embeds is not None
    guidance = 2.0 if conditional and loaded.card.null_class is not None else 1.0
    for exact, widths in ((False, forwards.fast), (True, forwards.exact)):
        for plan in _every_kind(loaded):
            lane = Lane(plan, 0, 0 if conditional else None, guidance=guidance, snapshot_steps=frozenset({0}))
            width = widths.narrowest(lane.rows, reproducible=False)
            while width is not None and lane.remaining:
                runner.advance([lane], width, exact).wait()


def _every_kind(loaded: Checkpoint) -> Iterator[Plan]:
    """Short walks of each sampler, at every order, and of each inversion."""
    schedule, habits = loaded.schedule, SamplingDefaults.from_config(loaded.scheduler_config)
    steps = min(WARM_STEPS, schedule.T)
    for sampler in SAMPLERS.values():
        options = habits.options(sampler, steps, schedule.T)
        for order in ({"order": order} for order in (1, 2, 3)) if "order" in sampler.options else ({},):
            with contextlib.suppress(ScheduleError):  # of an order or a length that it does not have
                yield sampler.compile(schedule, steps, **options, **order)
    for method in INVERSIONS.values():
        spacing = habits.options(SAMPLERS[method.sampler], steps, schedule.T)["spacing"]
        with contextlib.suppress(ScheduleError):
            yield method.compile(schedule, steps, spacing=spacing)


def device_of(settings: Settings) -> torch.device:
    """The device that the settings ask for.

    Raises:
        DeviceError: it is not there, or does not have their dtype.
    """
    device = pick_device(settings.device)
    if settings.dtype == "tf32" and device.type != "cuda":
        raise DeviceError("dtype", settings.dtype, "only CUDA devices have it; use auto, float32 or bfloat16")
    return device


def pick_device(name: str) -> torch.device:
    """``auto`` becomes the CUDA device where there is one, else the CPU.

    Raises:
        DeviceError: no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name != "cpu" and not re.fullmatch(r"cuda(:\d+)?", name):
        raise DeviceError("device", name, "choose auto, cpu, cuda or cuda:N")
    if name != "cpu" and int(name.partition(":")[2] or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise DeviceError("device", name, f"{count} CUDA devices are available here; use auto or cpu")
    return torch.device(name)
