"""How many requests a second one API key may send: a token bucket in Valkey, by the server's clock.

Owns the bucket; which requests count is the caller's to say. Invariant: however many API processes there are, a
key has one bucket.
"""

from __future__ import annotations

from jobs.errors import JobsError
from jobs.ledger import Ledger


class RateLimited(JobsError):
    """The key has sent more requests than it may; it has a next one after `seconds`."""

    def __init__(self, rate: float, seconds: float) -> None:
        self.seconds = seconds
        super().__init__(f"This key may send {rate:g} requests a second and has sent more. Wait, then go on slower.")


class RateLimiter:
    """The buckets of all keys. A rate of 0 is no limit, and costs nothing."""

    def __init__(self, ledger: Ledger, *, rate: float, burst: int) -> None:
        self._ledger = ledger
        self._rate = rate
        self._burst = burst

    def take(self, key_id: str) -> None:
        """Count one request of a key; raises `RateLimited`, `Unavailable`."""
        if not self._rate:
            return
        wait_ms = int(self._ledger.run_script("take", key_id, str(self._rate), str(self._burst)))
        if wait_ms:
            raise RateLimited(self._rate, wait_ms / 1000)
