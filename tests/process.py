"""Unstir as a process of its own, for tests over a real socket."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

ROOT = Path(__file__).resolve().parents[1]


def unstir(*arguments: str, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "app", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@contextmanager
def server(tiny: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen, httpx.Client, list[str]]]:
    """`unstir serve` on a free port, ready; yields the process, a client, and the lines of its log so far."""
    process = unstir(
        "serve", "--port", "0", "--device", "cpu", *arguments, UNSTIR_CHECKPOINT=str(tiny), UNSTIR_THREADS="1"
    )
    lines: list[str] = []
    reader = threading.Thread(target=lambda: lines.extend(iter(process.stdout.readline, "")))
    reader.start()
    try:
        base = wait_for(lambda: next(iter(re.findall(r"http://[\d.]+:\d+", "".join(lines))), None), lines)
        with httpx.Client(base_url=base, timeout=180) as client:
            wait_for(lambda: client.get("/readyz").status_code == 200, lines)
            yield process, client, lines
    finally:
        process.kill()
        process.wait()
        reader.join()
        process.stdout.close()


def wait_for(condition, lines: list[str], seconds: float = 60):
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "".join(lines)
        time.sleep(0.02)
    return value
