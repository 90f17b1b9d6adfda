"""The application under uvicorn in a thread of the test's process, with the real service behind it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from api.app import create_app
from api.server import Server, make_server
from api.settings import ApiSettings
from api.streams import EventStreams
from deploy.local.ports import pick_port
from jobs.service import JobService
from jobs.settings import QueueSettings, StorageSettings
from jobs.store.audit_log import AuditLog
from tests.clock import patience


class RunningApi:
    """One API process, as far as its clients can tell."""

    def __init__(self, service: JobService, *, audit: AuditLog | None = None, **settings: Any) -> None:
        self.service = service
        api_settings = ApiSettings.model_validate({"port": pick_port(), "shutdown_seconds": 5, **settings})
        self.app = create_app(service, api_settings, audit)
        self.server: Server = make_server(self.app, api_settings)
        self.port = api_settings.port
        self.url = f"http://127.0.0.1:{api_settings.port}"
        self.thread = threading.Thread(target=self.server.run)

    @property
    def streams(self) -> EventStreams:
        return self.app.state.streams

    @contextmanager
    def run(self) -> Iterator[None]:
        """Serve in this block; it must end in order."""
        self.thread.start()
        try:
            wait_until(lambda: self.server.started)
            yield
        finally:
            self.server.should_exit = True
            self.thread.join(timeout=patience(20))
        assert not self.thread.is_alive()


def wait_until(true: Callable[[], Any], seconds: float = 15) -> None:
    deadline = time.monotonic() + patience(seconds)
    while not true():
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.02)


def in_environment(storage: StorageSettings, queue: QueueSettings) -> dict[str, str]:
    """These servers as a command reads them."""
    return {
        "S3_ENDPOINT": storage.endpoint,
        "S3_BUCKET": storage.bucket,
        "S3_REGION": storage.region,
        "AWS_ACCESS_KEY_ID": storage.access_key.get_secret_value(),
        "AWS_SECRET_ACCESS_KEY": storage.secret_key.get_secret_value(),
        "REDIS_URL": queue.redis_url.get_secret_value(),
        "GRPO_PREFIX": queue.prefix,
    }
