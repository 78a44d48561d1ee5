"""Ray Serve: requests are batched in a replica, and a batch is answered when its last row is done."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any

import ray
from ray import serve
from starlette.requests import Request

from bench.peers import common


@serve.deployment(num_replicas=1, max_ongoing_requests=10_000, ray_actor_options={"num_cpus": 0.5})
class Diffusion:
    """One replica that finishes a batch before it answers."""

    def __init__(self) -> None:
        self.net = common.network()
        common.warm_up(self.net)

    @serve.batch(max_batch_size=common.CAP, batch_wait_timeout_s=0.005)  # type: ignore[untyped-decorator]
    async def answer(self, requests: list[dict[str, Any]]) -> list[dict[str, str]]:
        # In a thread, so that the next requests are received meanwhile.
        return await asyncio.to_thread(common.answer_all, self.net, requests)

    async def __call__(self, request: Request) -> Any:
        return await self.answer(await request.json())


if __name__ == "__main__":
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=100 << 20,
        runtime_env={"env_vars": {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}},
    )
    serve.start(http_options={"host": "127.0.0.1", "port": common.port()})
    serve.run(Diffusion.bind(), route_prefix="/sample")  # type: ignore[attr-defined]
    signal.pause()
