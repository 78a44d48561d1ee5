"""LitServe's loop for language models, given steps instead of tokens: rows come and go between forwards."""

from __future__ import annotations

import json
from typing import Any

import litserve
from litserve.loops.continuous_batching_loop import ContinuousBatchingLoop, Output
from litserve.utils import LitAPIStatus

from bench.peers import common, ports


class Diffusion(litserve.LitAPI):  # type: ignore[misc]
    """One process that takes the oldest rows it holds a step further, whenever it is asked to."""

    def setup(self, device: str) -> None:  # noqa: ARG002 - its signature
        self.net = common.network()
        self.rows: dict[str, common.Row] = {}
        common.warm_up(self.net)

    def add_request(self, uid: str, request: dict[str, Any]) -> None:
        self.rows[uid] = common.Row.of(request)

    def has_capacity(self) -> bool:
        # Whoever the loop itself keeps waiting gets no room before the next request comes, or a second has passed, and
        # those who come then go first. So all are let in, and here the oldest go first.
        return True

    def has_active_requests(self) -> bool:
        return bool(self.rows)

    def step(self, previous: list[Output] | None) -> list[Output]:  # noqa: ARG002 - its signature
        rows = dict(list(self.rows.items())[: common.CAP])  # another thread adds to them meanwhile
        common.advance(self.net, list(rows.values()))
        outputs = []
        for uid, row in rows.items():
            if row.done:
                del self.rows[uid]
                outputs.append(Output(uid, json.dumps(row.reply), LitAPIStatus.OK))
                outputs.append(Output(uid, "", LitAPIStatus.FINISH_STREAMING))
        # After a step that says nothing at all, the loop sleeps for 10 ms.
        return outputs or [Output(next(iter(rows)), "", LitAPIStatus.OK)]


if __name__ == "__main__":
    api = Diffusion(max_batch_size=common.CAP, stream=True, loop=ContinuousBatchingLoop(), api_path="/predict")
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1, timeout=False)
    server.run(host="127.0.0.1", port=ports.asked(), num_api_servers=1, generate_client_file=False, log_level="warning")
