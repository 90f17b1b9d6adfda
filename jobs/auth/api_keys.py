"""API keys: shown once and stored as hashes, in the bucket and as a copy in Valkey, which each request reads.

Owns creation, revocation and the check. The bucket is authoritative. A key is 256 random bits, so an unsalted SHA-256
is as safe as a slow hash. Invariant: the next request with a revoked or expired key is refused, with two exceptions.
While Valkey is unavailable, `scraper_keys` may lag a minute behind. And a Valkey that lost its most recent writes
accepts a key that was revoked in them, until its records have been compared with the bucket, which starts within
seconds (`valkey_recovery`); to wait for that would delay every request.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import structlog
from ulid import ULID

from grpo_core import strict_json
from jobs.errors import NotFound, Unavailable
from jobs.store import object_keys
from jobs.store.bucket import ObjectStore
from jobs.store.job_store import JobStore, guarded

log = structlog.get_logger()

OWNER_SCOPES = ("jobs:read", "jobs:write", "datasets:write")
"""The scopes that an owner needs for jobs and data; the default of a new key."""
OPERATOR = "operator"
"""The scope of operators: they drain workers, and see whose job each one has."""
SCOPES = (*OWNER_SCOPES, "metrics:read", OPERATOR)
KEY_PREFIX = "grpo_"
OWNER = r"[\w.@+-]{1,100}"
"""Pattern of an owner's name. It can be part of a Valkey key, and an unset shell variable does not match."""
LOADED = "loaded"
"""Field of the Valkey hash that is set once the bucket's keys were copied into it."""


@dataclass(frozen=True, kw_only=True)
class KeyRecord:
    """The record of a key, without the key itself."""

    id: str
    owner: str
    scopes: list[str]
    created_at: datetime
    expires_at: datetime | None = None
    revoked_at: datetime | None = None
    name: str | None = None

    def is_valid(self, now: datetime) -> bool:
        """Whether the key is neither revoked nor expired."""
        return self.revoked_at is None and (self.expires_at is None or now < self.expires_at)


class KeyStore:
    """All API keys of one service."""

    def __init__(self, store: ObjectStore, job_store: JobStore) -> None:
        self._store = store
        self._job_store = job_store
        self._index = f"{job_store.prefix}:keys"

    def create(
        self,
        owner: str,
        scopes: Sequence[str] = OWNER_SCOPES,
        *,
        name: str | None = None,
        expires_at: datetime | None = None,
    ) -> tuple[str, KeyRecord]:
        """Create a key and return it with its record. The key cannot be read again. Raises `ValueError`."""
        if not re.fullmatch(OWNER, owner):
            raise ValueError(f"The owner {owner!r} is not a valid name: use at most 100 letters, digits and . _ @ + -.")
        unknown = set(scopes) - set(SCOPES)
        if unknown or not scopes:
            raise ValueError(f"Unknown scopes {sorted(unknown)}; use some of {', '.join(SCOPES)}.")
        key = KEY_PREFIX + secrets.token_urlsafe(32)
        record = KeyRecord(
            id=f"key-{ULID()}",
            owner=owner,
            scopes=list(scopes),
            created_at=datetime.now(UTC),
            expires_at=expires_at,
            name=name,
        )
        self._save(record, digest_of(key))
        return key, record

    def authenticate(self, key: str) -> KeyRecord | None:
        """Return the record of a valid key; None for any other text."""
        if not key.startswith(KEY_PREFIX) or len(key) > 128 or not key.isascii():
            return None
        return self.find(digest_of(key))

    def find(self, digest: str) -> KeyRecord | None:
        """Return the record of the valid key with this hash, or None."""
        text, loaded = self._read(digest)
        if text is None and not loaded:
            self.load()
            text, _ = self._read(digest)
        record = _decode(text)[0] if text else None
        return record if record and record.is_valid(datetime.now(UTC)) else None

    def list(self, owner: str | None = None) -> list[KeyRecord]:
        """Return the records of all keys from the bucket, oldest first."""
        records = [record for record, _ in self.stored()]
        return [record for record in records if owner is None or record.owner == owner]

    def revoke(self, key_id: str) -> KeyRecord:
        """Revoke a key permanently. Raises `NotFound`."""
        for record, digest in self.stored():
            if record.id == key_id:
                revoked = replace(record, revoked_at=record.revoked_at or datetime.now(UTC))
                self._save(revoked, digest)
                return revoked
        raise NotFound("key", key_id)

    def load(self) -> int:
        """Copy the bucket's keys into Valkey, which may have lost them. Returns their number.

        A key that cannot be read is skipped, and all keys are copied again until it can be read.
        """
        unreadable: list[str] = []
        entries = {digest: (record, _encode(record, digest)) for record, digest in self._readable(unreadable)}

        def copy() -> None:
            pipeline = self._job_store.client.pipeline()
            for digest, (record, body) in entries.items():
                # Keep a revocation made meanwhile, and always write one, because Valkey may have lost it.
                (pipeline.hset if record.revoked_at else pipeline.hsetnx)(self._index, digest, body)
            if not unreadable:
                pipeline.hset(self._index, LOADED, "1")
            pipeline.execute()

        guarded(copy)
        return len(entries)

    def missing(self) -> int:
        """Return the number of keys in the bucket that Valkey does not have."""
        digests = [digest for _, digest in self.stored()]
        known: list[str | None] = guarded(lambda: self._job_store.client.hmget(self._index, digests)) if digests else []
        return known.count(None)

    def stored(self) -> list[tuple[KeyRecord, str]]:
        """Return every key in the bucket with its hash, oldest first."""
        return [entry for item in self._store.list(object_keys.KEYS) if (entry := self._stored(item.key))]

    def _stored(self, name: str) -> tuple[KeyRecord, str] | None:
        body = self._store.get(name)
        return None if body is None else _decode(body.decode())

    def _readable(self, unreadable: list[str]) -> Iterator[tuple[KeyRecord, str]]:
        """Yield as `stored` returns. Names of keys that cannot be read are added to `unreadable`."""
        for item in self._store.list(object_keys.KEYS):
            try:
                entry = self._stored(item.key)
            except Unavailable as error:
                if self._store.is_at_fault(error):
                    raise
                log.error("key_unreadable", key=item.key, reason=str(error))  # noqa: TRY400 - an error of the store
                unreadable.append(item.key)
            else:
                if entry is not None:
                    yield entry

    def _read(self, digest: str) -> tuple[str | None, str | None]:
        text, loaded = guarded(lambda: self._job_store.client.hmget(self._index, [digest, LOADED]))
        return text, loaded

    def _save(self, record: KeyRecord, digest: str) -> None:
        self._store.put(object_keys.api_key(record.id), _encode(record, digest).encode())
        guarded(lambda: self._job_store.client.hset(self._index, digest, _encode(record, digest)))


def digest_of(key: str) -> str:
    """Return the digest of a key, which is stored in its place."""
    return hashlib.sha256(key.encode()).hexdigest()


def _encode(record: KeyRecord, digest: str) -> str:
    body: dict[str, Any] = dict(record.__dict__)
    for name in ("created_at", "expires_at", "revoked_at"):
        body[name] = body[name].isoformat() if body[name] else None
    return strict_json.dumps({"v": 1, "sha256": digest, **body})


def _decode(text: str) -> tuple[KeyRecord, str]:
    body = strict_json.loads(text)
    for name in ("created_at", "expires_at", "revoked_at"):
        body[name] = datetime.fromisoformat(body[name]) if body[name] else None
    digest = body.pop("sha256")
    body.pop("v")
    return KeyRecord(**body), digest
