import numpy as np
import pytest
import torch

from model.diffusion import machine
from model.diffusion.plan import Columns, Guard, Plan, Step

SHAPE = (2, 3, 3)  # C, H, W


def randn(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def guarded(watch, instead, scales=(2.0, 0.5, 1.0)):
    """One step of three slots that scales each, so that the first grows and the second falls."""
    diagonal = tuple(tuple(scale if i == j else 0.0 for j in range(3)) for i, scale in enumerate(scales))
    none = (0.0, 0.0, 0.0)
    return Plan(
        (
            Step(
                t=5,
                x0=(1.0, 0.0),
                eps=(0.0, 1.0, 0.0),
                g=(1.0, 0.0, 0.0),
                A=diagonal,
                b=none,
                c=none,
                s=none,
                guard=None if watch is None else Guard(watch, instead),
            ),
        )
    )


def zero(u, t, y):
    return torch.zeros_like(u)


@pytest.mark.parametrize(
    ("watch", "instead", "expected"),
    [
        (None, None, ("2 a", "b / 2", "c")),
        (1, (0, 2, 1), ("2 a", "b / 2", "c")),  # it decreased, so the update stands
        (0, (None, None, None), ("2 a", "b / 2", "c")),
        (0, (0, None, None), ("a", "b / 2", "c")),
        (0, (2, None, 0), ("c", "b / 2", "a")),
        (0, (1, 1, 1), ("b", "b", "b")),
        (2, (1, 2, 0), ("b", "c", "a")),  # as large as before has not decreased
    ],
)
def test_a_guard_puts_old_slots_where_the_watched_one_did_not_decrease(watch, instead, expected):
    a, b, c = randn(1, 3, *SHAPE)
    values = {"a": a, "b": b, "c": c, "2 a": 2 * a, "b / 2": b / 2}
    (found,) = machine.advance(zero, torch.stack([a, b, c])[None], guarded(watch, instead).table(3))
    assert torch.equal(found, torch.stack([values[name] for name in expected]))


def test_a_guard_goes_back_on_what_is_not_a_number():
    a, b, c = randn(1, 3, *SHAPE)
    a[0, 0, 0] = torch.nan
    (found,) = machine.advance(zero, torch.stack([a, b, c])[None], guarded(0, (1, None, None)).table(3))
    assert torch.equal(found[0], b)


def test_each_row_of_a_batch_guards_itself():
    # The same guard: rows whose watched slot falls keep their update, the others do not, and one has no guard at all.
    plans = [guarded(0, (1, None, None), (scale, 1.0, 1.0)) for scale in (0.5, 2.0, -0.9, -1.1)] + [guarded(None, None)]
    state = randn(3, 5, 3, *SHAPE)
    found = machine.advance(zero, state, np.concatenate([plan.table(3) for plan in plans]))
    expected = [0.5 * state[0, 0], state[1, 1], -0.9 * state[2, 0], state[3, 1], 2 * state[4, 0]]
    assert torch.equal(found[:, 0], torch.stack(expected))
    assert torch.equal(found[:, 1:4], torch.cat([state[:4, 1:], torch.stack([state[4, 1] / 2, state[4, 2]])[None]]))
    same = machine.advance(zero, state, np.repeat(plans[0].table(3), 5, axis=0))
    assert torch.equal(same[:, 0], 0.5 * state[:, 0])


@pytest.mark.parametrize("column", ["WATCH", 0, 1, 2], ids=["watch", "instead-0", "instead-1", "instead-2"])
def test_every_column_of_a_guard_matters(column):
    at, state, rows = Columns(3), randn(4, 1, 3, *SHAPE), guarded(0, (2, 0, 1)).table(3).copy()
    base = machine.advance(zero, state, rows)
    rows[0, at.WATCH if column == "WATCH" else at.instead[column]] = 0
    assert not torch.equal(machine.advance(zero, state, rows), base)
