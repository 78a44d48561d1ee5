"""Asynchronous jobs, idempotency keys, deadlines and priorities, and every way a request can end."""

from __future__ import annotations

import asyncio
import re
import threading
import time

import httpx
import numpy as np
import pytest

from app.api.app import create_app
from app.api.job_store import JobStore
from app.api.responses.sample import SampleResult
from app.api.tasks import RequestTask
from app.engine.runner import Runner
from app.errors import NotFinite
from app.operations.context import RequestContext
from app.settings import Settings
from model import images
from tests.app.api.test_bad_input import assert_problem
from tests.conftest import save_tiny, serving
from tests.engines import until
from tests.metrics import metric

pytestmark = pytest.mark.anyio
ASYNC = {"prefer": "respond-async"}
NPY, JSON = {"accept": "application/x-npy"}, {"accept": "application/json"}
LONG = {"sampler": "ddpm", "n": 16}
BODY = {"seed": 1, "steps": 6, "reproducible": True}


@pytest.fixture
async def held(settings, monkeypatch):
    """A client of a service whose device waits before each forward until it is told to go on."""
    go, advance = threading.Event(), Runner.advance

    def gated(self, *arguments):
        assert go.wait(30)
        return advance(self, *arguments)

    monkeypatch.setattr(Runner, "advance", gated)
    # What is still held in the end is cut off rather than finished.
    async with serving(create_app(settings.model_copy(update={"drain_seconds": 0}))) as client:
        yield client, go
        go.set()


async def begun(client: httpx.AsyncClient, body: dict, path: str = "/sample", **headers: str) -> str:
    response = await client.post(path, json=body, headers={**ASYNC, **headers})
    assert response.status_code == 202, response.text
    assert response.headers["preference-applied"] == "respond-async"
    assert response.headers["location"] == f"/jobs/{response.json()['id']}"
    return response.headers["location"]


async def finished(client: httpx.AsyncClient, place: str) -> dict:
    async with asyncio.timeout(30):
        while (found := (await client.get(place)).json())["state"] in ("waiting", "running"):
            await asyncio.sleep(0.01)
    return found


@pytest.mark.parametrize(
    ("path", "body"), [("/sample", BODY), ("/interpolate", {"a": 1, "b": 2, "steps": 4, "reproducible": True})]
)
async def test_a_job_comes_to_what_the_request_itself_would_have(client, path, body):
    place = await begun(client, body, path)
    found = await finished(client, place)
    assert (found["state"], found["progress"], found["seconds_left"]) == ("done", 1, 0)
    assert found["result"] == f"{place}/result"
    for accept in ("image/png", "application/x-npy"):
        plain = await client.post(path, json=body, headers={"accept": accept})
        for _ in range(2):  # as often as it is asked for
            result = await client.get(found["result"], headers={"accept": accept})
            assert (result.status_code, result.content) == (200, plain.content)
            assert result.headers["x-nfe"] == plain.headers["x-nfe"]
    events = (await client.get(found["result"], headers={"accept": "text/event-stream"})).text
    assert re.findall("event: (\\w+)", events)[0] == "queued"
    assert re.findall("event: (\\w+)", events)[-1] == "completed"


async def test_how_it_fares(held):
    client, go = held
    first = await begun(client, LONG)
    second = await begun(client, {"steps": 5, "n": 2})
    third = await begun(client, {"steps": 50, "n": 2})
    found = [(await client.get(place)).json() for place in (first, second, third)]
    assert [each["state"] for each in found] == ["waiting"] * 3
    assert [each["position"] for each in found] == [2, 0, 1]  # by the work that they are
    assert found[1]["total"] == 10
    assert 0 < found[1]["seconds_left"] < found[2]["seconds_left"] < found[0]["seconds_left"]
    waiting = await client.get(f"{first}/result")
    assert_problem(waiting, 409, "not_done", "it is waiting")
    assert int(waiting.headers["retry-after"]) >= 1
    assert await metric(client, "unstir_jobs") == 3
    go.set()
    assert {(await finished(client, place))["state"] for place in (second, third)} == {"done"}
    assert (await client.delete(first)).json()["state"] == "cancelled"


@pytest.mark.parametrize("running", [False, True])
async def test_a_job_is_cancelled_wherever_it_is(held, running):
    client, go = held
    place = await begun(client, LONG)
    if running:
        go.set()
        async with asyncio.timeout(30):
            while (await client.get(place)).json()["done"] == 0:
                await asyncio.sleep(0.005)
    found = (await client.delete(place)).json()
    assert found["state"] == "cancelled"
    assert found["error"]["code"] == "cancelled"
    assert await metric(client, "unstir_estimated_wait_seconds") == 0
    assert await metric(client, "unstir_images_waiting") == await metric(client, "unstir_images_running") == 0
    assert await metric(client, "unstir_requests_finished_total", endpoint="/sample", outcome="cancelled") == 1
    assert_problem(await client.get(f"{place}/result"), 410, "cancelled", "send the request again")
    go.set()
    assert (await client.post("/sample", json=BODY)).status_code == 200
    assert await metric(client, "unstir_cancel_latency_seconds_count") == 1
    assert (await client.delete(place)).status_code == 200  # twice does no harm: now it is forgotten
    assert_problem(await client.get(place), 404, "no_such_job")


