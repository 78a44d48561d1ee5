"""The operations of the service itself: model, health, readiness, metrics, docs; starting, overload and draining."""

from __future__ import annotations

import asyncio
import json
import threading

import pytest
import torch

from app import __version__, errors
from app.api.app import create_app
from app.api.routes.operations import OPERATIONS
from app.engine.loading import load as load_model
from app.engine.runner import Runner
from app.engine.widths import Forwards
from app.errors import catalogue
from app.operations.warmup import warm_up
from app.settings import Settings
from app.telemetry.metrics import Metrics
from model.checkpoint import load
from model.diffusion.samplers import SAMPLERS
from model.images import text_of
from tests.app.api.test_bad_input import assert_problem
from tests.conftest import CLASSES, save_tiny, serving
from tests.engines import WIDTHS
from tests.metrics import metric

pytestmark = pytest.mark.anyio
JOBS = ("/jobs/{identifier}", "/jobs/{identifier}/result")


async def test_model_says_what_is_served(client, tiny):
    body = (await client.get("/model")).json()
    card = load(tiny).card
    assert (body["name"], body["sha256"], body["classes"]) == ("tiny", card.sha256, list(CLASSES))
    assert (body["shape"], body["timesteps"], body["prediction"]) == ([1, 8, 8], 1000, "epsilon")
    entries = {entry.pop("name"): entry for entry in body["samplers"]}
    assert entries.keys() == SAMPLERS.keys()
    assert all(entry["what"] and entry["when"] and entry["good_steps"] for entry in entries.values())
    assert (entries["ddim"]["default_steps"], entries["ddpm"]["default_steps"]) == (50, 1000)
    assert (entries["heun"]["evaluations"], entries["ddim"]["evaluations"]) == ("2N - 1", "N")
    assert (entries["ddpm"]["stochastic"], entries["ddim"]["stochastic"]) == (True, False)
    assert (entries["ddim"]["options"], entries["pndm"]["options"]) == (["eta"], ["warmup"])
    assert (entries["ddim"]["spacings"][0], entries["unipc"]["spacings"][0]) == ("leading", "karras")
    assert "karras" not in entries["pndm"]["spacings"]
    assert body["guidance"] is True
    assert body["schedule"]["beta_schedule"] == "linear"
    assert (body["device"], body["dtype"], body["version"]) == ("cpu", "float32", __version__)
    assert body["forward_ms"]["1"] > 0
    assert body["reproducible_width"] == 4
    assert body["limits"]["max_images"] == 16


async def test_health_readiness_and_docs(client):
    assert (await client.get("/healthz")).json() == {"status": "alive"}
    assert (await client.get("/readyz")).json() == {"status": "ready"}
    assert (await client.get("/docs")).status_code == 200
    paths = (await client.get("/openapi.json")).json()["paths"]
    assert set(paths) == {"/sample", "/invert", "/interpolate", "/model", "/healthz", "/readyz", "/metrics", *JOBS}
    documented = paths["/sample"]["post"]
    assert set(documented["responses"]["200"]["content"]) == set(OPERATIONS[0].formats)
    problems = {status: set(r["content"]) for status, r in documented["responses"].items() if status >= "400"}
    assert set(problems) == {"400", "403", "406", "408", "409", "410", "413", "415", "422", "429", "500", "503", "504"}
    assert all(content == {"application/problem+json"} for content in problems.values())
    assert set(documented["requestBody"]["content"]) == {
        "application/json",
        "multipart/form-data",
        "application/x-www-form-urlencoded",
    }
    assert set(paths["/invert"]["post"]["requestBody"]["content"]) >= {"image/*"}


