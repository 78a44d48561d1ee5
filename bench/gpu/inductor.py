"""The forward that torch.compile makes of the same network, beside the one that is made by hand."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.gpu import beside, clock
from bench.gpu.bench import Bench
from bench.gpu.engine import Served
from bench.gpu.networks import Network
from model.network.cuda_graphs import Arithmetic, Graphed
from model.network.inference import InferenceUNet


@torch.inference_mode()
def measure(network: Network, bench: Bench, found: dict[str, Any]) -> None:
    """Both as CUDA graphs, in turns, at one row and at the most that a forward takes; and what compiling took."""
    served = beside.load(bench, network)
    for width in sorted({served.widths[-1], 1}):
        bench.tell(f"torch.compile, width {width}")
        began = time.monotonic()
        compiled = _compiled(bench, served, width)
        took = time.monotonic() - began
        turns = {
            name: partial(clock.seconds, forward, bench.of(20, 2), bench.device)
            for name, forward in (("compiled", compiled), ("by_hand", served.bare(width)))
        }
        times = clock.in_rounds(turns, bench.of(15, 2), 0.2 * bench.left())
        found[str(width)] = {
            **{name: clock.summary(each) for name, each in times.items()},
            "times_as_long": clock.ratios(times["compiled"], times["by_hand"]),
            "compile_seconds": round(took, 2),
        }


def _compiled(bench: Bench, served: Served, width: int) -> Callable[[], Tensor]:
    """Of the same weights in bfloat16 and channels_last, whose operations are torch's own; on a CPU only traced."""
    x, t, y = served.rows(width)
    torch.compiler.reset()
    form = InferenceUNet(served.checkpoint.net, served.checkpoint.schedule.T, torch.bfloat16, "channels_last")
    backend = "inductor" if bench.device.type == "cuda" else "eager"
    form.forward = torch.compile(form.forward, backend=backend, fullgraph=True, dynamic=False)  # type: ignore[method-assign]
    told = form.conditioning(t, y)
    forward: Callable[[Tensor, Tensor], Tensor] = form.forward
    if bench.device.type == "cuda":
        graphed = Graphed(form, Arithmetic(chosen_by_clock=True))
        graphed.capture([width])
        forward = graphed.forward
    forward(x, told)
    return partial(forward, x, told)
