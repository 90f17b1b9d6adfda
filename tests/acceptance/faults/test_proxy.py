"""The proxy of the faults leaves nothing behind: what it left would fail a test that has nothing to do with it."""

from __future__ import annotations

import gc
import select
import socket
import sys

import pytest

from tests.acceptance.faults.proxy import Mode, Network, Proxy


@pytest.mark.parametrize("mode", ["open", "hole"])
@pytest.mark.parametrize("full", [False, True])
def test_a_closed_network_leaves_no_connection(monkeypatch: pytest.MonkeyPatch, mode: Mode, full: bool) -> None:
    left: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda found: left.append(found.exc_value))
    with socket.create_server(("127.0.0.1", 0)) as server:
        network = Network()
        proxy = Proxy(network, server.getsockname()[1])
        network.run(proxy._set(mode, 0.0))
        with socket.create_connection(("127.0.0.1", proxy.port)) as client:
            client.setblocking(False)
            client.send(b"a request")
            # A server that never reads: at the end the proxy has bytes that it could not pass on.
            while select.select([], [client], [], 0.3)[1] and full:
                client.send(b"." * 65536)
            network.close()
        del network, proxy
        gc.collect()
    assert left == []
