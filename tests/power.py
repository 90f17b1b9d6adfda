"""Power cuts: a Valkey that comes back without the last bytes of its file, and a replica that has fallen behind."""

from __future__ import annotations

import secrets
from pathlib import Path

from deploy.local.ports import pick_port
from deploy.local.valkey import Valkey
from tests.conftest import ValkeyServer


def make_valkey(folder: Path, password: str = "") -> ValkeyServer:
    """A server of the test's own, not started."""
    folder.mkdir(exist_ok=True)
    password = password or secrets.token_urlsafe(24)
    return ValkeyServer(Valkey(data=folder / "data", port=pick_port(), password=password, log=folder / "valkey.log"))


def written(data: Path) -> int:
    """How much of the append-only file is written: what comes later may be lost."""
    return _file(data).stat().st_size


def cut(data: Path, size: int) -> None:
    """Leave so much of it, of a server that is down: the disk never had the rest. The end may be half a command."""
    with _file(data).open("r+b") as file:
        file.truncate(size)


def _file(data: Path) -> Path:
    (file,) = data.glob("appendonlydir/*.incr.aof")
    return file
