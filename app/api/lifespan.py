"""The process from start to end: loading, serving, draining.

The HTTP server answers from the first moment; the network is loaded on the thread that then does the engine's work.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import torch

from app.api.uploads import Uploads
from app.engine.engine import Engine
from app.engine.loading import LoadedModel, describe_failure, load
from app.errors import EngineDead, Starting
from app.operations.service import Service
from app.operations.warmup import warm_up
from app.settings import Settings
from app.telemetry.metrics import Metrics
from model.output import counted

log = logging.getLogger("unstir")
POLL_SECONDS = 0.02


class Lifecycle:
    """Whether there is a service, and why not.

    Attributes:
        failure: why loading failed, or None.
        uploads: the room for request bodies.
        refusing: set when nothing more is accepted.
        stopped: set when what still runs is given up.
    """

    def __init__(self, settings: Settings, metrics: Metrics, on_failure: Callable[[], None] = lambda: None) -> None:
        """Args: on_failure: called when the network cannot be loaded; says so to whoever waits for it."""
        self.settings = settings
        self.metrics = metrics
        self.failure: str | None = None
        self.uploads = Uploads(settings.max_upload_bytes)
        self.refusing = asyncio.Event()
        self.stopped = asyncio.Event()
        self._responses = 0
        self._on_failure = on_failure
        self._service: Service | None = None

    def get_service(self) -> Service:
        """The service.

        Raises:
            Starting: the network is still being loaded.
            EngineDead: it could not be.
        """
        if self._service is not None:
            return self._service
        if self.failure is not None:
            raise EngineDead(f"the network could not be loaded: {self.failure}")
        raise Starting("the network is being loaded and warmed up; try again in a moment", retry_after=2)

    @property
    def model(self) -> LoadedModel | None:
        return None if self._service is None else self._service.model

    @property
    def engine(self) -> Engine | None:
        return None if self._service is None else self._service.engine

    @property
    def loading(self) -> bool:
        return self._service is None and self.failure is None

    @property
    def unready(self) -> str | None:
        """Why no requests should be sent here now, or None."""
        if self.failure is not None:
            return f"the network could not be loaded: {self.failure}"
        return "starting: the network is being loaded" if self.engine is None else self.engine.unready

    @asynccontextmanager
    async def run(self, _: Any) -> AsyncIterator[None]:
        """The ASGI lifespan."""
        # A daemon, so that a process that is told to stop need not first finish loading.
        loop = asyncio.get_running_loop()
        threading.Thread(target=self._load_and_work, args=[loop], name="device", daemon=True).start()
        watching = asyncio.ensure_future(self.metrics.measure_lag())
        yield
        await self.drain()
        watching.cancel()
        self.close()

    @contextlib.contextmanager
    def responding(self) -> Iterator[None]:
        """Within it, a response is computed or encoded, for which :meth:`drain` waits."""
        self._responses += 1
        try:
            yield
        finally:
            self._responses -= 1

    @property
    def unfinished(self) -> int:
        """Accepted requests and jobs that are not answered."""
        return 0 if self.engine is None else max(sum(self.engine.requests.values()), self._responses)

    async def drain(self, cause: str = "the server ends") -> None:
        """Accept nothing new, and wait until accepted work is answered or ``drain_seconds`` have passed.

        Args:
            cause: for the log, as the name of a signal.
        """
        began, seconds = not self.refusing.is_set(), self.settings.drain_seconds
        self.refusing.set()
        if self.engine is None or self.engine.failure or self.engine.draining:
            if began:
                log.info("%s: stopping", cause)
            return
        left = self.unfinished
        requests = counted(left, "request")
        remaining = f"{requests} left, for up to {seconds:g} s; a second signal ends what is left with 503"
        log.info("%s: draining, %s", cause, remaining if left else "no requests left")
        deadline = time.monotonic() + seconds
        unfinished = await self.engine.drain(seconds)
        while self._responses and not self.engine.failure and time.monotonic() < deadline:
            await asyncio.sleep(POLL_SECONDS)
        unfinished = max(unfinished, self._responses)
        if self.stopped.is_set():  # which has been logged
            return
        ended = counted(unfinished, "request")
        log.info("drained" if not unfinished else f"drain time is over, {ended} ended with 503")

    def stop(self, cause: str) -> None:
        """Give up what still runs, and say so.

        Args:
            cause: as in :meth:`drain`.
        """
        log.info("%s: stopped, %s ended with 503", cause, counted(self.unfinished, "request"))
        self.close()

    def close(self) -> None:
        """End the device thread; what still runs fails with 503."""
        self.stopped.set()
        if self.engine is not None:
            self.engine.close()

    def _load_and_work(self, loop: asyncio.AbstractEventLoop) -> None:
        """The device thread."""
        try:
            model = load(self.settings, self.metrics)
            if model.device.type == "cuda":
                warm_up(model.runner, model.engine.forwards)
        except BaseException as error:  # a SystemExit, too, ends this thread, and must not leave "starting" for ever
            self._call(loop, self._fail, error)
        else:
            self._call(loop, self._start, model)
            model.engine.work()

    @staticmethod
    def _call(loop: asyncio.AbstractEventLoop, function: Callable[..., None], argument: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the process was told to stop in the meantime
            loop.call_soon_threadsafe(function, argument)

    def _start(self, model: LoadedModel) -> None:
        torch.set_num_threads(1)  # of this thread and later ones; the device thread keeps its own
        model.engine.open()
        self.metrics.initialize_widths(
            {width for widths in (model.engine.forwards.fast, model.engine.forwards.exact) for width in widths.sizes}
        )
        self._service = Service(self.settings, self.metrics, model)
        log.info("ready")

    def _fail(self, error: BaseException) -> None:
        self.failure = describe_failure(self.settings.checkpoint, error)
        level = logging.DEBUG if isinstance(error, Exception) else logging.CRITICAL
        log.log(level, "while loading", exc_info=error)
        self._on_failure()
