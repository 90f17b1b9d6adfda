"""Who has no key and no certificate cannot read, write or erase anything on any port that SeaweedFS opens."""

from __future__ import annotations

import dataclasses
import http.client
import shutil
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest
from botocore.exceptions import BotoCoreError, ClientError

from deploy.certificates import Certificates
from deploy.local.ports import SEAWEEDFS_SPAN, seaweedfs_ports
from deploy.local.process import Child, Service
from deploy.local.seaweedfs import SeaweedFS
from tests.conftest import SeaweedFSServer
from tests.integration.store import new_store, shell

HTTP2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"
"""What a gRPC client says first: the preface, and empty settings."""
NTH_PORT = range(2 * SEAWEEDFS_SPAN)
COMMANDS_OF_THE_MASTER = (
    "/col/delete?collection={bucket}",
    "/dir/assign",
    "/dir/lookup?volumeId=1",
    "/dir/status",
    "/vol/status",
    "/vol/grow?count=1",
    "/vol/vacuum?garbageThreshold=0",
    "/submit",
    "/cluster/status",
    "/cluster/raft/remove?id=x",
    "/stats/memory",
    "/",
    "/ui/index.html",
)


def speak(port: int, protocol: str, *, tls: bool, certificate: Path | None = None) -> socket.socket:
    """A connection of a client that trusts any server, with the store's certificate where its folder is given."""
    connection = socket.create_connection(("127.0.0.1", port), timeout=5)
    if not tls:
        return connection
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols([protocol])
    if certificate is not None:
        context.load_cert_chain(certificate / "store.crt", certificate / "store.key")
    try:
        return context.wrap_socket(connection)
    except OSError:
        connection.close()
        raise


def status(port: int, path: str, method: str, *, tls: bool, certificate: Path | None = None) -> int | None:
    """The status that a request without a key is answered with; None when nothing is answered."""
    try:
        with speak(port, "http/1.1", tls=tls, certificate=certificate) as connection:
            client = http.client.HTTPConnection("127.0.0.1", port)
            client.sock = connection
            client.request(method, path)
            with client.getresponse() as response:
                return response.status
    except (OSError, http.client.HTTPException):
        return None


def greeting(port: int, *, tls: bool = True, certificate: Path | None = None) -> bytes:
    """What a gRPC server answers to a client's first bytes: its own settings, or nothing where it refuses."""
    try:
        with speak(port, "h2", tls=tls, certificate=certificate) as connection:
            connection.sendall(HTTP2)
            return connection.recv(9)
    except OSError:
        return b""


@pytest.mark.parametrize("nth", NTH_PORT)
def test_no_port_takes_orders_of_the_master(seaweedfs: SeaweedFSServer, prefix: str, nth: int) -> None:
    client = seaweedfs.client()
    client.put_object(Bucket=seaweedfs.bucket, Key=prefix, Body=b"precious" * 10_000)
    port = seaweedfs_ports(seaweedfs.port)[nth]
    for path in COMMANDS_OF_THE_MASTER:
        for method in ("GET", "POST"):
            for tls in (False, True):
                answer = status(port, path.format(bucket=seaweedfs.bucket), method, tls=tls)
                assert answer is None or answer >= 400, f"{method} {path} of {port}: {answer}"
    assert client.get_object(Bucket=seaweedfs.bucket, Key=prefix)["Body"].read() == b"precious" * 10_000


@pytest.mark.parametrize("nth", NTH_PORT[1:])
def test_every_port_but_that_of_s3_wants_the_certificate(seaweedfs: SeaweedFSServer, nth: int) -> None:
    port = seaweedfs_ports(seaweedfs.port)[nth]
    assert not is_settings(greeting(port, tls=False))
    assert greeting(port) == b""
    # It does answer who shows it: the refusals are about the certificate.
    answer = greeting(port, certificate=seaweedfs.certificates.folder)
    assert is_settings(answer) if nth >= SEAWEEDFS_SPAN else answer != b""


def is_settings(frame: bytes) -> bool:
    """Whether this is HTTP/2's frame of type 4 on stream 0."""
    return len(frame) == 9 and frame[3] == 4 and frame[5:] == bytes(4)


