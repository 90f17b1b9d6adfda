"""Keys of monitoring (scope `metrics:read`), which also work while Valkey is unavailable, when monitoring matters most.

Owns this process's cache of such keys; `jobs.auth.api_keys` owns all others. Invariant: without Valkey, only keys with
this scope are accepted, and a revoked key for at most `REFRESH_SECONDS`, unless object storage is unavailable too.
"""

from __future__ import annotations

import threading
import time
from datetime import UTC, datetime

import structlog

from jobs.auth.api_keys import KeyRecord, KeyStore, digest_of
from jobs.auth.rate_limit import RateLimiter
from jobs.errors import Unavailable
from jobs.store.job_store import JobStore

log = structlog.get_logger()

SCOPE = "metrics:read"
REFRESH_SECONDS = 60.0
"""Shortest time in seconds between two reads of the keys from the bucket, for any number of unknown keys."""
WAIT_SECONDS = 2.0
"""Longest time in seconds that a scrape waits for the bucket; Prometheus gives up after 10 s."""


class ScraperKeys:
    """One API process's cache of monitoring keys. Thread-safe."""

    def __init__(self, keys: KeyStore, job_store: JobStore, rates: RateLimiter) -> None:
        self._keys = keys
        self._job_store = job_store
        self._rates = rates
        self._known: dict[str, KeyRecord] = {}
        """Records by the key's hash."""
        self._refreshed = -REFRESH_SECONDS
        self._lock = threading.Lock()

    def authenticate(self, key: str) -> KeyRecord | None:
        """Return the record of a valid key, or None. Raises `RateLimited`, and `Unavailable` if nothing can tell."""
        try:
            self._job_store.ping()  # short, because the check itself would wait longer than a scrape lasts
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
        """Read the keys from the bucket, unless that was done recently. Without an answer, the cache stays
        unchanged."""
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
