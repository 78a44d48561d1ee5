"""Log lines that say which request they belong to, for people or, an object a line, for machines."""

from __future__ import annotations

import json
import logging
import time
from contextvars import ContextVar

REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="")


def configure(level: str, form: str) -> None:
    """Set the root logger up; ``form`` is text or json."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Json() if form == "json" else logging.Formatter(TEXT))
    handler.addFilter(_with_request)
    logging.basicConfig(level=level.upper(), handlers=[handler])


TEXT = "%(asctime)s %(levelname)s %(name)s %(message)s%(told)s"


def _with_request(record: logging.LogRecord) -> bool:
    request_id = REQUEST_ID.get()
    record.__dict__ |= {"request_id": request_id, "told": f" id={request_id}" if request_id else ""}
    return True


class _Json(logging.Formatter):
    """One object: time, level, logger, message, request id, and what else the call said in ``extra["fields"]``."""

    converter = staticmethod(time.gmtime)

    def format(self, record: logging.LogRecord) -> str:
        told = {
            "time": f"{self.formatTime(record, '%Y-%m-%dT%H:%M:%S')}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if request_id := getattr(record, "request_id", ""):
            told["request_id"] = request_id
        told |= getattr(record, "fields", {})
        if record.exc_info:
            told["exception"] = self.formatException(record.exc_info)
        return json.dumps(told, ensure_ascii=False, default=str)