def test_the_certificate_of_another_store_opens_nothing(seaweedfs: SeaweedFSServer, tmp_path: Path) -> None:
    foreign = Certificates(tmp_path / "foreign")
    foreign.ensure()
    assert [greeting(port, certificate=foreign.folder) for port in seaweedfs_ports(seaweedfs.port)[1:]] == [b""] * 9


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE"])
@pytest.mark.parametrize(("nth", "path"), [(1, "/buckets/{bucket}/{name}"), (3, "/1,0123456789")])
def test_objects_are_behind_a_second_lock(
    seaweedfs: SeaweedFSServer, prefix: str, nth: int, path: str, method: str
) -> None:
    client = seaweedfs.client()
    client.put_object(Bucket=seaweedfs.bucket, Key=prefix, Body=b"private" * 10_000)
    path = path.format(bucket=seaweedfs.bucket, name=prefix)
    certificate = seaweedfs.certificates.folder
    assert status(seaweedfs.port + nth, path, method, tls=True, certificate=certificate) in (401, 404)
    assert client.get_object(Bucket=seaweedfs.bucket, Key=prefix)["Body"].read() == b"private" * 10_000


def test_unix_sockets_are_the_owners_alone(seaweedfs: SeaweedFSServer) -> None:
    """SeaweedFS puts some below /tmp, which everyone shares."""
    inodes = {str(path.readlink()) for path in Path(f"/proc/{seaweedfs.pid}/fd").iterdir() if path.is_symlink()}
    lines = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:]]
    found = [Path(line[7]) for line in lines if f"socket:[{line[6]}]" in inodes and len(line) > 7]
    paths = [Path(f"/proc/{seaweedfs.pid}/cwd") / path for path in found]
    assert len(paths) >= SEAWEEDFS_SPAN
    assert [path for path in paths if path.stat().st_mode & 0o077] == []


# --- A store of yesterday ---


def yesterday(config: SeaweedFS) -> Service:
    """The service as release 0.1.0 started it: no certificates, and a master that obeys everyone."""
    service = config.service()
    shutil.rmtree(config.certificates.folder)
    return dataclasses.replace(
        service, argv=tuple(word for word in service.argv if word != "-disableHttp"), probe=lambda: None
    )


def is_writable(config: SeaweedFS) -> bool:
    try:
        config.client().put_object(Bucket=config.bucket, Key="written", Body=b"")
    except (BotoCoreError, ClientError):
        return False
    return True


@pytest.fixture
def old_store(tmp_path: Path) -> Iterator[tuple[SeaweedFS, list[Child]]]:
    """A store of yesterday's flags, with what runs on it in a list."""
    config = new_store(tmp_path)
    running: list[Child] = []
    try:
        running.append(Child(yesterday(config)))
        while "without a certificate" not in str(config.missing()) or not is_writable(config):
            assert running[0].alive()
        yield config, running
    finally:
        for child in running:
            child.stop()


@pytest.mark.long
def test_a_store_of_yesterday_opens_and_its_objects_cannot_be_erased_by_the_shell(
    old_store: tuple[SeaweedFS, list[Child]], tmp_path: Path
) -> None:
    config, running = old_store
    client = config.client()
    for name in ("jobs/one", "jobs/two", "victim"):
        client.put_object(Bucket=config.bucket, Key=name, Body=name.encode() * 1_000_000)

    def names() -> list[str]:
        listed = client.list_objects_v2(Bucket=config.bucket).get("Contents", [])
        return [item.get("Key", "") for item in listed]

    # The attack as it was: without it, what follows would prove nothing.
    shell(config.port, f"fs.rm -rf /buckets/{config.bucket}/victim", tmp_path, timeout_s=60)
    assert names() == ["jobs/one", "jobs/two", "written"]
    running[0].stop()
    running.append(Child(config.service()))
    running[-1].wait_ready()

    for name in ("jobs/one", "jobs/two"):
        assert client.get_object(Bucket=config.bucket, Key=name)["Body"].read() == name.encode() * 1_000_000
    erase = f"fs.rm -rf /buckets/{config.bucket}/jobs"
    assert shell(config.port, erase, tmp_path, timeout_s=6) == "refused"
    assert names() == ["jobs/one", "jobs/two", "written"]
    # The operator's way, and the proof that nothing but the certificate was missing.
    shell(config.port, erase, config.data, timeout_s=60)
    assert names() == ["written"]
