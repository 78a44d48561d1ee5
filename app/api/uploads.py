"""A bound on the bytes of request bodies in memory: who finds no room waits, and its bytes wait with the client."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass, field

from starlette.datastructures import Headers

from app.errors import Overloaded

SMALL_BYTES = 1 << 16  # of a body that needs no room: the number of connections bounds those


@dataclass(eq=False)
class Upload:
    """The room that one body takes."""

    uploads: Uploads
    nbytes: int
    caller: str = ""
    granted: asyncio.Event = field(default_factory=asyncio.Event)

    def shrink(self, nbytes: int) -> None:
        """Give back what the body did not need."""
        if nbytes < self.nbytes:
            spare, self.nbytes = self.nbytes - nbytes, nbytes
            self.uploads.give_back(self.caller, spare)

    def release(self) -> None:
        """Give all of the room back; it may be called again."""
        self.shrink(0)


class Uploads:
    """Bodies that are received, parsed, or belong to requests not yet done; let in in their order.

    One caller gets at most half of the room while it has some already, so that others find theirs. Its methods are
    called on the event loop.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = self._room = max_bytes
        self._held: Counter[str] = Counter()  # by caller
        self._waiting: list[Upload] = []

    @property
    def nbytes(self) -> int:
        """Bytes that are taken."""
        return self._max_bytes - self._room

    async def reserve(self, headers: Headers, max_body_bytes: int, seconds: float, caller: str = "") -> Upload:
        """Wait for room for a body of this Content-Length, or for the largest if it names none.

        Raises:
            Overloaded: there was none within so many seconds.
        """
        declared = headers.get("content-length", "" if "transfer-encoding" in headers else "0")
        nbytes = min(int(declared), max_body_bytes) if declared.isdecimal() else max_body_bytes
        if nbytes <= SMALL_BYTES:
            return Upload(self, 0)
        upload = Upload(self, min(nbytes, self._max_bytes), caller)
        self._waiting.append(upload)
        self._let_in()
        try:
            async with asyncio.timeout(seconds):
                await upload.granted.wait()
        except BaseException as error:
            if upload.granted.is_set():
                upload.release()
            else:
                self._waiting.remove(upload)
                self._let_in()
            if isinstance(error, TimeoutError):
                detail = (
                    f"{self.nbytes} bytes of request bodies are received or worked on; "
                    "try again later, though no room can be kept until then"
                )
                raise Overloaded(detail, retry_after=seconds) from None
            raise
        return upload

    def give_back(self, caller: str, nbytes: int) -> None:
        """So many bytes of a caller's are free."""
        self._room += nbytes
        self._held[caller] -= nbytes
        self._held += Counter()  # without those that hold nothing
        self._let_in()

    def _let_in(self) -> None:
        """Those who find room, in their order; who must wait for others of the same caller delays nobody else."""
        for upload in list(self._waiting):
            held = self._held[upload.caller]
            if held and held + upload.nbytes > self._max_bytes // 2:
                continue
            if upload.nbytes > self._room:
                return
            self._waiting.remove(upload)
            self._room -= upload.nbytes
            self._held[upload.caller] += upload.nbytes
            upload.granted.set()
