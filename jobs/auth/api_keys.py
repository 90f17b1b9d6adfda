"""API keys: shown once and stored as hashes, in the bucket and as a copy in Valkey, which each request reads.

Owns creation, revocation, the check and the list. The bucket is authoritative. A key is 256 random bits, so an unsalted
SHA-256 is as safe as a slow hash, and how long a look-up by it takes tells nothing of other keys. Invariant: the next
request with a revoked or expired key is refused, with two exceptions. While Valkey is unavailable, `scraper_keys` may
lag a minute behind. And a Valkey that lost its most recent writes accepts a key that was revoked in them, until its
records have been compared with the bucket, which starts within seconds (`valkey_recovery`); to wait for that would
delay every request.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import structlog
from ulid import ULID

from grpo_core import strict_json
from grpo_core.spec import Problem
from jobs.errors import NotFound, Unavailable
from jobs.store import object_keys
from jobs.store.bucket import ObjectStore
from jobs.store.job_store import JobStore, guarded

log = structlog.get_logger()

OWNER_SCOPES = ("jobs:read", "jobs:write", "datasets:write")
"""The scopes that an owner needs for jobs and data; the default of a new key."""
OPERATOR = "operator"
"""The scope of operators: they drain workers, and see whose job each one has."""
KEYS_WRITE = "keys:write"
"""The scope that creates and revokes keys. No key has it unless its creator says so, because a stolen key could make
others that outlive it."""
SCOPES = (*OWNER_SCOPES, "metrics:read", OPERATOR, KEYS_WRITE)
KEY_PREFIX = "grpo_"
HINT_CHARACTERS = len(KEY_PREFIX) + 4
"""Characters of a key that are stored to recognise it by: 24 of its 256 bits."""
KEY_ID = r"^key-[0-9A-HJKMNP-TV-Z]{26}$"
MAX_KEYS = 100
"""Valid keys of one owner that keys may create."""
USED_SECONDS = 60.0
"""How exactly the last use of a key is known."""
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


@dataclass(frozen=True, kw_only=True)
class ListedKey:
    """A key as lists show it."""

    record: KeyRecord
    hint: str | None
    """Its first characters; None: an earlier release created it."""
    created_by: str | None
    """Id of the key that created it; None: the command line of the service."""
    last_used_at: datetime | None
    """When it was last used, to the minute; None: not since Valkey was last lost."""


class KeyStore:
    """All API keys of one service."""

    def __init__(self, store: ObjectStore, job_store: JobStore) -> None:
        self._store = store
        self._job_store = job_store
        self._index = f"{job_store.prefix}:keys"
        self._facts = f"{job_store.prefix}:key-facts"
        self._used = f"{job_store.prefix}:keys-used"
        self._noted: dict[str, float] = {}
        """When this process last noted the use of each key, by its monotonic clock."""

    def create(
        self,
        owner: str,
        scopes: Sequence[str] = OWNER_SCOPES,
        *,
        name: str | None = None,
        expires_at: datetime | None = None,
        created_by: str | None = None,
    ) -> tuple[str, KeyRecord]:
        """Create a key and return it with its record. The key cannot be read again. Raises `ValueError`.

        `created_by` is the id of the key that creates it; the caller checks what that one may grant (`granted`).
        """
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
        # In a separate object: earlier releases refuse a record with unknown fields.
        facts = {"v": 1, "hint": key[:HINT_CHARACTERS], "created_by": created_by}
        self._store.put_json(object_keys.key_facts(record.id), facts)
        guarded(lambda: self._job_store.client.hset(self._facts, record.id, strict_json.dumps(facts)))
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
        if record is None or not record.is_valid(datetime.now(UTC)):
            return None
        self._note_use(record.id)
        return record

    def list(self, owner: str | None = None) -> list[KeyRecord]:
        """Return the records of all keys from the bucket, oldest first."""
        records = [record for record, _ in self.stored()]
        return [record for record in records if owner is None or record.owner == owner]

    def listed(self, owner: str | None = None) -> list[ListedKey]:
        """Return an owner's keys from Valkey, newest first; with None those of all owners."""
        if not guarded(lambda: self._job_store.client.hexists(self._index, LOADED)):
            self.load()
        stored: dict[str, str] = guarded(lambda: self._job_store.client.hgetall(self._index))
        records = [_decode(text)[0] for digest, text in stored.items() if digest != LOADED]
        wanted = sorted((r for r in records if owner in (None, r.owner)), key=lambda record: record.id, reverse=True)
        return self._with_facts(wanted)

    def listed_as(self, record: KeyRecord) -> ListedKey:
        """Return one key as lists show it."""
        return self._with_facts([record])[0]

    def revoke(self, key_id: str, owner: str | None = None) -> KeyRecord:
        """Revoke a key permanently; with `owner` only a key of that owner. Raises `NotFound`."""
        body = self._store.get(object_keys.api_key(key_id)) if re.fullmatch(KEY_ID, key_id) else None
        record, digest = _decode(body.decode()) if body else (None, "")
        if record is None or owner not in (None, record.owner):
            raise NotFound("key", key_id)
        revoked = replace(record, revoked_at=record.revoked_at or datetime.now(UTC))
        self._save(revoked, digest)
        return revoked

    def _with_facts(self, records: Sequence[KeyRecord]) -> list[ListedKey]:
        if not records:
            return []
        ids = [record.id for record in records]

        def read() -> list[list[str | None]]:
            pipeline = self._job_store.client.pipeline(transaction=False)
            pipeline.hmget(self._facts, ids)
            pipeline.hmget(self._used, ids)
            return pipeline.execute()

        facts, used = guarded(read)
        return [
            _listed(record, self._facts_of(record.id, text), last)
            for record, text, last in zip(records, facts, used, strict=True)
        ]

    def _facts_of(self, key_id: str, text: str | None) -> dict[str, Any]:
        """Read the facts of a key, from the bucket if Valkey has lost them."""
        if text is None:
            text = strict_json.dumps(self._store.get_json(object_keys.key_facts(key_id)) or {})
            guarded(lambda: self._job_store.client.hset(self._facts, key_id, text))
        return strict_json.loads(text)

    def _note_use(self, key_id: str) -> None:
        """Note that a key was used, once a minute in each process: every request asks."""
        now = time.monotonic()
        if now - self._noted.get(key_id, -USED_SECONDS) >= USED_SECONDS:
            self._noted[key_id] = now
            with contextlib.suppress(Unavailable):
                guarded(lambda: self._job_store.client.hset(self._used, key_id, str(int(time.time()))))

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


