"""HTTP as the RFCs have it: methods, negotiation, caching, origins, and requests that are cut short."""

from __future__ import annotations

import asyncio
import re

import pytest
from starlette.datastructures import Headers

from app.api.app import create_app
from app.api.negotiation import negotiate
from app.api.origins import OriginMiddleware, find_foreign_sender
from app.api.responses.formats import APNG, EVENTS, GIF, JPEG, JSON, PNG, WEBP
from app.errors import NotAcceptable
from app.settings import Settings
from tests.app.api.test_bad_input import assert_problem
from tests.conftest import serving
from tests.metrics import metric

pytestmark = pytest.mark.anyio
FORMATS = (PNG, WEBP, JPEG, GIF, APNG, JSON, EVENTS)
REPEATABLE = {"seed": 7, "steps": 2, "reproducible": True}
QUERY = "/sample?seed=7&steps=2&reproducible=true"


@pytest.mark.parametrize(
    ("lines", "chosen"),
    [
        ([], PNG),
        ([""], PNG),
        (["*/*"], PNG),
        (["image/*"], PNG),
        (["text/html, image/gif, image/jpeg, *; q=.2, */*; q=.2"], JPEG),  # Java's URLConnection, without the gif
        (["image/avif,image/webp,image/apng,image/svg+xml,image/*,*/*;q=0.8"], PNG),  # an <img> in Chromium
        (["image/webp;q=0.5, image/jpeg;Q=0.9"], JPEG),
        (["image/webp ; q = 0.5 , image/jpeg ; q = 0.9"], JPEG),
        (["image/webp;q=0.5", "image/jpeg;q=0.9"], JPEG),  # several lines are one list (RFC 9110, section 5.3)
        (["image/png;q=0, */*"], WEBP),
        (["application/json;charset=utf-8"], JSON),
        (['image/jpeg;note="a, b";q=0.3, image/webp;q=0.2'], JPEG),
        (["image/jpeg;q=nan, image/webp"], WEBP),  # what cannot be read says nothing
        (["image/jpeg;q=2, image/webp;q=0.4"], WEBP),
        (["*"], PNG),
        (["nonsense"], PNG),
        (["IMAGE/JPEG"], JPEG),
    ],
)
def test_accept(lines, chosen):
    possible = [media_type for media_type in FORMATS if media_type not in (GIF, APNG)]
    assert negotiate(lines, possible) == chosen


@pytest.mark.parametrize("line", ["image/tiff", "image/png;q=0", "*/*;q=0", "image/gif"])
def test_accept_of_nothing_that_there_is(line):
    with pytest.raises(NotAcceptable, match=r"choose one of image/png.*no trajectory"):
        negotiate([line], (PNG, JPEG), "no trajectory")


async def test_the_format_is_one_that_this_request_can_have(client):
    accept = {"accept": "image/gif, image/png;q=0.9"}
    still = await client.post("/sample", json={"steps": 2}, headers=accept)
    assert (still.status_code, still.headers["content-type"]) == (200, PNG)
    moving = await client.post("/sample", json={"steps": 2, "trajectory": 2}, headers=accept)
    assert (moving.status_code, moving.headers["content-type"]) == (200, GIF)
    job = await client.post("/sample", json={"steps": 2}, headers={"prefer": "respond-async"})
    while (result := await client.get(f"{job.headers['location']}/result", headers=accept)).status_code == 409:
        await asyncio.sleep(0.01)
    assert result.headers["content-type"] == PNG


async def test_head_is_get_without_the_body(client):
    for path in ("/healthz", "/model", "/metrics", "/openapi.json", "/docs", QUERY):
        head = await client.head(path)
        assert head.status_code == 200
        assert head.content == b""
        got = await client.get(path)
        assert head.headers["content-type"] == got.headers["content-type"]
    assert_problem(await client.get("/invert"), 405, "method_not_allowed", "use OPTIONS, POST")


