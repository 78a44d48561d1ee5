"""Connections: how many there are, and how long each may take to send a request or to read a response.

uvicorn bounds neither. A client that opens connections and sends nothing would take all file descriptors, and then
even those that answer would fail. So connections are counted below the limit of files; when all are taken, the one
that has been idle longest makes room, and where none is idle, a new one gets 503.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import logging
import os
import resource
import socket
import struct
import sys
import termios
import time
import uuid
from functools import partial
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from app.api import problems
from app.errors import InvalidHTTP, SlowRequest, TooManyConnections, UnstirError
from app.settings import Settings

log = logging.getLogger("unstir.http")
SPARE_FILES = 64  # descriptors for all else: the network's files, a cache, connections about to be refused
BACKLOG = 2048  # connections that the system keeps until they are accepted
MIN_CONNECTIONS = 8
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: on, for 0 seconds
SETTLE_SECONDS = 1.0  # a connection younger than this is not idle yet
LOG_SECONDS = 60.0  # between two lines about a full table


def raise_file_limit() -> int | None:
    """Raise the limit of open files to the hard one, and return it; None if there is none."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
        except (ValueError, OSError):  # macOS reports an infinite hard limit and refuses it
            log.debug("the limit of open files stays %d", soft)
    return None if soft == resource.RLIM_INFINITY else soft


