"""Log lines that name the request they belong to: text for people, or one JSON object a line."""

from __future__ import annotations

import logging
import re
from contextvars import ContextVar
from typing import Any

from pythonjsonlogger.json import JsonFormatter

REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="")
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
JSON_NAMES = {"levelname": "level", "name": "logger", "exc_info": "exception"}


def configure(level: str, log_format: str) -> None:
    """Set the root logger up; ``log_format`` is text or json."""
    handler = logging.StreamHandler()
    handler.setFormatter(_JsonFormatter() if log_format == "json" else _TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler])


def escape_controls(text: str) -> str:
    """Without characters that end a line or move a terminal's cursor: a path can spell them, and so forge lines."""
    return _CONTROLS.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


class _TextFormatter(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # the standard library's name
        request_id = REQUEST_ID.get()
        record.message = escape_controls(record.message)
        return super().formatMessage(record) + (f" id={request_id}" if request_id else "")


class _JsonFormatter(JsonFormatter):
    """time, level, logger, message, request_id, the fields of ``extra``, and a traceback as ``exception``."""

    def __init__(self) -> None:
        super().__init__("%(levelname)s %(name)s %(message)s", rename_fields=JSON_NAMES, timestamp="time")

    def process_log_record(self, log_data: dict[str, Any]) -> dict[str, Any]:
        if request_id := REQUEST_ID.get():
            log_data["request_id"] = request_id
        return log_data | {"level": log_data["level"].lower()}