@pytest.mark.parametrize(
    ("path", "methods"),
    [
        ("/sample", "GET, HEAD, OPTIONS, POST"),
        ("/invert", "OPTIONS, POST"),
        ("/jobs/x", "DELETE, GET, HEAD, OPTIONS"),
        ("/model", "GET, HEAD, OPTIONS"),
    ],
)
async def test_options_and_405_name_every_method(client, path, methods):
    options = await client.options(path)
    assert (options.status_code, options.headers["allow"]) == (204, methods)
    refused = await client.patch(path)
    assert_problem(refused, 405, "method_not_allowed", methods)
    assert refused.headers["allow"] == methods


async def test_no_redirect_names_the_host_of_the_request(client):
    response = await client.get("/model/", headers={"host": "evil.example"})
    assert_problem(response, 404, "not_found")
    assert "location" not in response.headers


async def test_get_is_post_with_a_query(client):
    got, posted = await client.get(QUERY), await client.post("/sample", json=REPEATABLE)
    assert got.status_code == 200
    assert got.content == posted.content
    assert got.headers["content-disposition"] == 'inline; filename="sample-ddim-2-7.png"'
    assert_problem(await client.get("/sample?steps=two"), 422, "invalid_field", "steps")
    assert_problem(await client.get("/sample?colour=red"), 422, "invalid_field", "colour", "no such field")
    strip = await client.get("/interpolate?a=1&b=2&steps=2&frames=3&label=Big%20star")
    assert strip.status_code == 200
    both = await client.get("/interpolate?latents=1&latents=2&weights=0.5,0.5&steps=2")
    assert both.status_code == 200, both.text


@pytest.mark.parametrize(
    ("label", "accept", "name"),
    [
        ("Big star", PNG, 'inline; filename="sample-Big-star-ddim-2-7.png"'),
        (None, "application/x-npy", 'attachment; filename="sample-ddim-2-7.npy"'),
        (None, JSON, 'inline; filename="sample-ddim-2-7.json"'),
    ],
)
async def test_a_name_to_save_it_by(client, label, accept, name):
    response = await client.post("/sample", json=REPEATABLE | {"label": label}, headers={"accept": accept})
    assert response.headers["content-disposition"] == name


async def test_what_is_repeatable_has_a_tag_that_saves_the_work(client):
    first = await client.get(QUERY)
    tag = first.headers["etag"]
    assert first.headers["cache-control"] == "no-cache"
    before = await metric(client, "unstir_rows_total")
    for line in (tag, f"W/{tag}", f'"other", {tag}'):
        again = await client.get(QUERY, headers={"if-none-match": line})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
        assert again.headers["vary"] == "Accept"
    posted = await client.post("/sample", json=REPEATABLE, headers={"if-none-match": tag})
    assert posted.status_code == 304
    assert await metric(client, "unstir_rows_total") == before
    for path in (f"{QUERY}&label=circle", QUERY.replace("7", "8")):
        assert (await client.get(path, headers={"if-none-match": tag})).status_code == 200
    assert (await client.get(QUERY, headers={"if-none-match": tag, "accept": WEBP})).status_code == 200
    as_json = await client.get(QUERY, headers={"accept": JSON})
    assert as_json.headers["etag"].startswith("W/")  # it has times in it


@pytest.mark.parametrize(
    "body",
    [
        {"steps": 2},
        {"steps": 2, "seed": 7},
        {"steps": 2, "reproducible": True},
        {"steps": 2, "reproducible": True, "sampler": "ddpm", "latent": 7},
        {"steps": 2, "reproducible": True, "eta": 0.5, "latent": 7},
    ],
)
async def test_what_is_drawn_anew_has_no_tag(client, body):
    response = await client.post("/sample", json=body)
    assert response.status_code == 200
    assert "etag" not in response.headers
    assert response.headers["cache-control"] == "no-store"


FOREIGN = {"origin": "https://evil.example"}
IMAGE = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors", "referer": "https://evil.example/"}


async def test_foreign_pages_are_refused(client):
    form = await client.post("/sample", files={"steps": (None, "2")}, headers=FOREIGN)
    assert_problem(form, 403, "foreign_origin", "https://evil.example", "UNSTIR_CORS_ORIGINS")
    assert_problem(await client.get(QUERY, headers=IMAGE), 403, "foreign_origin", "https://evil.example")
    assert_problem(await client.delete("/jobs/x", headers=FOREIGN), 403, "foreign_origin")
    preflight = FOREIGN | {"access-control-request-method": "POST"}
    assert_problem(await client.options("/sample", headers=preflight), 403, "foreign_origin")
    assert await metric(client, "unstir_rows_total") == 0


