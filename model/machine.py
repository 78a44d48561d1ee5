"""The row machine: one forward and one update for a batch whose rows are at different steps of different plans."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model import latents
from model.plan import Columns, Plan

Net = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def advance(
    net: Net,
    state: Tensor,
    rows: np.ndarray,
    y: Tensor | None = None,
    noise: Callable[[], Tensor] | None = None,
    show: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Execute one step of every row: the equations of :mod:`model.plan`, with per-row coefficients.

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

    Returns:
        The new state, like ``state``.
    """
    slots, channels = state.shape[1:3]
    at = Columns(slots)
    # By column: whether a row uses it, whether it is 1 for all, and tensors [B, 1, 1, 1]; or the same numbers thrice.
    used: Any
    ones: Any
    coef: Any
    if len(rows) == 1 or (rows == rows[0]).all():
        # One picture, or pictures in step: plain numbers give the same bits with fewer operations.
        used = ones = coef = rows[0].tolist()
        t = torch.full((len(rows),), used[at.T], dtype=state.dtype, device=state.device)
    else:
        used, ones = rows.any(axis=0).tolist(), (rows == 1).all(axis=0).tolist()
        coef = torch.from_numpy(rows.T.copy()).to(state.device, state.dtype)[..., None, None, None]
        t = coef[at.T].flatten()

    def total(terms: Sequence[tuple[int, Tensor]]) -> Tensor:
        """Σ coefficient · term, over the columns that some row uses."""
        products = [term if ones[column] == 1 else coef[column] * term for column, term in terms if used[column]]
        return sum(products[1:], products[0])

    u = total([(at.g[j], state[:, j]) for j in range(slots)])
    output = net(u, t, y).to(state.dtype)
    o = output[:, :channels]
    x_0 = _clip(total([(at.P, u), (at.Q, o)]), rows, coef, used)
    if show is not None:
        show(x_0)
    eps = total([(at.E_U, u), (at.E_O, o), (at.E_X, x_0)])

    z = None
    if used[at.LEARNED] or any(used[column] for column in at.s):
        if noise is None:
            raise ValueError("this walk draws noise, and there is no source of it")
        z = noise()
    new = []
    for i in range(slots):
        terms = [(at.A[i][j], state[:, j]) for j in range(slots)] + [(at.b[i], x_0), (at.c[i], eps)]
        if z is not None:
            terms.append((at.s[i], z))
            if i == 0 and used[at.LEARNED]:
                v = output[:, channels:]
                terms.append((at.LEARNED, torch.exp((coef[at.L0] + coef[at.L1] * v) / 2) * z))
        new.append(total(terms) if any(used[column] for column, _ in terms) else torch.zeros_like(u))
    after = torch.stack(new, dim=1) if slots > 1 else new[0][:, None]
    return _guarded(after, state, rows) if used[at.WATCH] else after


def _guarded(after: Tensor, before: Tensor, rows: np.ndarray) -> Tensor:
    """Let each guarded row go back on its update, see :class:`model.plan.Guard`."""
    at = Columns(before.shape[1])
    for i in np.flatnonzero(rows[:, at.WATCH]):
        watch = int(rows[i, at.WATCH]) - 1
        fell = after[i, watch].square().mean() < before[i, watch].square().mean()  # false for NaN, too
        for slot, source in enumerate(rows[i, list(at.instead)].astype(int) - 1):
            if source >= 0:
                after[i, slot] = torch.where(fell, after[i, slot], before[i, source])
    return after


def _clip(x_0: Tensor, rows: np.ndarray, coef: Any, used: Any) -> Tensor:
    """Clamp each row to its own limit, and threshold those that ask for it by their own quantile."""
    at = Columns
    limits = rows[:, at.LIMIT].tolist()
    lowest = min(limits)
    if lowest == max(limits):
        x_0 = x_0 if lowest == math.inf else x_0.clamp(-lowest, lowest)
    else:
        x_0 = torch.maximum(torch.minimum(x_0, coef[at.LIMIT]), -coef[at.LIMIT])
    if used[at.QUANTILE]:
        x_0 = x_0.clone()
        for i in np.flatnonzero(rows[:, at.QUANTILE]):
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


def guided(net: Net, scale: Tensor, null: int) -> Net:
    """Classifier-free guidance (Ho & Salimans 2022, eq. 6): o = o_null + w (o_y - o_null), for rows with w ≠ 1.

    Such a row takes two rows of the forward, the second without its class; a learned variance is left as it was.

    Args:
        scale: [B], w of each row, which is the paper's plus 1; 1 takes no second row.
        null: the class that stands for none.
    """
    asking = scale.ne(1).nonzero().flatten()
    if not len(asking):
        return net

    def forward(u: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        assert y is not None, "This is a bug: guidance without classes."
        nobody = torch.full_like(y[asking], null)
        if y.is_floating_point():
            nobody = torch.zeros_like(y[asking])
            nobody[:, null] = 1
        output = net(torch.cat([u, u[asking]]), torch.cat([t, t[asking]]), torch.cat([y, nobody]))
        with_class, without = output[: len(u)], output[len(u) :]
        channels = u.shape[1]
        w = scale[asking].to(output.dtype)[:, None, None, None]
        blended = without[:, :channels] + w * (with_class[asking, :channels] - without[:, :channels])
        with_class = with_class.clone()
        with_class[asking, :channels] = blended
        return with_class

    return forward


def sample(net: Net, plan: Plan, seeds: Sequence[int], shape: tuple[int, ...], y: Tensor | None = None) -> Tensor:
    """Pictures [len(seeds), C, H, W] from seeds, with the noise that the server would draw for them.

    Args:
        shape: (C, H, W) of one picture.
        y: int64 [len(seeds)] on the network's device, or None.
    """
    device = next((p.device for p in getattr(net, "parameters", list)()), torch.device("cpu"))
    generators = [latents.generator(seed) for seed in seeds]

    def draw() -> Tensor:
        return torch.stack([latents.draw(g, shape) for g in generators]).to(device)

    return run(net, plan, draw(), y, draw)