async def test_cancelling_ends_the_stream_of_its_events(held):
    client, _ = held
    place = await begun(client, LONG)
    watching = asyncio.create_task(client.get(f"{place}/result", headers={"accept": "text/event-stream"}))
    await asyncio.sleep(0.3)
    await client.delete(place)
    text = (await asyncio.wait_for(watching, 10)).text
    assert re.findall("event: (\\w+)", text)[-1] == "error"
    assert '"code": "cancelled"' in text


async def test_what_is_refused_is_refused_at_once(client):
    assert_problem(await client.post("/sample", json={"steps": 0}, headers=ASYNC), 422, "invalid_field", "steps")
    assert_problem(await client.post("/invert", json={"image": "AAAA"}, headers=ASYNC), 422, "invalid_field", "image")
    assert await metric(client, "unstir_jobs") == 0


async def test_a_job_that_fails_says_why(tmp_path, settings, monkeypatch):
    read_output = Runner.read_output
    monkeypatch.setattr(Runner, "read_output", lambda self, lane: read_output(self, lane) * float("nan"))
    async with serving(create_app(settings)) as client:
        place = await begun(client, BODY)
        found = await finished(client, place)
        assert (found["state"], found["error"]["code"], found["error"]["status"]) == ("failed", "not_finite", 500)
        assert_problem(await client.get(f"{place}/result"), 500, "not_finite")
        assert await metric(client, "unstir_forward_errors_total", kind="nan") == 1


async def test_an_unknown_job(client):
    for method in ("GET", "DELETE"):
        assert_problem(await client.request(method, "/jobs/nobody"), 404, "no_such_job", "nobody")
    assert_problem(await client.get("/jobs/nobody/result"), 404, "no_such_job")


async def test_results_are_kept_for_a_while_and_not_without_bound(tiny, settings):
    few = settings.model_copy(update={"job_seconds": 2, "max_jobs": 3})
    async with serving(create_app(few)) as client:
        places = []
        for seed in range(3):  # one after another, or any of them may be the first to end
            places.append(await begun(client, BODY | {"seed": seed}))
            await finished(client, places[-1])
        places.append(await begun(client, BODY))
        assert [(await client.get(place)).status_code for place in places] == [404, 200, 200, 200]
        await finished(client, places[-1])
        await asyncio.sleep(2.1)
        assert [(await client.get(place)).status_code for place in places] == [404] * 4
        assert await metric(client, "unstir_jobs") == 0
        assert await metric(client, "unstir_job_bytes") == 0


async def test_results_are_bounded_in_bytes(settings):
    # Each result holds 16 latents, images and seven more frames of each, of 256 bytes: 36 kB.
    async with serving(create_app(settings.model_copy(update={"max_job_bytes": 1 << 17}))) as client:
        places = [await begun(client, {"n": 16, "steps": 8, "trajectory": 8, "seed": s}) for s in range(8)]
        for place in places:
            async with asyncio.timeout(30):
                while (answer := await client.get(place)).status_code == 200 and answer.json()["state"] != "done":
                    await asyncio.sleep(0.01)
        assert 0 < await metric(client, "unstir_job_bytes") <= 1 << 17
        assert (await client.get(places[0])).status_code == 404
        assert (await client.get(places[-1])).status_code == 200


async def test_the_bytes_of_a_result_are_counted_once(client, monkeypatch):
    counted, nbytes = [], SampleResult.nbytes
    monkeypatch.setattr(SampleResult, "nbytes", property(lambda self: counted.append(self) or nbytes.fget(self)))
    await finished(client, await begun(client, {"n": 2, "steps": 2}))
    found = {await metric(client, "unstir_job_bytes") for _ in range(3)}
    assert found == {2 * 2 * 256}  # of each image, 8x8 floats at its start and at its end
    assert len(counted) == 1


async def test_the_newest_result_is_kept_however_large(settings):
    async with serving(create_app(settings.model_copy(update={"max_job_bytes": 1}))) as client:
        for seed in range(2):
            place = await begun(client, BODY | {"seed": seed})
            assert (await finished(client, place))["state"] == "done"
            assert (await client.get(f"{place}/result")).status_code == 200
        assert await metric(client, "unstir_jobs") == 1


