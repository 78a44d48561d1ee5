"""`unstir loadtest`: arrivals, records, summaries, and what it says when it cannot measure."""

from __future__ import annotations

import asyncio
import json
import math
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise

import httpx
import pytest

from app.cli.loadtest import command, load, report
from app.cli.loadtest.load import LoadError, Record, Target
from app.cli.main import main
from app.cli.mix import Arrival, Mix, MixError, poisson

MIXED = Mix.parse("10:0.6,20:0.3,100:0.1")


def body(steps: int, seed: int) -> dict[str, int]:
    return {"steps": steps, "seed": seed}


def target(handler, **more) -> Target:
    return Target("http://test/sample", body, transport=httpx.MockTransport(handler), **more)


def measured(handler, use, **more):
    async def run():
        async with load.connected(target(handler, **more)) as client:
            return await use(client)

    return asyncio.run(run())


def test_mix():
    assert MIXED.steps == [10, 20, 100]
    assert MIXED.mean == pytest.approx(22)
    assert Mix.parse("50").weights == {50: 1.0}
    assert Mix.parse("20:3, 10:1").weights == {10: 0.25, 20: 0.75}
    assert Mix.parse(str(MIXED)) == MIXED


@pytest.mark.parametrize(
    "text", ["", "ten:1", "10:x", "10:0", "10:-1", "0:1", "10:inf", "10:nan", "10:1,10:2", "10:1,"]
)
def test_bad_mix(text):
    with pytest.raises(MixError):
        Mix.parse(text)


def test_arrivals_are_poisson_and_seeded():
    rate, seconds = 5.0, 2000.0
    arrivals = poisson(MIXED, rate, seconds, seed=3)
    assert arrivals == poisson(MIXED, rate, seconds, seed=3)
    assert arrivals != poisson(MIXED, rate, seconds, seed=4)
    times = [arrival.at for arrival in arrivals]
    assert times == sorted(times)
    assert 0 <= times[0] <= times[-1] < seconds
    expected = rate * seconds
    assert abs(len(arrivals) - expected) < 4 * math.sqrt(expected)
    gaps = [later - earlier for earlier, later in pairwise(times)]
    assert sum(gap > 1 / rate for gap in gaps) / len(gaps) == pytest.approx(math.exp(-1), abs=0.02)  # exponential
    for steps, weight in MIXED.weights.items():
        share = sum(arrival.steps == steps for arrival in arrivals) / len(arrivals)
        assert abs(share - weight) < 4 * math.sqrt(weight * (1 - weight) / len(arrivals))
    assert len({arrival.seed for arrival in arrivals}) == len(arrivals)


def test_every_load_of_a_seed_asks_for_the_same_work():
    slow, fast = poisson(MIXED, 1, 100, 7), poisson(MIXED, 2, 100, 7)
    assert [arrival.steps for arrival in slow] == [arrival.steps for arrival in fast[: len(slow)]]


def test_summary():
    records = [
        Record(0, 0, 10, latency=1.0, status=200),
        Record(1, 1.5, 10, latency=3.0, status=200),
        Record(2, 2, 100, latency=10.0, status=200),
        Record(2, 2, 100, latency=30.0, error=load.UNANSWERED),
        Record(3, 3, 10, latency=0.1, status=429, retry_after=2),
        Record(3, 3, 10, latency=0.1, status=504),
        Record(3, 3, 10, latency=0.1, status=500),
        Record(3, 3, 10, latency=0.1, status=200, error="an answer of 3 bytes"),
        Record(3, 3, 10, latency=5.0, status=200, retry_after=2, retried=True),
        Record(3, 3, 10, latency=5.0, status=429, retry_after=2, retried=True),
    ]
    summary = report.summarize(records, 40.0, {10: 1.0, 100: 5.0})
    assert summary["outcomes"] == {"ok": 4, "429": 2, "504": 1, "other": 1, "errors": 1, "unanswered": 1}
    assert summary["requests_per_second"] == 4 / 40
    assert summary["row_steps_per_second"] == 130 / 40
    short, long = summary["classes"]["10"], summary["classes"]["100"]
    assert short["latency"] == {"mean": 3, "p50": 3, "p95": pytest.approx(4.8), "p99": pytest.approx(4.96)}
    assert long["slowdown"]["mean"] == 4  # 10 s and at least 30 s, over 5 s
    assert summary["slowdown"]["mean"] == pytest.approx((1 + 3 + 5 + 2 + 6) / 5)
    assert summary["retried"] == {"requests": 2, "admitted": 1}
    assert summary["late_sends"]["mean"] == 0.05
    printed = report.table(summary)
    assert "4 ok, 2 429, 1 504, 1 other, 1 errors, 1 unanswered" in printed
    assert "retries after Retry-After: 2, then answered: 1" in printed
    json.dumps(summary)


