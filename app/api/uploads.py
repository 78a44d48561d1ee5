"""A bound on the bytes of request bodies in memory: who finds no room waits, and its bytes wait with the client."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field

from starlette.datastructures import Headers

from app.errors import Overloaded

SMALL_BYTES = 1 << 16  # of a body that needs no room: the number of connections bounds those


@dataclass(eq=False)
class Upload:
    """The room that one body takes."""

    uploads: Uploads
    nbytes: int
    granted: asyncio.Event = field(default_factory=asyncio.Event)

    def release(self) -> None:
        """Give the room back; it may be called again."""
        nbytes, self.nbytes = self.nbytes, 0
        self.uploads.add_room(nbytes)


class Uploads:
    """Bodies that are received, parsed, or belong to requests not yet done; let in in their order.

    Its methods are called on the event loop.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = self._room = max_bytes
        self._waiting: deque[Upload] = deque()

    @property
    def nbytes(self) -> int:
        """Bytes that are taken."""
        return self._max_bytes - self._room

    async def reserve(self, headers: Headers, max_body_bytes: int, seconds: float) -> Upload:
        """Wait for room for a body of this Content-Length, or for the largest if it names none.

        Raises:
            Overloaded: there was none within so many seconds.
        """
        declared = headers.get("content-length", "" if "transfer-encoding" in headers else "0")
        nbytes = min(int(declared), max_body_bytes) if declared.isdecimal() else max_body_bytes
        if nbytes <= SMALL_BYTES:
            return Upload(self, 0)
        upload = Upload(self, min(nbytes, self._max_bytes))
        self._waiting.append(upload)
        self.add_room(0)
        try:
            async with asyncio.timeout(seconds):
                await upload.granted.wait()
        except BaseException as error:
            if upload.granted.is_set():
                upload.release()
            else:
                self._waiting.remove(upload)
            if isinstance(error, TimeoutError):
                detail = f"{self.nbytes} bytes of request bodies are received or worked on; try again later"
                raise Overloaded(detail, retry_after=seconds) from None
            raise
        return upload

    def add_room(self, nbytes: int) -> None:
        """Let in who waits and finds room now."""
        self._room += nbytes
        while self._waiting and self._waiting[0].nbytes <= self._room:
            upload = self._waiting.popleft()
            self._room -= upload.nbytes
            upload.granted.set()
