"""The servers that are compared: how each is started, and how it is asked."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import httpx
import numpy as np

from app.cli.loadtest.load import Target
from bench.peers import common
from bench.server import ROOT, free_port

PYTHON = sys.executable
START_SECONDS = 90
STEPS, SEED, LIKE = 10, 0, 0.02  # of an image that all must draw, values in [-1, 1] differing by no more
LEAST_PNG = 500  # bytes of any image here, and more than any answer without one
MARK = "BENCH_MARK"
QUIET = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "BENTOML_DO_NOT_TRACK": "true",
    "RAY_USAGE_STATS_ENABLED": "0",
}


class StartError(Exception):
    """A server that did not answer in time; the message ends with what it said."""


def _array(content: bytes) -> np.ndarray:
    return common.pixels(content) if content.startswith(common.PNG) else np.load(io.BytesIO(content)).ravel()


def _plain(steps: int, seed: int) -> dict[str, Any]:
    return {"steps": steps, "seed": seed}


@dataclass(frozen=True)
class Peer:
    """One server.

    Attributes:
        title: what people call it.
        command: that starts it, after the interpreter; ``{port}`` stands for the port.
        path: that is asked.
        body: (steps, seed) to the JSON of a request.
        accept, accept_png: what it is asked for, where answers are numbers, and where they are PNGs.
        image: the numbers in an answer, flat.
        packages: whose versions matter.
        step_level: whether rows may join and leave between two forwards.
        warm_up: how many requests it is sent before anything is measured.
    """

    name: str
    title: str
    command: tuple[str, ...]
    path: str = "/sample"
    body: Callable[[int, int], dict[str, Any]] = _plain
    accept: str = "application/json"
    accept_png: str = "application/json"
    image: Callable[[bytes], np.ndarray] = common.image
    packages: tuple[str, ...] = ()
    step_level: bool = False
    warm_up: int = 12

    def target(self, port: int) -> Target:
        """Where and what to ask; every answer holds a whole image."""
        url = f"http://127.0.0.1:{port}{self.path}"
        if common.in_png():
            return Target(url, self.body, self.accept_png, LEAST_PNG)
        return Target(url, self.body, self.accept, 4 * int(np.prod(common.checkpoint().shape)))


def _own(name: str) -> tuple[str, ...]:
    return ("-m", f"bench.peers.{name}", "--port", "{port}")


UNSTIR = ("--threads", "1", "--device", "cpu", "--dtype", "float32", "--max-width", "8", "--log-level", "warning")
_BENTOML = "-m bentoml serve bench.peers.bentoml_service:Diffusion --host 127.0.0.1 --port {port}"
PEERS = {
    peer.name: peer
    for peer in (
        Peer(
            "unstir",
            "Unstir",
            ("-m", "app", "serve", "--port", "{port}", *UNSTIR),
            body=lambda steps, seed: {"steps": steps, "seed": seed, "sampler": "ddim"},
            accept="application/x-npy",
            accept_png="image/png",
            image=_array,
            packages=("fastapi", "uvicorn"),
            step_level=True,
        ),
        Peer(
            "lock_diffusers",
            "FastAPI, a lock, diffusers",
            _own("lock_diffusers"),
            packages=("diffusers", "fastapi", "uvicorn"),
        ),
        Peer("mosec", "mosec", _own("mosec_server"), "/inference", packages=("mosec",)),
        Peer("litserve_request", "LitServe", _own("litserve_request"), "/predict", packages=("litserve",)),
        Peer(
            "litserve_loop",
            "LitServe, continuous loop",
            _own("litserve_loop"),
            "/predict",
            packages=("litserve",),
            step_level=True,
        ),
        Peer(
            "bentoml",
            "BentoML",
            tuple(_BENTOML.split()),
            body=lambda steps, seed: {"requests": [{"steps": steps, "seed": seed}]},
            image=lambda content: common.image(content.strip()[1:-1]),
            packages=("bentoml",),
        ),
        Peer("ray", "Ray Serve", _own("ray_server"), packages=("ray",)),
    )
}


@dataclass(frozen=True)
class Running:
    """A server that runs.

    Attributes:
        target: how to ask it.
        mark: that all its processes bear.
    """

    target: Target
    mark: str

    @property
    def pids(self) -> list[int]:
        """Its processes, as of now."""
        return _marked(self.mark)

    def stop(self) -> None:
        """Let all of it stand still, with everything that it is about."""
        self._send(signal.SIGSTOP)

    def go_on(self) -> None:
        """After :meth:`stop`."""
        self._send(signal.SIGCONT)

    def _send(self, what: signal.Signals) -> None:
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, what)


@contextmanager
def running(peer: Peer) -> Iterator[Running]:
    """Start a server and warm it up; at the end every process of it is gone.

    Raises:
        StartError: it did not answer within 90 seconds, or with another image.
    """
    port, mark = free_port(), uuid.uuid4().hex
    command = [PYTHON, *(part.format(port=port) for part in peer.command)]
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    bench = {"UNSTIR_CHECKPOINT": str(common.CHECKPOINT), "PYTHONPATH": paths, MARK: mark}
    target = peer.target(port)
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **QUIET, **bench},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            _wait(peer, process, target, log)
            yield Running(target, mark)
        finally:
            _end(process, mark)


def ask(peer: Peer, target: Target, steps: int, seed: int, seconds: float | None = None) -> np.ndarray:
    """The image, flat.

    Raises:
        httpx.HTTPError: there was no answer, or a refusal.
    """
    answer = httpx.post(
        target.url, json=target.body(steps, seed), headers={"accept": target.accept}, timeout=seconds, trust_env=False
    )
    return peer.image(answer.raise_for_status().content)


def _wait(peer: Peer, process: subprocess.Popen[bytes], target: Target, log: IO[bytes]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        with contextlib.suppress(httpx.HTTPError):
            ask(peer, target, 2, 0, seconds=max(1.0, deadline - time.monotonic()))
            break
        if process.poll() is not None or time.monotonic() > deadline:
            log.seek(0)
            raise StartError(f"{peer.name} did not start:\n{log.read().decode(errors='replace')[-3000:]}")
        time.sleep(0.2)
    _compare(peer.name, ask(peer, target, STEPS, SEED))
    for _ in range(peer.warm_up // 4):
        with ThreadPoolExecutor(4) as several:
            list(several.map(lambda seed: ask(peer, target, 10, seed), range(4)))


def _compare(name: str, found: np.ndarray) -> None:
    """Everybody must draw the same image, or some would do less work.

    Raises:
        StartError: it is another.
    """
    request = {"steps": STEPS, "seed": SEED}
    mine = common.image(json.dumps(common.answer_all(common.network(), [request])[0]).encode())
    least = 127.5 * LIKE if common.in_png() else LIKE
    if found.shape != mine.shape or not np.abs(found.astype(float) - mine.astype(float)).max() <= least:
        raise StartError(f"{name} draws another image")


def _end(process: subprocess.Popen[bytes], mark: str) -> None:
    """Ask the server to stop; then kill what it left behind, in whatever group or session."""
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
    """The processes that were started with this mark in their environment, and still run."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark.encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
    return found