def granted(holder: KeyRecord, owner: str, scopes: Sequence[str], expires_at: datetime | None) -> list[Problem]:
    """Return why a key may not create another one like this: it can grant nothing that it does not have itself."""
    found: list[Problem] = []
    if owner != holder.owner and OPERATOR not in holder.scopes:
        remedy = "Leave it out, or use a key with the scope operator."
        found.append(_refusal("/owner", f"your key belongs to {holder.owner}", remedy))
    if missing := [name for name in scopes if name not in holder.scopes]:
        remedy = f"Use some of {', '.join(holder.scopes)}."
        found.append(_refusal("/scopes", f"your key does not have {', '.join(missing)} itself", remedy))
    if holder.expires_at is not None and (expires_at is None or expires_at > holder.expires_at):
        remedy = "Give that time or an earlier one."
        until = holder.expires_at.astimezone(UTC).isoformat(timespec="seconds")
        found.append(_refusal("/expires_at", f"your key expires at {until}, and no key it creates outlives it", remedy))
    return found


def _refusal(pointer: str, detail: str, remedy: str) -> Problem:
    return Problem(pointer=pointer, code="not_granted", detail=detail, remedy=remedy)


def _listed(record: KeyRecord, facts: dict[str, Any], used: str | None) -> ListedKey:
    return ListedKey(
        record=record,
        hint=facts.get("hint"),
        created_by=facts.get("created_by"),
        last_used_at=datetime.fromtimestamp(int(used), UTC) if used else None,
    )


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
