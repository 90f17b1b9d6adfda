"""A bucket in memory: `ObjectStore` without a server. tests/integration/test_doubles.py compares the two."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from jobs.settings import StorageSettings
from jobs.store.bucket import ObjectStore, StoredObject


class MemoryStore(ObjectStore):
    """A bucket in memory, with the same promise: what is put once is never changed."""

    def __init__(self) -> None:
        super().__init__(StorageSettings.model_validate({"bucket": "memory"}))
        self.objects: dict[str, bytes] = {}

    def put(self, key: str, body: bytes, *, content_type: str = "") -> None:
        self.objects[key] = body

    def put_once(self, key: str, body: bytes) -> bool:
        return self.objects.setdefault(key, body) == body

    def get(self, key: str) -> bytes | None:
        return self.objects.get(key)

    def digest(self, key: str) -> tuple[str, int] | None:
        body = self.objects.get(key)
        return None if body is None else (hashlib.sha256(body).hexdigest(), len(body))

    def list(self, prefix: str, *, after: str = "") -> Iterator[StoredObject]:
        keys = sorted(key for key in self.objects if key.startswith(prefix) and key > after)
        return iter([StoredObject(key, len(self.objects[key])) for key in keys])

    def folders(self, prefix: str, *, after: str = "") -> Iterator[str]:
        below = [key.removeprefix(prefix) for key in self.objects if key.startswith(prefix)]
        return iter(sorted({name.split("/")[0] for name in below if "/" in name and name.split("/")[0] > after}))

    def delete(self, key: str) -> None:
        self.objects.pop(key, None)
