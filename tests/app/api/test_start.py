"""The process as it starts: what stops it at once, and what its log says."""

from __future__ import annotations

import json
import signal
import socket

import pytest

from tests.process import server, unstir, wait_for


def test_a_log_for_machines(tiny):
    with server(tiny, "--log-format", "json") as (_, client, lines):
        client.post("/sample", json={"steps": 2}, headers={"x-request-id": "mine"})
        wait_for(lambda: any("/sample" in line for line in lines), lines)
    entries = [json.loads(line) for line in lines if line.startswith("{")]
    [line] = [entry for entry in entries if entry.get("path") == "/sample"]
    assert (line["request_id"], line["status"], line["level"], line["sampler"]) == ("mine", 200, "info", "ddim")
    assert line["ms"] > 0


@pytest.mark.parametrize(
    ("arguments", "environment", "words"),
    [
        (["--port", "eighty"], {}, "--port (UNSTIR_PORT) = eighty: must be an integer of 0 to 65535"),
        (["--device", "tpu"], {}, "= tpu: choose auto, cpu, cuda or cuda:N"),
        (["--device", "cuda:99"], {}, "--device (UNSTIR_DEVICE) = cuda:99: "),
        (["--device", "cpu", "--dtype", "tf32"], {}, "--dtype (UNSTIR_DTYPE) = tf32: only CUDA devices have it"),
        ([], {"UNSTIR_MAX_IMAGES": "0"}, "(UNSTIR_MAX_IMAGES) = 0: "),
        (["--checkpoint", "no/such/folder"], {}, "no such folder"),
    ],
    ids=["port", "device", "no-such-card", "dtype", "environment", "checkpoint"],
)
def test_a_bad_setting_stops_the_start(arguments, environment, words):
    process = unstir("serve", *arguments, **environment)
    output, _ = process.communicate(timeout=180)
    assert process.returncode == 2
    assert words in output
    assert "Traceback" not in output


def test_a_broken_checkpoint_stops_the_process(tmp_path):
    process = unstir("serve", "--port", "0", "--device", "cpu", "--checkpoint", str(tmp_path))
    output, _ = process.communicate(timeout=180)
    assert process.returncode == 1
    assert "is no checkpoint; neither unet/ nor config.json is in it" in output
    assert "Traceback" not in output


def test_a_port_in_use_stops_the_process_at_once(tiny):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        process = unstir("serve", "--port", port, "--device", "cpu", "--checkpoint", str(tiny))
        output, _ = process.communicate(timeout=180)
    assert process.returncode != 0
    assert "address already in use" in output
    assert "choose another --port (UNSTIR_PORT)" in output
    assert "Traceback" not in output


def test_a_signal_while_loading_does_not_wait_for_the_network(tiny):
    # A width that takes this network minutes to warm up.
    process = unstir(
        "serve", "--port", "0", "--device", "cpu", "--checkpoint", str(tiny), "--reproducible-width", "1024",
        "--max-width", "1024", UNSTIR_THREADS="1", PYTHONUNBUFFERED="1",
    )  # fmt: skip
    lines: list[str] = []
    while "Uvicorn running" not in "".join(lines):
        lines.append(process.stdout.readline())
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "ready" not in output
