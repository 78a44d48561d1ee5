"""Forwards of made-up rows: how long they take, and whose bits agree."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from itertools import pairwise

import torch
from torch import Tensor

from app.engine import networks as forms
from app.engine.networks import InferenceNet
from model.checkpoint import Checkpoint
from model.diffusion.machine import Net

ROUNDS = 7  # through all widths
SATURATED = 1.02  # a card to which twice the rows give less than so many times the rows a second
LONGEST = 0.25  # seconds of a forward on a card beyond which no wider one is tried: nobody wants to wait for it


class TooSmallError(Exception):
    """The device has no room for the forwards that it must make."""


class Probe:
    """Runs forwards of made-up rows on a device, and times them or compares their bits."""

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

    def seconds(self, form: InferenceNet, width: int, forwards: int = 3) -> float:
        """The best of a few forwards in a row; on a card as it sees them, without what the host does."""
        x, t, y = self.rows(width)
        if self.device.type == "cuda":
            return min(self._seconds_of_card(form, x, form.told(t, y), forwards))
        times: list[float] = []
        for _ in range(forwards):
            began = time.perf_counter()
            form(x, t, y)
            times.append(time.perf_counter() - began)
        return min(times)

    @staticmethod
    def _seconds_of_card(form: InferenceNet, x: Tensor, told: Tensor, forwards: int) -> list[float]:
        events = [
            torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            for _ in range(forwards + 1)
        ]
        form.forward(x, told)  # the card is busy when the first event is recorded, and no forward waits for the host
        for event in events[:-1]:
            event.record()
            form.forward(x, told)
        events[-1].record()
        events[-1].synchronize()
        return [one.elapsed_time(next_) / 1e3 for one, next_ in pairwise(events)]

    def bits(self, net: Net, width: int, threads: int) -> Tensor:
        """What the network says of made-up rows, with so many threads."""
        torch.set_num_threads(threads)
        return net(*self.rows(width))

    def curve(self, form: InferenceNet, max_width: int, canonical: int) -> dict[int, float]:
        """Seconds by width: doubling ones and the canonical one, up to the widest that gives 99 % of the best rows/s.

        Whether a forward is that wide is decided tick by tick, so that one width too many is no loss, while one too few
        would be, for as long as the process lives. Widths take turns, because in service, too, a forward seldom finds
        in the cache what one of its own width left there (up to a fifth of one row's time), and so that a slow moment
        does not bend the line.

        Raises:
            TooSmallError: there is no room for the canonical width.
        """
        costs: dict[int, float] = {}
        doubling = [2**k for k in range(max_width.bit_length()) if 2**k <= max_width]
        for width in sorted({*doubling, canonical}):
            before = max((w / s for w, s in costs.items()), default=0.0)
            try:
                forms.capture(form, [width])
                costs[width] = self.seconds(form, width)
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                break
            if width > canonical and self._enough(width / costs[width], before, costs[width]):
                break
        if canonical not in costs:
            raise TooSmallError(f"{self.device} has no room for a forward of {canonical} rows")
        self._fill_in(form, costs)
        turns = [{width: self.seconds(form, width, forwards=1) for width in costs} for _ in range(ROUNDS)]
        costs = {width: min(turn[width] for turn in turns) for width in sorted(costs)}
        best = max(w / s for w, s in costs.items())
        cap = max(w for w, s in costs.items() if w / s >= 0.99 * best)
        return {w: s for w, s in costs.items() if w <= max(cap, canonical)}

    def _enough(self, rate: float, before: float, seconds: float) -> bool:
        """Whether wider forwards need not be tried."""
        if self.device.type == "cuda":
            return rate < SATURATED * before or seconds > LONGEST
        return rate < 0.8 * before

    def _fill_in(self, form: InferenceNet, costs: dict[int, float]) -> None:
        """On a card, where a forward of nine rows would be padded to sixteen, add the widths half-way between."""
        if self.device.type != "cuda":
            return
        try:
            for width in [3 * w // 2 for w in costs if w >= 8 and 2 * w in costs]:
                forms.capture(form, [width])
                costs[width] = self.seconds(form, width)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()

    def difference(self, net: Net, exact: Net) -> float:
        """Of two forms of the network: rms of what they differ by over rms of what they say, at the worst row."""
        x, t, y = self.rows(8)
        worst = 0.0
        for i in range(len(x)):  # by itself: the device may have no room for all
            row = x[i : i + 1], t[i : i + 1], None if y is None else y[i : i + 1]
            said = exact(*row)
            worst = max(worst, float((net(*row) - said).square().mean() / said.square().mean()))
        return math.sqrt(worst)

    def alike(self, net: Net, canonical: int, widths: Iterable[int]) -> tuple[int, ...]:
        """The widths at which each row, whatever its slot, has the bits that it has at the canonical one.

        Where slots or neighbours change a row's bits at that width already, a narrower one takes its place; a forward
        of one row has neither.
        """
        narrower = sorted((width for width in widths if width < canonical), reverse=True)
        canonical = next((width for width in (canonical, *narrower) if self.steady(net, width)), 1)
        found = [canonical]
        for width in widths:
            if width != canonical and all(self._same_bits(net, canonical, width, seed) for seed in range(2)):
                found.append(width)
        return tuple(sorted(found))

    def steady(self, net: Net, width: int) -> bool:
        """Whether a row of so many has the same bits in every slot and any company."""
        x, t, y = self.rows(width)
        said = net(x, t, y)
        for shift in {1, width // 2} - {0, width}:
            moved = net(x.roll(shift, 0), t.roll(shift, 0), None if y is None else y.roll(shift, 0))
            if not torch.equal(moved.roll(-shift, 0), said):
                return False
        others, _, _ = self.rows(width, seed=1)
        others[0] = x[0]
        return torch.equal(net(others, t, y)[0], said[0])

    def _same_bits(self, net: Net, one: int, other: int, seed: int) -> bool:
        narrow, wide = sorted((one, other))
        x, t, y = self.rows(wide, seed)
        together = net(x, t, y)
        for first in range(0, wide, narrow):
            part = slice(min(first, wide - narrow), min(first, wide - narrow) + narrow)
            if not torch.equal(net(x[part], t[part], None if y is None else y[part]), together[part]):
                return False
        return True