def test_summary_of_nothing_answered():
    summary = report.summarize([Record(0, 0, 10, status=429)], 1.0, {})
    assert summary["slowdown"] == summary["classes"]["10"]["latency"] == {}
    assert "1 429" in report.table(summary)


def test_open_loop_waits_for_nobody():
    async def slow(request: httpx.Request) -> httpx.Response:
        await asyncio.sleep(0.3 if json.loads(request.content)["steps"] == 100 else 0.01)
        return httpx.Response(200, content=b"image")

    arrivals = [Arrival(0.0, 100, 0), *(Arrival(0.02 * i, 10, i) for i in range(1, 6))]
    run = measured(slow, lambda client: load.open_loop(client, arrivals))
    assert [record.steps for record in run.records] == [100, 10, 10, 10, 10, 10]
    assert all(record.ok for record in run.records)
    assert 0.3 <= run.records[0].latency <= run.seconds < 2
    assert all(record.latency < 0.25 for record in run.records[1:])
    assert [record.arrival for record in run.records] == [arrival.at for arrival in arrivals]


def test_those_given_up_have_waited_until_then():
    async def never(request: httpx.Request) -> httpx.Response:
        await asyncio.sleep(60 if json.loads(request.content)["steps"] == 100 else 0)
        return httpx.Response(200, content=b"image")

    arrivals = [Arrival(0.0, 100, 0), Arrival(0.01, 10, 1)]
    run = measured(never, lambda client: load.open_loop(client, arrivals, patience=0.1))
    assert [record.unanswered for record in run.records] == [True, False]
    assert run.records[1].ok
    assert 0.1 <= run.records[0].latency < 5


def test_retry_after_is_heeded_once():
    asked: list[int] = []

    def busy(request: httpx.Request) -> httpx.Response:
        seed = json.loads(request.content)["seed"]
        asked.append(seed)
        if seed == 1 or asked.count(seed) == 1:
            return httpx.Response(429, headers={"retry-after": "0.05"})
        return httpx.Response(200, content=b"image")

    arrivals = [Arrival(0.0, 10, 0), Arrival(0.0, 10, 1)]
    admitted, refused = measured(busy, lambda client: load.open_loop(client, arrivals, retry=True)).records
    assert (admitted.ok, admitted.retried, admitted.retry_after) == (True, True, 0.05)
    assert admitted.latency >= 0.05
    assert (refused.status, refused.retried) == (429, True)
    assert sorted(asked) == [0, 0, 1, 1]
    asked.clear()
    (once,) = measured(busy, lambda client: load.open_loop(client, arrivals[:1])).records
    assert (once.status, once.retried, once.retry_after) == (429, False, 0.05)


def test_what_is_no_image_is_an_error():
    def odd(request: httpx.Request) -> httpx.Response:
        match json.loads(request.content)["seed"]:
            case 0:
                return httpx.Response(200, content=b"sorry")
            case 1:
                raise httpx.ReadError("cut off")
            case _:
                return httpx.Response(503, headers={"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"})

    arrivals = [Arrival(0.0, 10, seed) for seed in range(3)]
    short, cut, later = measured(
        odd, lambda client: load.open_loop(client, arrivals, retry=True), least_bytes=6
    ).records
    assert (short.ok, short.error) == (False, "an answer of 5 bytes")
    assert (cut.ok, cut.status, cut.error) == (False, 0, "ReadError: cut off")
    assert (later.status, later.retry_after, later.retried) == (503, None, False)


def test_closed_loop_keeps_its_clients_busy():
    now = most = 0

    async def handler(_: httpx.Request) -> httpx.Response:
        nonlocal now, most
        now, most = now + 1, max(most, now + 1)
        await asyncio.sleep(0.02)
        now -= 1
        return httpx.Response(200, content=b"image")

    run = measured(handler, lambda client: load.closed_loop(client, MIXED, clients=3, seconds=0.2))
    assert most == 3
    assert len(run.records) >= 6
    assert all(record.ok for record in run.records)
    assert run.seconds >= 0.2


