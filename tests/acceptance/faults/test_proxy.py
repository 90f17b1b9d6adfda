"""The proxy of the faults leaves nothing behind: what it left would fail a test that has nothing to do with it."""

from __future__ import annotations

import contextlib
import select
import socket
from pathlib import Path

import pytest

from tests.acceptance.faults.conftest import core
from tests.acceptance.faults.proxy import Mode, Network, Proxy


def open_sockets(*ports: int) -> list[str]:
    """The ends of this process's sockets that have one of these ports; sockets that other tests left are theirs."""
    ours: set[str] = set()
    for fd in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            ours.add(str(fd.readlink()))
    found: list[str] = []
    for line in Path("/proc/self/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        ends = [int(end.rpartition(":")[2], 16) for end in fields[1:3]]
        if f"socket:[{fields[9]}]" in ours and set(ends) & set(ports):
            found.append(f"{ends[0]} to {ends[1]}")
    return found


@core
@pytest.mark.parametrize("mode", ["open", "hole"])
@pytest.mark.parametrize("full", [False, True])
def test_a_closed_network_leaves_no_connection(mode: Mode, full: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        target = server.getsockname()[1]
        network = Network()
        proxy = Proxy(network, target)
        network.run(proxy._set(mode, 0.0))
        with socket.create_connection(("127.0.0.1", proxy.port)) as client:
            client.setblocking(False)
            client.send(b"a request")
            # A server that never reads: at the end the proxy has bytes that it could not pass on.
            while select.select([], [client], [], 0.3)[1] and full:
                client.send(b"." * 65536)
            assert len(open_sockets(proxy.port, target)) >= 3, "those of the client and of who listens are seen"
            network.close()
    assert open_sockets(proxy.port, target) == []
