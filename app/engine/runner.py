"""The device: it holds the network, pads lanes to a width, and hands plans to the row machine. It knows no requests."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from app.engine.calibration import Nets
from app.engine.lane import Lane
from model import latents, machine
from model.checkpoint import Checkpoint


class OutOfMemoryError(Exception):
    """The device had no room for a forward of this width; no lane has moved."""


class Runner:
    """Advances lanes on one device. All methods are called from one thread at a time."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device, nets: Nets | None = None) -> None:
        self.checkpoint = checkpoint
        self.nets = nets or Nets(checkpoint.net, checkpoint.net)
        self.device = device
        self.shape = checkpoint.shape
        self.conditional = checkpoint.net.config.num_class_embeds is not None

    @torch.inference_mode()
    def advance(self, lanes: Sequence[Lane], width: int, exact: bool = False) -> None:
        """Take every lane one step of its plan, in one forward of ``width`` rows.

        Args:
            lanes: different lanes, none of them at its end, that take 1 to ``width`` rows together.
            exact: in float32, rather than in whatever is fastest.

        Raises:
            OutOfMemoryError: the forward does not fit; all lanes are as they were.
        """
        try:
            new = self._forward(lanes, width, exact)
        except torch.OutOfMemoryError as error:
            torch.cuda.empty_cache()
            raise OutOfMemoryError(f"a forward of {width} rows does not fit: {error}") from error
        for i, lane in enumerate(lanes):
            lane.state, lane.noise = new[i, : lane.plan.slots], None
            lane.cursor += 1

    def _forward(self, lanes: Sequence[Lane], width: int, exact: bool) -> Tensor:
        """The next states, [B, R, C, H, W], lanes first; can be tried again, since noise once drawn is kept."""
        slots = max(lane.plan.slots for lane in lanes)
        for lane in lanes:
            if lane.state is None:
                lane.generator = latents.generator(lane.seed)
                lane.state = torch.zeros(lane.plan.slots, *self.shape, device=self.device)
                # Drawn in any case: the noise that follows is then the same, wherever the walk begins.
                x_T = latents.draw(lane.generator, self.shape)
                start = x_T[None] if lane.start is None else lane.start
                lane.state[: len(start)] = start.to(self.device)

        # Padding repeats the first lane's coefficients on an empty picture, and its result is dropped.
        padded = [*lanes, *[lanes[0]] * (width - sum(lane.rows for lane in lanes))]
        rows = np.array([lane.plan.table(slots)[lane.cursor] for lane in padded])

        def noise() -> Tensor:
            z = torch.zeros(len(padded), *self.shape)
            for i, lane in enumerate(lanes):
                if lane.plan.steps[lane.cursor].noisy:
                    if lane.noise is None:
                        lane.noise = latents.draw(lane.generator, self.shape)  # type: ignore[arg-type]
                    z[i] = lane.noise
            return z.to(self.device)

        if len(lanes) == len(padded) and all(lane.plan.slots == slots for lane in lanes):
            state = torch.stack([lane.state for lane in lanes])  # type: ignore[misc]
        else:
            state = torch.zeros(len(padded), slots, *self.shape, device=self.device)
            for i, lane in enumerate(lanes):
                state[i, : lane.plan.slots] = lane.state  # type: ignore[assignment]
        y = self._classes(padded) if self.conditional else None
        net = self.nets.exact if exact else self.nets.fast
        null = self.checkpoint.card.null_class
        if null is not None and any(lane.rows == 2 for lane in lanes):
            scale = torch.ones(len(padded), device=self.device)
            scale[: len(lanes)] = torch.tensor([lane.guidance for lane in lanes], device=self.device)
            net = machine.guided(net, scale, null)
        return machine.advance(net, state, rows, y, noise, show=partial(self._show, lanes))

    def _classes(self, lanes: Sequence[Lane]) -> Tensor:
        """int64 [B]; or float32 [B, K], weights of every class embedding, where some lane mixes them."""
        labels = [lane.label for lane in lanes]
        if not any(isinstance(label, tuple) for label in labels):
            return torch.tensor(labels, device=self.device)
        weights = torch.zeros(len(lanes), self.checkpoint.net.config.num_class_embeds or 0)
        for row, label in zip(weights, labels, strict=True):
            if isinstance(label, tuple):
                row[:] = torch.tensor(label)
            elif label is not None:
                row[label] = 1
        return weights.to(self.device)

    @staticmethod
    def _show(lanes: Sequence[Lane], x_0: Tensor) -> None:
        """Keep what was asked for; a step that is tried again shows the same."""
        for i, lane in enumerate(lanes):
            if lane.cursor in lane.keep:
                seen = x_0[i] if lane.look == "x_0" else lane.state[0]  # type: ignore[index]
                lane.frames[lane.cursor] = seen.float().cpu().clone()

    def end(self, lane: Lane) -> Tensor:
        """A finished lane's first slots, float32 [returns, C, H, W] on the CPU; the lane gives up its state."""
        assert lane.state is not None, "This is a bug: a lane ended before it began."
        slots = lane.state[: lane.returns].float().cpu().clone()
        lane.let_go()
        return slots
