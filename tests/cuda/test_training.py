"""Training on a real card: that the host never waits for it, that it learns, and that a run can be taken up again."""

from __future__ import annotations

import os
import time
import warnings
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch

from model import checkpoint
from model.training.batches import Batches
from model.training.run import train
from model.training.trainer import AHEAD, Trainer
from tests.tiny_training import CPU, TINY, assert_equal_states, shades

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("default"),  # torch.compile warns of its own doings
]
CUDA = torch.device("cuda")
# Read by cuBLAS once, at the first multiplication of the process: without it no product is deterministic.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@contextmanager
def nobody_waits():
    """Any call that makes the host wait for the device is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the mode's own: it is a prototype
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


@contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("resident", [True, False])
def test_the_order_of_the_images_is_that_of_a_cpu_and_the_noise_repeats(resident):
    recipe, dataset = replace(TINY, flip=False, label_drop=0.0, batch=7), shades(10)
    there, again = (Batches(recipe, dataset, 1000, CUDA, resident) for _ in range(2))
    here = Batches(recipe, dataset, 1000, CPU)
    for step in (0, 1, 2, 1):
        batch, same, plain = there.at(step), again.at(step), here.at(step)
        assert all(torch.equal(a, b) for a, b in zip(batch, same, strict=True))
        # float32: a CUDA device multiplies by 1/127.5 instead of dividing, a rounding of values up to 2.
        assert (batch.x_0.cpu() - plain.x_0).abs().max() < 1e-6
        assert torch.equal(batch.y.cpu(), plain.y)
        assert (batch.t[:3] + batch.t[4:] == 999).all()
        assert batch.x_0.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("resident", [True, False], ids=["resident", "sent"])
def test_no_step_waits_for_the_device(resident, compiled):
    trainer = Trainer.start(replace(TINY, precision="auto", steps=100), shades(10), CUDA, resident)
    if compiled:
        pytest.importorskip("triton")
        assert trainer.compile() is None
    for _ in range(2):
        trainer.advance()  # moments and plans of convolutions are made in the first
    with nobody_waits():
        for _ in range(10):
            trainer.advance()
            assert len(trainer._queued) <= AHEAD
        with pytest.raises(RuntimeError, match="synchroniz"):
            assert trainer.loss


def test_it_learns_in_bf16_compiled_once():
    pytest.importorskip("triton")
    recipe = replace(TINY, steps=120, batch=16, lr=1e-2, dropout=0.0, flip=False, ema=0.9, precision="auto")
    trainer = Trainer.start(recipe, shades(10), CUDA)
    assert trainer.precision == "bf16"
    assert trainer.compile() is None
    with torch.compiler.set_stance("fail_on_recompile"):
        trainer.advance()
        before = trainer.loss
        while trainer.progress() < 1:
            trainer.advance()
    assert 0.8 < before < 1.2  # no noise predicted: the mean square of 1024 Gaussians, and a bias
    assert trainer.loss < before / 2


def test_a_compiled_gradient_is_the_eager_one():
    pytest.importorskip("triton")
    eager, compiled = (Trainer.start(replace(TINY, dropout=0.0), shades(10), CUDA) for _ in range(2))
    for trainer in (eager, compiled):
        torch.nn.init.normal_(trainer.net.conv_out.weight, std=0.2, generator=torch.Generator(CUDA).manual_seed(1))
    assert compiled.compile() is None
    for trainer in (eager, compiled):
        trainer._gradient(trainer.batches.at(0))
    for name, parameter in eager.net.named_parameters():
        other = dict(compiled.net.named_parameters())[name].grad
        # Convolutions are in TF32 on both sides: ten bits, and sums of up to 256 pixels in another order.
        scale = parameter.grad.abs().max()
        assert (parameter.grad - other).abs().max() <= 0.02 * scale + 1e-5, name


def test_a_resumed_run_is_the_uninterrupted_run_where_torch_is_deterministic(tmp_path):
    with deterministic():
        whole, first = (Trainer.start(TINY, shades(10), CUDA) for _ in range(2))
        for _ in range(7):
            whole.advance()
        for _ in range(4):
            first.advance()
        first.save_state(tmp_path / "state.pt")
        assert not first._queued
        second = Trainer.start(TINY, shades(10), CUDA)
        second.load_state(tmp_path / "state.pt")
        assert_equal_states(first, second)
        for _ in range(3):
            second.advance()
        assert_equal_states(whole, second)


def test_seconds_are_those_of_the_device():
    recipe = replace(TINY, size=32, channels=(64, 128), attention=(16,), head_dim=32, batch=256, steps=100)
    images = np.zeros((16, 32, 32, 1), np.uint8)
    trainer = Trainer.start(recipe, replace(shades(16), images=images), CUDA)
    for _ in range(5):
        trainer.advance()
    trainer.catch_up()
    torch.cuda.synchronize()
    before, began = trainer.seconds, time.perf_counter()
    for _ in range(20):
        trainer.advance()
    trainer.catch_up()
    wall = time.perf_counter() - began
    torch.cuda.synchronize()
    assert time.perf_counter() - began < 1.2 * wall + 0.01  # nothing was left to wait for
    assert 0.9 * wall < trainer.seconds - before <= wall


def test_a_whole_run_leaves_a_checkpoint_and_no_settings_behind(tmp_path):
    dataset = shades(10)
    np.savez(tmp_path / "data.npz", images=dataset.images, labels=dataset.labels, names=np.array(dataset.classes))
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark
    recipe = replace(TINY, precision="auto", weights="bfloat16", steps=3)
    train(tmp_path / "data.npz", tmp_path / "out", recipe, CUDA)
    trainer = train(tmp_path / "data.npz", tmp_path / "out", replace(recipe, steps=6), CUDA, resume=True)
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark) == before
    assert trainer.step == 6
    found = checkpoint.load(tmp_path / "out", CUDA)
    assert found.card.training["precision"] == "bf16"
    assert (tmp_path / "out" / "samples" / "step-0000006.png").exists()
