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
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, TypeVar, get_args

import torch
from torch import Tensor

from app.engine.scheduler import Widths
from model.checkpoint import Checkpoint
from model.folded import Folded, Layout
from model.machine import Net

Dtype = Literal["float32", "bfloat16"]
DTYPES: tuple[Dtype, ...] = get_args(Dtype)
LARGEST_ERROR = 0.01  # of ε in bfloat16: rms of the difference over rms of ε, at any noise level; 0.004 as shipped
WORTH = 1.05  # a choice that is not the usual one must be faster by so much
ROUNDS = 7  # through all widths
FORMAT = 4  # of the file
K = TypeVar("K")
log = logging.getLogger("unstir.engine")


class TooSmallError(Exception):
    """The device has no room for the forwards that it must make."""


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
        error: of bfloat16 as :data:`LARGEST_ERROR` has it; None where it was not tried.
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


@dataclass(frozen=True)
class Nets:
    """The network in the forms that it is used in; where one will do, both are the same object."""

    fast: Net
    exact: Net


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
        log.info("calibrated in %.1f s", time.perf_counter() - began)
        _write(file, found)
    if device.type == "cpu":
        torch.set_num_threads(found.threads)
    return found


def nets(checkpoint: Checkpoint, found: Calibration) -> Nets:
    """The network in the forms that were found to be best."""
    exact = Folded(checkpoint.net, checkpoint.schedule.T, torch.float32, found.layout)
    if found.dtype == "float32":
        return Nets(exact, exact)
    return Nets(Folded(checkpoint.net, checkpoint.schedule.T, torch.bfloat16, found.layout), exact)


def _measured(checkpoint: Checkpoint, device: torch.device, wanted: Wanted) -> Calibration:
    probe = _Probe(checkpoint, device)

    def folded(layout: Layout, dtype: torch.dtype = torch.float32) -> Folded:
        return Folded(checkpoint.net, checkpoint.schedule.T, dtype, layout)

    def timed(net: Net, threads: int) -> Callable[[], float]:
        def measure() -> float:
            torch.set_num_threads(threads)
            return probe.seconds(net, wanted.canonical)

        return measure

    # What is faster may be chosen by the clock only where it leaves the bits of reproducible answers alone, or a busy
    # moment at the start would change them.
    on_cpu = device.type == "cpu"
    usual = wanted.threads or torch.get_num_threads()
    torch.set_num_threads(usual)
    forms: dict[tuple[Layout, int], Net] = {("channels_last", usual): (plain := folded("channels_last"))}
    if on_cpu and torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        forms["packed", usual] = folded("packed")
    if on_cpu and wanted.threads is None:
        forms |= {(layout, usual // 2): net for (layout, _), net in list(forms.items()) if usual > 1}
    bits = probe.bits(plain, wanted.canonical, usual)
    forms = {form: net for form, net in forms.items() if torch.equal(bits, probe.bits(net, wanted.canonical, form[1]))}
    layout, threads = _fastest({form: timed(net, form[1]) for form, net in forms.items()})
    exact = forms[layout, threads]
    torch.set_num_threads(threads)

    costs = probe.curve(exact, wanted.max_width, wanted.canonical)
    dtype, error, fast = wanted.dtype or "float32", None, costs
    if wanted.dtype == "bfloat16" or (wanted.dtype is None and on_cpu and bfloat16_is_native()):
        halved = folded(layout, torch.bfloat16)
        error = probe.difference(halved, exact)
        times = probe.curve(halved, wanted.max_width, 1)
        gain = min(s / w for w, s in costs.items()) / min(s / w for w, s in times.items())
        if wanted.dtype or (error <= LARGEST_ERROR and gain >= WORTH):
            dtype, fast = "bfloat16", times
    return Calibration(threads, layout, dtype, error, fast, costs, probe.alike(exact, wanted.canonical, costs))


class _Probe:
    """Runs forwards of made-up rows, and times them or compares their bits."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device) -> None:
        self.shape, self.device = checkpoint.shape, device
        self.classes = checkpoint.net.config.num_class_embeds
        self.T = checkpoint.schedule.T

    def rows(self, width: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor | None]:
        """The first of more rows are those of fewer."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.stack([torch.randn(self.shape, generator=generator) for _ in range(width)])
        t = torch.arange(width).mul(self.T // 8 + 1).remainder(self.T).float()
        y = None if self.classes is None else torch.arange(width).remainder(self.classes).to(self.device)
        return x.to(self.device), t.to(self.device), y

    def seconds(self, net: Net, width: int, forwards: int = 3) -> float:
        """The best of a few forwards in a row."""
        rows = self.rows(width)
        times: list[float] = []
        for _ in range(forwards):
            began = time.perf_counter()
            net(*rows).sum().item()  # .item() waits for the device
            times.append(time.perf_counter() - began)
        return min(times)

    def bits(self, net: Net, width: int, threads: int) -> Tensor:
        """What the network says of made-up rows, with so many threads."""
        torch.set_num_threads(threads)
        return net(*self.rows(width))

    def curve(self, net: Net, max_width: int, canonical: int) -> dict[int, float]:
        """Seconds by width: doubling ones and the canonical one, up to the widest that gives 99 % of the best rows/s.

        Whether a forward is that wide is decided tick by tick, so that one width too many is no loss, while one too few
        would be, for as long as the process lives. Widths take turns, because in service, too, a forward seldom finds
        in the cache what one of its own width left there (up to a fifth of one row's time), and so that a slow moment
        does not bend the line.
        """
        costs: dict[int, float] = {}
        doubling = [2**k for k in range(max_width.bit_length()) if 2**k <= max_width]
        for width in sorted({*doubling, canonical}):
            try:
                costs[width] = self.seconds(net, width)
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                break
            best = max(w / s for w, s in costs.items())
            if width > canonical and width / costs[width] < 0.8 * best:
                break
        if canonical not in costs:
            raise TooSmallError(f"{self.device} has no room for a forward of {canonical} rows")
        turns = [{width: self.seconds(net, width, forwards=1) for width in costs} for _ in range(ROUNDS)]
        costs = {width: min(turn[width] for turn in turns) for width in costs}
        best = max(w / s for w, s in costs.items())
        cap = max(w for w, s in costs.items() if w / s >= 0.99 * best)
        return {w: s for w, s in costs.items() if w <= max(cap, canonical)}

    def difference(self, net: Net, exact: Net) -> float:
        """Of two forms of the network: rms of what they differ by over rms of what they say, at the worst row."""
        rows = self.rows(8)
        said = exact(*rows).flatten(1)
        worst = ((net(*rows).flatten(1) - said).square().mean(1) / said.square().mean(1)).max()
        return float(worst.sqrt())

    def alike(self, net: Net, canonical: int, widths: Iterable[int]) -> tuple[int, ...]:
        """The widths at which each row, whatever its slot, has the bits that it has at the canonical one."""
        found = [canonical]
        for width in widths:
            if width != canonical and all(self._same_bits(net, canonical, width, seed) for seed in range(2)):
                found.append(width)
        return tuple(sorted(found))

    def _same_bits(self, net: Net, one: int, other: int, seed: int) -> bool:
        narrow, wide = sorted((one, other))
        x, t, y = self.rows(wide, seed)
        together = net(x, t, y)
        for first in range(0, wide, narrow):
            part = slice(min(first, wide - narrow), min(first, wide - narrow) + narrow)
            if not torch.equal(net(x[part], t[part], None if y is None else y[part]), together[part]):
                return False
        return True


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
