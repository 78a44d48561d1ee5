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
    """The update of all rows in one or two launches, with the same bits: :mod:`model.diffusion.machine_triton`."""

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
        """Let guarded rows go back on their update, in place."""


def advance(
    net: Net,
    state: Tensor,
    rows: np.ndarray,
    y: Tensor | None = None,
    noise: Callable[[], Tensor] | None = None,
    show: Callable[[Tensor], None] | None = None,
    kernels: Kernels | None = None,
) -> Tensor:
    """Execute one step of every row: the equations of :mod:`model.diffusion.plan`, with per-row coefficients.

    What happens to a row depends on its own line of ``rows`` alone; a term that is zero for every row is left out,
    which changes no bits.

    Args:
        net: (u [B, C, H, W], t [B], y) to [B, C, H, W], or 2C channels where the variance is learned.
        state: [B, R, C, H, W], float32 or float64; left untouched.
        rows: float64 [B, K], each a line of ``Plan.table(R)``.
        y: int64 [B], the classes, for a class-conditional network; or float [B, K], weights of all K of them.
        noise: gives z [B, C, H, W]; called at most once, after the forward has succeeded, and only if a row needs it;
            None for walks that draw none.
        show: is shown x̂0 [B, C, H, W], for whoever wants to look on.
        kernels: for a float32 state on a device that they run on; None computes operation by operation.

    Returns:
        The new state, like ``state``.
    """
    at = Columns(state.shape[1])
    c = _Coefficients(rows, state, as_table=kernels is not None)
    u = c.total([(at.g[j], state[:, j]) for j in range(state.shape[1])])
    output = net(u, c.t, y).to(state.dtype)
    z = None
    if c.used[at.LEARNED] or any(c.used[column] for column in at.s):
        if noise is None:
            raise ValueError("this walk draws noise, and there is no source of it")
        z = noise()
    if kernels is not None:
        after, x_0 = _by_kernels(kernels, state, u, output, z, c)
    else:
        after, x_0 = _updated(state, u, output, z, c)
        if c.used[at.WATCH]:
            after = _guarded(after, state, rows)
    if show is not None:
        show(x_0)
    return after


class _Coefficients:
    """One step's numbers of every row, by column.

    Attributes:
        used: whether a row's is not 0.
        table: float [B, K] on the device, where kernels want it.
        t: [B] on the device.
    """

    def __init__(self, rows: np.ndarray, state: Tensor, *, as_table: bool) -> None:
        at = Columns
        self.rows = rows
        self.table: Tensor | None = None
        # Whether a number is 1 for all rows, and the numbers, [B, 1, 1, 1]; or the same plain ones.
        self._ones: Any
        self._coef: Any
        if not as_table and (len(rows) == 1 or (rows == rows[0]).all()):
            # One image, or images in step: plain numbers give the same bits with fewer operations.
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

    def total(self, terms: Sequence[tuple[int, Tensor]]) -> Tensor:
        """Σ coefficient · term, over the columns that some row uses."""
        products = [
            term if self._ones[column] == 1 else self._coef[column] * term
            for column, term in terms
            if self.used[column]
        ]
        return sum(products[1:], products[0])


def _updated(state: Tensor, u: Tensor, output: Tensor, z: Tensor | None, c: _Coefficients) -> tuple[Tensor, Tensor]:
    """S' and x̂0, from what the network said of u."""
    slots, channels = state.shape[1:3]
    at = Columns(slots)
    o = output[:, :channels]
    x_0 = _thresholded(_clamped(c.total([(at.P, u), (at.Q, o)]), c), c.rows)
    eps = c.total([(at.E_U, u), (at.E_O, o), (at.E_X, x_0)])
    new = []
    for i in range(slots):
        terms = [(at.A[i][j], state[:, j]) for j in range(slots)] + [(at.b[i], x_0), (at.c[i], eps)]
        if z is not None:
            terms.append((at.s[i], z))
            if i == 0 and c.used[at.LEARNED]:
                v = output[:, channels:]
                terms.append((at.LEARNED, torch.exp((c[at.L0] + c[at.L1] * v) / 2) * z))
        new.append(c.total(terms) if any(c.used[column] for column, _ in terms) else torch.zeros_like(u))
    return torch.stack(new, dim=1) if slots > 1 else new[0][:, None], x_0


def _by_kernels(
    kernels: Kernels, state: Tensor, u: Tensor, output: Tensor, z: Tensor | None, c: _Coefficients
) -> tuple[Tensor, Tensor]:
    assert c.table is not None, "This is a bug: kernels without a table."
    u, output, given = u.contiguous(), output.contiguous(), None
    if c.used[Columns.QUANTILE]:
        given = _thresholded(kernels.predict(u, output, c.table), c.rows)
    after, x_0 = kernels.update(state, u, output, z, c.table, given)
    if c.used[Columns.WATCH]:
        kernels.guard(after, state, c.table)
    return after, x_0