NAMED = "pages of this site may not use the service; name {} in UNSTIR_CORS_ORIGINS, or"
NO_SITE = "the page has no site, as a file has none; serve it over http, or allow all pages with UNSTIR_CORS_ORIGINS=*"


@pytest.mark.parametrize(
    ("headers", "detail"),
    [
        ({"origin": "http://a.b:3000"}, "Origin = http://a.b:3000: " + NAMED.format("http://a.b:3000")),
        (
            {"origin": "moz-extension://0a-1b"},
            "Origin = moz-extension://0a-1b: " + NAMED.format("moz-extension://0a-1b"),
        ),
        ({"origin": "null"}, f"Origin = null: {NO_SITE}"),
        ({"origin": "file://"}, f"Origin = file://: {NO_SITE}"),
        (IMAGE, "Referer = https://evil.example/: " + NAMED.format("https://evil.example")),
        (
            {"sec-fetch-site": "cross-site"},
            "Sec-Fetch-Site = cross-site: a page of another site sent this, and neither",
        ),
    ],
)
async def test_refused_pages_learn_what_they_sent_and_a_remedy_that_works(client, settings, headers, detail):
    body = assert_problem(await client.get(QUERY, headers=headers), 403, "foreign_origin")
    assert body["detail"].startswith(detail)
    named = re.findall(r"name (\S+://\S+) in UNSTIR_CORS_ORIGINS|UNSTIR_CORS_ORIGINS=(\S+)", body["detail"])
    [remedy] = ["".join(groups) for groups in named]
    allowed = Settings(**settings.model_dump() | {"cors_origins": remedy})  # which takes it
    passed = OriginMiddleware(None, allowed.origins, costly=())
    assert passed._allows(find_foreign_sender(Headers(headers)).origin)


@pytest.mark.parametrize("headers", [{"origin": "http://[x"}, {**IMAGE, "referer": "http://[x"}])
async def test_an_origin_that_cannot_be_read_is_foreign(client, headers):
    assert_problem(await client.get(QUERY, headers=headers), 403, "foreign_origin")


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"origin": "https://renamed.by.a.proxy", "sec-fetch-site": "same-origin"},
        {"origin": "http://test"},
        {"origin": "https://TEST"},
        {"sec-fetch-site": "same-origin"},
        {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"},
    ],
)
async def test_our_own_pages_links_and_programs_are_not(client, headers):
    assert (await client.get(QUERY, headers=headers)).status_code == 200


async def test_foreign_pages_may_look_at_what_costs_nothing(client):
    response = await client.get("/healthz", headers=FOREIGN)
    assert response.status_code == 200
    assert "access-control-allow-origin" not in response.headers


async def test_sites_that_the_settings_name(settings):
    app = create_app(settings.model_copy(update={"cors_origins": "https://a.example, https://b.example:8443"}))
    async with serving(app) as client:
        origin = {"origin": "https://b.example:8443"}
        asked = {"access-control-request-method": "POST", "access-control-request-headers": "content-type,prefer"}
        preflight = await client.options("/sample", headers=origin | asked)
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == "https://b.example:8443"
        assert "POST" in preflight.headers["access-control-allow-methods"]
        response = await client.post("/sample", json={"steps": 2}, headers=origin)
        assert response.headers["access-control-allow-origin"] == "https://b.example:8443"
        assert "Retry-After" in response.headers["access-control-expose-headers"]
        assert (await client.get(QUERY, headers=IMAGE | {"referer": "https://a.example/x"})).status_code == 200
        assert_problem(await client.post("/sample", headers=FOREIGN), 403, "foreign_origin")


