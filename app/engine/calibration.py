"""Measures this device: the fastest network, the cost of its forwards by width, and the widths of identical bits.

It takes a second or two at the start. The result is kept in a file, since the same checkpoint on the same device with
the same versions would give the same. Other load on the machine only makes forwards slower, so the fastest of a few is
taken; :mod:`app.engine.cost_model` follows later load. What was measured while that load took much of the time is used
as long as the load lasts, since measuring again would give nothing better; the first start without it measures again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TypeVar, get_args

import torch

from app.engine.networks import Dtype, InferenceNet, Networks, build_network, capture
from app.engine.probe import Probe
from app.engine.widths import Widths
from model.checkpoint import Checkpoint
from model.diffusion.machine import Kernels
from model.network import kernels
from model.network.inference_layers import Layout
from model.output import write_atomically

MAX_ERROR = 0.01  # of ε by the fast network: rms of the difference over rms of ε, at any noise level; 0.004 as shipped
MAX_FLOAT32_ERROR = 1e-4  # the same between two float32 layouts, which sum in another order: about 1e-6
MIN_SPEEDUP = 1.05  # a choice other than the usual one must be faster by this factor
MAX_THREADS = 1024
MIN_SHARE = 0.9  # of a core, that the measuring thread has on a CPU that nobody else uses; its waits are short
LOOK_SECONDS = 0.1  # for which a start looks whether there is other load; a slice of a busy core is some milliseconds
FORMAT = 7  # of the file
K = TypeVar("K")
T = TypeVar("T")
log = logging.getLogger("unstir.engine")


@dataclass(frozen=True)
class CalibrationOptions:
    """What the settings decide; None leaves a choice to the measurement.

    Attributes:
        max_width: most rows of a forward.
        reproducible_width: rows of a forward that reproducible lanes can always use.
    """

    max_width: int
    reproducible_width: int
    threads: int | None = None
    dtype: Dtype | None = None


@dataclass(frozen=True)
class Calibration:
    """What was measured.

    Attributes:
        threads: CPU threads of a forward.
        dtype: of ordinary forwards; exact ones are float32.
        error: of the last dtype tried beside float32, as :data:`MAX_ERROR` has it; None where none was.
        fast, exact: seconds of a forward by width, rising, up to the widest that pays.
        bit_identical: widths at which a row of an exact forward has the same bits.
        share: of a core that the measuring thread had; below :data:`MIN_SHARE`, there was other load.
    """

    threads: int
    layout: Layout
    dtype: Dtype
    error: float | None
    fast: dict[int, float]
    exact: dict[int, float]
    bit_identical: tuple[int, ...]
    share: float = field(default=1.0, compare=False)

    def __post_init__(self) -> None:
        if not (isinstance(self.share, float) and 0 < self.share < math.inf):
            raise ValueError(f"share = {self.share}")
        for name, costs in (("fast", self.fast), ("exact", self.exact)):
            if not costs or list(costs) != sorted(costs) or min(costs) < 1:
                raise ValueError(f"{name} has the widths {list(costs)}")
            if not all(0 < seconds < math.inf for seconds in costs.values()):
                raise ValueError(f"{name} has the seconds {list(costs.values())}")
        identical = self.bit_identical
        if not identical or list(identical) != sorted(identical) or not set(identical) <= set(self.exact):
            raise ValueError(f"bit_identical = {identical}, of the widths {list(self.exact)}")
        if not (isinstance(self.threads, int) and 1 <= self.threads <= MAX_THREADS):
            raise ValueError(f"threads = {self.threads}")
        if self.layout not in get_args(Layout) or self.dtype not in get_args(Dtype):
            raise ValueError(f"layout = {self.layout}, dtype = {self.dtype}")

    def widths(self, *, exact: bool) -> Widths:
        costs = self.exact if exact else self.fast
        return Widths(tuple(costs), tuple(costs.values()), self.bit_identical if exact else ())

    @property
    def log_lines(self) -> list[str]:
        lines = [f"{self.dtype}, {self.layout}, threads: {self.threads}"]
        for name, costs in (("forward", self.fast), ("exact forward", self.exact)):
            lines.append(f"{name} in ms by width: " + ", ".join(f"{w}: {s * 1e3:.1f}" for w, s in costs.items()))
        return [*lines, f"exact forwards give the same bits at widths {', '.join(map(str, self.bit_identical))}"]


def calibrate(
    checkpoint: Checkpoint, device: torch.device, options: CalibrationOptions, cache: Path | None
) -> Calibration:
    """Read a former measurement under the same circumstances from the folder ``cache``, or measure.

    Raises:
        TooSmallError: there is no room for a forward of the reproducible width.
    """
    file = None if cache is None else cache / f"calibration-{_cache_key(checkpoint, device, options)}.json"
    calibration = _read(file)
    if calibration is None or (calibration.share < MIN_SHARE and _look_for_load() >= MIN_SHARE):
        found = _measure_once(checkpoint, device, options)
        if calibration is None or calibration.share <= found.share:
            calibration = found
            _write(file, found)
    if device.type == "cpu":
        torch.set_num_threads(calibration.threads)
    return calibration


def _measure_once(checkpoint: Checkpoint, device: torch.device, options: CalibrationOptions) -> Calibration:
    log.info("calibrating, once for this checkpoint on this machine")
    share, seconds, found = _share_of(lambda: _measure(checkpoint, device, options))
    log.info("calibrated in %.1f s", seconds)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # of graphs that were captured to be timed
        return found
    if share < MIN_SHARE:
        remedy = "the next start on an idle machine calibrates again"
        log.warning("calibrated beside other load, with %.0f %% of a core; %s", 100 * share, remedy)
    return replace(found, share=share)


def _share_of(work: Callable[[], T]) -> tuple[float, float, T]:
    """The share of a core that this thread had for some work, the seconds that it took, and its result."""
    began, busy = time.perf_counter(), time.thread_time()
    result = work()
    seconds = time.perf_counter() - began
    return (time.thread_time() - busy) / seconds, seconds, result


def _look_for_load() -> float:
    """The share of a core that this thread can have now."""

    def spin() -> None:
        until = time.perf_counter() + LOOK_SECONDS
        while time.perf_counter() < until:
            pass

    return _share_of(spin)[0]


def build_networks(checkpoint: Checkpoint, device: torch.device, calibration: Calibration) -> Networks:
    """The networks that a calibration found best, with CUDA graphs captured for its widths."""
    exact = build_network(checkpoint, device, calibration.layout, "float32", exact=True)
    fast = exact
    if calibration.dtype != "float32":
        fast = build_network(checkpoint, device, calibration.layout, calibration.dtype, exact=False)
    for net, widths in {exact: calibration.exact, fast: calibration.fast}.items():
        for width in sorted(widths, reverse=True):
            try:
                capture(net, [width])
            except torch.OutOfMemoryError as error:  # the engine gives the width up when it runs out of memory
                torch.cuda.empty_cache()
                log.warning("no room to prepare forwards of %d rows: %s", width, error)
    return Networks(fast, exact, _update_kernels(device, calibration.layout))


def _update_kernels(device: torch.device, layout: Layout) -> Kernels | None:
    if device.type != "cuda" or layout != "fused":
        return None
    from model.diffusion import machine_triton  # noqa: PLC0415 - it needs Triton

    return machine_triton


@torch.inference_mode()
def _measure(checkpoint: Checkpoint, device: torch.device, options: CalibrationOptions) -> Calibration:
    probe = Probe(checkpoint, device)
    threads = options.threads or torch.get_num_threads()
    torch.set_num_threads(threads)
    if device.type == "cuda":
        layout = _choose_layout_on_card(checkpoint, device, probe)
    else:
        layout, threads = _choose_layout_on_cpu(checkpoint, device, options, probe)
    exact = build_network(checkpoint, device, layout, "float32", exact=True)
    costs = probe.time_widths(exact, options.max_width, options.reproducible_width)
    dtype: Dtype = "float32"
    error, fast = None, costs
    for candidate in _candidate_dtypes(device, options.dtype):
        net = build_network(checkpoint, device, layout, candidate, exact=False)
        error = probe.relative_error(net, exact)
        times = probe.time_widths(net, options.max_width, 1)
        speedup = min(s / w for w, s in costs.items()) / min(s / w for w, s in times.items())
        if options.dtype or (error <= MAX_ERROR and speedup >= MIN_SPEEDUP):
            dtype, fast = candidate, times
            break
    identical = probe.find_bit_identical(exact, options.reproducible_width, costs)
    return Calibration(threads, layout, dtype, error, fast, costs, identical)


def _choose_layout_on_cpu(
    checkpoint: Checkpoint, device: torch.device, options: CalibrationOptions, probe: Probe
) -> tuple[Layout, int]:
    """The fastest layout and threads, among those with the bits of the usual ones.

    A choice by time may not change bits: a busy moment at the start would change reproducible results.
    """

    def timer(net: InferenceNet, threads: int) -> Callable[[], float]:
        def measure() -> float:
            torch.set_num_threads(threads)
            return probe.time_forward(net, options.reproducible_width)

        return measure

    usual = torch.get_num_threads()
    plain = build_network(checkpoint, device, "channels_last", "float32", exact=True)
    tried: dict[tuple[Layout, int], InferenceNet] = {("channels_last", usual): plain}
    if torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        tried["packed", usual] = build_network(checkpoint, device, "packed", "float32", exact=True)
    if options.threads is None:
        tried |= {(layout, usual // 2): net for (layout, _), net in list(tried.items()) if usual > 1}
    bits = probe.compute(plain, options.reproducible_width, usual)
    identical = {
        (layout, threads): net
        for (layout, threads), net in tried.items()
        if torch.equal(bits, probe.compute(net, options.reproducible_width, threads))
    }
    layout, threads = _choose_fastest({choice: timer(net, choice[1]) for choice, net in identical.items()})
    torch.set_num_threads(threads)
    return layout, threads


def _choose_layout_on_card(checkpoint: Checkpoint, device: torch.device, probe: Probe) -> Layout:
    """``fused`` unless its kernels fail here; never by time, since the bits of the layouts differ."""
    if not kernels.usable(device):
        log.warning("%s: Triton is missing or does not support this card; forwards will be slower", device)
        return "channels_last"
    plain, fused = (
        build_network(checkpoint, device, layout, "float32", exact=True) for layout in ("channels_last", "fused")
    )
    try:
        error = probe.relative_error(fused, plain)
    except Exception as failure:  # whatever a compiler may raise
        log.warning("%s: Triton's kernels cannot be used; forwards will be slower: %s", device, failure)
        return "channels_last"
    if error <= MAX_FLOAT32_ERROR:
        return "fused"
    log.warning("%s: Triton's kernels are off by %.1e; forwards will be slower", device, error)
    return "channels_last"


def _candidate_dtypes(device: torch.device, asked: Dtype | None) -> list[Dtype]:
    """Dtypes of ordinary forwards to try besides float32, the likely best first."""
    if asked is not None:
        return [asked] if asked != "float32" else []
    if device.type == "cuda":
        return ["bfloat16", "tf32"] if torch.cuda.get_device_capability(device) >= (8, 0) else []
    return ["bfloat16"] if bfloat16_is_native() else []


def _choose_fastest(timers: dict[K, Callable[[], float]]) -> K:
    """The first, usual one, unless another is clearly faster; each round times all, so that all see the same load."""
    rounds = [{key: measure() for key, measure in timers.items()} for _ in range(3)][1:]  # the first warms up
    times = {key: min(seconds[key] for seconds in rounds) for key in timers}
    usual, best = next(iter(times)), min(times, key=lambda key: times[key])
    return best if times[usual] >= MIN_SPEEDUP * times[best] else usual


def bfloat16_is_native() -> bool:
    """Whether the processor multiplies bfloat16, rather than converting it to float32 and back."""
    supported = (getattr(torch.cpu, f"_is_{name}_supported", bool) for name in ("avx512_bf16", "amx_tile"))
    return any(ask() for ask in supported)


def _cache_key(checkpoint: Checkpoint, device: torch.device, options: CalibrationOptions) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.processor()} {os.cpu_count()}"
    facts = [FORMAT, checkpoint.card.sha256, device.type, name, torch.__version__, torch.get_num_threads()]
    if device.type == "cuda":
        facts.append(kernels.usable(device))
    return hashlib.sha256(json.dumps([*facts, asdict(options)]).encode()).hexdigest()[:16]


def _read(file: Path | None) -> Calibration | None:
    try:
        fields = json.loads(file.read_text()) if file else None
        if not fields:
            return None
        for name in ("fast", "exact"):
            fields[name] = {int(width): float(seconds) for width, seconds in fields[name].items()}
        return Calibration(**{**fields, "bit_identical": tuple(fields["bit_identical"])})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        log.warning("%s is ignored: %s", file, error)
        return None


def _write(file: Path | None, calibration: Calibration) -> None:
    if file is None:
        return
    try:
        write_atomically(file, json.dumps(asdict(calibration)))
    except OSError as error:  # a container without a home, say: it measures at each start
        log.info("the calibration is not kept: %s", error)
