"""Room for request bodies: taken in order, given back however a request ends."""

from __future__ import annotations

import asyncio

import pytest
from starlette.datastructures import Headers

from app.api.app import create_app
from app.api.uploads import SMALL_BYTES, Uploads
from app.errors import Overloaded
from tests.app.api.test_bad_input import assert_problem
from tests.conftest import serving

pytestmark = pytest.mark.anyio
MIB = 1 << 20


def declared(nbytes: int) -> Headers:
    return Headers({"content-length": str(nbytes)})


async def test_bodies_wait_for_room_in_their_order():
    uploads, order = Uploads(4 * MIB), []

    async def ask(name: str, nbytes: int):
        upload = await uploads.reserve(declared(nbytes), 8 * MIB, 5)
        order.append(name)
        return upload

    first = await ask("first", 3 * MIB)
    waiting = [asyncio.create_task(ask(name, size * MIB)) for name, size in (("large", 4), ("later", 1))]
    await asyncio.sleep(0.01)
    assert (order, uploads.nbytes) == (["first"], 3 * MIB)
    assert (await ask("small", SMALL_BYTES)).nbytes == 0  # needs no room
    first.release()
    first.release()
    (await waiting[0]).release()
    (await waiting[1]).release()
    assert order == ["first", "small", "large", "later"]
    assert uploads.nbytes == 0


async def test_a_length_that_is_not_named_counts_as_the_largest():
    uploads = Uploads(4 * MIB)
    chunked = await uploads.reserve(Headers({"transfer-encoding": "chunked"}), 2 * MIB, 1)
    assert uploads.nbytes == 2 * MIB
    chunked.release()
    assert (await uploads.reserve(Headers({}), 2 * MIB, 1)).nbytes == 0  # no body at all
    larger = await uploads.reserve(declared(9 * MIB), 8 * MIB, 1)  # than all the room: alone
    assert uploads.nbytes == 4 * MIB
    larger.release()


async def test_who_waits_in_vain_is_told_and_who_leaves_takes_no_room():
    uploads = Uploads(MIB)
    first = await uploads.reserve(declared(MIB), MIB, 1)
    with pytest.raises(Overloaded, match="1048576 bytes"):
        await uploads.reserve(declared(MIB), MIB, 0.01)
    leaving = asyncio.create_task(uploads.reserve(declared(MIB), MIB, 5))
    await asyncio.sleep(0)
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
    first.release()
    assert uploads.nbytes == 0
    (await uploads.reserve(declared(MIB), MIB, 0.01)).release()


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        ('{"steps": 2, "label": "%s"}', {}, 422),
        ('{"steps": 2, %s', {}, 400),
        ('{"steps": 2}%s', {"accept": "image/gif"}, 406),
        ('{"steps": 2}%s', {}, 200),
        ('{"steps": 2}%s', {"prefer": "respond-async"}, 202),
        ('{"steps": 2}%s', {"idempotency-key": "a"}, 200),
        ('{"steps": 2, "seed": 1, "reproducible": true}%s', {}, 200),
        ('{"sampler": "ddpm", "n": 16}%s', {"x-request-timeout-ms": "30"}, 504),
    ],
)
async def test_room_is_given_back_however_a_request_ends(settings, body, headers, status):
    app = create_app(settings.model_copy(update={"max_body_bytes": MIB, "max_upload_bytes": MIB}))
    content = body.replace("%s", " " * (SMALL_BYTES + 1)).encode()
    async with serving(app) as client:
        for _ in range(2):
            headers = {"content-type": "application/json"} | headers
            response = await client.post("/sample", content=content, headers=headers)
            assert response.status_code == status, response.text
            if tag := response.headers.get("etag"):
                again = await client.post("/sample", content=content, headers=headers | {"if-none-match": tag})
                assert again.status_code == 304
        async with asyncio.timeout(5):
            while app.state.lifecycle.uploads.nbytes:
                await asyncio.sleep(0.01)


async def test_refusals_while_room_is_missing_come_in_time(settings):
    app = create_app(settings.model_copy(update={"max_body_bytes": MIB, "max_upload_bytes": MIB, "body_seconds": 0.05}))
    async with serving(app) as client:
        held = await app.state.lifecycle.uploads.reserve(declared(MIB), MIB, 1)
        response = await client.post("/sample", content=b" " * MIB, headers={"content-type": "application/json"})
        assert_problem(response, 429, "overloaded", "bytes of request bodies")
        assert (await client.post("/sample", json={"steps": 1})).status_code == 200
        late = await client.post(
            "/sample",
            content=b" " * MIB,
            headers={"content-type": "application/json", "x-request-timeout-ms": "10"},
        )
        assert_problem(late, 504, "too_late", "10 ms were allowed")
        held.release()


async def test_who_waits_behind_one_that_gives_up_is_let_in():
    uploads = Uploads(10 * MIB)
    held = await uploads.reserve(declared(5 * MIB), 8 * MIB, 1, "a")
    large = asyncio.create_task(uploads.reserve(declared(8 * MIB), 8 * MIB, 0.05, "b"))
    await asyncio.sleep(0)
    small = await uploads.reserve(declared(MIB), 8 * MIB, 1, "c")
    with pytest.raises(Overloaded):
        await large
    held.release()
    small.release()
    assert uploads.nbytes == 0


async def test_one_caller_leaves_half_of_the_room_to_others():
    uploads = Uploads(8 * MIB)
    mine = [await uploads.reserve(declared(2 * MIB), 8 * MIB, 1, "me") for _ in range(2)]
    waiting = asyncio.create_task(uploads.reserve(declared(2 * MIB), 8 * MIB, 1, "me"))
    await asyncio.sleep(0)
    other = await uploads.reserve(declared(2 * MIB), 8 * MIB, 0.05, "you")  # though it came later
    assert not waiting.done()
    mine[0].release()
    for upload in (await waiting, mine[1], other):
        upload.release()
    assert uploads.nbytes == 0


async def test_a_body_takes_the_room_that_it_needs():
    uploads = Uploads(4 * MIB)
    chunked = await uploads.reserve(Headers({"transfer-encoding": "chunked"}), 2 * MIB, 1)
    chunked.shrink(11)
    assert uploads.nbytes == 11
    chunked.release()
    assert uploads.nbytes == 0
