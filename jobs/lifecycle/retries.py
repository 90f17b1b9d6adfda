"""Repeated requests of clients that send no Idempotency-Key but say that they repeat one, as OpenAI's SDK does.

Owns what Valkey remembers of them: for each body of an API key, the key of the newest request that had it. Invariant:
a repetition within `REMEMBER_SECONDS` has the Idempotency-Key of the request that it repeats, and any other request has
a new one.
"""

from __future__ import annotations

import hashlib
import secrets
from typing import Final

from jobs.lifecycle.admission import RequestKey
from jobs.store.job_store import JobStore, guarded

REMEMBER_SECONDS: Final = 600


class Retries:
    """The keys of requests that may be repeated."""

    def __init__(self, job_store: JobStore) -> None:
        self._job_store = job_store

    def key(self, owner: str, key_id: str, operation: str, body: str, *, again: bool) -> RequestKey:
        """Return the key of a request. `again`: its sender says that it repeats one. Raises `Unavailable`."""
        client = self._job_store.client
        digest = hashlib.sha256(f"{key_id}\n{operation}\n{body}".encode()).hexdigest()
        name = f"{self._job_store.prefix}:repeatable:{owner}:{digest}"
        new = secrets.token_hex(16)
        # With `again` the first request may not have come this far: then this one is the first.
        guarded(lambda: client.set(name, new, ex=REMEMBER_SECONDS, nx=again))
        stored: str | None = guarded(lambda: client.get(name)) if again else new
        return RequestKey.of(operation, stored or new, body)
