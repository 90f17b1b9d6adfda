"""The limit on requests per second of one API key: a token bucket in Valkey, by the server's clock.

Owns the bucket; the caller decides which requests count. Invariant: a key has one bucket, shared by all API processes.
"""

from __future__ import annotations

from jobs.errors import JobsError
from jobs.store.job_store import JobStore


class RateLimited(JobsError):
    """A rate limit was exceeded. The next request is accepted after `seconds`."""

    def __init__(self, refusal: str, seconds: float) -> None:
        self.seconds = seconds
        super().__init__(f"{refusal} Wait, then send fewer per second.")


class RateLimiter:
    """The buckets of all keys. With a rate of 0 there is no limit and no request to Valkey."""

    def __init__(self, job_store: JobStore, *, rate: float, burst: int, refusal: str = "") -> None:
        """`refusal` is the message for an exceeded limit; the default is that of a key's requests."""
        self._job_store = job_store
        self._refusal = refusal or f"This key may send {rate:g} requests per second and has sent more."
        self._rate = rate
        self._burst = burst

    def take(self, key_id: str) -> None:
        """Count one request of a key. Raises `RateLimited` and `Unavailable`."""
        if not self._rate:
            return
        wait_ms = int(self._job_store.run_script("take", key_id, str(self._rate), str(self._burst)))
        if wait_ms:
            raise RateLimited(self._refusal, wait_ms / 1000)
