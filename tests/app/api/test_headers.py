"""Headers of a request: deadline, key, Priority (RFC 9218) and Prefer (RFC 7240)."""

from __future__ import annotations

import pytest
from starlette.datastructures import Headers

from app.api.headers import RequestHeaders
from tests.app.api.test_bad_input import assert_problem

pytestmark = pytest.mark.anyio
BODY = {"seed": 1, "steps": 6}


@pytest.mark.parametrize(
    ("header", "value"),
    [
        ("x-request-timeout-ms", "soon"),
        ("x-request-timeout-ms", "0"),
        ("x-request-timeout-ms", "-5"),
        ("x-request-timeout-ms", "9" * 30),
        ("x-request-timeout-ms", "1.5"),
        ("x-request-timeout-ms", "000000000001" + "0" * 400),
        ("idempotency-key", "k" * 201),
        ("idempotency-key", "two words"),
    ],
)
async def test_headers_that_cannot_be(client, header, value):
    assert_problem(await client.post("/sample", json=BODY, headers={header: value}), 400, "invalid_header", value[:20])


@pytest.mark.parametrize(
    "value", ["u=9", "u=-1", "u=1.5", "u=?1", 'u="2"', "u=00079x", "u=" + "1" * 5000, "nonsense;;", "ü"]
)
async def test_a_priority_that_cannot_be_is_ignored(value):
    """RFC 9218, section 4: out of range or of another type is as if it were absent."""
    assert RequestHeaders.parse(Headers({"priority": value})).priority == 0


@pytest.mark.parametrize(
    ("value", "priority"), [("u=0", 3), ("u=7", -4), ("u=3", 0), ("i, u=1", 2), ("u=5;x=1, i", -2), ("u=2, u=6", -3)]
)
def test_the_range_of_priority(value, priority):
    assert RequestHeaders.parse(Headers({"priority": value})).priority == priority


@pytest.mark.parametrize(
    ("value", "asynchronous"),
    [
        ("respond-async", True),
        ("Respond-Async", True),
        ("respond-async; wait=10", True),
        ("wait=10, respond-async", True),
        ('return=minimal, foo="a, b", respond-async', True),
        ("respond-asynchronously", False),
        ('foo="respond-async"', False),
        ("respond-async=", True),
        ('respond-async = ""', True),
        ("respond-async,", True),
        (", Respond-Async , wait = 5", True),
        ("respond-async=0", False),
    ],
)
def test_preferences(value, asynchronous):
    """RFC 7240; what cannot be read is ignored."""
    assert RequestHeaders.parse(Headers({"prefer": value})).respond_async == asynchronous


def test_headers_of_several_lines():
    lines = [(b"prefer", b"wait=5"), (b"prefer", b"respond-async"), (b"priority", b"u=1"), (b"priority", b"i")]
    headers = RequestHeaders.parse(Headers(raw=lines))
    assert headers.respond_async
    assert headers.priority == 2
