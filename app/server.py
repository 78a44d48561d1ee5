"""The process: uvicorn, and what SIGTERM means."""

from __future__ import annotations

import asyncio
import logging
import signal
from types import FrameType

import uvicorn

from app.main import create_app
from app.service import Service
from app.settings import Settings


class Server(uvicorn.Server):
    """Drains before it stops: the port stays open, so that /readyz can say why, until accepted work is answered."""

    service: Service
    loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list | None = None) -> None:  # type: ignore[type-arg]
        """Remember the loop for the signal handler."""
        self.loop = asyncio.get_running_loop()
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """First signal: drain, then stop. Second: stop now."""
        engine_stops = self.service.unready and self.service.unready.startswith("draining")
        if self.loop is None or engine_stops:
            super().handle_exit(sig, frame)
        else:
            self.loop.call_soon_threadsafe(lambda: asyncio.ensure_future(self._drain(sig)))

    async def _drain(self, sig: int) -> None:
        logging.getLogger("unstir").info("%s: draining", signal.Signals(sig).name)
        await self.service.drain()
        self.should_exit = True


def serve(settings: Settings) -> int:
    """Serve until told to stop; returns the exit status, 1 if the network could not be loaded."""
    logging.basicConfig(level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s %(message)s")

    def give_up() -> None:
        server.should_exit = True

    app = create_app(settings, on_failure=give_up)
    config = uvicorn.Config(app, host=settings.host, port=settings.port, log_config=None, access_log=False)
    server = Server(config)
    server.service = app.state.service
    server.run()
    return 1 if server.service.failure else 0
