"""Valkey and SeaweedFS as the stack starts them: locked, durable, on loopback, and gone with their parent."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import textwrap
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import redis
from botocore.exceptions import ClientError

from deploy.local.errors import StackError, StartError
from deploy.local.ports import is_free, pick_port, pick_s3_port, seaweedfs_ports
from deploy.local.process import Child, Service
from deploy.local.seaweedfs import SeaweedFS
from deploy.local.valkey import Valkey
from grpo_core import processes
from jobs.settings import QueueSettings, StorageSettings
from tests.clock import patience

if TYPE_CHECKING:
    from tests.conftest import SeaweedFSServer, ValkeyServer


def listeners(pid: int) -> list[str]:
    """The addresses that a process listens on."""
    lines = subprocess.run(["ss", "-ltnpH"], capture_output=True, text=True, check=True).stdout.splitlines()
    return [line.split()[3] for line in lines if f"pid={pid}," in line]


def seaweedfs_with(config: SeaweedFSServer, access_key: str, secret_key: str) -> SeaweedFS:
    return SeaweedFS(
        data=Path("unused"), port=config.port, access_key=access_key, secret_key=secret_key, log=Path("unused")
    )


@pytest.mark.parametrize("url", ["redis://127.0.0.1:{port}/0", "redis://:wrong@127.0.0.1:{port}/0"])
def test_valkey_wants_its_password(valkey: ValkeyServer, url: str) -> None:
    with pytest.raises(redis.AuthenticationError):
        redis.Redis.from_url(url.format(port=valkey.port)).ping()


def test_valkey_is_durable_never_evicts_and_stays_on_loopback(valkey: ValkeyServer) -> None:
    client = redis.Redis.from_url(valkey.url, decode_responses=True)
    assert client.config_get("append*") | {"appendonly": "yes", "appendfsync": "everysec"} == client.config_get(
        "append*"
    )
    assert listeners(valkey.pid) == [f"127.0.0.1:{valkey.port}"]


def test_valkey_password_is_not_in_ps(valkey: ValkeyServer) -> None:
    assert valkey.password not in Path(f"/proc/{valkey.pid}/cmdline").read_text()
    assert valkey.password not in Path(f"/proc/{valkey.pid}/environ").read_text()


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_valkey_keeps_its_data(valkey: ValkeyServer, prefix: str, end: str) -> None:
    client = redis.Redis.from_url(valkey.url, decode_responses=True)
    client.set(f"{prefix}:kept", "yes")
    # A KILL loses nothing that was answered: the file is written before the answer, only the fsync is later.
    getattr(valkey, end)()
    try:
        with pytest.raises(redis.ConnectionError):
            client.ping()
    finally:
        valkey.start()
    assert client.get(f"{prefix}:kept") == "yes"


@pytest.mark.parametrize("password", ["", "short", "with a space in the middle", "line\nbreak-requirepass-none"])
def test_valkey_refuses_unsafe_passwords(tmp_path: Path, password: str) -> None:
    with pytest.raises(StackError, match="password"):
        Valkey(data=tmp_path, port=pick_port(), password=password, log=tmp_path / "log").service()


def test_failed_start_shows_the_log(valkey: ValkeyServer, tmp_path: Path) -> None:
    twin = Valkey(data=tmp_path / "data", port=valkey.port, password="x" * 16, log=tmp_path / "log")
    child = Child(twin.service())
    with pytest.raises(StartError, match="Address already in use"):
        child.wait_ready()
    assert not child.alive()


def test_seaweedfs_stays_on_its_ports_and_on_loopback(seaweedfs: SeaweedFSServer) -> None:
    expected = {f"127.0.0.1:{port}" for port in seaweedfs_ports(seaweedfs.port)}
    deadline = time.monotonic() + patience(30)
    # It serves before the last of them is open, as after the restart of another test.
    while not expected <= (found := set(listeners(seaweedfs.pid))) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert found == expected


def test_seaweedfs_refuses_to_start_without_credentials(tmp_path: Path) -> None:
    for access_key, secret_key in (("", "secret"), ("access", "")):
        config = SeaweedFS(
            data=tmp_path, port=pick_s3_port(), access_key=access_key, secret_key=secret_key, log=tmp_path / "log"
        )
        with pytest.raises(StackError, match="accept everyone"):
            config.service()


def test_seaweedfs_refuses_other_keys(seaweedfs: SeaweedFSServer) -> None:
    for access_key, secret_key in ((seaweedfs.access_key, "wrong"), ("wrong", seaweedfs.secret_key)):
        with pytest.raises(ClientError, match=r"SignatureDoesNotMatch|InvalidAccessKeyId"):
            seaweedfs_with(seaweedfs, access_key, secret_key).client().list_buckets()


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE"])
def test_s3_lets_nobody_in_without_keys(seaweedfs: SeaweedFSServer, prefix: str, method: str) -> None:
    seaweedfs.client().put_object(Bucket=seaweedfs.bucket, Key=prefix, Body=b"private" * 10_000)
    url = f"{seaweedfs.endpoint}/{seaweedfs.bucket}/{prefix}"
    request = urllib.request.Request(url, method=method, data=b"x" if method == "PUT" else None)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with pytest.raises(urllib.error.HTTPError) as caught:
        opener.open(request, timeout=5)
    assert caught.value.code == 403
    caught.value.close()
    answer = seaweedfs.client().get_object(Bucket=seaweedfs.bucket, Key=prefix)
    assert answer["Body"].read() == b"private" * 10_000


def test_put_if_absent_refuses_the_second(seaweedfs: SeaweedFSServer, prefix: str) -> None:
    client = seaweedfs.client()
    client.put_object(Bucket=seaweedfs.bucket, Key=prefix, Body=b"first", IfNoneMatch="*")
    with pytest.raises(ClientError) as caught:
        client.put_object(Bucket=seaweedfs.bucket, Key=prefix, Body=b"second", IfNoneMatch="*")
    assert caught.value.response.get("ResponseMetadata", {}).get("HTTPStatusCode") == 412
    assert client.get_object(Bucket=seaweedfs.bucket, Key=prefix)["Body"].read() == b"first"


def test_wrong_bucket_is_an_error(seaweedfs: SeaweedFSServer) -> None:
    with pytest.raises(ClientError, match="NoSuchBucket"):
        seaweedfs.client().put_object(Bucket="no-such-bucket", Key="x", Body=b"")


@pytest.mark.alone
def test_an_idle_seaweedfs_leaves_the_processor_alone(seaweedfs: SeaweedFSServer) -> None:
    """A memory limit below its heap costs 15 % of a core in garbage collection."""

    def processor_seconds() -> float:
        fields = Path(f"/proc/{seaweedfs.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    before = processor_seconds()
    time.sleep(3)
    assert processor_seconds() - before < 0.2


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_seaweedfs_keeps_its_data(seaweedfs: SeaweedFSServer, prefix: str, end: str) -> None:
    client = seaweedfs.client()
    client.put_object(Bucket=seaweedfs.bucket, Key=f"{prefix}/small", Body=b"yes")
    client.put_object(Bucket=seaweedfs.bucket, Key=f"{prefix}/large", Body=b"yes" * 3_000_000)
    getattr(seaweedfs, end)()
    try:
        assert all(map(is_free, seaweedfs_ports(seaweedfs.port)))
    finally:
        seaweedfs.start()
    assert client.get_object(Bucket=seaweedfs.bucket, Key=f"{prefix}/small")["Body"].read() == b"yes"
    assert client.get_object(Bucket=seaweedfs.bucket, Key=f"{prefix}/large")["Body"].read() == b"yes" * 3_000_000


def test_settings_of_the_fixtures(
    queue_settings: QueueSettings, storage_settings: StorageSettings, seaweedfs: SeaweedFSServer, prefix: str
) -> None:
    client = redis.Redis.from_url(queue_settings.redis_url.get_secret_value())
    assert client.ping()
    assert queue_settings.prefix == prefix
    assert storage_settings.endpoint == seaweedfs.endpoint
    assert storage_settings.secret_key.get_secret_value() == seaweedfs.secret_key


def shell(folder: Path, script: str, *, stop_s: float = 5.0) -> Service:
    return Service(
        name="shell",
        argv=("/bin/sh", "-c", script),
        env={"PATH": os.defpath},
        cwd=folder,
        log=folder / "log",
        stop_s=stop_s,
    )


def test_stop_ends_the_whole_group(tmp_path: Path) -> None:
    child = Child(shell(tmp_path, "sleep 600 & echo $! > pid.new; mv pid.new pid; wait"))
    wait_for(tmp_path / "pid")
    child.stop()
    assert_gone(int((tmp_path / "pid").read_text()))


def test_group_of_a_leader_that_ended_by_itself_is_ended_too(tmp_path: Path) -> None:
    child = Child(shell(tmp_path, "sleep 600 & echo $! > pid.new; mv pid.new pid"))
    wait_for(tmp_path / "pid")
    while child.alive():
        time.sleep(0.01)
    child.stop()
    assert_gone(int((tmp_path / "pid").read_text()))


def test_deaf_child_is_killed_after_its_grace(tmp_path: Path) -> None:
    child = Child(shell(tmp_path, "trap '' TERM; touch deaf; while :; do sleep 0.1; done", stop_s=0.5))
    wait_for(tmp_path / "deaf")
    started = time.monotonic()
    child.stop()
    assert 0.4 < time.monotonic() - started < patience(3)
    assert not child.alive()


def test_log_is_for_the_owner_only(tmp_path: Path) -> None:
    child = Child(shell(tmp_path, "echo said; touch made"))
    wait_for(tmp_path / "made")
    child.stop()
    assert (tmp_path / "log").read_text() == "said\n"
    for name in ("log", "made"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_child_dies_with_its_parent(tmp_path: Path, number: signal.Signals) -> None:
    parent = f"""
        import os, time
        from pathlib import Path
        from deploy.local.process import Child, Service
        folder = Path({str(tmp_path)!r})
        argv = ("/bin/sh", "-c", "trap '' TERM HUP; echo $$ > pid.new; mv pid.new pid; while :; do sleep 0.1; done")
        Child(Service(name="child", argv=argv, env={{"PATH": os.defpath}}, cwd=folder, log=folder / "log"))
        time.sleep(600)
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(parent)], cwd=Path(__file__).parents[2])
    wait_for(tmp_path / "pid")
    process.send_signal(number)
    process.wait()
    assert_gone(int((tmp_path / "pid").read_text()))


def test_launcher_refuses_when_the_parent_is_gone(tmp_path: Path) -> None:
    launcher = processes.__file__
    command = [sys.executable, "-I", "-S", launcher, "1", "/bin/touch", str(tmp_path / "ran")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "parent is already gone" in done.stderr
    assert not (tmp_path / "ran").exists()


def wait_for(path: Path, timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + patience(timeout_s)
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.01)


def assert_gone(pid: int, timeout_s: float = 5.0) -> None:
    deadline = time.monotonic() + patience(timeout_s)
    # A zombie that nobody reaps in a bare container counts as gone.
    while (status := Path(f"/proc/{pid}/stat")).exists() and status.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline, f"process {pid} is still there"
        time.sleep(0.02)
