"""What a client can make the service spend before it is admitted: connections, bytes, time; over a real socket."""

from __future__ import annotations

import contextlib
import json
import re
import resource
import socket
import threading
import time
from pathlib import Path

import httpx
import pytest

from app.api.connections import MIN_CONNECTIONS, count_connections, raise_file_limit
from tests.metrics import metric
from tests.process import server, wait_for

SIZE = 8 << 20
MAX_BYTES, MAX_SECONDS, MAX_LATENCY = 100e6, 2.0, 0.2  # what a body of any shape may cost
HEAD = b'--x\r\nContent-Disposition: form-data; name="%b"\r\n\r\n'
END = b"\r\n--x--\r\n"
FORM = "multipart/form-data; boundary=x"
JSON = "application/json"
URLENCODED = "application/x-www-form-urlencoded"


def filled(begin: bytes, unit: bytes, end: bytes = b"") -> bytes:
    """A body of 8 MiB: ``begin``, as many units as there is room for, ``end``."""
    return begin + unit * ((SIZE - len(begin) - len(end)) // len(unit)) + end


SHAPES = {
    "lists": (JSON, filled(b'{"labels":[', b"[],", b"[]]}")),
    "numbers": (JSON, filled(b'{"weights":[', b"1,", b"1]}")),
    "unknown keys": (JSON, b"{" + b",".join(b'"k%d":1' % i for i in range(700_000)) + b"}"),
    "depth": (JSON, filled(b'{"a":', b"[")),
    "a number": (JSON, filled(b'{"steps":', b"9", b"}")),
    "a key": (JSON, filled(b'{"', b"A", b'":1}')),
    "spaces": (JSON, filled(b"{", b" ", b"x}")),
    "escapes": (JSON, filled(b'{"a":{"npy":"', b"\\n", b'"}}')),
    "backslashes": (JSON, filled(b'{"a":"', b"\\")),
    "wide characters": (JSON, filled(b'{"a":{"npy":"', b"A", b'\\ud83d\\ude00"}}')),
    "base64 of no image": (JSON, filled(b'{"latents":[1,{"image":"', b"A", b'"}],"grid":[2,2]}')),
    "a list in a form": (FORM, HEAD % b"labels" + filled(b"[", b"[],", b"[]]") + END),
    "many items in a form": (FORM, HEAD % b"weights" + filled(b"", b"1,", b"1") + END),
    "many parts": (FORM, filled(b"", HEAD % b"a" + b"1\r\n", b"--x--\r\n")),
    "many headers": (FORM, b"--x\r\n" + filled(b"", b"a:1\r\n")),
    "near boundaries": (FORM, HEAD % b"label" + filled(b"", b"\r\n--") + END),
    "percent signs": (URLENCODED, filled(b"label=", b"%41")),
    "ampersands": (URLENCODED, filled(b"a", b"&")),
}


def memory(process, name: str) -> float:
    """Bytes of a line of /proc/pid/status: VmRSS is now, VmHWM the most since it was reset."""
    return 1024 * int(re.search(rf"{name}:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text())[1])


@contextlib.contextmanager
def latencies(base: str):
    """Asks /healthz all the time; yields the list of how long each took."""
    found: list[float] = []
    ended = threading.Event()

    def ask() -> None:
        with httpx.Client(base_url=base, trust_env=False) as client:
            while not found or not ended.wait(0.005):
                began = time.perf_counter()
                assert client.get("/healthz", timeout=10).status_code == 200
                found.append(time.perf_counter() - began)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield found
    finally:
        ended.set()
        thread.join()


@pytest.fixture(scope="module")
def served(tiny):
    with server(tiny, "--max-body-bytes", str(SIZE + 200), "--log-level", "warning") as found:
        yield found


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's peak of memory")
def test_a_body_of_any_shape_costs_little(served):
    process, client, lines = served
    for media, content in SHAPES.values():  # once before, so that what stays of the first is not counted
        client.post("/interpolate", content=content[:100_000], headers={"content-type": media})
    for name, (media, content) in SHAPES.items():
        Path(f"/proc/{process.pid}/clear_refs").write_text("5")
        before = memory(process, "VmRSS")
        with latencies(base_of(client)) as delays:
            began = time.perf_counter()
            response = client.post("/interpolate", content=content, headers={"content-type": media})
            seconds = time.perf_counter() - began
        nbytes = memory(process, "VmHWM") - before
        print(f"{name:24} {nbytes / 1e6:5.0f} MB {seconds:6.2f} s, /healthz within {max(delays) * 1e3:4.0f} ms")
        assert response.status_code in (400, 422), (name, response.status_code, response.text)
        assert len(response.content) < 6000
        assert nbytes < MAX_BYTES, (name, nbytes)
        assert seconds < MAX_SECONDS, (name, seconds)
        assert max(delays) < MAX_LATENCY, (name, max(delays))
    assert not [line for line in lines if "unexpected" in line]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's peak of memory")
def test_many_large_bodies_at_once_wait_for_room(tiny):
    content = filled(b'{"a":{"seed":1},"b":{"npy":"', b"A", b'"}}')
    with server(tiny, "--max-body-bytes", str(SIZE), "--max-upload-bytes", str(16 << 20)) as (process, client, _):
        before = memory(process, "VmRSS")
        Path(f"/proc/{process.pid}/clear_refs").write_text("5")
        statuses: list[int] = []

        def ask() -> None:
            response = httpx.post(
                f"{base_of(client)}/interpolate", content=content, headers={"content-type": JSON}, timeout=60
            )
            statuses.append(response.status_code)

        threads = [threading.Thread(target=ask) for _ in range(24)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert statuses == [422] * 24
        # Two bodies of 8 MiB at a time: what was received, its text, its bytes; 24 at once would take 500 MB and more.
        assert memory(process, "VmHWM") - before < 2 * MAX_BYTES


def base_of(client: httpx.Client) -> str:
    return f"http://{client.base_url.host}:{client.base_url.port}"


def connect(client, content: bytes = b"") -> socket.socket:
    sock = socket.create_connection((client.base_url.host, client.base_url.port))
    sock.settimeout(30)
    sock.sendall(content)
    return sock


@pytest.mark.parametrize("content", [b"", b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-Half: "], ids=["silent", "half"])
def test_a_thousand_connections_without_a_request(served, content):
    _, client, _ = served
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 2048)), hard))
    socks = [connect(client, content) for _ in range(1000)]
    try:
        for _ in range(3):
            assert httpx.get(f"{base_of(client)}/healthz", timeout=5).status_code == 200
        assert client.post("/sample", json={"steps": 2}).status_code == 200
    finally:
        for sock in socks:
            sock.close()


def test_a_full_table_answers_503_and_says_so_once(tiny):
    arguments = ("--max-connections", "8", "--header-seconds", "30")
    with server(tiny, *arguments) as (_, client, lines):
        client.close()
        busy = [connect(client, BEGUN) for _ in range(8)]  # their bodies are on the way, so none is idle
        wait_for(lambda: b"503" in answer_of(connect(client)), lines)
        for _ in range(20):
            assert b'"code": "too_many_connections"' in answer_of(connect(client))
        for sock in busy:
            sock.close()
        wait_for(lambda: b"200 OK" in answer_of(connect(client, HEALTH)), lines)
        # A request that was sent along with one before it is under way, and its connection not idle.
        pipelined = connect(client, b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n" + BEGUN)
        busy = [connect(client, BEGUN) for _ in range(7)]
        time.sleep(1.1)
        assert b"503" in answer_of(connect(client))
        pipelined.sendall(b'"steps": 2}' + b" " * 87)
        assert b"200 OK" in pipelined.recv(65536)
        for sock in (pipelined, *busy):
            sock.close()
        wait_for(lambda: b"200 OK" in answer_of(connect(client, HEALTH)), lines)
        # Idle ones make room for who comes.
        idle = [connect(client) for _ in range(8)]
        time.sleep(1.1)
        assert all(b"200 OK" in answer_of(connect(client, HEALTH)) for _ in range(3))
        assert idle[0].recv(1) == b""
        for sock in idle:
            sock.close()
        assert len([line for line in lines if "connections are taken" in line]) == 1


BEGUN = b"POST /sample HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{"
HEALTH = b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


def answer_of(sock: socket.socket) -> bytes:
    """All that is sent until the connection is closed."""
    found = b""
    with sock, contextlib.suppress(ConnectionError):
        while more := sock.recv(65536):
            found += more
    return found


def drain(sock: socket.socket) -> None:
    while sock.recv(65536):
        pass


def test_headers_bodies_and_reading_have_deadlines(tiny):
    arguments = ("--header-seconds", "0.3", "--body-seconds", "0.6", "--write-seconds", "0.5")
    with server(tiny, *arguments) as (_, client, _lines):
        assert answer_of(connect(client)) == b""
        late = answer_of(connect(client, b"GET /healthz HTTP/1.1\r\nHost:"))
        assert late.startswith(b"HTTP/1.1 408 ")
        assert json.loads(late.partition(b"\r\n\r\n")[2])["code"] == "slow_request"
        late = answer_of(connect(client, BEGUN))
        assert late.startswith(b"HTTP/1.1 408 ")
        assert b'"detail":"body = 1 bytes so far: send all of it in 0.6 s, and without a pause of 0.3 s' in late

        # The rest of a body that nobody wants has a deadline, too.
        refused = connect(client, BEGUN.replace(b"application/json", b"text/plain").replace(b"/sample", b"/nothing"))
        answer = answer_of(refused)  # until the connection is closed
        assert answer.startswith(b"HTTP/1.1 404 ")
        assert b"not_found" in answer

        # Headers of a second request have the same deadline as those of the first.
        second = connect(client, b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"200 OK" in second.recv(65536)
        second.sendall(b"GET /hea")
        assert b"HTTP/1.1 408 " in answer_of(second)

        # A kept connection may be idle for longer than headers may take.
        kept = connect(client, b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"200 OK" in kept.recv(65536)
        time.sleep(0.5)
        kept.sendall(HEALTH)
        assert b"200 OK" in answer_of(kept)

        # Who reads nothing of megabytes is disconnected.
        greedy = connect(client)
        greedy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        for _ in range(300):
            greedy.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        time.sleep(2)
        with greedy, pytest.raises(ConnectionResetError):
            drain(greedy)
        assert client.get("/healthz").status_code == 200


@pytest.mark.parametrize(
    "content",
    [
        b"NONSENSE\r\n\r\n",
        b"GET / HTTP/9\r\n\r\n",
        b"GET /x HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"\x16\x03\x01\x02",
        b"POST /sample HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz",
    ],
    ids=["words", "version", "two hosts", "tls", "chunks"],
)
def test_what_is_no_http_gets_a_problem(served, content):
    _, client, _ = served
    answer = answer_of(connect(client, content + b"\r\n\r\n"))
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert b"application/problem+json" in head
    problem = json.loads(body)
    assert problem["code"] == "invalid_http"
    assert f"X-Request-Id: {problem['request_id']}".encode() in head


def test_a_client_that_hangs_up_while_it_sends_is_no_error(tiny):
    with server(tiny) as (_, client, lines):
        for start in (BEGUN, BEGUN.replace(b"/json", b"/x-www-form-urlencoded")):
            connect(client, start).close()
        wait_for(lambda: metric(client, "unstir_requests_total", code="499") == 2, lines)
        assert metric(client, "unstir_requests_total", code="500") == 0
    assert not [line for line in lines if "Traceback" in line or "unexpected" in line]


def test_how_many_connections_the_limit_of_files_allows():
    assert count_connections(None, 4096) == (4096, 12)
    limit, accepts = count_connections(1024, 4096)
    assert 700 < limit < 960
    assert accepts == 12
    limit, accepts = count_connections(64, 4096)
    assert limit <= 42
    assert accepts == 4
    assert count_connections(1, 4096)[0] == MIN_CONNECTIONS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        assert raise_file_limit() == (None if hard == resource.RLIM_INFINITY else hard)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[1] == hard
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
