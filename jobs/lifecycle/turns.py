"""Turns: work that every process can do and one does at a time, by a lock in Valkey.

Owns the lock, not the work. Invariant: a process that missed three of its turns loses the lock to the next process.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
from collections.abc import Generator

from jobs.errors import Unavailable
from jobs.store.job_store import JobStore, guarded

MISSED = 3


class Turns:
    """This process's turns at one kind of work."""

    def __init__(self, job_store: JobStore, work: str, interval_seconds: float) -> None:
        self._job_store = job_store
        self._client = job_store.client
        self._work = work
        self._lock = f"{job_store.prefix}:lock:{work}"
        self._name = secrets.token_hex(8)
        self._interval = interval_seconds
        self._lock_ms = int(interval_seconds * MISSED * 1000)
        self._sits_out = False

    def mine(self) -> bool:
        """Take or keep the lock. Returns whether this process has it. Raises `Unavailable`."""
        if self._sits_out:
            self._sits_out = False
            return False
        if guarded(lambda: self._client.set(self._lock, self._name, nx=True, px=self._lock_ms)):
            return True
        if guarded(lambda: self._client.get(self._lock)) != self._name:
            return False
        guarded(lambda: self._client.pexpire(self._lock, self._lock_ms))
        return True

    def pass_on(self) -> None:
        """Release the lock and skip the next turn, because another process may reach servers that this one cannot."""
        self._sits_out = True
        self.release()

    def release(self) -> None:
        """Release the lock if this process has it. If Valkey does not answer, the lock expires."""
        with contextlib.suppress(Unavailable):
            self._job_store.release(self._work, self._name)

    @contextlib.contextmanager
    def kept(self) -> Generator[None]:
        """Keep a lock that was taken while the block runs, then release it."""
        done = threading.Event()

        def keep() -> None:
            while not done.wait(self._interval):
                with contextlib.suppress(Unavailable):
                    self.mine()

        keeper = threading.Thread(target=keep, name=f"{self._work}-lock", daemon=True)
        keeper.start()
        try:
            yield
        finally:
            done.set()
            keeper.join()
            self.release()
