"""Runs the application under uvicorn: one process, our own log lines, an orderly end on TERM."""

from __future__ import annotations

import asyncio
import logging
import socket
import time

import structlog
from litestar import Litestar

from api import compat
from api.app import create_app
from api.compat import HttpServer
from api.connections import GuardedConfig
from api.settings import ApiSettings
from api.streams import EventStreams
from jobs import logs
from jobs.service import JobService
from jobs.store.audit_log import AuditLog, AuditSettings

log = structlog.get_logger(__name__)


def serve(host: str | None = None, port: int | None = None) -> None:
    """Serve until TERM, then give open requests some seconds. Raises `UnsafeStorage`, `UnsafeValkey`.

    Servers that are away are waited for: until they answer, `/readyz` says so and nothing is accepted.
    """
    settings = ApiSettings()
    logs.configure(logging.getLevelNamesMapping()[settings.log_level])
    service = JobService.from_settings()
    # Here and not first in the lifespan, from where uvicorn could only print a traceback.
    service.start()
    server = make_server(create_app(service, settings, AuditLog.of(AuditSettings())), settings, host, port)
    server.run()
    if not server.started:
        raise SystemExit(3)


class Server(HttpServer):
    """Closes event streams as soon as it receives TERM; otherwise they would stay open for as long as uvicorn waits."""

    def __init__(self, config: GuardedConfig, app: Litestar) -> None:
        super().__init__(config)
        self._connections = config.connections
        self._litestar = app

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Say where it listens, once it does."""
        await super().startup(sockets)
        if self.started:
            log.info("api_ready", url=f"http://{self.config.host}:{self.config.port}")

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second; once a second look at what takes too long."""
        if counter % 10 == 0:
            self._connections.sweep(time.monotonic())
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop in order: streams, requests, lifespan."""
        streams: EventStreams | None = self._litestar.state.get("streams")
        if streams is not None:
            streams.close()
        await super().shutdown(sockets)
        # uvicorn would wait once more for a reader that does not read.
        self.cut_connections()
        await asyncio.sleep(0)


def make_server(app: Litestar, settings: ApiSettings, host: str | None = None, port: int | None = None) -> Server:
    """The server of one application. Raises `LibraryChanged`."""
    compat.check()
    config = GuardedConfig(
        app,
        settings,
        host=host or settings.host,
        port=port or settings.port,
        # Ours, which knows request ids and leaves query strings out.
        access_log=False,
        log_config=None,
        server_header=False,
        timeout_graceful_shutdown=settings.shutdown_seconds,
    )
    return Server(config, app)
