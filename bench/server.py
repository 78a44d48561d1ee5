"""`unstir serve` as a process of its own, for measurements and for tests over a real socket."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

ROOT = Path(__file__).resolve().parents[1]
START_SECONDS = 60


@dataclass(frozen=True)
class Served:
    """A running server.

    Attributes:
        base: its address, without a slash at the end.
        lines: of its log, so far.
    """

    process: subprocess.Popen[str]
    base: str
    lines: list[str] = field(default_factory=list)

    def series(self, name: str) -> dict[tuple[str, ...], float]:
        """The present values of a metric, by the values of its labels.

        Raises:
            KeyError: the server exports no such metric.
        """
        text = httpx.get(f"{self.base}/metrics", trust_env=False).text
        samples = (each for family in text_string_to_metric_families(text) for each in family.samples)
        found = {tuple(each.labels.values()): each.value for each in samples if each.name == name}
        if not found:
            raise KeyError(name)
        return found

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels, now; raises KeyError as :meth:`series` does."""
        return sum(self.series(name).values())


def unstir(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    """The command line of this checkout, with its output and errors in one pipe."""
    return subprocess.Popen(
        [sys.executable, "-m", "app", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@contextlib.contextmanager
def server(*arguments: str, within: float = START_SECONDS, **environment: str) -> Iterator[Served]:
    """`unstir serve` on a free port, ready; killed at the end if it still runs.

    Args:
        within: seconds until it must be ready.

    Raises:
        RuntimeError: it was not; with its log.
    """
    port = free_port()
    process = unstir("serve", "--port", str(port), *arguments, **environment)
    served = Served(process, f"http://127.0.0.1:{port}")
    log = process.stdout
    assert log is not None
    # Read all the time, or it would fill the pipe.
    reader = threading.Thread(target=lambda: served.lines.extend(iter(log.readline, "")))
    reader.start()
    try:
        _wait(served, within)
        yield served
    finally:
        process.kill()
        process.wait()
        reader.join()
        log.close()


def free_port() -> int:
    """A port that nobody listened on just now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def _wait(served: Served, within: float) -> None:
    deadline = time.monotonic() + within
    while time.monotonic() < deadline and served.process.poll() is None:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{served.base}/readyz", trust_env=False).status_code == 200:
                return
        time.sleep(0.05)
    raise RuntimeError("unstir did not become ready:\n" + "".join(served.lines))
