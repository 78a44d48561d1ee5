"""Where the time of a saturated forward goes, kernel by kernel."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import torch
from torch.profiler import DeviceType, ProfilerActivity, profile

from bench.gpu import beside, clock
from bench.gpu.bench import Bench
from bench.gpu.networks import Network

KINDS = {  # the first whose pattern is in the kernel's name; some are of model/kernels
    "attention": r"flash|fmha|attention|softmax",
    "convolutions and products": r"conv|gemm|cutlass|xmma|wgmma|matmul|nvjet",
    "norms": r"norm|welford|moments|^_whole|^_measure",
    "moving and laying out": r"copy|cat|transpose|nchw|nhwc|memcpy|memset|upsample|pad|index|gather",
    "number by number": r"elementwise|vectorized|silu|add|mul|clamp|residual|triton",
}
MOST = 25  # kernels that are listed
FORWARDS = 5


class Kernel(NamedTuple):
    """Of one forward: seconds in this kernel, and how often it ran."""

    seconds: float
    calls: float


@torch.inference_mode()
def measure(network: Network, bench: Bench, found: dict[str, Any]) -> None:
    """Seconds by kernel and by kind, of a few forwards at the widest."""
    if bench.device.type != "cuda":
        found["left_out"] = "a CPU has no kernels to tell of"
        return
    served = beside.load(bench, network)
    width = served.widths[-1]
    forward = served.bare(width)
    forward()
    whole = clock.seconds(forward, 4 * FORWARDS, bench.device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for _ in range(FORWARDS):
            forward()
        clock.synchronize(bench.device)
    found["width"] = width
    found |= account(
        {
            each.key: Kernel(each.self_device_time_total / 1e6 / FORWARDS, each.count / FORWARDS)
            for each in profiler.key_averages()
            if each.device_type == DeviceType.CUDA and not each.is_user_annotation
        },
        whole,
    )


def account(kernels: dict[str, Kernel], whole: float) -> dict[str, Any]:
    """Shares of a forward that takes so many seconds; what is missing from 1, the device idled or overlapped."""
    kinds: dict[str, float] = {}
    for name, each in kernels.items():
        kinds[kind(name)] = kinds.get(kind(name), 0.0) + each.seconds / whole
    top = sorted(kernels.items(), key=lambda item: -item[1].seconds)[:MOST]
    return {
        "forward_seconds": whole,
        "busy_share": sum(kinds.values()),
        "kinds": dict(sorted(kinds.items(), key=lambda item: -item[1])),
        "kernels": [
            {"name": name[:160], "seconds": each.seconds, "calls": each.calls, "share": each.seconds / whole}
            for name, each in top
        ],
    }


def kind(kernel: str) -> str:
    """What a kernel does, as far as its name says."""
    return next((name for name, pattern in KINDS.items() if re.search(pattern, kernel.lower())), "other")
