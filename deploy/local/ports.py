"""Which TCP ports are free on 127.0.0.1; reserves none, so a port can still be lost between the look and the bind.

SeaweedFS listens on ten: five in a row from its S3 port, and each of those plus 10000.
"""

from __future__ import annotations

import random
import socket
from collections.abc import Callable

from deploy.local.errors import PortInUseError, StackError

GRPC_OFFSET = 10000
"""SeaweedFS's own convention between an HTTP port and its gRPC twin; its S3 gateway exits when the sum is no port."""
SEAWEEDFS_SPAN = 5

# Below Linux's range for outgoing connections (from 32768), whose sockets would make a port fail now and then.
_TEST_PORTS = range(11000, 32000)
# Not the module's shared generator: test plug-ins seed that one, and two sessions would pick the same ports.
_random = random.SystemRandom()


def seaweedfs_ports(s3_port: int) -> list[int]:
    """All ten ports of a SeaweedFS whose S3 gateway listens on `s3_port`."""
    http = range(s3_port, s3_port + SEAWEEDFS_SPAN)
    return [*http, *(port + GRPC_OFFSET for port in http)]


def is_free(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # As the servers do: connections that just ended on this port are no reason to refuse it.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def check_free(ports: list[int], *, wanted_by: str, option: str) -> None:
    """Raises for the first of `ports` that is impossible or taken."""
    for port in ports:
        if not 1024 <= port <= 65535:
            raise StackError(f"{wanted_by} would need port {port}: choose {option} so that it lies in 1024-65535")
        if not is_free(port):
            raise PortInUseError(port, wanted_by, option)


def pick_port() -> int:
    """A port that is free now, for tests."""
    return _pick(lambda port: [port])


def pick_s3_port() -> int:
    """An S3 port whose nine companions are free too, for tests."""
    return _pick(seaweedfs_ports)


def _pick(needs: Callable[[int], list[int]]) -> int:
    for _ in range(1000):
        port = _random.choice(_TEST_PORTS)
        wanted = needs(port)
        if max(wanted) < _TEST_PORTS.stop and all(map(is_free, wanted)):
            return port
    raise StackError("found no free port below 32000 in 1000 tries: end something that listens on 127.0.0.1")
