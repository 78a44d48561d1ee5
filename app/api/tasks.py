"""One operation under way, for all who wait for it.

They may come and go: the client of an ordinary request, several with the same ``Idempotency-Key``, an event stream, or
nobody for now, as with an asynchronous job.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

from app.api.responses.results import OperationResult
from app.errors import Cancelled, UnstirError
from app.errors.frames import copy_error, forget_frames
from app.operations.context import RequestContext

ASK_AGAIN = "it was cancelled before it was done; send it again"


class RequestTask:
    """Runs an operation, and cancels it when the last who waits leaves.

    Attributes:
        ended: when it ended, on the engine's clock; None while it runs.
        cancelled_by: the error that a cancellation was given; None if nobody was left to wait.
    """

    def __init__(
        self,
        operation: Coroutine[Any, Any, OperationResult],
        context: RequestContext,
        on_end: Callable[[RequestTask], None] = lambda _: None,
    ) -> None:
        self.context = context
        self.ended: float | None = None
        self.cancelled_by: UnstirError | None = None
        self._on_end = on_end
        self._waiting = 0
        self._task = asyncio.ensure_future(operation)
        self._task.add_done_callback(self._end)

    def _end(self, task: asyncio.Task[OperationResult]) -> None:
        self.ended = time.monotonic()
        try:
            forget_frames(task.exception())  # it is retrieved even if nobody is left to do so
        except asyncio.CancelledError as error:
            forget_frames(error)
        self._on_end(self)

    @property
    def done(self) -> bool:
        return self._task.done()

    @property
    def error(self) -> Exception | None:
        """Why it failed; None while it runs and after success."""
        if not self._task.done():
            return None
        if self._task.cancelled():
            return self.cancelled_by or Cancelled(ASK_AGAIN)
        error = self._task.exception()
        return error if isinstance(error, Exception) else None

    @property
    def cancelled(self) -> bool:
        return self._task.cancelled()

    @property
    def result(self) -> OperationResult | None:
        """What it gave; None until it is done, and if it failed."""
        return None if not self._task.done() or self.error else self._task.result()

    async def wait(self) -> OperationResult:
        """The result. The last to stop waiting cancels the operation.

        Raises:
            UnstirError: it failed, or somebody else cancelled it.
        """
        self._waiting += 1
        try:
            return await asyncio.shield(self._task)
        except asyncio.CancelledError:
            if self.cancelled_by is not None:
                raise copy_error(self.cancelled_by) from None
            if self._task.cancelled():  # by somebody else who waited for it
                raise Cancelled(ASK_AGAIN) from None
            raise
        except Exception as error:
            raise copy_error(error) from None
        finally:
            self._leave()

    async def wait_admitted(self) -> None:
        """Wait until the engine has admitted it, or it is done.

        Raises:
            UnstirError: it was refused.
        """
        admitted = asyncio.ensure_future(self.context.admitted.wait())
        self._waiting += 1
        try:
            await asyncio.wait({admitted, self._task}, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            self._leave()
            raise
        else:
            self._waiting -= 1
        finally:
            admitted.cancel()
        if not self.context.admitted.is_set():
            try:
                self._task.result()
            except Exception as error:
                raise copy_error(error) from None

    def _leave(self) -> None:
        self._waiting -= 1
        if not self._waiting and not self._task.done():
            self.cancel()

    def keep(self) -> None:
        """Go on although nobody waits, until it is cancelled."""
        self._waiting += 1

    def cancel(self, error: UnstirError | None = None) -> None:
        """Its lanes leave before the next tick; whoever waits gets ``error``."""
        self.cancelled_by = self.cancelled_by or error
        self._task.cancel()

    async def wait_ended(self) -> None:
        """Wait for the end, whatever it is."""
        await asyncio.wait({self._task})
