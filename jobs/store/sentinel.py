"""The sentinel: an object that shows whether the bucket is still the same and still has its objects.

The first process writes it once, and every process reads it repeatedly, because a store that lost all its objects still
answers a HEAD of the bucket. It shows neither a loss from before this process started nor the loss of other objects.
"""

from __future__ import annotations

import secrets
from typing import Protocol

from jobs.errors import Damaged
from jobs.store import object_keys


class Objects(Protocol):
    """The methods of a bucket that the sentinel needs."""

    def get(self, key: str) -> bytes | None: ...

    def put_json_once(self, key: str, value: object) -> bool: ...


class Sentinel:
    """The sentinel of one bucket."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects
        self._seen: bytes | None = None

    def check(self) -> None:
        """Raise `Unavailable` if it cannot be read, and `Damaged` if it differs from the first check."""
        body = self._objects.get(object_keys.SENTINEL)
        if body is None and self._seen is None:
            self._objects.put_json_once(object_keys.SENTINEL, {"bucket": secrets.token_hex(16)})
            body = self._objects.get(object_keys.SENTINEL)
        if body is None:
            raise Damaged(object_keys.SENTINEL, "is missing: the bucket has lost its objects")
        if self._seen not in (None, body):
            raise Damaged(object_keys.SENTINEL, "has changed: this is another bucket than before")
        self._seen = body
