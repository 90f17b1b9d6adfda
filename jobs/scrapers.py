"""Keys of those who watch the service (scope `metrics:read`), known also while Valkey is away: then above all they ask.

Owns what is remembered of such keys in this process; all others are `jobs.keys`'s alone. Invariant: what is decided
without Valkey lets nobody but a watcher in, and a key that was revoked meanwhile for no longer than `REFRESH_SECONDS`,
unless object storage is away too.
"""

from __future__ import annotations

import threading
import time
from datetime import UTC, datetime

import structlog

from jobs.errors import Unavailable
from jobs.keys import KeyRecord, KeyStore, digest_of
from jobs.ledger import Ledger
from jobs.ratelimit import RateLimiter

log = structlog.get_logger()

SCOPE = "metrics:read"
REFRESH_SECONDS = 60.0
"""How often the bucket is asked for the keys, at most, whatever keys are tried."""
WAIT_SECONDS = 2.0
"""What a scrape waits for the bucket: Prometheus gives up after 10 s."""


class ScraperKeys:
    """The watchers' keys, as one API process knows them. Thread-safe."""

    def __init__(self, keys: KeyStore, ledger: Ledger, rates: RateLimiter) -> None:
        self._keys = keys
        self._ledger = ledger
        self._rates = rates
        self._known: dict[str, KeyRecord] = {}
        """By hash."""
        self._refreshed = -REFRESH_SECONDS
        self._lock = threading.Lock()

    def authenticate(self, key: str) -> KeyRecord | None:
        """The record of a valid key, else None; raises `RateLimited`, and `Unavailable` where it is not known."""
        try:
            self._ledger.ping()  # brief, where the check itself would wait for longer than a scrape lasts
            record = self._keys.authenticate(key)
            if record is not None:
                self._rates.take(record.id)
        except Unavailable:
            self._refresh()
            record = self._known.get(digest_of(key))
            if record is None or not record.is_valid(datetime.now(UTC)):
                raise
            return record
        self._remember(key, record)
        return record

    def _remember(self, key: str, record: KeyRecord | None) -> None:
        digest = digest_of(key)
        with self._lock:
            if record is not None and SCOPE in record.scopes:
                self._known = {**self._known, digest: record}
            elif digest in self._known:
                self._known = {known: kept for known, kept in self._known.items() if known != digest}

    def _refresh(self) -> None:
        """Read the keys from the bucket, unless that was done a moment ago; what it does not answer stays as it was."""
        with self._lock:
            if time.monotonic() - self._refreshed < REFRESH_SECONDS:
                return
            self._refreshed = time.monotonic()
        thread = threading.Thread(target=self._read, name="scraper-keys", daemon=True)
        thread.start()
        thread.join(WAIT_SECONDS)

    def _read(self) -> None:
        try:
            known = {digest: record for record, digest in self._keys.stored() if SCOPE in record.scopes}
            with self._lock:
                self._known = known
        except Unavailable as error:
            log.warning("keys_not_refreshed", reason=str(error))