async def test_a_kept_inversion_does_not_keep_the_file(client):
    file = images.png(np.zeros((50, 50, 3), np.uint8))
    place = (
        await client.post("/invert?fit=resize&steps=4", content=file, headers={**ASYNC, "content-type": "image/png"})
    ).headers["location"]
    assert (await finished(client, place))["state"] == "done"
    (job,) = client._transport.app.state.job_store._kept.values()
    assert job.task.result.encoding.request.image == b""


async def test_no_room_for_another_job(tiny, held):
    client, _ = held
    client._transport.app.state.job_store = JobStore(Settings(checkpoint=tiny, max_jobs=2))
    for _ in range(2):
        await begun(client, LONG)
    assert_problem(await client.post("/sample", json=BODY, headers=ASYNC), 429, "overloaded", "2 jobs are under way")
    assert await metric(client, "unstir_requests_waiting", endpoint="/sample") == 2
    await asyncio.sleep(0.05)  # its task ends in the next rounds of the event loop
    assert await metric(client, "unstir_requests_finished_total", outcome="overloaded") == 1
    assert await metric(client, "unstir_requests_finished_total") == 1


async def test_a_key_makes_a_retry_safe(client):
    body = {"steps": 4}  # no seed: without the key, each answer would be another image
    first = await client.post("/sample", json=body, headers={"idempotency-key": "k1"} | NPY)
    again = await client.post("/sample", json=body, headers={"idempotency-key": "k1"} | NPY)
    other = await client.post("/sample", json=body, headers={"idempotency-key": "k2"} | NPY)
    assert first.content == again.content != other.content
    assert again.headers["idempotent-replayed"] == "true"
    assert "idempotent-replayed" not in first.headers
    assert await metric(client, "unstir_images_total", endpoint="/sample") == 2
    taken = await client.post("/sample", json={"steps": 5}, headers={"idempotency-key": "k1"})
    assert_problem(taken, 409, "key_reused", "k1")


async def test_requests_of_one_key_at_once_are_one(held):
    client, go = held
    body = {"steps": 4}
    asking = [
        asyncio.create_task(client.post("/sample", json=body, headers={"idempotency-key": "k"} | NPY)) for _ in range(3)
    ]
    await until(lambda: sum(client._transport.app.state.lifecycle.engine.requests.values()) == 1)
    asking[0].cancel()  # one of them leaves, and the others do not suffer for it
    await asyncio.sleep(0.05)
    go.set()
    answers = await asyncio.gather(*asking[1:])
    assert answers[0].status_code == 200
    assert answers[0].content == answers[1].content
    assert await metric(client, "unstir_images_total", endpoint="/sample") == 1


async def test_a_retry_has_a_deadline_of_its_own(held):
    client, go = held
    key = {"idempotency-key": "k"}
    first = asyncio.create_task(client.post("/sample", json=BODY, headers=key))
    await until(lambda: sum(client._transport.app.state.lifecycle.engine.requests.values()) == 1)
    late = await client.post("/sample", json=BODY, headers={**key, "x-request-timeout-ms": "100"})
    assert_problem(late, 504, "too_late", "100 ms were allowed and are over")
    go.set()
    assert (await first).status_code == 200


async def test_who_leaves_while_others_wait_ends_nothing():
    """Two wait for the same task, one of them only for its admission; that one leaves before there is any."""
    go = asyncio.Event()

    async def fail():
        await go.wait()
        raise NotFinite("as it happens")

    task = RequestTask(fail(), RequestContext())
    stays, leaves = asyncio.ensure_future(task.wait()), asyncio.ensure_future(task.wait_admitted())
    await asyncio.sleep(0)
    leaves.cancel()
    await asyncio.wait({leaves})
    go.set()
    with pytest.raises(NotFinite):
        await stays


async def test_who_waits_alone_for_admission_and_leaves_ends_it():
    task = RequestTask(asyncio.Event().wait(), RequestContext())
    leaves = asyncio.ensure_future(task.wait_admitted())
    await asyncio.sleep(0)
    leaves.cancel()
    await asyncio.wait({leaves})
    await task.wait_ended()
    assert task.cancelled


async def test_a_key_whose_request_failed_can_be_tried_again(client):
    late = {"idempotency-key": "k", "x-request-timeout-ms": "5"}
    body = {"sampler": "ddpm"}
    assert (await client.post("/sample", json=body, headers=late)).status_code == 504
    assert await metric(client, "unstir_jobs") == 0  # nor does it push anything out
    assert (await client.post("/sample", json=body, headers={"idempotency-key": "k"})).status_code == 200


async def test_a_key_of_a_job_leads_to_the_same_job(client):
    places = [await begun(client, BODY, **{"idempotency-key": "k"}) for _ in range(2)]
    assert places[0] == places[1]
    await finished(client, places[0])


