"""The cost model follows the device: given ticks of a device that is slower or faster than at the start."""

from __future__ import annotations

import random

import pytest

from app.engine import cost_model as module
from app.engine.cost_model import MAX_DEVIATION, RATE, CostModel
from app.engine.widths import Forwards, Widths

LINE = Widths((1, 2, 4, 8), (0.010, 0.015, 0.026, 0.048), (4,))
EXACT = Widths((2, 4), (0.030, 0.050), (2, 4))


def shared() -> CostModel:
    return CostModel(Forwards(LINE, LINE))


def followed(model: CostModel, truth: dict[int, float], ticks: int, noise: float = 0.05) -> dict[int, float]:
    draw = random.Random(1)
    for _ in range(ticks):
        width = draw.choice(list(truth))
        model.update(False, width, truth[width] * draw.lognormvariate(0, noise))
    return dict(zip(model.forwards.fast.sizes, model.forwards.fast.seconds, strict=True))


def test_a_device_as_it_was_stays_so():
    found = followed(shared(), dict(zip(LINE.sizes, LINE.seconds, strict=True)), 500)
    assert found == pytest.approx(dict(zip(LINE.sizes, LINE.seconds, strict=True)), rel=0.04)


def test_what_slows_all_down_is_soon_known_of_all():
    """Even of widths that were not tried meanwhile, and none seems dearer beside the others for having been tried."""
    model = shared()
    found = followed(model, {8: 0.048 * 1.5}, 60)
    assert found[8] == pytest.approx(0.072, rel=0.05)
    assert found[1] / 0.010 == pytest.approx(1.5, rel=0.05)
    assert model.ratio == pytest.approx(found[1] / 0.010, rel=0.001)


def test_a_busy_device_that_falters_is_not_served_narrower_forwards():
    """Ticks that are slow for seconds, and some that hang: eight rows at once stay best, by 8 %."""
    model, draw = shared(), random.Random(1)
    taken, slow = [], 1.0
    for _ in range(5000):
        slow = max(1.0, slow + draw.gauss(0, 0.03))
        width = min(model.forwards.fast.sizes, key=lambda size: model.forwards.fast.time(size) / size)
        stopped = 3.0 if draw.random() < 0.02 * width / 8 else 0.0
        model.update(False, width, LINE.time(width) * slow * draw.lognormvariate(0, 0.1) + stopped)
        taken.append(width)
    assert taken.count(8) > 0.99 * len(taken)


def test_a_width_that_was_thought_too_dear_is_tried_again():
    bent = Widths(LINE.sizes, (0.010, 0.015, 0.026, 0.0533), (4,))  # eight rows at once seem not to pay, by 2.5 %
    model = CostModel(Forwards(bent, bent))
    truth, taken = dict(zip(LINE.sizes, LINE.seconds, strict=True)), []
    for _ in range(40_000):
        width = min(model.forwards.fast.sizes, key=lambda size: model.forwards.fast.time(size) / size)
        model.update(False, width, truth[width])
        taken.append(width)
    assert set(taken[:1000]) == {4}
    assert taken[-1000:].count(8) > 980


def test_a_line_that_was_bent_is_straightened():
    truth = {1: 0.012, 2: 0.015, 4: 0.026, 8: 0.043}
    assert followed(shared(), truth, 4000) == pytest.approx(truth, rel=0.05)


def test_a_tick_that_hangs_counts_little():
    model = shared()
    model.update(False, 1, 60.0)
    assert model.ratio == pytest.approx(MAX_DEVIATION**RATE)
    # The only tick so far says nothing about its width beside the others.
    assert model.forwards.fast.seconds[0] == pytest.approx(0.010 * model.ratio, rel=1e-9)


def test_ticks_without_end_leave_times_within_bounds():
    model = shared()
    for seconds in (1e3, 1e-9):
        for _ in range(5000):
            model.update(False, 4, seconds)
        assert 1 / 256 <= model.forwards.fast.time(4) / 0.026 <= 256


def test_a_device_that_is_fifty_times_as_slow_is_known_to_be_and_said_once(caplog):
    model = shared()
    for slow, warnings in ((50.0, 1), (1.0, 1), (3.0, 2)):
        found = followed(model, {4: 0.026 * slow, 8: 0.048 * slow}, 300)
        assert found[4] == pytest.approx(0.026 * slow, rel=0.05)
        assert len(caplog.messages) == warnings
    assert "forwards take 2 times as long as they were calibrated" in caplog.text
    assert "UNSTIR_THREADS" in caplog.text


def test_one_kind_stays_one_kind_and_two_stay_two():
    model = shared()
    model.update(True, 4, 0.05)
    assert model.forwards.shared
    model = CostModel(Forwards(LINE, EXACT))
    for _ in range(10):
        model.update(False, 8, 0.048)
    model.update(True, 4, 0.1)
    assert not model.forwards.shared
    fast, exact = model.forwards.fast, model.forwards.exact
    assert fast.time(4) / 0.026 == pytest.approx(model.ratio, rel=0.001)
    assert exact.time(4) / 0.050 > model.ratio  # its own width's share
    assert exact.bit_identical == (2, 4)


def test_each_kind_of_forward_is_compared_with_its_own_times():
    model = CostModel(Forwards(LINE, EXACT))
    model.update(True, 4, EXACT.time(4))
    model.update(False, 4, LINE.time(4))
    assert model.ratio == pytest.approx(1)
    assert (model.widths(True).sizes, model.widths(False).sizes) == (EXACT.sizes, LINE.sizes)


def test_a_tick_of_a_width_that_was_given_up_is_ignored():
    model = shared()
    model.update(False, 4, 0.05)
    assert model.halve()
    before, ratio = model.forwards, model.ratio
    model.update(False, 8, 60.0)
    assert (model.forwards, model.ratio) == (before, ratio)


def test_the_wider_half_is_given_up_and_the_ratio_kept():
    model = shared()
    followed(model, {1: 0.020, 8: 0.096}, 200)
    assert model.halve()
    assert model.forwards.fast.sizes == (1, 2, 4)
    assert model.forwards.fast.time(1) == pytest.approx(0.020, rel=0.05)
    assert [model.halve() for _ in range(3)] == [True, True, False]
    assert model.forwards.fast.sizes == (1,)


def test_widths_given_up_come_back_and_later_each_time_that_it_was_too_early(monkeypatch):
    monkeypatch.setattr(module, "WIDEN_TICKS", 10)
    model = shared()

    def ticks_until_wider() -> int:
        cap, ticks = model.forwards.fast.cap, 0
        while model.forwards.fast.cap == cap:
            model.update(False, 1, LINE.seconds[0])
            ticks += 1
            assert ticks < 10_000
        return ticks

    model.halve()
    model.halve()
    assert [ticks_until_wider(), ticks_until_wider()] == [10, 10]
    assert model.forwards.fast.sizes == LINE.sizes
    waits = []
    for _ in range(3):
        model.halve()
        waits.append(ticks_until_wider())
    assert waits == [40, 160, 640]
    for _ in range(640):
        model.update(False, 1, LINE.seconds[0])
    model.halve()
    assert ticks_until_wider() == 10  # the memory was there all that time
