"""BentoML: requests are batched by how long its dispatcher expects them to take, and answered batch by batch."""

from __future__ import annotations

from typing import Any

import bentoml

from bench.peers import common


@bentoml.service(workers=1, traffic={"timeout": common.PATIENCE, "max_concurrency": 100_000})
class Diffusion:
    """One process that finishes a batch before it answers."""

    def __init__(self) -> None:
        self.net = common.network()
        common.warm_up(self.net)

    # It answers 503 when it expects to be slower than max_latency_ms, 60 s by default; nothing is refused here.
    @bentoml.api(batchable=True, max_batch_size=common.CAP, max_latency_ms=1000 * common.PATIENCE)  # type: ignore[untyped-decorator]
    def sample(self, requests: list[dict[str, Any]]) -> list[dict[str, str]]:
        return common.answer_all(self.net, requests)
