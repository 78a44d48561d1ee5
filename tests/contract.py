"""Requests that schemathesis makes from the OpenAPI document: ``python -m tests.contract --examples 100``.

No response may be a server error (but 504, for deadlines are among what is made), and each must have a status, a type,
headers and a body as the document says. ``--seed`` repeats a run.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
)
CONFIG = Path(__file__).with_name("schemathesis.toml")


def command(url: str, *options: str) -> list[str]:
    """The command that tries the service at this address."""
    fixed = (
        "--continue-on-failure",
        "--request-timeout",
        "120",
        "--generation-database",
        "none",
        "--checks",
        ",".join(CHECKS),
    )
    program = [str(Path(sys.executable).with_name("schemathesis")), "--config-file", str(CONFIG)]
    return [*program, "run", f"{url}/openapi.json", *fixed, *options]


if __name__ == "__main__":
    from tests.conftest import save_tiny
    from tests.process import server

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=100, help="of each endpoint, at most")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, server(save_tiny(Path(folder))) as (_, client, lines):
        options = ("--max-examples", str(arguments.examples), "--seed", str(arguments.seed))
        done = subprocess.run(command(str(client.base_url).rstrip("/"), *options), cwd=folder, check=False)
        assert not [line for line in lines if "Traceback" in line], "".join(lines)
    sys.exit(done.returncode)
