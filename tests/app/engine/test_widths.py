"""Widths of forwards: what is left of them where memory is short."""

from __future__ import annotations

from app.engine.widths import Forwards, Widths
from tests.lanes import CPU, TWO, one


def test_halving_gives_up_the_widest_first_and_ends():
    assert CPU.halve().sizes == (1, 2, 4)
    assert CPU.halve().halve().halve().sizes == (1,)
    assert CPU.halve().halve().halve().halve() is None
    assert CPU.halve().bit_identical == (4,)
    assert CPU.halve().halve().bit_identical == ()
    assert one(CPU).halve().shared
    assert not TWO.halve().shared
    narrow = Widths((1,), (0.01,))
    assert Forwards(CPU, narrow).halve() is None  # lanes of either kind would be stuck
    assert Forwards(narrow, CPU).halve() is None
