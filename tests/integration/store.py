"""Stores of a test's own, and SeaweedFS's administration of them."""

from __future__ import annotations

import os
import secrets
import subprocess
from pathlib import Path

from deploy.local.ports import GRPC_OFFSET, pick_s3_port
from deploy.local.seaweedfs import SeaweedFS, find_binary


def new_store(folder: Path) -> SeaweedFS:
    return SeaweedFS(
        data=folder / "data",
        port=pick_s3_port(),
        access_key=secrets.token_hex(10),
        secret_key=secrets.token_urlsafe(30),
        log=folder / "seaweedfs.log",
    )


def shell(port: int, command: str, home: Path, timeout_s: float) -> str:
    """What SeaweedFS's own administration says; it goes on trying for as long as it is let. Its home has settings."""
    master, filer = (f"127.0.0.1:{port + nth}.{port + nth + GRPC_OFFSET}" for nth in (2, 1))
    words = [str(find_binary()), "shell", f"-master={master}", f"-filer={filer}"]
    try:
        done = subprocess.run(
            words,
            input=f"lock\n{command}\nunlock\n",
            env={"PATH": os.defpath, "HOME": str(home)},
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
    except subprocess.TimeoutExpired:
        return "refused"
    return done.stdout + done.stderr
