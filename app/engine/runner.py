"""Executes ticks on one device: pads lanes to a width and passes their plans to the row machine. It knows no requests.

On a CUDA device nothing here waits: coefficients, noise and classes are copied from pinned memory, the forward is a
CUDA graph, and what is copied back is read when the tick is complete. The host prepares a tick while the device is busy
with the one before.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
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
from model.diffusion.guidance import Guidance
from model.diffusion.noise import draw_noise, seeded_generator
from model.diffusion.plan import Columns
from model.network.inference import InferenceUNet

ALLOCATOR = "DefaultCPUAllocator"  # in the message of the RuntimeError that the CPU's allocator raises
NOISE_THREADS = 8  # they draw noise for a CUDA device, which would otherwise wait for it at large widths


class OutOfMemoryError(Exception):
    """The device had no room for a forward of this width; no lane has moved."""


def is_out_of_memory(error: Exception) -> bool:
    """Whether a device's or the host's allocator had no room."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or ALLOCATOR in str(error)


class Runner:
    """Advances lanes on one device. All methods are called from one thread at a time.

    Attributes:
        ahead: ticks that may be enqueued while an earlier one runs.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device, networks: Networks | None = None) -> None:
        if networks is None:
            plain = InferenceUNet(checkpoint.net, checkpoint.schedule.T)
            networks = Networks(plain, plain)
        self.checkpoint = checkpoint
        self.networks = networks
        self.device = device
        self.shape = checkpoint.shape
        self.conditional = checkpoint.net.config.num_class_embeds is not None
        self.ahead = 1 if device.type == "cuda" else 0
        self._noise_pool = ThreadPoolExecutor(NOISE_THREADS, "noise") if device.type == "cuda" else None

    @torch.inference_mode()
    def advance(self, lanes: Sequence[Lane], width: int, exact: bool = False) -> PendingTick:
        """Advance every lane by one step of its plan, in one forward of ``width`` rows.

        Cursors have moved when this returns; snapshots and :meth:`read_output` wait for the tick to complete.

        Args:
            lanes: different lanes with steps left, that take 1 to ``width`` rows together.
            exact: use the float32 network rather than the fastest one.

        Raises:
            OutOfMemoryError: the forward does not fit; all lanes are as they were.
        """
        pending = PendingTick(self.device)
        try:
            new = self._forward(lanes, width, exact, pending)
            outputs = self._copy_to_host(lanes, new)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            raise OutOfMemoryError(f"a forward of {width} rows does not fit: {error}") from error
        for i, lane in enumerate(lanes):
            lane.state, lane.noise = outputs.get(i, new[i, : lane.plan.slots]), None
            lane.cursor += 1
        pending.record()
        return pending

    @torch.inference_mode()
    def check(self) -> None:
        """Compute a row of zeros by each network, and wait for it; raises whatever a device that has failed raises."""
        y = torch.zeros(1, dtype=torch.int64) if self.conditional else None
        for net in (self.networks.fast, self.networks.exact):
            conditioning = net.conditioning(torch.zeros(1), y)
            net.forward(torch.zeros(1, *self.shape, device=self.device), conditioning).sum().item()

    def _forward(self, lanes: Sequence[Lane], width: int, exact: bool, pending: PendingTick) -> Tensor:
        """The next states [B, R, C, H, W], lanes first; it can be repeated, since noise once drawn is kept."""
        slots = max(lane.plan.slots for lane in lanes)
        self._initialize([lane for lane in lanes if lane.state is None])

        # Padding rows have the first lane's coefficients and a state of zeros; their results are dropped.
        padded = [*lanes, *[lanes[0]] * (width - sum(lane.rows for lane in lanes))]
        rows = np.array([lane.plan.table(slots)[lane.cursor] for lane in padded])
        return machine.advance(
            self._bind_network(padded, len(lanes), rows[:, Columns.T], exact),
            self._gather_states(lanes, len(padded), slots),
            rows,
            noise=partial(self._gather_noise, lanes, len(padded)),
            observe=partial(self._copy_snapshots, lanes, pending),
            kernels=self.networks.kernels,
        )

    def _initialize(self, lanes: Sequence[Lane]) -> None:
        """Seed the lanes' generators and set their first states."""
        for lane in lanes:
            lane.generator = seeded_generator(lane.seed)
        states = torch.zeros(len(lanes), max((lane.plan.slots for lane in lanes), default=0), *self.shape)
        # x_T is drawn even where it is not used, so that the noise of later steps is the same.
        self._draw(lanes)
        for state, lane in zip(states, lanes, strict=True):
            initial = lane.noise[None] if lane.initial_state is None else lane.initial_state  # type: ignore[index]
            lane.noise = None
            state[: len(initial)] = initial
        for state, lane in zip(to_device(states, self.device) if lanes else (), lanes, strict=True):
            lane.state = state[: lane.plan.slots]

    def _gather_states(self, lanes: Sequence[Lane], count: int, slots: int) -> Tensor:
        """All states [count, slots, C, H, W], zero where a lane has none: one copy for each number of slots."""
        sizes = {lane.plan.slots for lane in lanes}
        if len(lanes) == count and len(sizes) == 1:
            return torch.stack([lane.state for lane in lanes])  # type: ignore[misc]
        state = torch.zeros(count, slots, *self.shape, device=self.device)
        for size in sizes:
            at = [i for i, lane in enumerate(lanes) if lane.plan.slots == size]
            stacked = torch.stack([lanes[i].state for i in at])  # type: ignore[misc]
            if len(sizes) == 1:
                state[: len(lanes)] = stacked
            else:
                state[to_device(torch.tensor(at), self.device), :size] = stacked
        return state

    @staticmethod
    def _copy_to_host(lanes: Sequence[Lane], new: Tensor) -> dict[int, Tensor]:
        """Begin to copy the outputs of the lanes whose last step this is, by their place, in one copy."""
        done = [i for i, lane in enumerate(lanes) if lane.remaining == 1]
        if not done:
            return {}
        first, slots = done[0], max(lanes[i].output_slots for i in done)
        copies = to_host(new[first : done[-1] + 1, :slots])
        return {i: copies[i - first, : lanes[i].output_slots] for i in done}

    def _draw(self, lanes: Iterable[Lane]) -> None:
        """Draw each lane's next noise from its own generator. If one raises, the others keep what they drew."""

        def draw(lane: Lane) -> None:
            lane.noise = draw_noise(lane.generator, self.shape)  # type: ignore[arg-type]

        if self._noise_pool is None:
            for lane in lanes:
                draw(lane)
            return
        drawing = [self._noise_pool.submit(draw, lane) for lane in lanes]
        wait(drawing)  # all of them, so that none is still drawing when the step is tried again
        for each in drawing:
            each.result()

    def _gather_noise(self, lanes: Sequence[Lane], count: int) -> Tensor:
        """z [count, C, H, W], zero for rows that draw none."""
        noisy = [i for i, lane in enumerate(lanes) if lane.plan.steps[lane.cursor].noisy]
        self._draw([lanes[i] for i in noisy if lanes[i].noise is None])
        z = torch.zeros(count, *self.shape)
        for i in noisy:
            z[i] = lanes[i].noise  # type: ignore[assignment]
        return to_device(z, self.device)

    def _bind_network(self, padded: Sequence[Lane], lanes: int, t: np.ndarray, exact: bool) -> machine.Net:
        """The network for these rows: lanes, then padding, then the unconditional copies of lanes with guidance."""
        net = self.networks.exact if exact else self.networks.fast
        guidance = Guidance([lane.guidance for lane in padded[:lanes]], self.device)
        guided = guidance.guided
        assert not guided or self.checkpoint.card.null_class is not None, (
            "This is a bug: guidance without a null class."
        )
        timesteps = torch.from_numpy(t[[*range(len(t)), *guided]]).float()
        conditioning = net.conditioning(timesteps, self._classes(padded, len(guided)))
        channels = self.shape[0]
        return lambda u, _t, _y: guidance.combine(net.forward(guidance.append_copies(u), conditioning), channels)

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
    def _copy_snapshots(lanes: Sequence[Lane], pending: PendingTick, x_0: Tensor) -> None:
        """Begin to copy the snapshots of this step; a step that is repeated copies the same."""

        def keep(lane: Lane, step: int, copy: Tensor) -> None:
            lane.snapshots[step] = copy.float().clone()

        for i, lane in enumerate(lanes):
            if lane.cursor in lane.snapshot_steps:
                copy = to_host(x_0[i] if lane.snapshot_kind == "x_0" else lane.state[0])  # type: ignore[index]
                pending.on_complete.append(partial(keep, lane, lane.cursor, copy))

    def read_output(self, lane: Lane) -> Tensor:
        """A finished lane's output, float32 [output_slots, C, H, W] on the host; the lane frees its tensors."""
        assert lane.state is not None, "This is a bug: output of a lane without a state."
        output = lane.state[: lane.output_slots].float().clone()
        lane.release()
        return output
