"""From a checkpoint folder to an engine that is ready for work."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from app.engine.calibration import Calibration, CalibrationOptions, build_networks, calibrate
from app.engine.engine import Engine
from app.engine.probe import TooSmallError
from app.engine.runner import Runner
from app.engine.widths import Forwards
from app.engine.worker import Observer
from app.settings import Settings
from model import checkpoint
from model.checkpoint import Checkpoint, CheckpointError
from model.device import DeviceError, select_device
from model.diffusion.defaults import SamplingDefaults
from model.diffusion.schedule import NoiseSchedule

log = logging.getLogger("unstir")
DEFAULT_MAX_WIDTH = {"cpu": 16, "cuda": 1024}  # rows of a forward, where no setting says how many


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """The network on its device, and the engine that batches it."""

    checkpoint: Checkpoint
    schedule: NoiseSchedule
    defaults: SamplingDefaults
    device: torch.device
    calibration: Calibration
    runner: Runner
    engine: Engine


def load(settings: Settings, observer: Observer) -> LoadedModel:
    """Read the checkpoint onto the device and calibrate, on the thread that will then do the engine's work.

    OpenMP gives each thread that computes a team of its own, and once there are more threads than cores, it puts
    idle ones to sleep between operations: a small network's forward is then more than twice as slow. So one thread
    does all the heavy work, from the first forward on, and all others compute alone.

    Raises:
        CheckpointError, DeviceError: there is no usable checkpoint, or no such device.
        TooSmallError: the device has no room for the network.
    """
    device = select_device_for(settings)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if settings.threads:  # for what is computed before the calibration, too
        torch.set_num_threads(settings.threads)
    loaded = checkpoint.load(settings.checkpoint, device)
    if loaded.note:
        log.warning("%s: %s", loaded.card.name, loaded.note)
    options = CalibrationOptions(
        settings.max_width or DEFAULT_MAX_WIDTH[device.type],
        settings.reproducible_width,
        settings.threads,
        None if settings.dtype == "auto" else settings.dtype,
    )
    calibration = calibrate(loaded, device, options, _cache_folder(settings.cache))
    for line in calibration.log_lines:
        log.info("%s on %s: %s", loaded.card.name, device, line)
    runner = Runner(loaded, device, build_networks(loaded, device, calibration))
    exact = calibration.widths(exact=True)
    engine = Engine(
        runner,
        Forwards(exact if calibration.dtype == "float32" else calibration.widths(exact=False), exact),
        max_queue_seconds=settings.max_queue_seconds,
        max_lanes=settings.max_lanes,
        observer=observer,
    )
    return LoadedModel(loaded, loaded.schedule, loaded.defaults, device, calibration, runner, engine)


def describe_failure(folder: Path, error: BaseException) -> str:
    """One line about why a checkpoint could not be loaded; errors of other places may name no file, or say nothing."""
    said = " ".join(str(error).split())
    if isinstance(error, CheckpointError | DeviceError | TooSmallError):
        return said
    kind = type(error).__name__
    remedy = "give the process more memory" if isinstance(error, MemoryError) else "UNSTIR_LOG_LEVEL=debug says where"
    return f"{folder}: {kind}{f' ({said})' if said else ''}; {remedy}"


def select_device_for(settings: Settings) -> torch.device:
    """The device that the settings ask for.

    Raises:
        DeviceError: it is not there, or does not have their dtype.
    """
    device = select_device(settings.device)
    if settings.dtype == "tf32" and device.type != "cuda":
        raise DeviceError("dtype", settings.dtype, "only CUDA devices have it; use auto, float32 or bfloat16")
    return device


def _cache_folder(name: str) -> Path | None:
    try:
        return Path(name).expanduser() if name else None
    except RuntimeError:  # there is no home
        return None
