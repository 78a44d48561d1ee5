"""LitServe: batching requests as it does by default, or with its loop for language models, steps instead of tokens.

By default a batch is answered when its last row is done; in the loop (``--continuous``) rows join and leave between
forwards.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import litserve
from litserve.loops.continuous_batching_loop import ContinuousBatchingLoop, Output
from litserve.utils import LitAPIStatus

from bench.peers import common


class Batched(litserve.LitAPI):  # type: ignore[misc]
    """One process that finishes a batch before it answers."""

    def setup(self, device: str) -> None:  # noqa: ARG002 - its signature
        self.net = common.network()
        common.warm_up(self.net)

    def batch(self, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return inputs

    def predict(self, x: list[dict[str, Any]]) -> list[dict[str, str]]:
        return common.answer_all(self.net, x)

    def unbatch(self, output: list[dict[str, str]]) -> list[dict[str, str]]:
        return output


class Continuous(litserve.LitAPI):  # type: ignore[misc]
    """One process that advances the oldest rows it holds, whenever the loop asks."""

    def setup(self, device: str) -> None:  # noqa: ARG002 - its signature
        self.net = common.network()
        common.warm_up(self.net)
        self.rows: dict[str, common.Row] = {}

    def add_request(self, uid: str, request: dict[str, Any]) -> None:
        self.rows[uid] = common.Row.start(request)

    def has_capacity(self) -> bool:
        # A request that the loop itself keeps waiting is admitted only when the next one comes or a second has passed,
        # and later ones overtake it. So all are admitted, and here the oldest go first.
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
        # After a step without any output, the loop sleeps for 10 ms.
        return outputs or [Output(next(iter(rows)), "", LitAPIStatus.OK)]


if __name__ == "__main__":
    if "--continuous" in sys.argv:
        api = Continuous(max_batch_size=common.CAP, stream=True, loop=ContinuousBatchingLoop(), api_path="/predict")
    else:
        api = Batched(max_batch_size=common.CAP, batch_timeout=0.005, api_path="/predict")
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1, timeout=False)
    server.run(host="127.0.0.1", port=common.port(), num_api_servers=1, generate_client_file=False, log_level="warning")