def count_connections(files: int | None, max_connections: int) -> tuple[int, int]:
    """How many connections there may be, and how many may be accepted at once before those beyond are refused.

    Args:
        files: the limit of open files; those that are open now are counted.
    """
    spare = SPARE_FILES if files is None else min(SPARE_FILES, files // 3)
    if files is not None:
        max_connections = max(MIN_CONNECTIONS, min(max_connections, files - _count_open_files() - spare))
    return max_connections, max(1, spare // 5)  # one is open for some rounds of the event loop until it is closed


def _count_open_files() -> int:
    for folder in ("/proc/self/fd", "/dev/fd"):
        if os.path.isdir(folder):
            return len(os.listdir(folder))
    return SPARE_FILES


class Connections:
    """All connections of a server.

    Attributes:
        limit: how many there may be.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.limit = settings.max_connections
        self._open: set[Connection] = set()
        self._idle: dict[Connection, float] = {}  # since when; the longest first
        self._logged = -LOG_SECONDS
        self._refused = 0

    def admit(self, connection: Connection) -> bool:
        """Count it in; whether there was room, or could be made."""
        if len(self._open) >= self.limit and not self._close_idle():
            self._refused += 1
            self._report("answered 503")
            return False
        self._open.add(connection)
        self.set_idle(connection)
        return True

    def set_idle(self, connection: Connection) -> None:
        """It waits for a request, from now on."""
        self._idle.pop(connection, None)
        self._idle[connection] = time.monotonic()

    def set_busy(self, connection: Connection) -> None:
        """It has sent a request."""
        self._idle.pop(connection, None)

    def remove(self, connection: Connection) -> None:
        self._open.discard(connection)
        self._idle.pop(connection, None)

    def _close_idle(self) -> bool:
        """Close the one that has been idle longest; what is still being sent is not idle."""
        settled = time.monotonic() - SETTLE_SECONDS
        old = (each for each, since in self._idle.items() if since <= settled and not each.count_unread())
        connection = next(old, None)
        if connection is None:
            return False
        self._refused += 1
        self._report("closed while idle")
        self.remove(connection)
        connection.transport.abort()
        return True

    def _report(self, what: str) -> None:
        now = time.monotonic()
        if now - self._logged >= LOG_SECONDS:
            remedy = "raise the limit of open files (ulimit -n), or UNSTIR_MAX_CONNECTIONS"
            log.warning("all %d connections are taken, %d were %s; %s", self.limit, self._refused, what, remedy)
            self._logged, self._refused = now, 0

    def report_accept_error(self, error: BaseException) -> None:
        """The system had no descriptor for a connection, though they are counted: others have taken them."""
        self._refused += 1
        self._report(f"not accepted ({error})")


class Connection(H11Protocol):
    """uvicorn's protocol, with deadlines.

    A request's headers must be complete ``header_seconds`` after the connection or the last response, or after the
    first byte of a later request; a client that reads nothing of a response for ``write_seconds`` is disconnected.
    """

    def __init__(self, connections: Connections, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._connections = connections
        self._refused = False
        self._header_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._received = False  # a part of a request's headers

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if not self._connections.admit(self):
            self._refused = True
            self.connections.discard(self)
            self._send_problem(TooManyConnections("no connection is free; try again later", retry_after=1))
            return
        self._start_header_timer()

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        super().data_received(data)
        if not self._awaits_request:
            self._received = False
            self._stop_header_timer()
            self._connections.set_busy(self)
        elif self.cycle is not None and not self.conn.trailing_data[0]:
            # The rest of a body that nobody wanted; once it has ended, the connection is as after any response.
            if not self.cycle.more_body:
                self._stop_header_timer()
                self._unset_keepalive_if_required()
                self.timeout_keep_alive_task = self.loop.call_later(
                    self.timeout_keep_alive, self.timeout_keep_alive_handler
                )
        else:
            self._received = True
            if self._header_timer is None:
                self._start_header_timer()

    @property
    def _awaits_request(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self._awaits_request:  # the next one was sent along with this one
            return
        self._connections.set_idle(self)
        self._received = False
        if self.cycle.more_body:  # the rest of it is on its way, and nobody wants it
            self._start_header_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._connections.remove(self)
        self._stop_header_timer()
        self._stop(self._write_timer)
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_writing(self.count_unread())

    def resume_writing(self) -> None:
        self._stop(self._write_timer)
        self._write_timer = None
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """As a problem, like every other error."""
        if self.cycle is not None and not self.cycle.response_complete:
            if self.cycle.response_started:
                self.transport.close()  # nothing can be put into a response that is on its way
                return
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self._send_problem(InvalidHTTP(f"{msg} See RFC 9112; send another request"))

    def _unsupported_upgrade_warning(self) -> None:
        """Nothing: a client may offer HTTP/2, and is answered in HTTP/1.1."""

    def count_unread(self) -> int:
        """Bytes of responses that the client has not taken: those kept here, and on Linux those of the system."""
        unread = self.transport.get_write_buffer_size()
        with contextlib.suppress(OSError, ValueError):
            queued = fcntl.ioctl(self.transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, bytes(4))
            unread += int.from_bytes(queued, sys.byteorder)
        return int(unread)

    def _stop_header_timer(self) -> None:
        self._stop(self._header_timer)
        self._header_timer = None

    def _start_header_timer(self) -> None:
        self._stop(self._header_timer)
        self._header_timer = self.loop.call_later(self._connections.settings.header_seconds, self._end_waiting)

    def _end_waiting(self) -> None:
        if not self._received:
            self.transport.close()
            return
        seconds = self._connections.settings.header_seconds
        self._send_problem(SlowRequest(f"the headers were not complete in {seconds:g} s; send them at once"))

    def _watch_writing(self, before: int) -> None:
        def check() -> None:
            left = self.count_unread()
            if left >= before:
                # Reset, or the system would keep what it has of the response for minutes.
                self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                self.transport.abort()
            else:
                self._watch_writing(left)

        self._stop(self._write_timer)
        self._write_timer = self.loop.call_later(self._connections.settings.write_seconds, check)

    def _send_problem(self, error: UnstirError) -> None:
        """Before there is a request; the connection is closed."""
        request_id = uuid.uuid4().hex
        body = json.dumps(problems.describe(error, request_id)).encode()
        headers = {
            "Content-Type": "application/problem+json",
            "Content-Length": str(len(body)),
            "Connection": "close",
            "X-Request-Id": request_id,
        } | error.headers
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        self.transport.write(f"HTTP/1.1 {error.status} {error.title}\r\n{lines}\r\n".encode() + body)
        self.transport.close()

    @staticmethod
    def _stop(timer: asyncio.TimerHandle | None) -> None:
        if timer is not None:
            timer.cancel()


def raise_backlog(listener: socket.socket) -> None:
    """Let the system keep more connections than asyncio accepts at once; for asyncio the two are one number."""
    with socket.socket(fileno=os.dup(listener.fileno())) as same:
        same.listen(BACKLOG)


def protocol_of(connections: Connections) -> Any:
    """What uvicorn calls for each connection."""
    return partial(Connection, connections)