async def test_before_the_network_is_there(settings, monkeypatch):
    release = threading.Event()
    monkeypatch.setattr("app.api.lifespan.load", lambda *args: release.wait(10) and load_model(*args))
    app = create_app(settings)
    async with serving(app, ready=False) as client:
        assert (await client.get("/healthz")).status_code == 200
        unready = await client.get("/readyz")
        assert (unready.status_code, unready.json()["status"]) == (503, "starting: the network is being loaded")
        for response in (await client.post("/sample", json={}), await client.get("/model")):
            assert_problem(response, 503, "starting", "try again")
            assert int(response.headers["retry-after"]) >= 1
        for method, path in (("GET", "/jobs/a"), ("DELETE", "/jobs/a"), ("GET", "/jobs/a/result")):
            assert_problem(await client.request(method, path), 404, "no_such_job")  # whatever is still loading
        assert await metric(client, "unstir_ready") == 0
        release.set()
        while app.state.lifecycle.unready:
            await asyncio.sleep(0.005)
        assert (await client.post("/sample", json={"steps": 1})).status_code == 200
        assert await metric(client, "unstir_ready") == 1


@pytest.mark.parametrize(("asked", "taken"), [(None, 1), (2, 2)], ids=["as torch was told", "as asked"])
async def test_threads_of_a_forward(settings, asked, taken):
    try:
        await asyncio.to_thread(load_model, settings.model_copy(update={"threads": asked}), Metrics())
        assert torch.get_num_threads() == 1  # as tests/conftest.py says; others keep what they have
        assert await asyncio.to_thread(torch.get_num_threads) == taken
    finally:
        torch.set_num_threads(1)


async def test_a_checkpoint_that_cannot_be_loaded(tmp_path):
    gave_up = []
    app = create_app(Settings(checkpoint=tmp_path, device="cpu"), on_failure=lambda: gave_up.append(True))
    async with serving(app, ready=False) as client:
        while not gave_up:
            await asyncio.sleep(0.005)
        unready = await client.get("/readyz")
        assert unready.status_code == 503
        assert "is no checkpoint; neither unet/ nor config.json is in it" in unready.json()["status"]
        assert_problem(await client.post("/sample", json={}), 503, "engine_dead", "is no checkpoint")


@pytest.mark.parametrize("names", [("1", "10", "2"), ("2", "0", "1")])
async def test_a_replay_draws_the_class_of_a_numeral_again(tmp_path, names):
    """A number is an index; a string is a name, and only then an index. The answer has the name, as a string."""
    checkpoint = save_tiny(tmp_path, names)
    settings = Settings(checkpoint=checkpoint, device="cpu", threads=1, dtype="float32", cache="", max_width=4)
    async with serving(create_app(settings)) as client:

        async def draw(label, **more):
            body = {"label": label, "seed": 3, "steps": 2, "reproducible": True}
            response = await client.post("/sample", json=body, **more)
            assert response.status_code == 200, response.text
            return response

        asked = {index: await draw(index, headers={"accept": "application/json"}) for index in range(3)}
        assert [answer.json()["label"] for answer in asked.values()] == list(names)
        for index, name in enumerate(names):
            by_index = (await draw(index)).content
            assert (await draw(name)).content == by_index
            form = await client.post(
                "/sample", files={key: (None, value) for key, value in FORM.items()} | {"label": (None, name)}
            )
            assert form.content == by_index
            again = json.loads(text_of(by_index)["unstir"])["request"]
            assert again["label"] == name
            assert (await client.post("/sample", json=again)).content == by_index


FORM = {"seed": "3", "steps": "2", "reproducible": "true"}


async def test_classes_without_a_card_are_numbers(tmp_path):
    (save_tiny(tmp_path) / "card.json").unlink()
    settings = Settings(checkpoint=tmp_path, device="cpu", threads=1, dtype="float32", cache="", max_width=4)
    async with serving(create_app(settings)) as client:
        model = (await client.get("/model")).json()
        assert (model["classes"], model["guidance"]) == (["0", "1", "2", "3"], False)
        assert "no guidance" in model["description"]
        assert_problem(
            await client.post("/sample", json={"steps": 2}), 422, "invalid_field", "choose one of 0, 1, 2, 3"
        )
        assert (await client.post("/sample", json={"steps": 2, "label": "3"})).status_code == 200


