"""What this machine is like: which form of the network is fastest here, what its forwards cost, and whose bits agree.

Measured at the start in a second or two, and kept in a file, since the same checkpoint on the same device with the same
versions would find the same. Whatever else the machine did meanwhile can only have made a forward slower, so of each
kind the best of a few counts; what load does to it later, the engine follows by itself.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import torch

from app.engine.networks import Dtype, InferenceNet, Networks, capture, form
from app.engine.probe import Probe
from app.engine.scheduler import Widths
from model.checkpoint import Checkpoint
from model.diffusion.machine import Kernels
from model.network import kernels
from model.network.inference_layers import Layout

LARGEST_ERROR = 0.01  # of ε in bfloat16: rms of the difference over rms of ε, at any noise level; 0.004 as shipped
SAME = 1e-4  # the same, of one float32 form beside another: sums in another order make 1e-6 of it
WORTH = 1.05  # a choice that is not the usual one must be faster by so much
FORMAT = 5  # of the file
K = TypeVar("K")
log = logging.getLogger("unstir.engine")


@dataclass(frozen=True)
class Wanted:
    """What the settings leave open (None) or decide.

    Attributes:
        max_width: most rows of a forward.
        canonical: rows of a forward that reproducible lanes may always ride in.
    """

    max_width: int
    canonical: int
    threads: int | None = None
    dtype: Dtype | None = None


@dataclass(frozen=True)
class Calibration:
    """What was found.

    Attributes:
        threads: of a forward on the CPU.
        dtype: of ordinary forwards; exact ones are float32.
        error: of bfloat16, or what was tried last, as :data:`LARGEST_ERROR` has it; None where nothing was.
        fast, exact: seconds of a forward by width, rising, up to the widest that is worth having.
        alike: widths, the canonical one among them, at which a row of an exact forward has the same bits.
    """

    threads: int
    layout: Layout
    dtype: Dtype
    error: float | None
    fast: dict[int, float]
    exact: dict[int, float]
    alike: tuple[int, ...]

    def widths(self, *, exact: bool) -> Widths:
        """For the scheduler."""
        costs = self.exact if exact else self.fast
        return Widths(tuple(costs), tuple(costs.values()), self.alike if exact else ())

    @property
    def told(self) -> list[str]:
        """For the log."""
        lines = [f"{self.dtype}, {self.layout}, threads: {self.threads}"]
        for name, costs in (("forward", self.fast), ("exact forward", self.exact)):
            lines.append(f"{name} in ms by width: " + ", ".join(f"{w}: {s * 1e3:.1f}" for w, s in costs.items()))
        return [*lines, f"exact forwards give the same bits at widths {', '.join(map(str, self.alike))}"]


def calibrated(checkpoint: Checkpoint, device: torch.device, wanted: Wanted, kept: Path | None) -> Calibration:
    """Read it from the folder ``kept`` if it was measured before under the same circumstances, else measure.

    Raises:
        TooSmallError: there is no room for a forward of the canonical width.
    """
    file = None if kept is None else kept / f"calibration-{_circumstances(checkpoint, device, wanted)}.json"
    found = _read(file)
    if found is None:
        began = time.perf_counter()
        with torch.inference_mode():
            found = _measured(checkpoint, device, wanted)
        if device.type == "cuda":
            torch.cuda.empty_cache()  # of graphs that were made to be measured
        log.info("calibrated in %.1f s", time.perf_counter() - began)
        _write(file, found)
    if device.type == "cpu":
        torch.set_num_threads(found.threads)
    return found


def nets(checkpoint: Checkpoint, device: torch.device, found: Calibration) -> Networks:
    """The network in the forms that were found to be best, ready for forwards of the widths that were."""
    exact = form(checkpoint, device, found.layout, "float32", exact=True)
    fast = exact
    if found.dtype != "float32":
        fast = form(checkpoint, device, found.layout, found.dtype, exact=False)
    for each, widths in {exact: found.exact, fast: found.fast}.items():
        for width in sorted(widths, reverse=True):
            try:
                capture(each, [width])
            except torch.OutOfMemoryError as error:  # the engine finds out by itself when it tries
                torch.cuda.empty_cache()
                log.warning("no room to prepare forwards of %d rows: %s", width, error)
    return Networks(fast, exact, _updates(device, found.layout))


def _updates(device: torch.device, layout: Layout) -> Kernels | None:
    if device.type != "cuda" or layout != "fused":
        return None
    from model.diffusion import machine_triton as rows  # noqa: PLC0415 - it needs Triton

    return rows


def _measured(checkpoint: Checkpoint, device: torch.device, wanted: Wanted) -> Calibration:
    probe = Probe(checkpoint, device)
    usual = wanted.threads or torch.get_num_threads()
    torch.set_num_threads(usual)
    if device.type == "cuda":
        layout, threads = _layout_on_card(checkpoint, device, probe), usual
    else:
        layout, threads = _layout_on_cpu(checkpoint, device, wanted, probe)
    exact = form(checkpoint, device, layout, "float32", exact=True)
    costs = probe.curve(exact, wanted.max_width, wanted.canonical)
    dtype: Dtype = "float32"
    error, fast = None, costs
    for other in _worth_trying(device, wanted.dtype):
        halved = form(checkpoint, device, layout, other, exact=False)
        error = probe.difference(halved, exact)
        times = probe.curve(halved, wanted.max_width, 1)
        gain = min(s / w for w, s in costs.items()) / min(s / w for w, s in times.items())
        if wanted.dtype or (error <= LARGEST_ERROR and gain >= WORTH):
            dtype, fast = other, times
            break
    return Calibration(threads, layout, dtype, error, fast, costs, probe.alike(exact, wanted.canonical, costs))


def _layout_on_cpu(checkpoint: Checkpoint, device: torch.device, wanted: Wanted, probe: Probe) -> tuple[Layout, int]:
    """Layout and threads: the fastest of those that leave the bits of reproducible answers alone.

    Others may not be chosen by the clock, or a busy moment at the start would change them.
    """

    def timed(net: InferenceNet, threads: int) -> Callable[[], float]:
        def measure() -> float:
            torch.set_num_threads(threads)
            return probe.seconds(net, wanted.canonical)

        return measure

    usual = torch.get_num_threads()
    plain = form(checkpoint, device, "channels_last", "float32", exact=True)
    tried: dict[tuple[Layout, int], InferenceNet] = {("channels_last", usual): plain}
    if torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        tried["packed", usual] = form(checkpoint, device, "packed", "float32", exact=True)
    if wanted.threads is None:
        tried |= {(layout, usual // 2): net for (layout, _), net in list(tried.items()) if usual > 1}
    bits = probe.bits(plain, wanted.canonical, usual)
    tried = {how: net for how, net in tried.items() if torch.equal(bits, probe.bits(net, wanted.canonical, how[1]))}
    layout, threads = _fastest({how: timed(net, how[1]) for how, net in tried.items()})
    torch.set_num_threads(threads)
    return layout, threads


def _layout_on_card(checkpoint: Checkpoint, device: torch.device, probe: Probe) -> Layout:
    """``fused`` unless its kernels cannot be used here; never by the clock, since their bits are others."""
    if not kernels.usable(device):
        log.warning("%s: Triton is missing or does not know this card; forwards will be slower", device)
        return "channels_last"
    plain, fused = (form(checkpoint, device, layout, "float32", exact=True) for layout in ("channels_last", "fused"))
    try:
        error = probe.difference(fused, plain)
    except Exception as failure:  # whatever a compiler may raise
        log.warning("%s: Triton's kernels cannot be used; forwards will be slower: %s", device, failure)
        return "channels_last"
    if error <= SAME:
        return "fused"
    log.warning("%s: Triton's kernels are off by %.1e; forwards will be slower", device, error)
    return "channels_last"


def _worth_trying(device: torch.device, wanted: Dtype | None) -> list[Dtype]:
    """What ordinary forwards may be computed in besides float32, the likely best first."""
    if wanted is not None:
        return [wanted] if wanted != "float32" else []
    if device.type == "cuda":
        return ["bfloat16", "tf32"] if torch.cuda.get_device_capability(device) >= (8, 0) else []
    return ["bfloat16"] if bfloat16_is_native() else []


def _fastest(seconds: dict[K, Callable[[], float]]) -> K:
    """The first, which is the usual one, unless another is clearly faster; in turns, so that all see the same load."""
    rounds = [{key: measure() for key, measure in seconds.items()} for _ in range(3)][1:]  # the first warms up
    times = {key: min(each[key] for each in rounds) for key in seconds}
    usual, best = next(iter(times)), min(times, key=lambda key: times[key])
    return best if times[usual] >= WORTH * times[best] else usual


def bfloat16_is_native() -> bool:
    """Whether the processor multiplies it, rather than converting forth and back."""
    capable = (getattr(torch.cpu, f"_is_{name}_supported", bool) for name in ("avx512_bf16", "amx_tile"))
    return any(ask() for ask in capable)


def _circumstances(checkpoint: Checkpoint, device: torch.device, wanted: Wanted) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.processor()} {os.cpu_count()}"
    told = [FORMAT, checkpoint.card.sha256, device.type, name, torch.__version__, torch.get_num_threads()]
    if device.type == "cuda":
        told.append(kernels.usable(device))
    return hashlib.sha256(json.dumps([*told, asdict(wanted)]).encode()).hexdigest()[:16]


def _read(file: Path | None) -> Calibration | None:
    try:
        told = json.loads(file.read_text()) if file else None
        if not told:
            return None
        for name in ("fast", "exact"):
            told[name] = {int(width): float(seconds) for width, seconds in told[name].items()}
        return Calibration(**{**told, "alike": tuple(told["alike"])})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        log.warning("%s is left aside: %s", file, error)
        return None


def _write(file: Path | None, found: Calibration) -> None:
    if file is None:
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(asdict(found)))
        part.replace(file)
    except OSError as error:  # a container without a home, say: it measures at each start
        log.info("the calibration is not kept: %s", error)
