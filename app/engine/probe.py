"""Forwards of random inputs: how long they take, and which of them give the same bits."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from itertools import pairwise

import torch
from torch import Tensor

from app.engine import networks
from app.engine.networks import InferenceNet
from model.checkpoint import Checkpoint
from model.diffusion.machine import Net

ROUNDS = 7  # of timing, each through all widths
MIN_GAIN = 1.02  # a card is saturated where twice the rows give less than so many times the rows/s
MAX_SECONDS = 0.25  # of a forward on a card; wider ones would add too much latency
CAP_SHARE = 0.99  # the cap is the widest forward with this share of the best rows/s


class TooSmallError(Exception):
    """The device has no room for the forwards that it must run."""


class Probe:
    """Runs forwards of random inputs on a device, and times them or compares their bits."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device) -> None:
        self.shape, self.device = checkpoint.shape, device
        self.classes = checkpoint.net.config.num_class_embeds
        self.T = checkpoint.schedule.T

    def inputs(self, width: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor | None]:
        """(x, t, y) of ``width`` rows; the rows of a narrower forward are the first of a wider one."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.stack([torch.randn(self.shape, generator=generator) for _ in range(width)])
        t = torch.arange(width).mul(self.T // 8 + 1).remainder(self.T).float()
        y = None if self.classes is None else torch.arange(width).remainder(self.classes).to(self.device)
        return x.to(self.device), t.to(self.device), y

    def compute(self, net: Net, width: int, threads: int) -> Tensor:
        """The network's output, computed by so many CPU threads."""
        torch.set_num_threads(threads)
        return net(*self.inputs(width))

    def time_forward(self, net: InferenceNet, width: int, forwards: int = 3) -> float:
        """Seconds of the fastest of a few forwards; on a card by its own clock, without the host's work."""
        x, t, y = self.inputs(width)
        if self.device.type == "cuda":
            return min(self._time_on_card(net, x, net.conditioning(t, y), forwards))
        times: list[float] = []
        for _ in range(forwards):
            began = time.perf_counter()
            net(x, t, y)
            times.append(time.perf_counter() - began)
        return min(times)

    @staticmethod
    def _time_on_card(net: InferenceNet, x: Tensor, conditioning: Tensor, forwards: int) -> list[float]:
        events = [
            torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            for _ in range(forwards + 1)
        ]
        net.forward(x, conditioning)  # keeps the card busy until the first event, so that no forward waits for the host
        for event in events[:-1]:
            event.record()
            net.forward(x, conditioning)
        events[-1].record()
        events[-1].synchronize()
        return [one.elapsed_time(next_) / 1e3 for one, next_ in pairwise(events)]

    def time_widths(self, net: InferenceNet, max_width: int, reproducible_width: int) -> dict[int, float]:
        """Seconds by width: powers of two and the reproducible width, up to the widest with 99 % of the best rows/s.

        The scheduler decides the width of every tick, so one width too many costs nothing, while one too few would cost
        throughput for as long as the process lives. Each round times all widths in order: in service, too, a forward
        seldom finds in the cache what the last one of its width left there (up to a fifth of one row's time), and a
        slow moment then affects all widths.

        Raises:
            TooSmallError: there is no room for the reproducible width.
        """
        costs: dict[int, float] = {}
        powers = [2**k for k in range(max_width.bit_length()) if 2**k <= max_width]
        for width in sorted({*powers, reproducible_width}):
            best = max((w / s for w, s in costs.items()), default=0.0)
            try:
                networks.capture(net, [width])
                costs[width] = self.time_forward(net, width)
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                break
            if width > reproducible_width and self._saturated(width / costs[width], best, costs[width]):
                break
        if reproducible_width not in costs:
            raise TooSmallError(f"{self.device} has no room for a forward of {reproducible_width} rows")
        self._add_halfway_widths(net, costs)
        rounds = [{width: self.time_forward(net, width, forwards=1) for width in costs} for _ in range(ROUNDS)]
        costs = {width: min(times[width] for times in rounds) for width in sorted(costs)}
        best = max(w / s for w, s in costs.items())
        cap = max(w for w, s in costs.items() if w / s >= CAP_SHARE * best)
        return {w: s for w, s in costs.items() if w <= max(cap, reproducible_width)}

    def _saturated(self, rate: float, best: float, seconds: float) -> bool:
        """Whether wider forwards need not be tried; rates are rows/s."""
        if self.device.type == "cuda":
            return rate < MIN_GAIN * best or seconds > MAX_SECONDS
        return rate < 0.8 * best

    def _add_halfway_widths(self, net: InferenceNet, costs: dict[int, float]) -> None:
        """On a card, add widths between the powers of two: a forward of nine rows would be padded to sixteen."""
        if self.device.type != "cuda":
            return
        try:
            for width in [3 * w // 2 for w in costs if w >= 8 and 2 * w in costs]:
                networks.capture(net, [width])
                costs[width] = self.time_forward(net, width)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()

    def relative_error(self, net: Net, exact: Net) -> float:
        """Of a network beside the exact one: rms of the difference over rms of the output, of the worst row."""
        x, t, y = self.inputs(8)
        worst = 0.0
        for i in range(len(x)):  # row by row: the device may have no room for all
            row = x[i : i + 1], t[i : i + 1], None if y is None else y[i : i + 1]
            output = exact(*row)
            worst = max(worst, float((net(*row) - output).square().mean() / output.square().mean()))
        return math.sqrt(worst)

    def find_bit_identical(self, net: Net, reproducible_width: int, widths: Iterable[int]) -> tuple[int, ...]:
        """The widths at which every row, in any slot, has the bits that it has at the reproducible width.

        Where a row's slot or the other rows change its bits at that width already, a narrower one takes its place; a
        forward of one row has neither.
        """
        narrower = sorted((width for width in widths if width < reproducible_width), reverse=True)
        reference = next((width for width in (reproducible_width, *narrower) if self.is_batch_invariant(net, width)), 1)
        found = [reference]
        for width in widths:
            if width != reference and all(self._are_bit_identical(net, reference, width, seed) for seed in range(2)):
                found.append(width)
        return tuple(sorted(found))

    def is_batch_invariant(self, net: Net, width: int) -> bool:
        """Whether a row's bits depend neither on its slot nor on the other rows of a forward of this width."""
        x, t, y = self.inputs(width)
        output = net(x, t, y)
        for shift in {1, width // 2} - {0, width}:
            rolled = net(x.roll(shift, 0), t.roll(shift, 0), None if y is None else y.roll(shift, 0))
            if not torch.equal(rolled.roll(-shift, 0), output):
                return False
        others, _, _ = self.inputs(width, seed=1)
        others[0] = x[0]
        return torch.equal(net(others, t, y)[0], output[0])

    def _are_bit_identical(self, net: Net, one: int, other: int, seed: int) -> bool:
        narrow, wide = sorted((one, other))
        x, t, y = self.inputs(wide, seed)
        together = net(x, t, y)
        for first in range(0, wide, narrow):
            part = slice(min(first, wide - narrow), min(first, wide - narrow) + narrow)
            if not torch.equal(net(x[part], t[part], None if y is None else y[part]), together[part]):
                return False
        return True
