"""What the card can do at most, as measured: multiply matrices, and move bytes. And which card it is."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from typing import Any

import torch

from bench.gpu import clock
from bench.gpu.bench import Bench


def measure(bench: Bench, found: dict[str, Any]) -> None:
    """Operations a second of a large bfloat16 product, and bytes a second of a copy, read and written.

    Random numbers, since a card draws less power, and so runs faster, on zeros.
    """
    side = bench.of(8192, 128)
    a, b, c = (torch.randn(side, side, device=bench.device).bfloat16() for _ in range(3))
    count = bench.of(1 << 30, 1 << 16)  # numbers of 2 bytes
    there = torch.randn(count // 16, device=bench.device).bfloat16().repeat(16)
    here = torch.empty_like(there)
    times = clock.in_rounds(
        {
            "matmul": lambda: clock.seconds(lambda: torch.mm(a, b, out=c), bench.of(20, 2), bench.device),
            "copy": lambda: clock.seconds(lambda: here.copy_(there), bench.of(10, 2), bench.device),
        },
        rounds=bench.of(15, 2),
        limit=bench.left() / 2,
    )
    found["matmul"] = {
        "side": side,
        "operations_per_second": clock.summary([2 * side**3 / each for each in times["matmul"]]),
    }
    moved = 2 * here.nbytes
    found["copy"] = {"bytes": moved, "bytes_per_second": clock.summary([moved / each for each in times["copy"]])}


def circumstances(device: torch.device) -> dict[str, Any]:
    """The machine and the versions, as far as they can be told."""
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
            "processors": card.multi_processor_count,
            "capability": f"{card.major}.{card.minor}",
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
            "driver": _driver(),
        }
    return facts


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return run.stdout.split("\n")[0].strip()
