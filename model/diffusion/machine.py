"""The row machine: one forward and one update for a batch whose rows are at different steps of different plans."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from model.device import to_device
from model.diffusion.noise import draw_noise, seeded_generator
from model.diffusion.plan import Columns, Plan

Net = Callable[[Tensor, Tensor, Tensor | None], Tensor]


class Kernels(Protocol):
    """The update of all rows in one or two launches, bit-identical: :mod:`model.diffusion.machine_triton`."""

    def predict(self, u: Tensor, output: Tensor, coef: Tensor) -> Tensor:
        """x̂0 [B, C, H, W], clamped to each row's limit."""

    def update(
        self,
        state: Tensor,
        u: Tensor,
        output: Tensor,
        z: Tensor | None,
        coef: Tensor,
        x_0: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The new state, and x̂0 unless it is given; ``coef`` is float32 [B, K], lines of ``Plan.table(R)``."""

    def guard(self, after: Tensor, before: Tensor, coef: Tensor) -> None:
        """Apply the guards, in place on ``after``."""


def advance(
    net: Net,
    state: Tensor,
    rows: np.ndarray,
    y: Tensor | None = None,
    noise: Callable[[], Tensor] | None = None,
    observe: Callable[[Tensor], None] | None = None,
    kernels: Kernels | None = None,
) -> Tensor:
    """Execute one step of every row: the equations of :mod:`model.diffusion.plan`, with per-row coefficients.

    A row's result depends on its own line of ``rows`` alone; a term whose coefficient is zero for every row is left
    out, which changes no bits.

    Args:
        net: (u [B, C, H, W], t [B], y) to [B, C, H, W], or 2C channels where the variance is learned.
        state: [B, R, C, H, W], float32 or float64; left untouched.
        rows: float64 [B, K], each a line of ``Plan.table(R)``.
        y: int64 [B], the classes, for a class-conditional network; or float [B, K], weights of all K of them.
        noise: returns z [B, C, H, W]; called at most once, after the forward has succeeded, and only if a row needs it;
            None for deterministic plans.
        observe: is called with x̂0 [B, C, H, W].
        kernels: for a float32 state on a device that they run on; None computes operation by operation.

    Raises:
        ValueError: a row draws noise, and ``noise`` is None.

    Returns:
        The new state, like ``state``.
    """
    at = Columns(state.shape[1])
    c = _Coefficients(rows, state, as_table=kernels is not None)
    u = c.weighted_sum([(at.g[j], state[:, j]) for j in range(state.shape[1])])
    output = net(u, c.t, y).to(state.dtype)
    z = None
    if c.used[at.LEARNED] or any(c.used[column] for column in at.s):
        if noise is None:
            raise ValueError("a stochastic plan needs a source of noise")
        z = noise()
    if kernels is not None:
        after, x_0 = _update_by_kernels(kernels, state, u, output, z, c)
    else:
        after, x_0 = _update(state, u, output, z, c)
        if c.used[at.WATCH]:
            after = _apply_guards(after, state, rows)
    if observe is not None:
        observe(x_0)
    return after


class _Coefficients:
    """One step's coefficients of every row, by column.

    Attributes:
        used: by column, whether any row's coefficient is not 0.
        table: float [B, K] on the device, if kernels take it.
        t: [B] on the device.
    """

    def __init__(self, rows: np.ndarray, state: Tensor, *, as_table: bool) -> None:
        at = Columns
        self.rows = rows
        self.table: Tensor | None = None
        # By column, whether the coefficient is 1 for all rows, and its values [B, 1, 1, 1]; or plain floats.
        self._ones: Any
        self._coef: Any
        if not as_table and (len(rows) == 1 or (rows == rows[0]).all()):
            # One image, or images at the same step: plain floats give the same bits with fewer operations.
            self.used = self._ones = self._coef = rows[0].tolist()
            self.t = torch.full((len(rows),), self.used[at.T], dtype=state.dtype, device=state.device)
            return
        self.used, self._ones = rows.any(axis=0).tolist(), (rows == 1).all(axis=0).tolist()
        lines = torch.from_numpy(rows if as_table else rows.T.copy()).to(state.dtype)
        table = to_device(lines, state.device)
        if as_table:
            self.table, table = table, table.T
        self._coef = table[..., None, None, None]
        self.t = table[at.T]

    def __getitem__(self, column: int) -> Any:
        return self._coef[column]

    def weighted_sum(self, terms: Sequence[tuple[int, Tensor]]) -> Tensor:
        """Σ coefficient · term over pairs (column, term), without columns that no row uses."""
        products = [
            term if self._ones[column] == 1 else self._coef[column] * term
            for column, term in terms
            if self.used[column]
        ]
        return sum(products[1:], products[0])


def _update(state: Tensor, u: Tensor, output: Tensor, z: Tensor | None, c: _Coefficients) -> tuple[Tensor, Tensor]:
    """S' and x̂0, from the network's input and output."""
    slots, channels = state.shape[1:3]
    at = Columns(slots)
    o = output[:, :channels]
    x_0 = _threshold(_clamp(c.weighted_sum([(at.P, u), (at.Q, o)]), c), c.rows)
    eps = c.weighted_sum([(at.E_U, u), (at.E_O, o), (at.E_X, x_0)])
    new = []
    for i in range(slots):
        terms = [(at.A[i][j], state[:, j]) for j in range(slots)] + [(at.b[i], x_0), (at.c[i], eps)]
        if z is not None:
            terms.append((at.s[i], z))
            if i == 0 and c.used[at.LEARNED]:
                v = output[:, channels:]
                terms.append((at.LEARNED, torch.exp((c[at.L0] + c[at.L1] * v) / 2) * z))
        new.append(c.weighted_sum(terms) if any(c.used[column] for column, _ in terms) else torch.zeros_like(u))
    return torch.stack(new, dim=1) if slots > 1 else new[0][:, None], x_0


def _update_by_kernels(
    kernels: Kernels, state: Tensor, u: Tensor, output: Tensor, z: Tensor | None, c: _Coefficients
) -> tuple[Tensor, Tensor]:
    assert c.table is not None, "This is a bug: kernels without a table."
    u, output, given = u.contiguous(), output.contiguous(), None
    if c.used[Columns.QUANTILE]:
        given = _threshold(kernels.predict(u, output, c.table), c.rows)
    after, x_0 = kernels.update(state, u, output, z, c.table, given)
    if c.used[Columns.WATCH]:
        kernels.guard(after, state, c.table)
    return after, x_0


def _apply_guards(after: Tensor, before: Tensor, rows: np.ndarray) -> Tensor:
    """Replace slots of guarded rows in place, see :class:`model.diffusion.plan.Guard`."""
    at = Columns(before.shape[1])
    for i in np.flatnonzero(rows[:, at.WATCH]):
        watch = int(rows[i, at.WATCH]) - 1
        decreased = after[i, watch].square().mean() < before[i, watch].square().mean()  # false for NaN
        for slot, source in enumerate(rows[i, list(at.instead)].astype(int) - 1):
            if source >= 0:
                after[i, slot] = torch.where(decreased, after[i, slot], before[i, source])
    return after


def _clamp(x_0: Tensor, c: _Coefficients) -> Tensor:
    """Clamp each row to its own limit."""
    limits = c.rows[:, Columns.LIMIT].tolist()
    lowest = min(limits)
    if lowest == max(limits):
        return x_0 if lowest == math.inf else x_0.clamp(-lowest, lowest)
    return torch.maximum(torch.minimum(x_0, c[Columns.LIMIT]), -c[Columns.LIMIT])


def _threshold(x_0: Tensor, rows: np.ndarray) -> Tensor:
    """Dynamic thresholding of the rows whose plan has it, see :class:`model.diffusion.plan.Clip`."""
    at = Columns
    thresholded = np.flatnonzero(rows[:, at.QUANTILE])
    if len(thresholded):
        x_0 = x_0.clone()
        for i in thresholded:
            threshold = torch.quantile(x_0[i].abs().flatten(), float(rows[i, at.QUANTILE]))
            threshold = threshold.clamp(1, max(1.0, float(rows[i, at.CEILING])))
            x_0[i] = torch.minimum(torch.maximum(x_0[i], -threshold), threshold) / threshold
    return x_0


def run(net: Net, plan: Plan, x: Tensor, y: Tensor | None = None, noise: Callable[[], Tensor] | None = None) -> Tensor:
    """Execute a whole plan for the batch ``x`` [B, C, H, W]: the plain loop, without a server.

    Args:
        noise: returns z [B, C, H, W], one after another for the stochastic steps.
    """
    return run_slots(net, plan, x[:, None], y, noise)[:, 0]


def run_slots(
    net: Net, plan: Plan, slots: Tensor, y: Tensor | None = None, noise: Callable[[], Tensor] | None = None
) -> Tensor:
    """:func:`run` for plans that start from, or end with, more than one slot.

    Args:
        slots: the first slots of every trajectory, [B, 1..R, C, H, W]; the others start at zero.

    Returns:
        All slots, [B, R, C, H, W].
    """
    batch, given, *shape = slots.shape
    state = torch.zeros(batch, plan.slots, *shape, dtype=slots.dtype, device=slots.device)
    state[:, :given] = slots
    for line in plan.table(plan.slots):
        state = advance(net, state, np.broadcast_to(line, (batch, len(line))), y, noise)
    return state


def sample(net: Net, plan: Plan, seeds: Sequence[int], shape: tuple[int, ...], y: Tensor | None = None) -> Tensor:
    """Images [len(seeds), C, H, W] from seeds, with the noise that the server draws for them.

    Args:
        shape: (C, H, W) of one image.
        y: int64 [len(seeds)] on the network's device, or None.
    """
    device = next((p.device for p in getattr(net, "parameters", list)()), torch.device("cpu"))
    generators = [seeded_generator(seed) for seed in seeds]

    def draw() -> Tensor:
        return torch.stack([draw_noise(g, shape) for g in generators]).to(device)

    return run(net, plan, draw(), y, draw)
