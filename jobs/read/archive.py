"""Several objects of the bucket as one tar archive, written while it is read.

Owns the archive's form. Invariants: memory holds one chunk of one object, no connection to storage waits for a slow
reader, and an object that is not what its manifest says ends the archive before its end mark.
"""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from jobs.errors import Damaged
from jobs.store.bucket import CHUNK_BYTES, ObjectStore
from jobs.store.write_once import ManifestEntry

BLOCK: Final = tarfile.BLOCKSIZE


@dataclass(frozen=True, slots=True)
class Archive:
    """The archive of these objects, each under its path."""

    store: ObjectStore
    entries: Sequence[ManifestEntry]

    @property
    def size(self) -> int:
        """Bytes of the whole archive."""
        return sum(len(_header(entry)) + entry.size + _padding(entry.size) for entry in self.entries) + 2 * BLOCK

    def chunks(self) -> Iterator[bytes]:
        """The archive's bytes. Raises `Damaged` for an object that was changed, and `Unavailable`."""
        for entry in self.entries:
            yield _header(entry)
            yield from self._body(entry)
            yield bytes(_padding(entry.size))
        yield bytes(2 * BLOCK)

    def _body(self, entry: ManifestEntry) -> Iterator[bytes]:
        digest, left = hashlib.sha256(), entry.size
        with self.store.open(entry.key) as file:
            while left and (chunk := file.read(min(CHUNK_BYTES, left))):
                digest.update(chunk)
                left -= len(chunk)
                yield chunk
        if left or digest.hexdigest() != entry.sha256:
            raise Damaged(entry.key, "is not what its manifest says")


def _header(entry: ManifestEntry) -> bytes:
    about = tarfile.TarInfo(entry.path)
    about.size, about.mode = entry.size, 0o644
    return about.tobuf(tarfile.PAX_FORMAT)


def _padding(size: int) -> int:
    return -size % BLOCK
