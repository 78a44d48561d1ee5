"""Pending ticks: how long they took, and what is done when they are complete."""

from __future__ import annotations

import time
from functools import partial

import pytest
import torch

from app.engine.pending import PendingTick
from tests.pretend_card import DEVICE, Card, Objection

CPU = torch.device("cpu")


def test_on_the_cpu_a_tick_ends_when_it_is_recorded():
    began = time.perf_counter()
    pending = PendingTick(CPU)
    time.sleep(0.002)
    pending.record()
    elapsed = time.perf_counter() - began
    time.sleep(0.002)
    assert 0.002 <= pending.wait() <= elapsed


def test_on_a_card_its_own_clock_is_read(monkeypatch):
    Card(monkeypatch)
    pending = PendingTick(DEVICE)
    time.sleep(0.005)
    pending.record()
    assert pending.wait() == 0.001  # in seconds, what its events give in milliseconds
    with pytest.raises(Objection):
        PendingTick(DEVICE).wait()


@pytest.mark.parametrize("device", [CPU, DEVICE], ids=["cpu", "card"])
def test_callbacks_are_called_once_in_order(device, monkeypatch):
    Card(monkeypatch)
    called: list[int] = []
    pending = PendingTick(device)
    pending.on_complete += [partial(called.append, i) for i in range(3)]
    pending.record()
    assert not called
    pending.wait()
    pending.wait()
    assert called == [0, 1, 2]
