"""API keys: made once, shown once, kept only as hashes; the bucket is the truth and Valkey the copy read per request.

Owns creation, revocation and the check. A key is 256 random bits, so an unsalted SHA-256 is as good as a slow
hash. Invariant: a revoked or expired key is refused by the very next request; `scrapers` alone, while Valkey is away,
may be a minute behind.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from ulid import ULID

from grpo_core import strict_json
from jobs import layout
from jobs.errors import NotFound
from jobs.ledger import Ledger, guarded
from jobs.storage import ObjectStore

OWNER_SCOPES = ("jobs:read", "jobs:write", "datasets:write")
"""What lets an owner work with what is theirs; a key has these unless others are named."""
SCOPES = (*OWNER_SCOPES, "metrics:read")
KEY_PREFIX = "grpo_"
OWNER = r"[\w.@+-]{1,100}"
"""A name that can be part of a Valkey key, and that an unset shell variable is not."""
LOADED = "loaded"
"""A field of the Valkey hash that says the bucket's keys were copied into it since it was last empty."""


@dataclass(frozen=True, kw_only=True)
class KeyRecord:
    """What is known of a key; never the key itself."""

    id: str
    owner: str
    scopes: list[str]
    created_at: datetime
    expires_at: datetime | None = None
    revoked_at: datetime | None = None
    name: str | None = None

    def is_valid(self, now: datetime) -> bool:
        """Whether the key opens anything at this moment."""
        return self.revoked_at is None and (self.expires_at is None or now < self.expires_at)


class KeyStore:
    """All API keys of one service."""

    def __init__(self, store: ObjectStore, ledger: Ledger) -> None:
        self._store = store
        self._ledger = ledger
        self._index = f"{ledger.prefix}:keys"

    def create(
        self,
        owner: str,
        scopes: Sequence[str] = OWNER_SCOPES,
        *,
        name: str | None = None,
        expires_at: datetime | None = None,
    ) -> tuple[str, KeyRecord]:
        """Make a key; returns it with its record. It cannot be read again. Raises `ValueError`."""
        if not re.fullmatch(OWNER, owner):
            raise ValueError(f"The owner {owner!r} is no name: use letters, digits and . _ @ + -, 100 at most.")
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
        """The record of a valid key; None for any other text."""
        if not key.startswith(KEY_PREFIX) or len(key) > 128 or not key.isascii():
            return None
        return self.find(digest_of(key))

    def find(self, digest: str) -> KeyRecord | None:
        """The record of the valid key with this hash, or None."""
        text, loaded = self._read(digest)
        if text is None and not loaded:
            self.load()
            text, _ = self._read(digest)
        record = _decode(text)[0] if text else None
        return record if record and record.is_valid(datetime.now(UTC)) else None

    def list(self, owner: str | None = None) -> list[KeyRecord]:
        """Every key, oldest first, read from the bucket."""
        records = [record for record, _ in self.stored()]
        return [record for record in records if owner is None or record.owner == owner]

    def revoke(self, key_id: str) -> KeyRecord:
        """Close a key for good; raises `NotFound`."""
        for record, digest in self.stored():
            if record.id == key_id:
                revoked = replace(record, revoked_at=record.revoked_at or datetime.now(UTC))
                self._save(revoked, digest)
                return revoked
        raise NotFound("key", key_id)

    def load(self) -> int:
        """Copy the bucket's keys into Valkey, which may have lost them; returns how many there are."""
        entries = {digest: _encode(record, digest) for record, digest in self.stored()}

        def copy() -> None:
            pipeline = self._ledger.client.pipeline()
            for digest, body in entries.items():
                pipeline.hsetnx(self._index, digest, body)  # never over a revocation made in the meantime
            pipeline.hset(self._index, LOADED, "1")
            pipeline.execute()

        guarded(copy)
        return len(entries)

    def missing(self) -> int:
        """How many of the bucket's keys Valkey does not know."""
        digests = [digest for _, digest in self.stored()]
        known: list[str | None] = guarded(lambda: self._ledger.client.hmget(self._index, digests)) if digests else []
        return known.count(None)

    def stored(self) -> list[tuple[KeyRecord, str]]:
        """Every key in the bucket, oldest first, with its hash."""
        found: list[tuple[KeyRecord, str]] = []
        for item in self._store.list(layout.KEYS):
            body = self._store.get(item.key)
            if body is not None:
                found.append(_decode(body.decode()))
        return found

    def _read(self, digest: str) -> tuple[str | None, str | None]:
        text, loaded = guarded(lambda: self._ledger.client.hmget(self._index, [digest, LOADED]))
        return text, loaded

    def _save(self, record: KeyRecord, digest: str) -> None:
        self._store.put(layout.api_key(record.id), _encode(record, digest).encode())
        guarded(lambda: self._ledger.client.hset(self._index, digest, _encode(record, digest)))


def digest_of(key: str) -> str:
    """What is stored of a key."""
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
