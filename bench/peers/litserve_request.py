"""LitServe as it comes: requests are batched, and a batch is answered when its last row is done."""

from __future__ import annotations

from typing import Any

import litserve

from bench.peers import common, ports


class Diffusion(litserve.LitAPI):  # type: ignore[misc]
    """One process that takes batches to their end."""

    def setup(self, device: str) -> None:  # noqa: ARG002 - its signature
        self.net = common.network()
        common.warm_up(self.net)

    def batch(self, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return inputs

    def predict(self, x: list[dict[str, Any]]) -> list[dict[str, str]]:
        return common.answer_all(self.net, x)

    def unbatch(self, output: list[dict[str, str]]) -> list[dict[str, str]]:
        return output


if __name__ == "__main__":
    api = Diffusion(max_batch_size=common.CAP, batch_timeout=0.005, api_path="/predict")
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1, timeout=False)
    server.run(host="127.0.0.1", port=ports.asked(), num_api_servers=1, generate_client_file=False, log_level="warning")
