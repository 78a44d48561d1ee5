"""The process: uvicorn, and what SIGTERM, SIGINT and SIGHUP mean."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from types import FrameType
from typing import Any

import uvicorn

from app.api.app import create_app
from app.api.connections import Connections, count_connections, protocol_of, raise_backlog, raise_file_limit
from app.api.lifespan import Lifecycle
from app.settings import Settings, review_environment
from app.telemetry import logs

# The server must not be the first to close an idle connection: a request that is just being sent would be lost.
# Clients and proxies keep theirs for 5 (httpx) to 60 s (nginx, load balancers); uvicorn by default for 5.
KEEP_ALIVE_SECONDS = 75
LINGER_SECONDS = 5  # for responses being sent once no work is left; a client that does not read must not delay the exit


class Server(uvicorn.Server):
    """Drains before it stops: the port stays open, so that /readyz can say why, until accepted work is answered."""

    loop: asyncio.AbstractEventLoop | None = None
    signals = 0

    def __init__(self, config: uvicorn.Config, lifecycle: Lifecycle, connections: Connections) -> None:
        super().__init__(config)
        self.lifecycle, self.connections = lifecycle, connections

    async def startup(self, sockets: list | None = None) -> None:  # type: ignore[type-arg]
        """Remember the loop for the signal handler."""
        self.loop = asyncio.get_running_loop()
        self.loop.set_exception_handler(self._on_loop_error)
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup sets it
            signal.signal(signal.SIGHUP, self.handle_exit)
        limit, self.config.backlog = count_connections(raise_file_limit(), self.connections.limit)
        self.connections.limit = limit
        await super().startup(sockets)
        for listener in (listener for server in self.servers for listener in server.sockets):
            raise_backlog(listener)

    def _on_loop_error(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if str(context.get("message", "")).startswith("socket.accept()"):
            self.connections.report_accept_error(context["exception"])
        else:
            loop.default_exception_handler(context)

    def handle_exit(self, sig: int, _: FrameType | None) -> None:
        """First signal: drain, then stop. Second: fail what runs with 503, and stop. Third: stop at once."""
        self.signals += 1
        name = signal.Signals(sig).name
        if self.loop is None or self.signals > 2:
            self.should_exit = self.force_exit = True
        elif self.signals == 2:
            self.loop.call_soon_threadsafe(self._stop, name)
        else:
            self.loop.call_soon_threadsafe(lambda: asyncio.ensure_future(self._drain(name)))

    async def _drain(self, cause: str) -> None:
        await self.lifecycle.drain(cause)
        self._close()

    def _stop(self, cause: str) -> None:
        self.lifecycle.stop(f"{cause}, the second signal")
        self._close()

    def _close(self) -> None:
        self.lifecycle.close()  # what still runs fails now, so that its connection ends
        self.should_exit = True


def create_server(settings: Settings) -> Server:
    """The server of these settings, not yet running."""
    # The device thread releases the interpreter's lock at every operation, and a busy event loop keeps it for a whole
    # switch interval each time: with Python's 5 ms, a forward of a hundred operations would wait for each request.
    sys.setswitchinterval(0.0005)
    logs.configure(settings.log_level, settings.log_format)
    for line in review_environment(os.environ):
        logging.getLogger("unstir").warning(line)

    def stop() -> None:
        logging.getLogger("unstir").critical("%s", server.lifecycle.unready)
        server.should_exit = True

    app = create_app(settings, on_failure=stop)
    connections = Connections(settings)
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=protocol_of(connections),
        ws="none",
        log_config=None,
        access_log=False,
        proxy_headers=bool(settings.trusted_proxies),
        forwarded_allow_ips=settings.trusted_proxies,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=LINGER_SECONDS,
    )
    server = Server(config, app.state.lifecycle, connections)
    return server


def serve(settings: Settings) -> int:
    """Serve until told to stop; returns the exit status, 1 if the network could not be loaded."""
    server = create_server(settings)
    status = 0
    try:
        server.run()
    except SystemExit as stopped:  # uvicorn could not listen, and has said why
        status = int(stopped.code or 0)
    if status:
        where = f"{settings.host}:{settings.port}"
        logging.getLogger("unstir").error(
            "no listening on %s: choose another --port (UNSTIR_PORT) or --host (UNSTIR_HOST)", where
        )
    if server.lifecycle.loading:  # leave without the loading thread, which may be deep in the device
        logging.shutdown()
        os._exit(status)
    return status if server.lifecycle.failure is None else 1
