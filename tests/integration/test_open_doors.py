"""Everything `grpo up` listens on, found in the kernel's tables: where, and what it tells whoever has no key."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from deploy.local import stack
from deploy.local.ports import pick_port, pick_s3_port, seaweedfs_ports
from tests.integration.test_closed_ports import status

METHODS = ("GET", "POST", "DELETE")
PATHS = (
    *("/", "/healthz", "/readyz", "/metrics", "/status", "/debug/pprof/", "/ui/index.html", "/cluster/status"),
    *("/col/delete?collection=grpo-jobs", "/dir/assign", "/grpo-jobs?list-type=2", "/buckets/grpo-jobs/", "/jobs"),
)
PUBLIC_OF_THE_API = {"/healthz", "/readyz", "/"}
PUBLIC_OF_S3 = {"/healthz", "/readyz", "/status"}
REDIS_COMMANDS = ("PING", "INFO", "HELLO 3", "FLUSHALL", "CONFIG GET *", "CLIENT LIST", "MONITOR", "SUBSCRIBE x")


class Sockets:
    """The listening sockets of some processes."""

    def __init__(self, pids: set[int]) -> None:
        self._inodes = {target[8:-1] for pid in pids for target in _targets(pid) if target.startswith("socket:[")}

    def internet(self, protocol: str, listening: str) -> set[tuple[str, int]]:
        """Addresses and ports in one of the kernel's tables, in this state."""
        found: set[tuple[str, int]] = set()
        for family in ("", "6"):
            for line in Path(f"/proc/net/{protocol}{family}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == listening and fields[9] in self._inodes:
                    address, port = fields[1].split(":")
                    found.add((_address(address), int(port, 16)))
        return found

    def unix(self) -> list[str]:
        """Names of Unix sockets that take connections."""
        lines = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:]]
        return [(line[7:] or [""])[0] for line in lines if line[6] in self._inodes and int(line[3], 16) & 0x10000]


def _targets(pid: int) -> list[str]:
    try:
        return [str(path.readlink()) for path in Path(f"/proc/{pid}/fd").iterdir()]
    except OSError:  # It, or the file, is gone by now.
        return []


def _address(text: str) -> str:
    """As people write it: the kernel has it in words of the machine's own byte order."""
    words = b"".join(struct.pack("=I", int(text[at : at + 8], 16)) for at in range(0, len(text), 8))
    return socket.inet_ntop(socket.AF_INET if len(words) == 4 else socket.AF_INET6, words)


def descendants(pid: int) -> set[int]:
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents[int(path.parent.name)] = int(fields[1])
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found


class Running:
    """A real stack, and who is in it."""

    def __init__(self, data: Path) -> None:
        self.data = data
        self.api, self.valkey, self.s3 = pick_port(), pick_port(), pick_s3_port()
        self.state = stack.up(data, api_port=self.api, valkey_port=self.valkey, s3_port=self.s3)
        assert self.state.pid is not None
        self.sockets = Sockets(descendants(self.state.pid))


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    data = tmp_path_factory.mktemp("doors") / "data"
    try:
        yield Running(data)
    finally:
        stack.down(data)


def test_only_the_ports_that_docs_name_are_open_and_only_on_loopback(running: Running) -> None:
    ports = {running.api, running.valkey, *seaweedfs_ports(running.s3)}
    assert running.sockets.internet("tcp", "0A") == {("127.0.0.1", port) for port in ports}
    assert running.sockets.internet("udp", "07") == set()


def test_unix_sockets_are_the_owners_alone(running: Running) -> None:
    names = running.sockets.unix()
    assert names
    assert [name for name in names if not name or name.startswith("@")] == [], (
        "anyone may connect to a name without a file"
    )
    paths = [running.data / "seaweedfs" / name for name in names]  # which stands where a name is no whole path
    assert [path for path in paths if path.stat().st_mode & 0o077] == []


def test_no_port_but_two_says_yes_to_anything_without_a_key(running: Running) -> None:
    wanted = [*((method, False) for method in METHODS), ("GET", True)]
    answers = {
        (port, path.partition("?")[0])
        for _, port in running.sockets.internet("tcp", "0A") - {("127.0.0.1", running.valkey)}
        for path in PATHS
        for method, tls in wanted
        if (answer := status(port, path, method, tls=tls)) is not None and answer < 400
    }
    api = {(running.api, path) for path in PUBLIC_OF_THE_API}
    assert answers == api | {(running.s3, path) for path in PUBLIC_OF_S3}


def test_of_the_api_only_probes_log_in_and_openapi_are_for_everyone(running: Running) -> None:
    url = f"http://127.0.0.1:{running.api}"
    with httpx.Client(base_url=url, follow_redirects=False) as client:
        paths: dict[str, Any] = client.get("/schema/openapi.json").json()["paths"]
        assert len(paths) > 15
        open_to_all = {
            path
            for path, operations in paths.items()
            for method in operations
            if client.request(method, path.format_map(Anything())).status_code < 400
        }
        assert open_to_all == {"/healthz", "/readyz"} | {path for path in paths if path.startswith("/schema")}
        # The page is the same for all who ask: it shows nothing before its own request with a key is answered.
        assert "grpo_" not in client.get("/").text


class Anything(dict[str, str]):
    def __missing__(self, key: str) -> str:
        return "x"


def test_valkey_answers_nothing_before_the_password(running: Running) -> None:
    for command in REDIS_COMMANDS:
        with socket.create_connection(("127.0.0.1", running.valkey), timeout=5) as connection:
            connection.sendall(f"{command}\r\n".encode())
            assert connection.recv(100).startswith((b"-NOAUTH", b"-ERR")), command
