"""Uploads in progress: their number, their owners, and whether the disk has room for all of them.

Owns the permission to start one; `api.bodies` reads the data. Invariant: an accepted upload fits on the disk, because
its announced size is reserved at once.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager

from api.places import Places
from api.problems import ApiError
from api.settings import ApiSettings


class Uploads:
    """The uploads of one process. Used from its event loop only."""

    def __init__(self, settings: ApiSettings) -> None:
        self._settings = settings
        self._places = Places(
            "too_many_uploads",
            "uploads under way",
            per_owner=settings.max_owner_uploads,
            in_all=settings.max_uploads,
            settings=("GRPO_MAX_OWNER_UPLOADS", "GRPO_MAX_UPLOADS"),
        )
        self._to_come = 0

    @contextmanager
    def begin(self, owner: str, announced: int | None, *, made: int = 0) -> Generator[Upload]:
        """Room for one upload, of as many bytes as it announces or as are accepted, and for `made` of it. Raises
        `ApiError`."""
        most = self._settings.max_dataset_bytes
        upload = Upload(self, min(most, most if announced is None else announced) + made)
        with self._places.take(owner):
            free = shutil.disk_usage(tempfile.gettempdir()).free - self._settings.min_free_bytes
            if free < self._to_come + upload.to_come:
                raise ApiError(
                    "no_room",
                    "The disk for uploads has no room for one of this size beside those under way. Send it later.",
                    headers={"Retry-After": "30"},
                )
            self.expect(upload.to_come)
            try:
                yield upload
            finally:
                self.expect(-upload.to_come)

    def expect(self, size: int) -> None:
        """Reserve this number of bytes."""
        self._to_come += size


class Upload:
    """One upload."""

    def __init__(self, uploads: Uploads, to_come: int) -> None:
        self._uploads = uploads
        self.to_come = to_come
        """Bytes set aside that are not on the disk yet."""

    def take(self, size: int) -> None:
        """Record this number of received bytes."""
        size = min(size, self.to_come)
        self.to_come -= size
        self._uploads.expect(-size)
