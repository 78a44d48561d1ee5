"""JSON, judged before anything is built from it.

A few megabytes of brackets become gigabytes of Python objects. So the tokens are counted first, in one pass without
memory, and a text with more of them than any request needs is refused; what is left costs no more than its strings.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from app.api.body.faults import plain
from app.errors import InvalidField, InvalidJSON
from app.errors.wording import Unquoted
from app.operations.fields import MAX_SEED

MAX_TOKENS = 1024  # brackets, commas, colons, strings and numbers; the largest request has about a hundred
MAX_DEPTH = 16  # a request has 3 levels
MAX_NUMBER = 64  # characters; a float64 needs 24
MAX_KEY = 200  # characters of a field's name
LONG_STRING = 1 << 16  # bytes; only files in base64 are longer, which are ASCII
# Matches are possessive, so that they need no memory, and short, so that other threads can run between them.
SPACE = re.compile(rb"[ \t\n\r]{0,65536}+")
MARK_OR_WORD = re.compile(rb'[\[\]{},:"]|[^\s\[\]{},:"]{1,128}+')
TEXT = re.compile(rb'(?:[^"\\]++|\\.){1,8192}+', re.DOTALL)
WHOLE = "send one JSON object"


def parse_json(content: bytes) -> dict[str, Any]:
    """The fields of one JSON object; empty bytes have none.

    Raises:
        InvalidJSON: it is not JSON, or not UTF-8.
        InvalidField: no object, or one that is larger than any request, a number or a key that is too long, or a
            field that is given twice.
    """
    content = content.removeprefix(b"\xef\xbb\xbf") or b"{}"
    _judge(content)
    try:
        fields = json.loads(content.decode(), object_pairs_hook=_refuse_duplicates, parse_float=_parse_number)
    except json.JSONDecodeError as error:
        raise InvalidJSON(f"at character {error.pos}: {error.msg}; {WHOLE}") from None  # the error holds the text
    except UnicodeDecodeError as error:
        raise InvalidJSON(f"at byte {error.start}: it is no UTF-8; {WHOLE}") from None
    if not isinstance(fields, dict):
        raise InvalidField("body", plain(fields), WHOLE)
    return fields


def _judge(content: bytes) -> None:
    """Count the tokens, field by field.

    Raises:
        InvalidField: see :func:`parse_json`; it names the field in which a limit was passed.
    """
    depth, field, last = 0, "body", b""
    for count, (start, end) in enumerate(_tokens(content)):
        mark = content[start : start + 1]
        depth += (mark in (b"[", b"{")) - (mark in (b"]", b"}"))
        if mark == b":" and last.startswith(b'"'):
            if len(last) > MAX_KEY:
                name = Unquoted(f"a name of more than {MAX_KEY} bytes")
                raise InvalidField(field, name, "no field has such a name")
            field = last[1:-1].decode(errors="replace") if depth == 1 else field
        if count >= MAX_TOKENS:
            remedy = "no request needs so many; send fewer"
            raise InvalidField(field, Unquoted(f"more than {MAX_TOKENS} values and marks"), remedy)
        if depth > MAX_DEPTH:
            levels = Unquoted(f"more than {MAX_DEPTH} levels of brackets")
            raise InvalidField(field, levels, f"no field has so many; {WHOLE}")
        if mark == b'"' and end - start > LONG_STRING and not content[start:end].isascii():
            size = Unquoted(f"{end - start} bytes")
            raise InvalidField(field, size, "only a file in base64 is so long, and it is ASCII")
        if mark != b'"' and end - start > MAX_NUMBER:
            long = Unquoted(f"more than {MAX_NUMBER} characters without quotes")
            raise InvalidField(field, long, "no number has so many")
        last = content[start : min(end, start + MAX_KEY + 3)]


def _tokens(content: bytes) -> Iterator[tuple[int, int]]:
    """Where each mark, word and string begins and ends; a string that does not end is the last of them."""
    at = 0
    while at < len(content):
        while at < (end := SPACE.match(content, at).end()):  # type: ignore[union-attr]
            at = end
        found = MARK_OR_WORD.match(content, at)
        if found is None:
            return
        start, at = found.span()
        if content[start] == ord('"'):
            while text := TEXT.match(content, at):
                at = text.end()
            at += 1
        yield start, min(at, len(content))


def _parse_number(text: str) -> float | int:
    """A number of JSON with a fraction or an exponent. JSON schema takes 20.0 for an integer, and so do we.

    Beyond 2^53 a float does not say which integer it is, and stays one.
    """
    value = float(text)
    return int(value) if value.is_integer() and abs(value) <= MAX_SEED else value


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields:
            raise InvalidField(name[:MAX_KEY], Unquoted("2 values"), "send it once")
        fields[name] = value
    return fields
