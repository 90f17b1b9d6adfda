"""Replaced objects: deleted from the bucket minutes after a worker has uploaded what replaces them.

A reader lists the rollouts of a running job and then reads them, while its worker merges them into larger objects. This
owns the list of replaced objects in Valkey, which outlives the run and its worker: the uploader adds to it, and the
housekeeper deletes. Invariant: an object stays for at least `KEPT_SECONDS` after it was replaced. If Valkey loses the
list, its objects stay until the job is deleted.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from jobs.store.bucket import ObjectStore
from jobs.store.job_store import JobStore, guarded

KEPT_SECONDS = 300.0
"""Longer than a listing takes in which every request is answered at its last attempt only."""
AT_ONCE, THREADS = 500, 8


class Discards:
    """The replaced objects of all jobs."""

    def __init__(self, job_store: JobStore, store: ObjectStore) -> None:
        self._job_store = job_store
        self._store = store
        self._name = f"{job_store.prefix}:discards"

    def add(self, keys: Sequence[str]) -> None:
        """Delete these objects later. All that replaces them must be in the bucket. May be repeated."""
        due = self._job_store.now_ms() + int(KEPT_SECONDS * 1000)
        guarded(lambda: self._job_store.client.zadd(self._name, dict.fromkeys(keys, due)))

    def step(self) -> None:
        """Delete objects that are due. Raises `Unavailable`; the next step continues with the rest."""
        now = self._job_store.now_ms()
        due: list[str] = guarded(lambda: self._job_store.client.zrangebyscore(self._name, 0, now, start=0, num=AT_ONCE))
        with ThreadPoolExecutor(THREADS) as pool:
            for _ in pool.map(self._delete, due):
                pass

    def _delete(self, key: str) -> None:
        self._store.delete(key)
        guarded(lambda: self._job_store.client.zrem(self._name, key))
