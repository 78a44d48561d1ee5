"""Forms, multipart and urlencoded, from bytes to their parts.

They are parsed whole, in memory, off the event loop: the body is bounded, and a file on a full disk is no safer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from app.errors import InvalidForm

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

MAX_FILES, MAX_FIELDS = 16, 64
MAX_URLENCODED = 1 << 20  # bytes; decoding takes eighty times as many
SEND_FORM = "send multipart/form-data, as curl -F does"


@dataclass(frozen=True)
class Part:
    """One part of a form.

    Attributes:
        filename: None for a field.
    """

    name: str
    content: bytes
    filename: str | None = None


def parse_urlencoded(content: bytes) -> list[Part]:
    """The fields of ``application/x-www-form-urlencoded``, in their order.

    Raises:
        InvalidForm: it is too long, or has too many fields.
    """
    remedy = "send application/x-www-form-urlencoded, as curl -d does"
    if len(content) > MAX_URLENCODED:
        raise InvalidForm(f"{len(content)} bytes, at most {MAX_URLENCODED}; for files {SEND_FORM}")
    if content.count(b"&") >= MAX_FIELDS:
        raise InvalidForm(f"more than {MAX_FIELDS} fields; {remedy}")
    if not content.isascii():
        raise InvalidForm(f"bytes that are no ASCII must be percent-encoded; {remedy}")
    pairs = parse_qsl(content.decode("ascii"), keep_blank_values=True, encoding="latin-1")
    return [Part(_decode(name.encode("latin-1")), value.encode("latin-1")) for name, value in pairs]


def parse_multipart(content: bytes, content_type: str) -> list[Part]:
    """The parts of ``multipart/form-data`` (RFC 7578), in their order.

    Raises:
        InvalidForm: it is malformed, ends early, or has too many parts.
    """
    boundary = parse_options_header(content_type)[1].get(b"boundary")
    if not boundary:
        raise InvalidForm(f"content-type has no boundary; {SEND_FORM}")
    reader = _Reader()
    try:
        parser = MultipartParser(boundary, reader.callbacks)
        parser.write(content)
        parser.finalize()
    except FormParserError as error:
        raise InvalidForm(f"{error}; {SEND_FORM}") from error
    if not reader.complete:
        raise InvalidForm(f"it ends before its closing boundary; {SEND_FORM}")
    return reader.parts


class _Reader:
    """Collects what the parser finds."""

    def __init__(self) -> None:
        self.parts: list[Part] = []
        self.complete = False
        self._header = b""
        self._disposition = b""
        self._value = b""
        self._content = bytearray()
        self._files = 0

    @property
    def callbacks(self) -> MultipartCallbacks:
        return {
            "on_part_begin": self._begin,
            "on_header_field": self._add_name,
            "on_header_value": self._add_value,
            "on_header_end": self._end_header,
            "on_part_data": self._add_content,
            "on_part_end": self._end,
            "on_end": self._finish,
        }

    def _begin(self) -> None:
        self._disposition, self._content = b"", bytearray()

    def _add_name(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _add_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _end_header(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = self._value
        self._header = self._value = b""

    def _add_content(self, data: bytes, start: int, end: int) -> None:
        self._content += memoryview(data)[start:end]

    def _end(self) -> None:
        _, options = parse_options_header(self._disposition)
        if b"name" not in options:
            raise InvalidForm(f"a part has no name in its Content-Disposition; {SEND_FORM}")
        filename = options.get(b"filename")
        self._files += filename is not None
        if self._files > MAX_FILES:
            raise InvalidForm(f"more than {MAX_FILES} files; {SEND_FORM}")
        if len(self.parts) + 1 - self._files > MAX_FIELDS:
            raise InvalidForm(f"more than {MAX_FIELDS} fields; {SEND_FORM}")
        name = None if filename is None else _decode(filename)
        self.parts.append(Part(_decode(options[b"name"]), bytes(self._content), name))

    def _finish(self) -> None:
        self.complete = True


def _decode(name: bytes) -> str:
    return name.decode("utf-8", "replace")
