"""Runs the application under uvicorn: one process, our own log lines, an orderly end on TERM."""

from __future__ import annotations

import logging

import uvicorn

from api.app import create_app
from api.settings import ApiSettings
from jobs import logs
from jobs.service import JobService


def serve(host: str | None = None, port: int | None = None) -> None:
    """Serve until TERM, then give open requests some seconds. Raises `JobsError` where storage cannot be used."""
    settings = ApiSettings()
    logs.configure(logging.getLevelNamesMapping()[settings.log_level])
    service = JobService.from_settings()
    # The lifespan checks this too, but from there uvicorn could only print a traceback.
    service.store.ensure_ready()
    uvicorn.run(
        create_app(service, settings),
        host=host or settings.host,
        port=port or settings.port,
        # Ours, which knows request ids and leaves query strings out.
        access_log=False,
        log_config=None,
        server_header=False,
        timeout_graceful_shutdown=settings.shutdown_seconds,
    )
