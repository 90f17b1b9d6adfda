"""The limit on requests per second of one API key: a token bucket in Valkey, by the server's clock.

Owns the bucket, and the note of what a request has left of each limit (`SPENT`); the caller decides which requests
count. Invariant: a key has one bucket, shared by all API processes.
"""

from __future__ import annotations

import math
from contextvars import ContextVar
from dataclasses import dataclass

from jobs.errors import JobsError
from jobs.store.job_store import JobStore


@dataclass(frozen=True, kw_only=True)
class Allowance:
    """What is left of a limit."""

    name: str
    most: int
    left: int
    window_seconds: float | None = None
    """Seconds in which all of it comes back; None: it limits how many there are at once."""
    full_seconds: float | None = None
    """Seconds until all of it is there."""


SPENT: ContextVar[dict[str, Allowance] | None] = ContextVar("grpo_allowances", default=None)
"""The limits that the present request counts for, by name; None where nobody wants to know."""


def note_allowance(allowance: Allowance) -> None:
    """Note what the present request has left of a limit."""
    spent = SPENT.get()
    if spent is not None:
        spent[allowance.name] = allowance


class RateLimited(JobsError):
    """A rate limit was exceeded. The next request is accepted after `seconds`."""

    def __init__(self, refusal: str, seconds: float) -> None:
        self.seconds = seconds
        super().__init__(f"{refusal} Wait, then send fewer per second.")


class RateLimiter:
    """The buckets of all keys. With a rate of 0 there is no limit and no request to Valkey."""

    def __init__(
        self, job_store: JobStore, *, rate: float, burst: int, name: str | None = "requests", refusal: str = ""
    ) -> None:
        """`refusal` is the message for an exceeded limit; the default is that of a key's requests.

        `name` is what clients know the limit by; None: they do not hear of it.
        """
        self._job_store = job_store
        self._refusal = refusal or f"This key may send {rate:g} requests per second and has sent more."
        self._rate = rate
        self._burst = burst
        self._name = name

    def take(self, key_id: str) -> None:
        """Count one request of a key. Raises `RateLimited` and `Unavailable`."""
        if not self._rate:
            return
        wait_ms, left = map(int, self._job_store.run_script("take", key_id, str(self._rate), str(self._burst)))
        if self._name is not None:
            note_allowance(self._allowance(self._name, left))
        if wait_ms:
            raise RateLimited(self._refusal, wait_ms / 1000)

    def _allowance(self, name: str, left: int) -> Allowance:
        return Allowance(
            name=name,
            most=self._burst,
            left=left,
            window_seconds=math.ceil(self._burst / self._rate),
            full_seconds=math.ceil((self._burst - left) / self._rate),
        )