async def test_a_deadline_that_cannot_be_met_is_refused_on_arrival(client):
    body = {"sampler": "ddpm", "steps": 200}
    assert (await client.post("/sample", json=body)).status_code == 200  # its plan is compiled, and kept
    forwards = await metric(client, "unstir_forwards_total")
    late = await client.post("/sample", json={**body, "n": 16}, headers={"x-request-timeout-ms": "150"})
    assert_problem(late, 504, "too_late", "on an idle device", "X-Request-Timeout-Ms")
    assert await metric(client, "unstir_forwards_total") == forwards
    assert await metric(client, "unstir_rejections_total", reason="too_late") == 1


async def test_a_deadline_that_passes_frees_the_lanes(held):
    client, go = held
    late = await client.post("/sample", json={"steps": 2}, headers={"x-request-timeout-ms": "150"})
    assert_problem(late, 504, "too_late", "150 ms were allowed and are over")
    assert await metric(client, "unstir_images_waiting") == 0
    assert await metric(client, "unstir_requests_finished_total", endpoint="/sample", outcome="too_late") == 1
    go.set()
    assert (await client.post("/sample", json=BODY)).status_code == 200


async def test_the_deadline_counts_while_the_body_comes(client):
    async def slow():
        yield b"{"
        await asyncio.sleep(10)
        yield b"}"

    began = time.monotonic()
    headers = {"content-type": "application/json", "x-request-timeout-ms": "100"}
    late = await client.post("/sample", content=slow(), headers=headers)
    assert_problem(late, 504, "too_late", "100 ms were allowed and are over")
    assert time.monotonic() - began < 5


async def test_the_server_has_a_limit_of_its_own(tiny, settings):
    async with serving(create_app(settings.model_copy(update={"max_request_seconds": 0.01}))) as client:
        for headers in ({}, {"x-request-timeout-ms": "100000"}):
            assert_problem(await client.post("/sample", json=LONG, headers=headers), 504, "too_late")


async def test_the_urgent_go_first(held):
    client, go = held
    order: list[str] = []

    async def ask(name: str, priority: str) -> None:
        await client.post("/sample", json={"steps": 4, "n": 8, "seed": 1}, headers={"priority": priority})
        order.append(name)

    asking = [asyncio.create_task(ask(name, p)) for name, p in (("low", "u=7"), ("plain", "i"), ("high", "u=0, i"))]
    engine = client._transport.app.state.lifecycle.engine
    await until(lambda: sum(engine.requests.values()) == 3)
    await asyncio.sleep(0.05)
    go.set()
    await asyncio.gather(*asking)
    # The first forward had begun with whoever came first; what comes after goes by urgency.
    assert order.index("high") < order.index("plain") < order.index("low") or order[0] == "low"
    assert order.index("high") < order.index("plain")


async def test_retry_after_holds(tmp_path, settings):
    """A full queue, clients who are sent away, and each of them let in when it comes back in time."""
    checkpoint = save_tiny(tmp_path / "net")
    tight = settings.model_copy(update={"max_queue_seconds": 0.5, "checkpoint": checkpoint})
    async with serving(create_app(tight)) as client:
        engine = client._transport.app.state.lifecycle.engine
        steps = min(1000, int(0.45 / (16 * engine.forwards.fast.seconds_per_row)))  # each a little less than may wait
        large = {"sampler": "ddpm", "n": 16, "steps": steps}
        busy = [asyncio.create_task(client.post("/sample", json=large)) for _ in range(3)]
        await until(lambda: len(engine._admitted) == 3)
        refused = [await client.post("/sample", json={"steps": 3, "seed": seed}) for seed in range(5)]
        assert {answer.status_code for answer in refused} == {429}
        assert await metric(client, "unstir_requests_promised") == 5
        assert await metric(client, "unstir_rejections_total", reason="overloaded") == 5

        async def back(seed: int, answer: httpx.Response) -> int:
            await asyncio.sleep(int(answer.headers["retry-after"]) + 0.01)
            return (await client.post("/sample", json={"steps": 3, "seed": seed})).status_code

        assert set(await asyncio.gather(*(back(s, a) for s, a in enumerate(refused)))) == {200}
        assert {answer.status_code for answer in await asyncio.gather(*busy)} == {200}
        assert await metric(client, "unstir_requests_promised") == 0


async def test_all_who_wait_for_one_key_learn_why_it_failed(client, monkeypatch):
    """Each gets an error of its own: clearing the frames of one would end those of the others."""

    def fail(*_):
        raise NotFinite("the network gave no number")

    monkeypatch.setattr(Runner, "read_output", fail)
    asking = [client.post("/sample", json=BODY, headers={"idempotency-key": "k"}) for _ in range(8)]
    for answer in await asyncio.gather(*asking):
        assert_problem(answer, 500, "step_failed", "the network gave no number")
