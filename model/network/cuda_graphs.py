"""An inference network whose forwards are CUDA graphs, one for each width.

A forward of a small network is some two hundred kernels, most of them shorter than their launch. Launched separately
they wait for the host; as a graph they are one launch, and the host is free to prepare the next tick.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from model.network.inference import InferenceUNet

WARM_UPS = 2  # forwards before a capture, so that compilation, autotuning and first allocations are not part of it


@dataclass(frozen=True)
class Arithmetic:
    """How a CUDA device computes float32, and which algorithms it may choose.

    Attributes:
        tf32: multiply with 10 bits of mantissa.
        benchmark: let cuDNN time all algorithms of a convolution and take the fastest; results then differ in their
            last bits between processes. Otherwise only deterministic algorithms are allowed, chosen by heuristics.
    """

    tf32: bool = False
    benchmark: bool = False

    @contextmanager
    def apply(self) -> Iterator[None]:
        """Set torch's global flags while forwards are launched or captured."""
        before = self._get()
        try:
            self._set(self.benchmark, not self.benchmark, self.tf32, "high" if self.tf32 else "highest")
            yield
        finally:
            self._set(*before)

    @staticmethod
    def _get() -> tuple[bool, bool, bool, str]:
        cudnn = torch.backends.cudnn
        return cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32, torch.get_float32_matmul_precision()

    @staticmethod
    def _set(benchmark: bool, deterministic: bool, tf32: bool, products: str) -> None:
        """By torch's older names: with the newer ones torch.compile fails (pytorch issue 166387)."""
        cudnn = torch.backends.cudnn
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # some versions warn that the older ones are deprecated
            cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32 = benchmark, deterministic, tf32
            torch.set_float32_matmul_precision(products)


@dataclass(frozen=True)
class _Graph:
    """A captured forward, and the memory that it reads and writes."""

    x: Tensor
    conditioning: Tensor
    output: Tensor
    replay: Callable[[], None]


class GraphedUNet:
    """An :class:`~model.network.inference.InferenceUNet` in CUDA graphs; widths without one are launched normally."""

    def __init__(self, net: InferenceUNet, arithmetic: Arithmetic) -> None:
        self.net = net
        self.arithmetic = arithmetic
        self._graphs: dict[int, _Graph] = {}
        self._pool: Any = None  # shared by all graphs, since they never run at the same time

    @property
    def widths(self) -> set[int]:
        """Widths with a graph."""
        return set(self._graphs)

    @torch.inference_mode()
    def capture(self, widths: Iterable[int]) -> None:
        """Capture graphs for these widths, the widest first, so that the others reuse its memory.

        Raises:
            torch.OutOfMemoryError: a width does not fit; wider ones are captured.
        """
        config, device = self.net.config, self.net.device
        for width in sorted(set(widths) - self.widths, reverse=True):
            x = torch.zeros(width, config.in_channels, *config.size, device=device)
            y = None if config.num_class_embeds is None else torch.zeros(width, dtype=torch.int64)
            conditioning = self.net.conditioning(torch.zeros(width), y)
            if self._pool is None:
                self._pool = memory_pool()
            with self.arithmetic.apply():
                output, replay = capture_graph(partial(self.net.forward, x, conditioning), self._pool)
            self._graphs[width] = _Graph(x, conditioning, output, replay)

    def conditioning(self, t: Tensor, y: Tensor | None = None) -> Tensor:
        """As :meth:`model.network.inference.InferenceUNet.conditioning`."""
        return self.net.conditioning(t, y)

    @torch.inference_mode()
    def forward(self, x: Tensor, conditioning: Tensor) -> Tensor:
        """As ``InferenceUNet.forward``; the result is overwritten by the next forward of the same width."""
        graph = self._graphs.get(len(x))
        if graph is None:
            with self.arithmetic.apply():
                return self.net.forward(x, conditioning)
        graph.x.copy_(x)
        graph.conditioning.copy_(conditioning)
        graph.replay()
        return graph.output

    def __call__(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """As :class:`model.diffusion.machine.Net`."""
        return self.forward(x, self.conditioning(t, y)).clone()


def memory_pool() -> Any:
    """Memory for graphs that are never replayed at the same time."""
    return torch.cuda.graph_pool_handle()


def capture_graph(run: Callable[[], Tensor], pool: Any) -> tuple[Tensor, Callable[[], None]]:
    """The result of ``run``, and a function that computes it again, into the same memory."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
        output = run()
    return output, graph.replay