async def test_links_begin_with_the_prefix_of_a_proxy(settings):
    app = create_app(settings.model_copy(update={"root_path": "/unstir"}))
    async with serving(app) as client:
        for prefix in ("", "/unstir"):  # proxies strip it, or do not
            accepted = await client.post(f"{prefix}/sample", json={"steps": 2}, headers={"prefer": "respond-async"})
            assert accepted.headers["location"] == f"/unstir/jobs/{accepted.json()['id']}"
            while (job := (await client.get(accepted.headers["location"])).json())["state"] != "done":
                await asyncio.sleep(0.01)
            assert job["result"] == f"{accepted.headers['location']}/result"
        assert 'src="docs/start.js"' in (await client.get("/unstir/docs")).text
        assert 'url: "openapi.json"' in (await client.get("/unstir/docs/start.js")).text
        assert (await client.get("/unstir/openapi.json")).json()["servers"] == [{"url": "/unstir"}]
        assert_problem(await client.get("/unstir/sample?steps=1", headers=IMAGE), 403, "foreign_origin")
        for prefix in ("", "/unstir"):
            unknown = await client.get(f"{prefix}/sampel")
            assert_problem(unknown, 404, "not_found", "did you mean /unstir/sample? see /unstir/docs for")


async def test_two_lengths_are_refused(client):
    headers = {"content-length": "5", "transfer-encoding": "chunked", "content-type": "application/json"}
    response = await client.post("/sample", content=b"", headers=headers)
    assert_problem(response, 400, "invalid_http", "send one of them")
    assert response.headers["connection"] == "close"


async def test_compressed_bodies_are_refused_by_their_coding(client):
    headers = {"content-encoding": "gzip", "content-type": "application/json"}
    response = await client.post("/sample", content=b"\x1f\x8b", headers=headers)
    assert_problem(response, 415, "unsupported_media_type", "gzip", "without a coding")
    assert response.headers["accept-encoding"] == "identity"


async def test_an_id_in_latin_1_is_replaced(client):
    response = await client.get("/healthz", headers={"x-request-id": "caf\xe9".encode("latin-1")})
    assert len(response.headers["x-request-id"]) == 32


@pytest.mark.parametrize("header", ["accept", "content-type", "content-encoding", "prefer", "idempotency-key"])
async def test_a_refusal_does_not_echo_a_long_header(client, header):
    response = await client.post("/sample", content=b"{}", headers={"content-type": "x/y"} | {header: "a" * 60_000})
    assert len(response.content) < 1500
    assert len((await client.get("/" + "a" * 60_000)).content) < 1500


@pytest.mark.parametrize(
    ("values", "field", "found"),
    [
        ({"UNSTIR_HOST": ""}, "host", "127.0.0.1"),
        ({"UNSTIR_PORT": ""}, "port", 8000),
        ({"UNSTIR_PORT": "tcp://10.96.0.5:8000"}, "port", 8000),
        ({"UNSTIR_CACHE": ""}, "cache", ""),
        ({"UNSTIR_LOG_LEVEL": "INFO"}, "log_level", "info"),
        ({"UNSTIR_DEVICE": "CPU"}, "device", "cpu"),
        ({"UNSTIR_DTYPE": "Float32"}, "dtype", "float32"),
    ],
)
def test_settings_as_orchestrators_write_them(monkeypatch, values, field, found):
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    assert getattr(Settings(), field) == found


async def test_a_body_of_a_get_is_bounded_too(client):
    for declared in (True, False):
        content = b" " * 9000 if declared else chunks(9000)
        response = await client.request("GET", "/sample?sampler=ddpm", content=content)
        assert_problem(response, 413, "body_too_large")


async def chunks(size: int):
    yield b" " * size


async def test_the_address_may_be_whole(client):
    """RFC 9112, section 3.2.2."""
    scope = {"type": "http", "method": "GET", "path": "http://test/healthz", "headers": [], "query_string": b""}
    sent = []

    async def receive():
        return {"type": "http.request"}

    async def send(message):
        sent.append(message)

    await client._transport.app({**scope, "raw_path": b"", "scheme": "http", "server": ("test", 80)}, receive, send)
    assert sent[0]["status"] == 200


async def test_draining_refuses_bodies_that_are_on_their_way(client):
    lifecycle = client._transport.app.state.lifecycle

    async def slow():
        yield b"{"
        await asyncio.sleep(30)

    answer = asyncio.create_task(client.post("/sample", content=slow(), headers={"content-type": "application/json"}))
    await asyncio.sleep(0.1)
    await lifecycle.drain()
    assert_problem(await answer, 503, "draining", "takes nothing new")
