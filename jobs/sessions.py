"""Sessions of people who logged in with an API key in a browser: a random token stands for the key for some hours.

Owns tokens and how often a log-in may be tried; what a key allows is `jobs.keys`'s. Neither key nor token is stored:
Valkey holds the hash of one under the hash of the other, and losing it means to log in again. Invariant: a session
opens nothing that its key would not open at that moment.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from jobs.errors import JobsError
from jobs.keys import KeyRecord, KeyStore, digest_of
from jobs.ledger import Ledger, guarded
from jobs.ratelimit import RateLimited, RateLimiter

FAILURES = 10
"""Wrong keys that one address may try at once."""
FAILURES_PER_SECOND = 0.2


class TooManyAttempts(JobsError):
    """An address tried too many wrong keys; it is told so for `seconds`."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        super().__init__("Too many wrong keys came from this address. Wait, then try again.")


@dataclass(frozen=True, kw_only=True)
class Session:
    """A new session. The token is given once, to be kept in a cookie."""

    token: str
    record: KeyRecord
    expires_at: datetime


class SessionStore:
    """All sessions of one service."""

    def __init__(self, ledger: Ledger, keys: KeyStore, *, hours: float) -> None:
        self._ledger = ledger
        self._keys = keys
        self._length = timedelta(hours=hours)
        self._failures = RateLimiter(ledger, rate=FAILURES_PER_SECOND, burst=FAILURES)

    def open(self, key: str, address: str) -> Session | None:
        """Begin a session of a valid key; None for any other text. Raises `TooManyAttempts`, `Unavailable`."""
        record = self._keys.authenticate(key)
        if record is None:
            self._count_failure(address)
            return None
        now = datetime.now(UTC)
        expires_at = min(now + self._length, record.expires_at or datetime.max.replace(tzinfo=UTC))
        token = secrets.token_urlsafe(32)
        # Expired a moment ago would be 0 seconds, which Valkey refuses.
        seconds = max(1, int((expires_at - now).total_seconds()))
        guarded(lambda: self._ledger.client.set(self._place(token), digest_of(key), ex=seconds))
        return Session(token=token, record=record, expires_at=expires_at)

    def _count_failure(self, address: str) -> None:
        """Only wrong keys are counted: everyone behind one proxy has one address, and a right key proves itself."""
        try:
            self._failures.take(f"log-in:{address}")
        except RateLimited as error:
            raise TooManyAttempts(error.seconds) from error

    def find(self, token: str) -> KeyRecord | None:
        """The record of the key behind a session, while both are good."""
        digest: str | None = guarded(lambda: self._ledger.client.get(self._place(token)))
        return self._keys.find(digest) if digest else None

    def close(self, token: str) -> None:
        """End a session; one that is over already stays so."""
        guarded(lambda: self._ledger.client.delete(self._place(token)))

    def _place(self, token: str) -> str:
        return f"{self._ledger.prefix}:session:{digest_of(token)}"
