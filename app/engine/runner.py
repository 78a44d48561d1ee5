"""The device: it holds the network, pads lanes to a width, and hands plans to the row machine. It knows no requests.

On a CUDA device nothing here waits: a step's coefficients, noise and classes go there from pinned memory, its forward
is a graph, and what comes back is read when its flight has landed. The host prepares a tick while the device is busy
with the one before.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch
from torch import Tensor

from app.engine.jobs import Lane
from app.engine.networks import Networks
from app.engine.pending import PendingTick
from model.checkpoint import Checkpoint
from model.device import to_device, to_host
from model.diffusion import machine
from model.diffusion.noise import draw_noise, seeded_generator
from model.diffusion.plan import Columns
from model.network.inference import InferenceUNet

DRAWERS = 8  # threads that draw noise for a CUDA device, which would otherwise wait for it at large widths


class OutOfMemoryError(Exception):
    """The device had no room for a forward of this width; no lane has moved."""


class Runner:
    """Advances lanes on one device. All methods are called from one thread at a time.

    Attributes:
        ahead: ticks that may be enqueued while an earlier one is under way.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device, nets: Networks | None = None) -> None:
        if nets is None:
            plain = InferenceUNet(checkpoint.net, checkpoint.schedule.T)
            nets = Networks(plain, plain)
        self.checkpoint = checkpoint
        self.nets = nets
        self.device = device
        self.shape = checkpoint.shape
        self.conditional = checkpoint.net.config.num_class_embeds is not None
        self.ahead = 1 if device.type == "cuda" else 0
        self._drawers = ThreadPoolExecutor(DRAWERS, "noise") if device.type == "cuda" else None

    @torch.inference_mode()
    def advance(self, lanes: Sequence[Lane], width: int, exact: bool = False) -> PendingTick:
        """Take every lane one step of its plan, in one forward of ``width`` rows.

        Cursors have moved when this returns; ``frames`` and :meth:`end` are there when the flight has landed.

        Args:
            lanes: different lanes, none of them at its end, that take 1 to ``width`` rows together.
            exact: in float32, rather than in whatever is fastest.

        Raises:
            OutOfMemoryError: the forward does not fit; all lanes are as they were.
        """
        flight = PendingTick(self.device)
        try:
            new = self._forward(lanes, width, exact, flight)
        except torch.OutOfMemoryError as error:
            torch.cuda.empty_cache()
            raise OutOfMemoryError(f"a forward of {width} rows does not fit: {error}") from error
        for i, lane in enumerate(lanes):
            lane.state, lane.noise = new[i, : lane.plan.slots], None
            lane.cursor += 1
        self._send_home(lanes, new)
        flight.depart()
        return flight

    def _forward(self, lanes: Sequence[Lane], width: int, exact: bool, flight: PendingTick) -> Tensor:
        """The next states, [B, R, C, H, W], lanes first; can be tried again, since noise once drawn is kept."""
        slots = max(lane.plan.slots for lane in lanes)
        self._begin([lane for lane in lanes if lane.state is None])

        # Padding repeats the first lane's coefficients on an empty image, and its result is dropped.
        padded = [*lanes, *[lanes[0]] * (width - sum(lane.rows for lane in lanes))]
        rows = np.array([lane.plan.table(slots)[lane.cursor] for lane in padded])
        return machine.advance(
            self._net(padded, len(lanes), rows[:, Columns.T], exact),
            self._gathered(lanes, len(padded), slots),
            rows,
            noise=partial(self._noise, lanes, len(padded)),
            show=partial(self._show, lanes, flight),
            kernels=self.nets.updates,
        )

    def _begin(self, lanes: Sequence[Lane]) -> None:
        """Give lanes their first states."""
        for lane in lanes:
            lane.generator = seeded_generator(lane.seed)
        states = torch.zeros(len(lanes), max((lane.plan.slots for lane in lanes), default=0), *self.shape)
        # Drawn in any case: the noise that follows is then the same, wherever the walk begins.
        for state, lane, x_T in zip(states, lanes, self._drawn(lanes), strict=True):
            start = x_T[None] if lane.start is None else lane.start
            state[: len(start)] = start
        for state, lane in zip(to_device(states, self.device) if lanes else (), lanes, strict=True):
            lane.state = state[: lane.plan.slots]

    def _gathered(self, lanes: Sequence[Lane], count: int, slots: int) -> Tensor:
        """All states, [count, slots, C, H, W], zero beyond what the lanes have: a copy for each number of slots."""
        kinds = {lane.plan.slots for lane in lanes}
        if len(lanes) == count and len(kinds) == 1:
            return torch.stack([lane.state for lane in lanes])  # type: ignore[misc]
        state = torch.zeros(count, slots, *self.shape, device=self.device)
        for kind in kinds:
            at = [i for i, lane in enumerate(lanes) if lane.plan.slots == kind]
            together = torch.stack([lanes[i].state for i in at])  # type: ignore[misc]
            if len(kinds) == 1:
                state[: len(lanes)] = together
            else:
                state[to_device(torch.tensor(at), self.device), :kind] = together
        return state

    @staticmethod
    def _send_home(lanes: Sequence[Lane], new: Tensor) -> None:
        """Begin to copy the ends of lanes that have ended, all at once."""
        ended = [i for i, lane in enumerate(lanes) if not lane.remaining]
        if ended:
            first, most = ended[0], max(lanes[i].returns for i in ended)
            home = to_host(new[first : ended[-1] + 1, :most])
            for i in ended:
                lanes[i].state = home[i - first, : lanes[i].returns]

    def _drawn(self, lanes: Iterable[Lane]) -> Iterable[Tensor]:
        """The next noise of each lane's own, in their order."""

        def drawn(lane: Lane) -> Tensor:
            return draw_noise(lane.generator, self.shape)  # type: ignore[arg-type]

        return map(drawn, lanes) if self._drawers is None else self._drawers.map(drawn, lanes)

    def _noise(self, lanes: Sequence[Lane], count: int) -> Tensor:
        """z [count, C, H, W], zero for rows that draw none."""
        noisy = [i for i, lane in enumerate(lanes) if lane.plan.steps[lane.cursor].noisy]
        new = [lanes[i] for i in noisy if lanes[i].noise is None]
        for lane, drawn in zip(new, self._drawn(new), strict=True):
            lane.noise = drawn
        z = torch.zeros(count, *self.shape)
        for i in noisy:
            z[i] = lanes[i].noise  # type: ignore[assignment]
        return to_device(z, self.device)

    def _net(self, padded: Sequence[Lane], lanes: int, t: np.ndarray, exact: bool) -> machine.Net:
        """The network for these rows, padding behind the lanes, and behind both the twins of those with guidance."""
        form = self.nets.exact if exact else self.nets.fast
        guidance = machine.Guidance([lane.guidance for lane in padded[:lanes]], self.device)
        twins = guidance.asking
        assert not twins or self.checkpoint.card.null_class is not None, "This is a bug: guidance without a null class."
        told = form.told(torch.from_numpy(t[[*range(len(t)), *twins]]).float(), self._classes(padded, len(twins)))
        channels = self.shape[0]
        return lambda u, _t, _y: guidance.blended(form.forward(guidance.doubled(u), told), channels)

    def _classes(self, lanes: Sequence[Lane], twins: int) -> Tensor | None:
        """int64 [B]; or float32 [B, K], weights of every class embedding, where some lane mixes them."""
        if not self.conditional:
            return None
        labels = [*(lane.label for lane in lanes), *[self.checkpoint.card.null_class] * twins]
        if not any(isinstance(label, tuple) for label in labels):
            return torch.tensor(labels)
        weights = torch.zeros(len(labels), self.checkpoint.net.config.num_class_embeds or 0)
        for row, label in zip(weights, labels, strict=True):
            if isinstance(label, tuple):
                row[:] = torch.tensor(label)
            elif label is not None:
                row[label] = 1
        return weights

    @staticmethod
    def _show(lanes: Sequence[Lane], flight: PendingTick, x_0: Tensor) -> None:
        """Keep what was asked for; a step that is tried again shows the same."""

        def take_home(lane: Lane, cursor: int, seen: Tensor) -> None:
            lane.frames[cursor] = seen.float().clone()

        for i, lane in enumerate(lanes):
            if lane.cursor in lane.keep:
                seen = to_host(x_0[i] if lane.look == "x_0" else lane.state[0])  # type: ignore[index]
                flight.landing.append(partial(take_home, lane, lane.cursor, seen))

    def end(self, lane: Lane) -> Tensor:
        """A finished lane's first slots, float32 [returns, C, H, W] on the host; the lane gives up its state."""
        assert lane.state is not None, "This is a bug: a lane ended before it began."
        slots = lane.state[: lane.returns].float().clone()
        lane.let_go()
        return slots
