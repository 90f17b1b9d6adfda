"""Finds free TCP ports on 127.0.0.1, for the stack, tests and the demo.

A port that was picked belongs to the process that picked it until it ends, so that two processes never pick the same.
Another program can still take a port between the check and the bind. SeaweedFS listens on ten: five in a
row from its S3 port, and each of those plus 10000.
"""

from __future__ import annotations

import fcntl
import os
import random
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path

from deploy.local.errors import PortInUseError, StackError

GRPC_OFFSET = 10000
"""SeaweedFS's distance between an HTTP port and its gRPC port. Its S3 gateway exits if the sum is not a valid port."""
SEAWEEDFS_SPAN = 5

# Below Linux's range for outgoing connections (from 32768), whose sockets would sometimes take a port.
_TEST_PORTS = range(11000, 32000)
# Not the module's shared generator: test plug-ins seed that one, and two sessions would pick the same ports.
_random = random.SystemRandom()


def seaweedfs_ports(s3_port: int) -> list[int]:
    """All ten ports of a SeaweedFS whose S3 gateway listens on `s3_port`."""
    http = range(s3_port, s3_port + SEAWEEDFS_SPAN)
    return [*http, *(port + GRPC_OFFSET for port in http)]


def is_free(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # As the servers do, so that connections that have just ended do not make the port look taken.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def check_free(ports: list[int], *, wanted_by: str, option: str) -> None:
    """Raise for the first of `ports` that is invalid or taken."""
    for port in ports:
        if not 1024 <= port <= 65535:
            raise StackError(f"{wanted_by} would need port {port}: choose {option} so that it lies in 1024-65535")
        if not is_free(port):
            raise PortInUseError(port, wanted_by, option)


def pick_port() -> int:
    """Return a port that is free now, for tests."""
    return _pick(lambda port: [port])


def pick_s3_port() -> int:
    """Return an S3 port whose nine further ports are free too, for tests."""
    return _pick(seaweedfs_ports)


def _pick(needs: Callable[[int], list[int]]) -> int:
    for _ in range(1000):
        port = _random.choice(_TEST_PORTS)
        wanted = needs(port)
        if max(wanted) < _TEST_PORTS.stop and all(map(is_free, wanted)) and _reserve(wanted):
            return port
    raise StackError("found no free port below 32000 in 1000 tries: end something that listens on 127.0.0.1")


def _reserve(ports: list[int]) -> bool:
    """Lock these ports against every other pick on this machine, until this process ends; False if one is locked."""
    folder = Path(tempfile.gettempdir()) / f"grpo-ports-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    locked: list[int] = []
    for port in ports:
        locked.append(os.open(folder / str(port), os.O_RDWR | os.O_CREAT, 0o600))
        try:
            fcntl.flock(locked[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            for descriptor in locked:
                os.close(descriptor)
            return False
    return True
