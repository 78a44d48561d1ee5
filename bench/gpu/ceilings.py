"""What the card can do at most, as measured: multiply matrices, and move bytes. And which card it is."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

import torch

from bench import timing
from bench.gpu.bench import Bench


def measure(bench: Bench, found: dict[str, Any]) -> None:
    """Operations a second of a large bfloat16 product, and bytes a second of a copy, read and written.

    Of random numbers, since a card draws less power, and so runs faster, on zeros.
    """
    side = bench.pick(8192, 128)
    a, b, c = (torch.randn(side, side, device=bench.device).bfloat16() for _ in range(3))
    count = bench.pick(1 << 30, 1 << 16)  # numbers of 2 bytes
    source = torch.randn(count // 16, device=bench.device).bfloat16().repeat(16)
    target = torch.empty_like(source)
    times = timing.alternate(
        {
            "matmul": lambda: timing.device_seconds(lambda: torch.mm(a, b, out=c), bench.pick(20, 2), bench.device),
            "copy": lambda: timing.device_seconds(lambda: target.copy_(source), bench.pick(10, 2), bench.device),
        },
        rounds=bench.pick(15, 2),
        limit=bench.left() / 2,
    )
    operations, moved = 2 * side**3, 2 * target.nbytes
    found["operations_per_second"] = timing.summarize([operations / each for each in times["matmul"]])
    found["bytes_per_second"] = timing.summarize([moved / each for each in times["copy"]])


def circumstances(device: torch.device) -> dict[str, Any]:
    """The machine and the versions."""
    facts: dict[str, Any] = {
        "device": device.type,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: _version(name) for name in ("triton", "diffusers", "unstir")},
    }
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        facts |= {
            "card": card.name,
            "memory_gib": round(card.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        }
    return facts


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
