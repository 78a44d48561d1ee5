"""Log lines that name the request they belong to: text for people, or one JSON object a line."""

from __future__ import annotations

import logging
from contextvars import ContextVar
from typing import Any

from pythonjsonlogger.json import JsonFormatter

REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="")
JSON_NAMES = {"levelname": "level", "name": "logger", "exc_info": "exception"}


def configure(level: str, log_format: str) -> None:
    """Set the root logger up; ``log_format`` is text or json."""
    handler = logging.StreamHandler()
    handler.setFormatter(_JsonFormatter() if log_format == "json" else _TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler])


class _TextFormatter(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # the standard library's name
        request_id = REQUEST_ID.get()
        return super().formatMessage(record) + (f" id={request_id}" if request_id else "")


class _JsonFormatter(JsonFormatter):
    """time, level, logger, message, request_id, the fields of ``extra``, and a traceback as ``exception``."""

    def __init__(self) -> None:
        super().__init__("%(levelname)s %(name)s %(message)s", rename_fields=JSON_NAMES, timestamp="time")

    def process_log_record(self, log_data: dict[str, Any]) -> dict[str, Any]:
        if request_id := REQUEST_ID.get():
            log_data["request_id"] = request_id
        return log_data | {"level": log_data["level"].lower()}
