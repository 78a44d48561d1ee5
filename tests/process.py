"""Unstir as a process of its own, for tests over a real socket."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from bench import server as bench

unstir = bench.unstir


@contextmanager
def server(tiny: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen, httpx.Client, list[str]]]:
    """`unstir serve`, ready; yields the process, a client, and the lines of its log so far."""
    with (
        bench.server("--device", "cpu", *arguments, UNSTIR_CHECKPOINT=str(tiny), UNSTIR_THREADS="1") as served,
        httpx.Client(base_url=served.base, timeout=180) as client,
    ):
        yield served.process, client, served.lines


def wait_for(condition, lines: list[str], seconds: float = 60):
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "".join(lines)
        time.sleep(0.02)
    return value