def test_time_alone():
    running = 0

    async def handler(request: httpx.Request) -> httpx.Response:
        nonlocal running
        running += 1
        assert running == 1
        await asyncio.sleep(json.loads(request.content)["steps"] / 1000)
        running -= 1
        return httpx.Response(200, content=b"image")

    alone = measured(handler, lambda client: load.alone(client, [10, 50], times=3))
    assert alone[10] >= 0.01
    assert 0.05 <= alone[50] < 1
    with pytest.raises(LoadError, match="answers 404: nowhere"):
        measured(lambda _: httpx.Response(404, text="nowhere"), lambda client: load.alone(client, [10]))


class Images(BaseHTTPRequestHandler):
    """Answers as a server does, and remembers what it was asked."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.asked.append((self.headers["accept"], asked))
        self.send_response(200)
        self.send_header("content-length", "5")
        self.end_headers()
        self.wfile.write(b"image")

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Images) as server:
        server.asked = []
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def loadtest(capsys):
    """Runs the command; gives its status, output and complaints."""

    def run(*options: str) -> tuple[int, str, str]:
        return main(["loadtest", *options]), *capsys.readouterr()

    return run


@pytest.mark.parametrize(
    ("how", "fact"), [(("--rate", "40"), "rate"), (("--clients", "2"), "clients"), (("--load", "0.5"), "capacity")]
)
def test_command(loadtest, server, monkeypatch, how, fact):
    async def quickly(*_):
        return 80.0

    monkeypatch.setattr(command, "_capacity", quickly)
    url = f"http://127.0.0.1:{server.server_port}/predict"
    options = ("--url", url, "--seconds", "0.5", "--mix", "3:1,5:1", "--field", "nfe", "--body", '{"eta": 1}', *how)
    status, printed, _ = loadtest(*options)
    assert status == 0
    facts = json.loads(printed.splitlines()[-1])
    assert facts[fact] > 0
    assert facts["outcomes"]["ok"] == facts["requests"] > 0
    assert set(facts["classes"]) <= {"3", "5"}
    accept, asked = server.asked[-1]
    assert accept == "application/x-npy"
    assert asked.keys() == {"nfe", "seed", "eta"}


def test_capacity(loadtest, server):
    async def run() -> float:
        asked = Target(f"http://127.0.0.1:{server.server_port}/", body)
        async with load.connected(asked) as client:
            return await command._capacity(client, MIXED, 0.2, 1)

    assert asyncio.run(run()) > 10


def test_plot(loadtest, server, tmp_path):
    pytest.importorskip("matplotlib")
    image = tmp_path / "latencies.png"
    url = f"http://127.0.0.1:{server.server_port}/"
    assert loadtest("--url", url, "--seconds", "0.2", "--clients", "1", "--plot", str(image))[0] == 0
    assert image.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("--mix", "10:0"), "--mix = 10:0: '10:0' needs at least one step and a positive weight"),
        (("--url", "http://127.0.0.1:9/sample"), "cannot ask http://127.0.0.1:9/sample: "),
        (("--url", "nonsense"), "cannot ask nonsense: "),
        (("--body", "{"), "--body = '{': "),
        (("--body", "[1]"), "--body = '[1]': a JSON object is needed"),
        (("--rate", "0"), "--rate = 0: must be a number above 0"),
        (("--rate", "nan"), "--rate = nan: must be a finite number above 0"),
        (("--seconds", "inf"), "--seconds = inf: must be a finite number above 0"),
        (("--clients", "-1"), "--clients = -1: must be an integer from 1"),
        (("--rate", "1", "--clients", "1"), "give one of --rate, --load and --clients"),
        (("--plot", "nowhere/a.png"), "--plot = nowhere/a.png: no such folder"),
    ],
)
def test_complaints(loadtest, options, complaint):
    status, printed, said = loadtest(*options)
    assert (status, printed) == (2, "")
    assert f"unstir: {complaint}" in said


def test_a_rate_at_which_no_request_arrives(loadtest, server):
    url = f"http://127.0.0.1:{server.server_port}/"
    status, _, said = loadtest("--url", url, "--rate", "1e-9", "--seconds", "0.1")
    assert status == 2
    assert "--seconds = 0.1: no request arrives at 1e-09 a second; take more" in said
