"""Servers as processes: started, compared with the reference, warmed up, and ended with all their children."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import httpx
import numpy as np

from app.cli.loadtest.load import Target
from bench.peers import common
from bench.peers.servers import Peer
from bench.server import ROOT, free_port

START_SECONDS = 90
STEPS, SEED, TOLERANCE = 10, 0, 0.02  # of the image that all must agree on, values in [-1, 1]
WARM_UP = 3  # rounds of four requests
MARK = "BENCH_MARK"  # environment variable that all processes of a server inherit
QUIET = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "BENTOML_DO_NOT_TRACK": "true",
    "RAY_USAGE_STATS_ENABLED": "0",
}


class StartError(Exception):
    """A server that did not answer in time, or with another image; the message ends with its output."""


@dataclass(frozen=True)
class Running:
    """A server that runs.

    Attributes:
        mark: value of :data:`MARK` in all its processes.
    """

    target: Target
    mark: str

    @property
    def pids(self) -> list[int]:
        """Its processes, as of now."""
        return _marked(self.mark)


@contextmanager
def running(peer: Peer) -> Iterator[Running]:
    """Start a server and warm it up; at the end all its processes are killed.

    Raises:
        StartError: it did not answer within 90 seconds, or with another image.
    """
    port, mark = free_port(), uuid.uuid4().hex
    command = [sys.executable, *(part.format(port=port) for part in peer.command)]
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {"UNSTIR_CHECKPOINT": str(common.CHECKPOINT), "PYTHONPATH": paths, MARK: mark}
    target = peer.target(port)
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **QUIET, **environment},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            _wait(peer, process, target, log)
            _compare(peer, target)
            for _ in range(WARM_UP):
                with ThreadPoolExecutor(4) as several:
                    list(several.map(lambda seed: _ask(peer, target, 10, seed), range(4)))
            yield Running(target, mark)
        finally:
            _end(process, mark)


def _ask(peer: Peer, target: Target, steps: int, seed: int, seconds: float | None = None) -> np.ndarray:
    answer = httpx.post(
        target.url, json=target.body(steps, seed), headers={"accept": target.accept}, timeout=seconds, trust_env=False
    )
    return peer.read(answer.raise_for_status().content)


def _wait(peer: Peer, process: subprocess.Popen[bytes], target: Target, log: IO[bytes]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        with contextlib.suppress(httpx.HTTPError):
            _ask(peer, target, 2, 0, seconds=max(1.0, deadline - time.monotonic()))
            return
        if process.poll() is not None or time.monotonic() > deadline:
            log.seek(0)
            raise StartError(f"{peer.name} did not start:\n{log.read().decode(errors='replace')[-3000:]}")
        time.sleep(0.2)


def _compare(peer: Peer, target: Target) -> None:
    """All must give the same image, or some would do less work."""
    (reference,) = common.answer_all(common.network(), [{"steps": STEPS, "seed": SEED}])
    expected, found = common.read_reply(json.dumps(reference).encode()), _ask(peer, target, STEPS, SEED)
    if found.shape != expected.shape or not np.abs(found - expected).max() <= TOLERANCE:
        raise StartError(f"{peer.name} gives another image")


def _end(process: subprocess.Popen[bytes], mark: str) -> None:
    """Terminate the server, then kill its other processes, in whatever group or session."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(10)
    while left := _marked(mark):
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.1)
        time.sleep(0.1)


def _marked(mark: str) -> list[int]:
    """The processes with this mark in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark.encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
    return found
