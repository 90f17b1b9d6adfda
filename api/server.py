"""Runs the application under uvicorn: one process, our own log lines, an orderly end on TERM."""

from __future__ import annotations

import asyncio
import logging
import socket

import structlog
import uvicorn
from litestar import Litestar

from api.app import create_app
from api.settings import ApiSettings
from api.streams import EventStreams
from jobs import logs
from jobs.service import JobService

log = structlog.get_logger(__name__)


def serve(host: str | None = None, port: int | None = None) -> None:
    """Serve until TERM, then give open requests some seconds. Raises `JobsError` where storage cannot be used."""
    settings = ApiSettings()
    logs.configure(logging.getLevelNamesMapping()[settings.log_level])
    service = JobService.from_settings()
    # Here and not first in the lifespan, from where uvicorn could only print a traceback.
    service.check_storage()
    server = make_server(create_app(service, settings), settings, host, port)
    server.run()
    if not server.started:
        raise SystemExit(3)


class Server(uvicorn.Server):
    """Ends event streams as soon as it is told to stop: they would go on for as long as uvicorn waits."""

    def __init__(self, config: uvicorn.Config, app: Litestar) -> None:
        super().__init__(config)
        self._litestar = app

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Say where it listens, once it does."""
        await super().startup(sockets)
        if self.started:
            log.info("api_ready", url=f"http://{self.config.host}:{self.config.port}")

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop in order: streams, requests, lifespan."""
        streams: EventStreams | None = self._litestar.state.get("streams")
        if streams is not None:
            streams.close()
        await super().shutdown(sockets)
        for connection in list(self.server_state.connections):
            # A reader that does not read: uvicorn waits for it once more, and uvloop cannot close with it.
            connection.transport.abort()
        await asyncio.sleep(0)


def make_server(app: Litestar, settings: ApiSettings, host: str | None = None, port: int | None = None) -> Server:
    """The server of one application."""
    config = uvicorn.Config(
        app,
        host=host or settings.host,
        port=port or settings.port,
        # Ours, which knows request ids and leaves query strings out.
        access_log=False,
        log_config=None,
        server_header=False,
        timeout_graceful_shutdown=settings.shutdown_seconds,
    )
    return Server(config, app)
