"""On networks of real size: reproducible bits in every batch, and images in the fast dtype near those of the CPU.

The checks take any device; ``tests/test_gpu_check.py`` runs them on the CPU with tiny networks.
"""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor

from bench.gpu import engine
from bench.gpu.bench import Bench
from bench.gpu.engine import LaneLoop, Loaded
from bench.gpu.networks import MAIN, SHIPPED_NAME, networks
from model import checkpoint
from model.diffusion import machine

needs_card = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
LEAST_PSNR = 35.0  # dB


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    folder = tmp_path_factory.mktemp("networks")
    return Bench(torch.device("cuda"), False, folder, time.monotonic() + 600, print)


def outputs_of_a_lane(loaded: Loaded, steps: int) -> dict[str, Tensor]:
    """One reproducible lane alone, among others, in the last slot and joining late, in each width of the same bits.

    It draws noise at every step.
    """
    plan, others = loaded.plan("ddim", steps, eta=1.0), loaded.plan("dpmpp_2m", 2 * steps)
    loop = LaneLoop(loaded.runner)

    def mine():
        return loaded.lane(plan, 7, reproducible=True)

    def strangers(count):
        return [loaded.lane(others, 100 + i, reproducible=True) for i in range(count)]

    outputs = {}
    for width in loaded.calibration.bit_identical:
        outputs[f"alone, width {width}"] = loop.run([mine()], width, exact=True)[0]
        outputs[f"among others, width {width}"] = loop.run([mine(), *strangers(width - 1)], width, exact=True)[0]
        outputs[f"last slot, width {width}"] = loop.run([*strangers(width - 1), mine()], width, exact=True)[-1]
        before, late = strangers(width - 1), mine()
        for _ in range(steps if before else 0):
            loop.tick(before, width, exact=True)
        for _ in range(steps):
            loop.tick([*before, late], width, exact=True)
        loop.wait()
        outputs[f"joining late, width {width}"] = loaded.runner.read_output(late)
    return outputs


def least_psnr(loaded: Loaded, count: int, steps: int) -> float:
    """dB, of DDIM images in the fast dtype beside float32 on the CPU."""
    plan, width = loaded.plan("ddim", steps), max(loaded.calibration.fast)
    y = None if loaded.classes is None else torch.arange(count) % loaded.classes
    with torch.inference_mode():
        net = checkpoint.load(loaded.folder).net
        expected = machine.sample(net, plan, range(count), loaded.checkpoint.shape, y)
    found = []
    for first in range(0, count, width):
        lanes = [loaded.lane(plan, seed) for seed in range(first, min(first + width, count))]
        found += [output[0] for output in LaneLoop(loaded.runner).run(lanes, width)]
    mse = (torch.stack(found).double().clamp(-1, 1) - expected.double().clamp(-1, 1)).square().mean((1, 2, 3))
    return float(10 * torch.log10(4 / mse.max().clamp_min(4e-20)))


@needs_card
def test_reproducible_lanes_have_the_same_bits_in_every_batch(bench):
    outputs = outputs_of_a_lane(engine.load(bench, networks()[MAIN], max_width=16), 6)
    first = next(iter(outputs.values()))
    assert [name for name, output in outputs.items() if not torch.equal(output, first)] == []


@needs_card
def test_images_in_the_fast_dtype_are_near_those_of_the_cpu(bench):
    loaded = engine.load(bench, networks()[SHIPPED_NAME], max_width=16)
    assert loaded.calibration.dtype == "bfloat16"
    assert least_psnr(loaded, 16, 50) >= LEAST_PSNR
