"""The process over a real socket: clients that hang up or do not read, and signals."""

from __future__ import annotations

import http.client
import signal
import socket
import threading
import time

import httpx

from app.api.server import LINGER_SECONDS
from tests.metrics import metric
from tests.process import server, wait_for


def test_hanging_up_frees_the_lanes(tiny):
    with server(tiny) as (_, client, lines):
        body = b'{"sampler": "ddpm", "n": 64}'
        for _ in range(3):
            with socket.create_connection((client.base_url.host, client.base_url.port)) as sock:
                sock.sendall(
                    b"POST /sample HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                    b"Content-Length: %d\r\n\r\n" % len(body) + body
                )
                wait_for(lambda: metric(client, "unstir_images_running") > 0, lines)
        # A later one may have left while an earlier one was still running, and have been seen to leave only now.
        gone = {"endpoint": "/sample", "outcome": "client_gone"}
        wait_for(lambda: metric(client, "unstir_requests_finished_total", **gone) == 3, lines)
        for state in ("running", "waiting"):
            assert metric(client, f"unstir_requests_{state}", endpoint="/sample") == 0
            assert metric(client, f"unstir_images_{state}") == 0
        time.sleep(0.2)  # the forward under way as they left is counted at its end
        before = metric(client, "unstir_rows_total")
        assert client.post("/sample", json={"steps": 10}).status_code == 200
        assert metric(client, "unstir_rows_total") == before + 10  # nobody's work went on in secret


def test_a_reader_who_does_not_read_holds_up_nobody(tiny):
    """Streams are made as they are read: previews wait in no queue, and others are served meanwhile."""
    with server(tiny) as (_, client, lines):
        body = b'{"sampler": "ddpm", "n": 8}'
        readers = []
        for _ in range(8):
            sock = socket.create_connection((client.base_url.host, client.base_url.port))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            sock.sendall(
                b"POST /sample HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                b"Accept: text/event-stream\r\nContent-Length: %d\r\n\r\n" % len(body) + body
            )
            readers.append(sock)
        wait_for(lambda: metric(client, "unstir_requests_running", endpoint="/sample") == 8, lines)
        for _ in range(3):
            assert client.post("/sample", json={"steps": 5}, timeout=30).status_code == 200
        assert metric(client, "unstir_event_loop_lag_seconds") < 1
        for sock in readers:
            sock.close()
        wait_for(lambda: metric(client, "unstir_requests_running", endpoint="/sample") == 0, lines)
        assert metric(client, "unstir_images_running") == metric(client, "unstir_images_waiting") == 0


def test_sigterm_finishes_what_was_accepted_and_then_exits(tiny):
    with server(tiny) as (process, client, lines):
        answers: list[httpx.Response] = []
        with httpx.Client(base_url=client.base_url, timeout=180) as other:
            request = {"sampler": "ddpm", "n": 16}
            asking = threading.Thread(target=lambda: answers.append(other.post("/sample", json=request)))
            asking.start()
            wait_for(lambda: metric(client, "unstir_images_running") > 0, lines)
            process.send_signal(signal.SIGTERM)
            wait_for(lambda: client.get("/readyz").status_code == 503, lines)
            assert "draining" in client.get("/readyz").json()["status"]
            refused = client.post("/sample", json={})
            assert (refused.status_code, refused.json()["code"]) == (503, "draining")
            asking.join()
        assert answers[0].status_code == 200
        assert process.wait(timeout=30) == 0
    assert any("drained" in line for line in lines)
    assert any("SIGTERM: draining, 1 request left, for up to 30 s" in line for line in lines)


def ask_for_much(client: httpx.Client, outcomes: list) -> threading.Thread:
    """A request of many seconds, in a thread of its own, which appends the answer."""

    def ask() -> None:
        with httpx.Client(base_url=client.base_url, timeout=180) as other:
            outcomes.append(other.post("/sample", json={"sampler": "ddpm", "n": 64}))

    thread = threading.Thread(target=ask)
    thread.start()
    return thread


def test_the_end_of_the_drain_time_cuts_requests_off_with_an_answer(tiny):
    with server(tiny, "--drain-seconds", "0.2") as (process, client, lines):
        outcomes: list = []
        asking = ask_for_much(client, outcomes)
        wait_for(lambda: metric(client, "unstir_images_running") > 0, lines)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0
        asking.join()
    assert any("drain time is over, 1 request ended with 503" in line for line in lines)
    assert (outcomes[0].status_code, outcomes[0].json()["code"]) == (503, "draining")


def test_a_second_signal_stops_at_once(tiny):
    with server(tiny, "--drain-seconds", "1000") as (process, client, lines):
        outcomes: list = []
        asking = ask_for_much(client, outcomes)
        wait_for(lambda: metric(client, "unstir_images_running") > 0, lines)
        process.send_signal(signal.SIGINT)
        wait_for(lambda: client.get("/readyz").status_code == 503, lines)
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 0
        asking.join()
        assert time.monotonic() - began < 10  # the request alone would take longer
    said = "".join(lines)
    assert "SIGINT: draining, 1 request left, for up to 1000 s; a second signal ends what is left with 503" in said
    assert "SIGINT, the second signal: stopped, 1 request ended with 503" in said
    assert "drained" not in said
    assert (outcomes[0].status_code, outcomes[0].json()["code"]) == (503, "draining")


def test_a_client_that_never_ends_its_request_does_not_hold_the_process(tiny):
    with (
        server(tiny) as (process, client, _),
        socket.create_connection((client.base_url.host, client.base_url.port)) as sock,
    ):
        sock.sendall(
            b"POST /sample HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{"
        )
        client.get("/healthz")
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=4 * LINGER_SECONDS) == 0


def test_idle_connections_are_not_the_servers_to_close(tiny):
    """A client that keeps one for 5 s, as most do, may be sending just as the server closes it."""
    with server(tiny) as (_, client, _):
        idle = http.client.HTTPConnection(client.base_url.host, client.base_url.port)
        idle.connect()
        first = idle.sock
        for pause in (6.0, 0.0):
            idle.request("GET", "/healthz")
            assert idle.getresponse().read() == b'{"status":"alive"}'
            time.sleep(pause)
        assert idle.sock is first  # it would have opened another by itself
        idle.close()
