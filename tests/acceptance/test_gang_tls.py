"""A job over two hosts whose Ray encrypts: `RAY_USE_TLS=1` with the certificates of `deploy.certificates`."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from jobs.service import JobService
from jobs.store.job import JobStatus
from tests.acceptance.conftest import WorkerProcess, wait_for
from tests.acceptance.test_gang import LAUNCHER, submit
from tests.acceptance.test_worker import assert_whole
from tests.conftest import pick_port
from tests.integration.children import MODELS
from tests.ray_cluster import RayCluster, unavailable

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    if why := unavailable():
        pytest.skip(why)
    environment = {"GRPO_LAUNCHER": " ".join(LAUNCHER), "GRPO_MODEL_DIR": str(MODELS), "OMP_NUM_THREADS": "1"}
    cluster = RayCluster(tmp_path_factory.mktemp("ray"), pick_port(), tls=True, **environment)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def answer(cluster: RayCluster, context: ssl.SSLContext | None) -> bytes:
    """What Ray's head says to a stranger who begins to speak its protocol."""
    host, _, port = cluster.address.rpartition(":")
    stream = socket.create_connection((host, int(port)), timeout=20)
    try:
        stream = stream if context is None else context.wrap_socket(stream, server_hostname=host)
        stream.sendall(PREFACE)
        return stream.recv(64)
    except (ssl.SSLError, ConnectionError):
        return b""
    finally:
        stream.close()


def test_a_job_trains_over_an_encrypted_cluster_that_strangers_cannot_use(
    service: JobService, start_worker: Callable[..., WorkerProcess], cluster: RayCluster
) -> None:
    variables = {**cluster.variables, "GRPO_MODEL_DIR": str(MODELS), "GRPO_RAY_WAIT_SECONDS": "2"}
    start_worker(LAUNCHER, **variables)
    job = submit(service, steps=3, step_seconds="0.01")
    done = wait_for(service, job.id)
    assert (done.status, done.epoch, done.step) == (JobStatus.SUCCEEDED, 1, 3), done.error
    assert_whole(service, done)

    folder = Path(cluster.variables["RAY_TLS_CA_CERT"]).parent
    assert answer(cluster, None) == b""
    context = ssl.create_default_context(cafile=str(folder / "authority.crt"))
    context.set_alpn_protocols(["h2"])
    assert answer(cluster, context) == b""
    context.load_cert_chain(folder / "store.crt", folder / "store.key")
    assert answer(cluster, context) != b"", "who has a certificate gets the server's settings"
