"""Saves a job's files: each is checked against its announced size and SHA-256 before it has its name.

Owns what reaches the disk, and trusts neither the service's names nor the storage's bytes. Invariant: a file that
stands under its name is whole and right, nothing is written outside the folder, and the API key never goes to storage.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Collection, Iterable
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

import httpx

from grpo_client.connection import why
from grpo_client.errors import DownloadError, UnreachableError
from grpo_client.results import ArtifactFile, ArtifactList

Progress = Callable[[str, int, int], None]
"""Called with a file's path, the bytes of it that have arrived, and its size."""

FORBIDDEN = 403
_CHUNK_BYTES = 256 * 1024


class Downloads:
    """Fetches the files of one job from object storage."""

    def __init__(
        self, storage: httpx.Client, listing: Callable[[], ArtifactList], on_progress: Progress | None = None
    ) -> None:
        self._storage, self._listing, self._on_progress = storage, listing, on_progress

    def all(self, job_id: str, folder: Path, only: Collection[str]) -> list[ArtifactFile]:
        """Save the files that `only` names, or all; returns what was announced of them."""
        listing = self._listing()
        wanted = [artifact for artifact in listing.data if _is_wanted(artifact.path, only)]
        if listing.data and not wanted:
            known = ", ".join(_tops(artifact.path for artifact in listing.data))
            raise DownloadError(f"Job {job_id} has no {', '.join(only)}; it left {known}.")
        if not wanted:
            reason = "left no files" if listing.complete else "has not ended: its files come then"
            raise DownloadError(f"Job {job_id} {reason}.")
        links = {artifact.path: artifact for artifact in wanted}
        for artifact in wanted:
            target = safe_path(folder, artifact.path)
            try:
                self._save(links[artifact.path], target)
            except _LinkExpired:
                # As links do during long downloads: fetch new ones, once for each file.
                links = {each.path: each for each in self._listing().data}
                self._save_once(links[artifact.path], target)
        return wanted

    def one(self, job_id: str, path: str, target: Path) -> ArtifactFile:
        """Save one file as `target`; returns what was announced of it."""
        listing = self._listing()
        for artifact in listing.data:
            if artifact.path == path:
                self._save_once(artifact, safe_path(target.parent, target.name))
                return artifact
        reason = "left none" if listing.complete else "has not ended: it may come then"
        raise DownloadError(f"There is no {path} of job {job_id}, which {reason}.")

    def _save_once(self, artifact: ArtifactFile, target: Path) -> None:
        try:
            self._save(artifact, target)
        except _LinkExpired as error:
            raise DownloadError(f"{artifact.path}: storage answered {FORBIDDEN}.") from error

    def _save(self, artifact: ArtifactFile, target: Path) -> None:
        if target.is_file() and _is_right(target, artifact):
            self._report(artifact, artifact.size)
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=".download-")
        temporary = Path(name)
        try:
            with os.fdopen(handle, "wb") as file:
                self._fetch(artifact, file.write)
            temporary.chmod(0o644)
            temporary.replace(target)
        except httpx.HTTPStatusError as error:
            status = error.response.status_code
            if status == FORBIDDEN:
                raise _LinkExpired from error
            raise DownloadError(f"{artifact.path}: storage answered {status}.") from error
        except (httpx.TransportError, httpx.InvalidURL) as error:
            raise UnreachableError(f"{artifact.path}: object storage cannot be reached ({why(error)}).") from error
        finally:
            temporary.unlink(missing_ok=True)

    def _fetch(self, artifact: ArtifactFile, write: Callable[[bytes], object]) -> None:
        digest, received = hashlib.sha256(), 0
        with self._storage.stream("GET", artifact.url) as response:
            response.raise_for_status()
            for chunk in response.iter_bytes(_CHUNK_BYTES):
                received += len(chunk)
                if received > artifact.size:
                    raise DownloadError(
                        f"{artifact.path}: storage sends more than the {artifact.size} bytes announced. "
                        "Download it again; if that fails too, ask who runs the service."
                    )
                digest.update(chunk)
                write(chunk)
                self._report(artifact, received)
        if received != artifact.size or digest.hexdigest() != artifact.sha256:
            raise DownloadError(
                f"{artifact.path}: what storage sent is not what the service announced "
                f"({received} of {artifact.size} bytes, SHA-256 {digest.hexdigest()}, announced {artifact.sha256}). "
                "Download it again; if that fails too, ask who runs the service."
            )

    def _report(self, artifact: ArtifactFile, done: int) -> None:
        if self._on_progress is not None:
            self._on_progress(artifact.path, done, artifact.size)


class _LinkExpired(Exception):
    """Storage refused a link, as it does once the link's time is over."""


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


def _is_right(path: Path, artifact: ArtifactFile) -> bool:
    if path.stat().st_size != artifact.size:
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == artifact.sha256


def _is_wanted(path: str, only: Collection[str]) -> bool:
    return not only or any(fnmatchcase(path, name) or path.startswith(f"{name.rstrip('/')}/") for name in only)


def _tops(paths: Iterable[str]) -> list[str]:
    """Files, and folders in place of what is in them."""
    return list(dict.fromkeys(path.partition("/")[0] + ("/" if "/" in path else "") for path in paths))
