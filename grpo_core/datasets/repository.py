"""A data set's repository, on the hub or in a local folder: lists its files and opens them.

Owns every request to the hub for data, and opens every file of a data set. Invariant: only listed files are opened, at
the commit at which they were listed; no file's content can lead elsewhere.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, Final, Protocol, cast

from grpo_core import hub
from grpo_core.datasets.card import foreign_files, is_inside
from grpo_core.datasets.rows import DatasetTooLargeError, problem

CARD: Final = "README.md"
_BLOCK_BYTES = 4 * 1024**2


class Repository(Protocol):
    """The files of one data set."""

    @property
    def paths(self) -> Sequence[str]:
        """The names of all files."""
        ...

    def open(self, path: str) -> BinaryIO:
        """Open one file for reading and seeking."""
        ...


class HubRepository:
    """A data set on the hub at one commit. Files are requested in ranges; nothing is written to the disk."""

    def __init__(self, name: str, revision: str | None, *, most_bytes: int | None = None) -> None:
        """With `most_bytes`, reading more than that from the hub raises `DatasetTooLargeError`."""
        from huggingface_hub import HfApi, HfFileSystem, constants

        hub.watch_requests()
        token = hub.token_for(name)
        info = HfApi(endpoint=constants.ENDPOINT, token=token).dataset_info(
            name, revision=revision, timeout=hub.TIMEOUT_SECONDS
        )
        if not re.fullmatch(r"[0-9a-f]{40}", info.sha or ""):
            raise ValueError("the hub returned no commit")
        self._root = f"datasets/{name}@{info.sha}"
        self._files = HfFileSystem(endpoint=constants.ENDPOINT, token=token, skip_instance_cache=True)
        self._name, self._left = name, most_bytes
        self.paths = [file.rfilename for file in info.siblings or [] if is_inside(file.rfilename)]

    def open(self, path: str) -> BinaryIO:
        """Open a file that is fetched in blocks. Fetched blocks are cached, because they are read more than once."""
        file = self._files.open(f"{self._root}/{path}", "rb", block_size=_BLOCK_BYTES, cache_type="blockcache")
        if self._left is not None:
            self._count(cast("Any", file).cache)
        return cast("BinaryIO", file)

    def _count(self, cache: Any) -> None:
        """Count what the cache fetches."""
        fetch = cache.fetcher

        def counted(start: int, end: int) -> bytes:
            self._left = (self._left or 0) - (end - start)
            if self._left < 0:
                detail = f"the first rows of {self._name} lie behind more data than is read for a look"
                remedy = "Use a data set of smaller files or parts."
                raise DatasetTooLargeError([problem("too_large", detail, remedy, "/data/dataset")])
            return fetch(start, end)

        cache.fetcher = counted


class FolderRepository:
    """A folder below `root`, the folder of all local data sets."""

    def __init__(self, name: str, folder: Path, root: Path) -> None:
        self._name = name
        self._folder = folder
        real = folder.resolve()
        # In the hub's download layout, files are links into a neighbouring folder.
        blobs = [real.parent.parent / "blobs"] if real.parent.name == "snapshots" else []
        self._within = [root.resolve(), real, *blobs]
        found = (Path(place) / file for place, _, files in os.walk(folder) for file in files)
        self.paths = [path.relative_to(folder).as_posix() for path in found]

    def open(self, path: str) -> BinaryIO:
        """Open a file. Refuses a link that leads out of the folder, because it may be part of an untrusted data set."""
        real = (self._folder / path).resolve()
        if not any(real.is_relative_to(place) for place in self._within):
            raise foreign_files(self._name)
        return real.open("rb")