def _guarded(after: Tensor, before: Tensor, rows: np.ndarray) -> Tensor:
    """Let each guarded row go back on its update, see :class:`model.diffusion.plan.Guard`."""
    at = Columns(before.shape[1])
    for i in np.flatnonzero(rows[:, at.WATCH]):
        watch = int(rows[i, at.WATCH]) - 1
        fell = after[i, watch].square().mean() < before[i, watch].square().mean()  # false for NaN, too
        for slot, source in enumerate(rows[i, list(at.instead)].astype(int) - 1):
            if source >= 0:
                after[i, slot] = torch.where(fell, after[i, slot], before[i, source])
    return after


def _clamped(x_0: Tensor, c: _Coefficients) -> Tensor:
    """Each row within its own limit."""
    limits = c.rows[:, Columns.LIMIT].tolist()
    lowest = min(limits)
    if lowest == max(limits):
        return x_0 if lowest == math.inf else x_0.clamp(-lowest, lowest)
    return torch.maximum(torch.minimum(x_0, c[Columns.LIMIT]), -c[Columns.LIMIT])


def _thresholded(x_0: Tensor, rows: np.ndarray) -> Tensor:
    """The rows that ask for it by their own quantile, see :class:`model.diffusion.plan.Clip`."""
    at = Columns
    asking = np.flatnonzero(rows[:, at.QUANTILE])
    if len(asking):
        x_0 = x_0.clone()
        for i in asking:
            threshold = torch.quantile(x_0[i].abs().flatten(), float(rows[i, at.QUANTILE]))
            threshold = threshold.clamp(1, max(1.0, float(rows[i, at.CEILING])))
            x_0[i] = torch.minimum(torch.maximum(x_0[i], -threshold), threshold) / threshold
    return x_0


def run(net: Net, plan: Plan, x: Tensor, y: Tensor | None = None, noise: Callable[[], Tensor] | None = None) -> Tensor:
    """Take every row of ``x`` [B, C, H, W] along the whole plan in step: the plain loop, without a server.

    Args:
        noise: gives z [B, C, H, W] for each stochastic step in turn.
    """
    return run_slots(net, plan, x[:, None], y, noise)[:, 0]


def run_slots(
    net: Net, plan: Plan, slots: Tensor, y: Tensor | None = None, noise: Callable[[], Tensor] | None = None
) -> Tensor:
    """:func:`run` for walks that start from, or end with, more than one slot.

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


class Guidance:
    """Classifier-free guidance (Ho & Salimans 2022, eq. 6): o = o_null + w (o_y - o_null), for rows with w ≠ 1.

    Such a row takes two rows of the forward, the second, its twin, without its class and behind all others; a learned
    variance is left as it was.

    Attributes:
        asking: the rows with w ≠ 1, in the order of their twins.
    """

    def __init__(self, scale: Sequence[float], device: torch.device) -> None:
        """``scale``: w of each row, which is the paper's plus 1; 1 takes no second row."""
        self.asking = [i for i, w in enumerate(scale) if w != 1]
        if self.asking:
            self._w = to_device(torch.tensor([scale[i] for i in self.asking])[:, None, None, None], device)
            self._at = to_device(torch.tensor(self.asking), device)

    def doubled(self, rows: Tensor) -> Tensor:
        """``rows`` [B, …], and the twins after them."""
        return torch.cat([rows, rows.index_select(0, self._at)]) if self.asking else rows

    def blended(self, output: Tensor, channels: int) -> Tensor:
        """[B, …] out of what the network says of :meth:`doubled` rows; ``channels`` of it are o."""
        if not self.asking:
            return output
        said, without = output[: -len(self.asking)], output[-len(self.asking) :, :channels]
        of_class = said.index_select(0, self._at)[:, :channels]
        said = said.clone()
        said[self._at, :channels] = without + self._w.to(output.dtype) * (of_class - without)
        return said


def guided(net: Net, scale: Tensor, null: int) -> Net:
    """The network with :class:`Guidance`; ``scale`` is w of each row, ``null`` the class that stands for none."""
    guidance = Guidance(scale.tolist(), scale.device)
    if not guidance.asking:
        return net

    def forward(u: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        assert y is not None, "This is a bug: guidance without classes."
        classes = guidance.doubled(y)
        if y.is_floating_point():
            classes[len(y) :] = 0
            classes[len(y) :, null] = 1
        else:
            classes[len(y) :] = null
        return guidance.blended(net(guidance.doubled(u), guidance.doubled(t), classes), u.shape[1])

    return forward


def sample(net: Net, plan: Plan, seeds: Sequence[int], shape: tuple[int, ...], y: Tensor | None = None) -> Tensor:
    """Images [len(seeds), C, H, W] from seeds, with the noise that the server would draw for them.

    Args:
        shape: (C, H, W) of one image.
        y: int64 [len(seeds)] on the network's device, or None.
    """
    device = next((p.device for p in getattr(net, "parameters", list)()), torch.device("cpu"))
    generators = [seeded_generator(seed) for seed in seeds]

    def draw() -> Tensor:
        return torch.stack([draw_noise(g, shape) for g in generators]).to(device)

    return run(net, plan, draw(), y, draw)
