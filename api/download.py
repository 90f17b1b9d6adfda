"""Saves a job's files: each one checked against its announced size and SHA-256 before it has its name.

Owns what reaches the disk, and trusts neither the service's names nor the storage's bytes. Invariant: a file that
stands under its name is whole and right, and nothing is written outside the folder.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import httpx

from api.client_errors import DownloadError
from grpo_core.runfolder import sha256_of

Progress = Callable[[str, int, int], None]
"""Told of a file's path, the bytes of it that are there, and its size."""

_CHUNK_BYTES = 256 * 1024


def save(client: httpx.Client, artifact: dict[str, Any], folder: Path, on_progress: Progress | None = None) -> Path:
    """Fetch one artifact into `folder`; raises `DownloadError`, or httpx's errors for what storage did."""
    target = safe_path(folder, artifact["path"])
    if target.is_file() and _is_right(target, artifact):
        _tell(on_progress, artifact, artifact["size"])
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=".download-")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            _fetch(client, artifact, file.write, on_progress)
        temporary.chmod(0o644)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    return target


def safe_path(folder: Path, name: str) -> Path:
    """Where a file of this name goes; raises `DownloadError` for any name that could lead elsewhere."""
    path = PurePosixPath(name)
    is_plain = name.isprintable() and "\\" not in name and ":" not in name
    if not is_plain or not name or path.is_absolute() or ".." in path.parts or str(path) != name or name == ".":
        raise DownloadError(f"The service names a file {name!r}, which is not safe to write; nothing was saved of it.")
    root = folder.resolve()
    # Resolved: a link that is already in the folder must not lead out of it either.
    target = (root / path).resolve()
    if not target.is_relative_to(root) or target == root:
        raise DownloadError(f"{name} leads out of {folder} through a link that is there; use an empty folder.")
    return target


def _fetch(
    client: httpx.Client, artifact: dict[str, Any], write: Callable[[bytes], object], on_progress: Progress | None
) -> None:
    digest, received = hashlib.sha256(), 0
    with client.stream("GET", artifact["url"]) as response:
        response.raise_for_status()
        for chunk in response.iter_bytes(_CHUNK_BYTES):
            received += len(chunk)
            if received > artifact["size"]:
                raise DownloadError(
                    f"{artifact['path']}: storage sends more than the {artifact['size']} bytes announced."
                )
            digest.update(chunk)
            write(chunk)
            _tell(on_progress, artifact, received)
    if received != artifact["size"] or digest.hexdigest() != artifact["sha256"]:
        raise DownloadError(
            f"{artifact['path']}: what storage sent is not what the service announced "
            f"({received} of {artifact['size']} bytes, SHA-256 {digest.hexdigest()}, announced {artifact['sha256']})."
        )


def _is_right(path: Path, artifact: dict[str, Any]) -> bool:
    return path.stat().st_size == artifact["size"] and sha256_of(path) == artifact["sha256"]


def _tell(on_progress: Progress | None, artifact: dict[str, Any], done: int) -> None:
    if on_progress is not None:
        on_progress(artifact["path"], done, artifact["size"])