async def test_eight_unlike_requests_share_forwards_and_equal_their_solo_answers(client):
    requests = [
        {"sampler": sampler, "steps": steps, "seed": seed, "label": seed % 3, "reproducible": True}
        for seed, (sampler, steps) in enumerate([("ddim", 10), ("ddim", 20), ("ddim", 50), ("ddpm", 200)] * 2)
    ]
    alone = [(await client.post("/sample", json=request)).content for request in requests]
    before = await metric(client, "unstir_forwards_total")
    together = await asyncio.gather(*(client.post("/sample", json=request) for request in requests))
    forwards = await metric(client, "unstir_forwards_total") - before
    assert [response.content for response in together] == alone
    assert 200 <= forwards < sum(request["steps"] for request in requests) / 2
    assert await metric(client, "unstir_requests_finished_total", outcome="ok") == 16


async def test_counters_count(client):
    await client.post("/sample", json={"n": 3, "steps": 5})
    await client.post("/sample", json={"sampler": "ddpm", "steps": 7})
    await client.post("/sample", json={"steps": 0})
    assert await metric(client, "unstir_images_total", endpoint="/sample") == 4
    assert await metric(client, "unstir_nfe_total", sampler="ddim") == 15
    assert await metric(client, "unstir_nfe_total", sampler="ddpm") == 7
    assert await metric(client, "unstir_rows_total") == 22
    assert await metric(client, "unstir_requests_total", endpoint="/sample", code="200") == 2
    assert await metric(client, "unstir_requests_total", endpoint="/sample", code="422") == 1
    assert await metric(client, "unstir_request_duration_seconds_count", endpoint="/sample") == 3
    assert await metric(client, "unstir_request_duration_seconds_count", sampler="ddpm") == 1
    assert await metric(client, "unstir_queue_time_seconds_count") == 2
    forwards = await metric(client, "unstir_forwards_total")
    assert await metric(client, "unstir_forward_duration_seconds_count") == forwards
    assert await metric(client, "unstir_batch_rows_sum") == 22
    assert await metric(client, "unstir_request_nfe_count") == 2
    assert await metric(client, "unstir_request_nfe_sum") == 22
    assert await metric(client, "unstir_time_to_first_step_seconds_count") == 2
    assert await metric(client, "unstir_image_encode_seconds_count") == 2
    assert await metric(client, "unstir_cancel_latency_seconds_count") == 0
    for kind in ("images", "requests"):
        assert await metric(client, f"unstir_{kind}_waiting") == await metric(client, f"unstir_{kind}_running") == 0


async def test_a_format_that_a_request_cannot_have_costs_no_work(client):
    gif = await client.post("/sample", json={"steps": 2}, headers={"accept": "image/gif"})
    assert_problem(gif, 406, "not_acceptable", "trajectory")
    assert await metric(client, "unstir_forwards_total") == 0  # it is refused before any work
    assert await metric(client, "unstir_image_encode_seconds_count") == 0


async def test_a_full_queue_answers_429_with_a_computed_wait(settings):
    app = create_app(settings.model_copy(update={"max_queue_seconds": 0.01}))
    async with serving(app) as client:
        body = {"sampler": "ddpm", "n": 8, "steps": 200}
        long = asyncio.create_task(client.post("/sample", json=body))
        while not app.state.lifecycle.engine.requests:
            await asyncio.sleep(0.001)
        refused = await client.post("/sample", json=body)
        assert_problem(refused, 429, "overloaded", "try again in", "0.01")
        wait = int(refused.headers["retry-after"])
        assert wait >= 1
        assert (await long).status_code == 200  # what was accepted is answered
        assert (await client.post("/sample", json={"steps": 1})).status_code == 200
        assert await metric(client, "unstir_requests_finished_total", outcome="overloaded") == 1


async def test_draining_over_http(settings):
    app = create_app(settings)
    async with serving(app) as client:
        long = asyncio.create_task(client.post("/sample", json={"sampler": "ddpm", "steps": 200}))
        while not app.state.lifecycle.engine.requests:
            await asyncio.sleep(0.001)
        draining = asyncio.create_task(app.state.lifecycle.drain())
        await asyncio.sleep(0)
        assert_problem(await client.post("/sample", json={}), 503, "draining", "another replica")
        assert (await client.get("/readyz")).status_code == 503
        assert (await client.get("/healthz")).status_code == 200
        assert await metric(client, "unstir_draining") == 1
        await draining
        assert (await long).status_code == 200


