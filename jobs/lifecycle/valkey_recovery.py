"""Detects that Valkey lost its most recent writes, and corrects its records without an operator.

A power cut loses the last second of the append-only file, and a promoted replica lags behind. In both cases the server
has a new run id or replication id. So this compares the server that answers with the one whose records were last
compared with the bucket; Valkey stores that, and a loss can only restore an older note, never one of the new server.
Until the comparison is done, no job is claimed and no Idempotency-Key is checked (`claim.lua`, `admit.lua`). Everything
that the service has promised is in the bucket: `job.json` with its key, commands, tickets, commits and outcomes.

Owns when records are compared and how far back; `rebuild` owns how. Invariant: a server is noted as compared only after
everything that it may have lost was compared.
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from datetime import timedelta

import structlog

from jobs.errors import Unavailable
from jobs.lifecycle.rebuild import Rebuild
from jobs.lifecycle.turns import Turns
from jobs.lifecycle.wakeups import WakeupPublisher
from jobs.settings import QueueSettings
from jobs.store.bucket import ObjectStore
from jobs.store.job import utc
from jobs.store.job_store import JobStore

log = structlog.get_logger()

MARGIN = timedelta(minutes=10)
"""Time before the server was last seen from which jobs are compared, because the clocks of API hosts, which date ids,
may differ."""

WAIT_SECONDS = 3.0
"""How long a request waits for the comparison, and a process for its turn at it."""
POLL_SECONDS = 0.1


LOCK_SECONDS = 5.0
"""How often the comparing process renews its lock."""

LOOK_AGAIN_SECONDS = 300.0
"""Time after which a job whose objects could not be read is compared again."""


class ValkeyRecovery:
    """Keeps Valkey's records up to date with the bucket, one process at a time. Thread-safe; one per process."""

    def __init__(
        self, store: ObjectStore, job_store: JobStore, wakeups: WakeupPublisher, settings: QueueSettings
    ) -> None:
        self._store = store
        self._job_store = job_store
        self._wakeups = wakeups
        self._settings = settings
        self._turns = Turns(job_store, "comparison", LOCK_SECONDS)
        self._comparing = threading.Lock()
        self._asked = threading.Lock()
        self._under_way: Future[bool] | None = None

    def ensure(self) -> bool:
        """Correct what Valkey may have lost. Returns whether a comparison was needed. Raises `Unavailable`.

        May take long, so it is for threads that must wait for it anyway.
        """
        if not self._job_store.look().may_have_forgotten:
            return False
        if not self._comparing.acquire(timeout=WAIT_SECONDS):
            raise _busy()
        try:
            if self._await_turn():
                with self._turns.kept():
                    self._compare()
        finally:
            self._comparing.release()
        return True

    def ensure_soon(self) -> bool:
        """Do as `ensure`, for a request: another thread compares, and this one waits for some seconds."""
        if not self._job_store.look().may_have_forgotten:
            return False
        with self._asked:
            if self._under_way is None or self._under_way.done():
                self._under_way = Future()
                threading.Thread(target=self._fulfil, args=(self._under_way,), name="comparison", daemon=True).start()
            under_way = self._under_way
        try:
            return under_way.result(timeout=WAIT_SECONDS)
        except TimeoutError:
            raise _busy() from None

    def look_again(self) -> None:
        """Compare jobs that could not be read during the comparison. Raises `Unavailable`."""
        if unread := self._job_store.begun("unread", LOOK_AGAIN_SECONDS):
            self._rebuild().look_again(unread)

    def _fulfil(self, asked: Future[bool]) -> None:
        try:
            asked.set_result(self.ensure())
        except BaseException as error:  # noqa: BLE001 - the waiting thread gets it
            asked.set_exception(error)

    def _await_turn(self) -> bool:
        """Wait for the lock; False if another process has compared meanwhile."""
        until = time.monotonic() + WAIT_SECONDS
        while not self._turns.mine():
            if time.monotonic() > until:
                raise _busy()
            time.sleep(POLL_SECONDS)
            if not self._job_store.look().may_have_forgotten:
                return False
        return True

    def _compare(self) -> None:
        look = self._job_store.look()
        if not look.may_have_forgotten:
            return
        since = utc(look.seen_ms) - MARGIN if look.seen_ms is not None else None
        # Without a note, this is the first start, an upgrade, or a Valkey that has lost everything.
        log.warning("valkey_restarted", since=since and since.isoformat())
        rebuild = self._rebuild()
        rebuild.catch_up(since)
        if not self._job_store.note_compared(look.here):
            raise Unavailable("Valkey", "it was restarted again while its records were compared with the bucket")
        rebuild.catch_up_queued()
        log.warning("valkey_compared")

    def _rebuild(self) -> Rebuild:
        return Rebuild(self._store, self._job_store, self._wakeups, lease_seconds=self._settings.lease_seconds)


def _busy() -> Unavailable:
    return Unavailable("Valkey", "it was restarted, and its records are being compared with the bucket")
