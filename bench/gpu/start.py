"""How long the server takes to be ready: the first time on a machine, and once that has left something to go by."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from bench import server
from bench.gpu.bench import Bench
from bench.gpu.networks import Network

PATIENCE = 120.0  # seconds


def measure(network: Network, bench: Bench, found: dict[str, Any]) -> None:
    """Seconds from the command to readiness: with nothing compiled or measured before, and again."""
    checkpoint, kept = network.folder(bench.folder, bench.device), bench.folder / "kept"
    for which in ("first", "again"):
        bench.tell(f"{which} start")
        found[f"{which}_seconds"] = round(_seconds(bench, checkpoint, kept), 2)


def _seconds(bench: Bench, checkpoint: Path, kept: Path) -> float:
    options = ["--checkpoint", str(checkpoint), "--device", str(bench.device), "--cache", str(kept)]
    options += bench.of([], ["--threads", "1", "--max-width", "4"])
    began = time.monotonic()
    with server.server(*options, within=PATIENCE, TRITON_CACHE_DIR=str(kept / "triton")):
        return time.monotonic() - began