async def test_a_defect_is_a_plain_500_with_an_id_and_without_its_text(client, monkeypatch):
    def broken(*_):
        raise KeyError("secret")

    monkeypatch.setattr("app.operations.sample.resolve", broken)
    response = await client.post("/sample", json={}, headers={"x-request-id": "abc"})
    body = assert_problem(response, 500, "internal", "report")
    assert "secret" not in response.text
    assert body["request_id"] == "abc"
    assert await metric(client, "unstir_requests_finished_total", outcome="internal") == 1
    assert await metric(client, "unstir_requests_total", endpoint="/sample", code="500") == 1


@pytest.mark.parametrize("kind", catalogue(), ids=lambda kind: kind.code)
async def test_every_error_has_the_one_shape(client, monkeypatch, kind):
    if issubclass(kind, errors.InvalidField):
        error = kind("field", "value", "remedy")
    elif issubclass(kind, errors.TryLater):
        error = kind("the detail", retry_after=1.2)
    else:
        error = kind("the detail")

    async def fail(*_):
        raise error

    monkeypatch.setattr("app.api.respond.run", fail)
    response = await client.post("/sample", json={})
    assert_problem(response, kind.status, kind.code, error.detail)
    if issubclass(kind, errors.TryLater):
        assert response.headers["retry-after"] == "2"
    if kind is errors.EngineDead:
        assert response.headers["retry-after"] == "10"


def test_codes_are_unique_and_every_error_is_explained():
    kinds = catalogue()
    assert len({kind.code for kind in kinds}) == len(kinds) == 28
    assert all(kind.meaning and kind.title for kind in kinds)


def test_warming_up_takes_every_kind_of_plan(tiny_ckpt, monkeypatch):
    """All slot counts and guards that requests can ask for, so that what they need has been compiled."""
    runner = Runner(tiny_ckpt, torch.device("cpu"))
    advance, seen = runner.advance, []
    monkeypatch.setattr(
        runner,
        "advance",
        lambda lanes, width, exact: seen.append((lanes[0], width, exact)) or advance(lanes, width, exact),
    )
    warm_up(runner, Forwards(WIDTHS, WIDTHS))
    assert {exact for _, _, exact in seen} == {False, True}
    assert {width for _, width, _ in seen} == {2}  # with guidance
    plans = {lane.plan.digest: lane.plan for lane, _, _ in seen}.values()
    assert {plan.slots for plan in plans} == {1, 2, 3, 4, 5}
    assert any(plan.stochastic for plan in plans)
    assert any(step.guard for plan in plans for step in plan.steps)
    assert all(not lane.remaining and lane.snapshots.keys() == {0} for lane, _, _ in seen)


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        pytest.param(SystemExit(3), "SystemExit (3); UNSTIR_LOG_LEVEL=debug says where", id="exit"),
        pytest.param(MemoryError(), "MemoryError; give the process more memory", id="without-a-word"),
        pytest.param(ValueError("is none"), "ValueError (is none); UNSTIR_LOG_LEVEL=debug says where", id="with-words"),
    ],
)
async def test_whatever_ends_the_loading_is_said(settings, monkeypatch, caplog, error, shown):
    """The thread's end is the process's: not ready, and the callback that stops the server."""

    def load(*_):
        raise error

    monkeypatch.setattr("app.api.lifespan.load", load)
    stopped = []
    app = create_app(settings, on_failure=lambda: stopped.append(True))
    async with serving(app, ready=False) as client:
        while not stopped:
            await asyncio.sleep(0.002)
        assert app.state.lifecycle.failure == f"{settings.checkpoint}: {shown}"
        response = await client.get("/readyz")
        assert response.status_code == 503
        assert response.json()["status"] == f"the network could not be loaded: {settings.checkpoint}: {shown}"
    assert ("Traceback" in caplog.text) == isinstance(error, SystemExit)  # nothing raises that on purpose
