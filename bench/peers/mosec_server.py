"""mosec: requests are batched by a Rust front, and a batch is answered when its last row is done."""

from __future__ import annotations

import os
import sys
from typing import Any

from mosec import Server, Worker

from bench.peers import common


class Diffusion(Worker):  # type: ignore[misc]
    """One process that finishes a batch before it answers."""

    def __init__(self) -> None:
        super().__init__()
        self.net = common.network()
        common.warm_up(self.net)

    def forward(self, data: list[dict[str, Any]]) -> list[dict[str, str]]:
        return common.answer_all(self.net, data)


if __name__ == "__main__":
    # By default it answers 408 after 3 s; it reads --port itself.
    sys.argv += ["--timeout", str(1000 * common.PATIENCE), "--address", "127.0.0.1", "--log-level", "warning"]
    server = Server()
    server.append_worker(
        Diffusion,
        num=1,
        max_batch_size=common.CAP,
        max_wait_time=5,
        timeout=common.PATIENCE,
        env=[{"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}],
    )
    server.run()
