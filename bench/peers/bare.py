"""The bare network: forwards in a loop, without a server. Everything else is measured against it."""

from __future__ import annotations

import statistics
import time

import torch
from torch import Tensor

from bench.peers import common

ROUNDS = 15


def inputs(width: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Arguments of a forward of so many rows."""
    return torch.randn(width, *common.checkpoint().shape), torch.full((width,), 500.0), common.null_class(width)


@torch.inference_mode()
def forward_seconds() -> dict[str, float]:
    """Median seconds of a forward by width; widths alternate, as they do in a server."""
    net, batches = common.network(), {width: inputs(width) for width in range(1, common.CAP + 1)}
    times: dict[int, list[float]] = {width: [] for width in batches}
    for _ in range(ROUNDS):
        for width, batch in batches.items():
            began = time.perf_counter()
            net(*batch)
            times[width].append(time.perf_counter() - began)
    return {str(width): statistics.median(each) for width, each in times.items()}


@torch.inference_mode()
def rows_per_second(seconds: float) -> float:
    """Of the widest forwards, over so many seconds from now."""
    net, batch = common.network(), inputs(common.CAP)
    count, began = 0, time.perf_counter()
    while (lasted := time.perf_counter() - began) < seconds:
        net(*batch)
        count += 1
    return common.CAP * count / lasted
