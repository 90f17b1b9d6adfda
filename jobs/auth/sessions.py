"""Browser sessions: after a log-in with an API key, a random token stands for the key for some hours.

Owns tokens and the limit on log-in attempts; `jobs.auth.api_keys` owns what a key allows. Neither key nor token is
stored: Valkey has the hash of the key under the hash of the token, and after a loss people log in again. Invariant: a
session allows only what its key allows at that moment.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from jobs.auth.api_keys import KeyRecord, KeyStore, digest_of
from jobs.auth.rate_limit import RateLimited, RateLimiter
from jobs.errors import JobsError
from jobs.store.job_store import JobStore, guarded

FAILURES = 10
"""Number of wrong keys that one address may try in a burst."""
FAILURES_PER_SECOND = 0.2
ALL_FAILURES = 200
ALL_FAILURES_PER_SECOND = 10.0
"""Number of wrong keys per second of all addresses together, because an attacker may have many addresses."""
LOG_INS = 20
LOG_INS_PER_SECOND = 0.5
"""Number of sessions per second that one key may start; each is stored for hours."""


class TooManyAttempts(JobsError):
    """Too many log-ins were tried. The next attempt is accepted after `seconds`."""

    def __init__(self, seconds: float, what: str = "Too many wrong keys came from this address.") -> None:
        self.seconds = seconds
        super().__init__(f"{what} Wait, then try again.")


@dataclass(frozen=True, kw_only=True)
class Session:
    """A new session. The token is returned once, for a cookie."""

    token: str
    record: KeyRecord
    expires_at: datetime


class SessionStore:
    """All sessions of one service."""

    def __init__(self, job_store: JobStore, keys: KeyStore, *, hours: float) -> None:
        self._job_store = job_store
        self._keys = keys
        self._length = timedelta(hours=hours)
        self._failures = RateLimiter(job_store, rate=FAILURES_PER_SECOND, burst=FAILURES, name=None)
        self._all_failures = RateLimiter(job_store, rate=ALL_FAILURES_PER_SECOND, burst=ALL_FAILURES, name=None)
        self._log_ins = RateLimiter(job_store, rate=LOG_INS_PER_SECOND, burst=LOG_INS, name=None)

    def open(self, key: str, address: str) -> Session | None:
        """Start a session of a valid key; None for any other text. Raises `TooManyAttempts` and `Unavailable`."""
        record = self._keys.authenticate(key)
        if record is None:
            self._count_failure(address)
            return None
        try:
            self._log_ins.take(f"log-in-of:{record.id}")
        except RateLimited as error:
            raise TooManyAttempts(error.seconds, "This key has started too many sessions.") from error
        now = datetime.now(UTC)
        expires_at = min(now + self._length, record.expires_at or datetime.max.replace(tzinfo=UTC))
        token = secrets.token_urlsafe(32)
        # A key that has just expired has 0 seconds left, which Valkey refuses.
        seconds = max(1, int((expires_at - now).total_seconds()))
        guarded(lambda: self._job_store.client.set(self._place(token), digest_of(key), ex=seconds))
        return Session(token=token, record=record, expires_at=expires_at)

    def _count_failure(self, address: str) -> None:
        """Count a wrong key. Right keys are not counted, because all people behind one proxy share an address."""
        try:
            self._failures.take(f"log-in:{address}")
        except RateLimited as error:
            raise TooManyAttempts(error.seconds) from error
        try:
            self._all_failures.take("log-in")
        except RateLimited as error:
            raise TooManyAttempts(error.seconds, "Too many wrong keys came from all addresses together.") from error

    def find(self, token: str) -> KeyRecord | None:
        """Return the record of the key behind a session; None unless both are valid."""
        digest: str | None = guarded(lambda: self._job_store.client.get(self._place(token)))
        return self._keys.find(digest) if digest else None

    def close(self, token: str) -> KeyRecord | None:
        """End a session and return the record of its key; None if it has already ended."""
        record = self.find(token)
        guarded(lambda: self._job_store.client.delete(self._place(token)))
        return record

    def _place(self, token: str) -> str:
        return f"{self._job_store.prefix}:session:{digest_of(token)}"
