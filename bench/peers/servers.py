"""The servers that are compared: how each is started, and how it is asked."""

from __future__ import annotations

import io
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch

from app.cli.loadtest.load import Target
from app.engine.calibration import bfloat16_is_native
from bench.peers import common


def _plain(steps: int, seed: int) -> dict[str, Any]:
    return {"steps": steps, "seed": seed}


@dataclass(frozen=True)
class Peer:
    """One server.

    Attributes:
        title: its name in tables.
        command: arguments of the interpreter that start it; ``{port}`` stands for the port.
        path: of the requests.
        body: (steps, seed) to the JSON of a request.
        accept: of the requests.
        read: the values in a response, flat.
        packages: whose versions are reported.
    """

    name: str
    title: str
    command: tuple[str, ...]
    path: str = "/sample"
    body: Callable[[int, int], dict[str, Any]] = _plain
    accept: str = "application/json"
    read: Callable[[bytes], np.ndarray] = common.read_reply
    packages: tuple[str, ...] = ()

    def target(self, port: int) -> Target:
        """Requests to it; every response holds a whole image."""
        least_bytes = 4 * int(np.prod(common.checkpoint().shape))
        return Target(f"http://127.0.0.1:{port}{self.path}", self.body, self.accept, least_bytes)


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
            read=lambda content: np.load(io.BytesIO(content)).ravel(),
            packages=("fastapi", "uvicorn"),
        ),
        Peer(
            "lock_diffusers",
            "FastAPI, a lock, diffusers",
            _own("lock_diffusers"),
            packages=("diffusers", "fastapi", "uvicorn"),
        ),
        Peer("mosec", "mosec", _own("mosec_server"), "/inference", packages=("mosec",)),
        Peer("litserve_request", "LitServe", _own("litserve_server"), "/predict", packages=("litserve",)),
        Peer(
            "litserve_loop",
            "LitServe, continuous loop",
            (*_own("litserve_server"), "--continuous"),
            "/predict",
            packages=("litserve",),
        ),
        Peer(
            "bentoml",
            "BentoML",
            tuple(_BENTOML.split()),
            body=lambda steps, seed: {"requests": [{"steps": steps, "seed": seed}]},
            read=lambda content: common.read_reply(content.strip()[1:-1]),
            packages=("bentoml",),
        ),
        Peer("ray", "Ray Serve", _own("ray_server"), packages=("ray",)),
    )
}
DEEP = ("unstir", "litserve_loop", "mosec", "litserve_request", "bentoml")  # those that stand high loads


def versions(names: Sequence[str]) -> dict[str, str]:
    """Of the processor, Python and every package that matters to the results."""
    native = "with" if bfloat16_is_native() else "without"
    found = {"cpu": f"{torch.backends.cpu.get_cpu_capability()} {native} bfloat16", "python": platform.python_version()}
    for package in sorted(
        {"torch", "numpy", "httpx", *(package for name in names for package in PEERS[name].packages)}
    ):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "missing"
    return found
