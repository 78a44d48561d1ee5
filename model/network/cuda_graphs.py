"""A folded network whose forwards are CUDA graphs, one for each width.

A forward of a small network is some two hundred kernels, most of them shorter than their launch. One by one they would
wait for the host; as a graph they are one launch, and the host is free to prepare what comes next.
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

WARM_UPS = 2  # before a capture: what is compiled, chosen or allocated at the first call must not be part of it


@dataclass(frozen=True)
class Arithmetic:
    """How a CUDA device computes float32, and which of its algorithms are allowed.

    Attributes:
        tf32: multiply with 10 bits of mantissa.
        chosen_by_clock: try all algorithms for a convolution, and take the fastest here and now; the bits then differ
            between processes. Otherwise only deterministic ones are allowed, chosen by rule.
    """

    tf32: bool = False
    chosen_by_clock: bool = False

    @contextmanager
    def applied(self) -> Iterator[None]:
        """While forwards are launched or captured: the device has no other memory of it."""
        before = self._now()
        try:
            self._set(self.chosen_by_clock, not self.chosen_by_clock, self.tf32, "high" if self.tf32 else "highest")
            yield
        finally:
            self._set(*before)

    @staticmethod
    def _now() -> tuple[bool, bool, bool, str]:
        cudnn = torch.backends.cudnn
        return cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32, torch.get_float32_matmul_precision()

    @staticmethod
    def _set(benchmark: bool, deterministic: bool, tf32: bool, products: str) -> None:
        """By torch's older names: where the newer are used, torch.compile fails (pytorch issue 166387)."""
        cudnn = torch.backends.cudnn
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # some versions call the older ones deprecated
            cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32 = benchmark, deterministic, tf32
            torch.set_float32_matmul_precision(products)


@dataclass(frozen=True)
class _Forward:
    """A captured forward: it reads ``x`` and ``told`` where they are, and writes ``said`` where it is."""

    x: Tensor
    told: Tensor
    said: Tensor
    replay: Callable[[], None]


class Graphed:
    """An :class:`~model.network.inference.InferenceUNet` in CUDA graphs; other widths are launched one by one."""

    def __init__(self, net: InferenceUNet, arithmetic: Arithmetic) -> None:
        self.net = net
        self.arithmetic = arithmetic
        self._forwards: dict[int, _Forward] = {}
        self._pool: Any = None  # memory of all graphs, whose intermediate results never live at the same time

    @property
    def widths(self) -> set[int]:
        """Those that were captured."""
        return set(self._forwards)

    @torch.inference_mode()
    def capture(self, widths: Iterable[int]) -> None:
        """Make graphs for these widths, the widest first, so that the others find room in its memory.

        Raises:
            torch.OutOfMemoryError: a width does not fit; those before it are there.
        """
        config, device = self.net.config, self.net.device
        for width in sorted(set(widths) - self.widths, reverse=True):
            x = torch.zeros(width, config.in_channels, *config.size, device=device)
            y = None if config.num_class_embeds is None else torch.zeros(width, dtype=torch.int64)
            told = self.net.conditioning(torch.zeros(width), y)
            if self._pool is None:
                self._pool = memory_pool()
            with self.arithmetic.applied():
                said, replay = captured(partial(self.net.forward, x, told), self._pool)
            self._forwards[width] = _Forward(x, told, said, replay)

    def conditioning(self, t: Tensor, y: Tensor | None = None) -> Tensor:
        """As :meth:`model.network.inference.InferenceUNet.conditioning`."""
        return self.net.conditioning(t, y)

    @torch.inference_mode()
    def forward(self, x: Tensor, told: Tensor) -> Tensor:
        """As ``InferenceUNet.forward``; the result is overwritten by the next forward of the same width."""
        graph = self._forwards.get(len(x))
        if graph is None:
            with self.arithmetic.applied():
                return self.net.forward(x, told)
        graph.x.copy_(x)
        graph.told.copy_(told)
        graph.replay()
        return graph.said

    def __call__(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """As :class:`model.diffusion.machine.Net` has it."""
        return self.forward(x, self.conditioning(t, y)).clone()


def memory_pool() -> Any:
    """For graphs that are never replayed at the same time."""
    return torch.cuda.graph_pool_handle()


def captured(run: Callable[[], Tensor], pool: Any) -> tuple[Tensor, Callable[[], None]]:
    """What ``run`` gives, and a function that has the device do the same again, into the same memory."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
        said = run()
    return said, graph.replay
