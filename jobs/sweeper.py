"""Finds jobs nobody is looking after: leases that ran out, queued jobs whose wake-up was lost, and what a process
began and did not finish.

Runs as a thread in every API and worker process, one at a time by a lock in Valkey. It is the only thing that
takes a job from a silent worker. Invariant: it never touches a job whose lease is live by the server's clock,
and it waits one lease after start-up, so that workers which lost contact can beat first.
"""

from __future__ import annotations

import secrets
import threading
from dataclasses import replace

import structlog

from jobs.archive import Archive
from jobs.ending import LOST, hand_back
from jobs.errors import Unavailable
from jobs.ledger import Ledger, guarded
from jobs.outbox import Outbox
from jobs.record import HELD, JobStatus
from jobs.settings import QueueSettings
from jobs.unfinished import Unfinished, apart

log = structlog.get_logger()

RING_AGAIN_SECONDS = 30.0
"""Or half a lease, where that is shorter."""
INTERVAL_SECONDS = 5.0
"""Or a quarter of a lease."""
LOCK_INTERVALS = 3
"""A sweeper that missed so many of its turns is dead, and another takes over."""


class Sweeper:
    """The thread that hands abandoned jobs on."""

    def __init__(self, ledger: Ledger, archive: Archive, outbox: Outbox, settings: QueueSettings) -> None:
        self._ledger = ledger
        self._archive = archive
        self._outbox = outbox
        self._lease_seconds = settings.lease_seconds
        self._interval = min(INTERVAL_SECONDS, settings.lease_seconds / 4)
        self._ring_again_seconds = min(RING_AGAIN_SECONDS, settings.lease_seconds / 2)
        self._lock_ms = int(self._interval * LOCK_INTERVALS * 1000)
        self._stop = threading.Event()
        self._name = secrets.token_hex(8)
        self._unfinished = Unfinished(ledger, archive, outbox, by="sweeper")
        self._lock = f"{ledger.prefix}:lock:sweeper"
        self._thread = threading.Thread(target=self._run, name="sweeper", daemon=True)

    def start(self) -> None:
        """Begin to sweep."""
        self._thread.start()

    def close(self) -> None:
        """Stop after the sweep at hand."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)

    def _run(self) -> None:
        leases_from = self._lease_seconds
        waited = 0.0
        while not self._stop.wait(self._interval):
            waited += self._interval
            try:
                if self._is_mine():
                    self._unfinished.finish()
                    self.ring_again(self._ring_again_seconds)
                    if waited >= leases_from:
                        self.take_over_expired()
            except Unavailable as error:
                waited = 0.0  # beats may have been lost too: wait a whole lease again
                log.warning("sweep_failed", reason=str(error))
            except Exception:  # an edge of the process: nothing may end all later sweeps
                log.exception("sweep_broken")

    def _is_mine(self) -> bool:
        """Take or keep the lock that makes one sweeper act at a time."""
        client = self._ledger.client
        if guarded(lambda: client.set(self._lock, self._name, nx=True, px=self._lock_ms)):
            return True
        if guarded(lambda: client.get(self._lock)) != self._name:
            return False
        guarded(lambda: client.pexpire(self._lock, self._lock_ms))
        return True

    def ring_again(self, seconds: float = RING_AGAIN_SECONDS) -> None:
        """Wake workers for jobs that have waited unclaimed, as far as a queue holds fewer wake-ups than jobs.

        While all workers are busy nobody takes any: rung for without end they would fill Valkey, and start machines
        where a cluster counts them. What is there in place of a missing one is used up by the next free worker.
        """
        missing: dict[str, int] = {}
        for job_id in self._ledger.unclaimed(seconds):
            with apart(job_id):
                record = self._ledger.get(job_id)
                if record is None or record.status is not JobStatus.QUEUED:
                    continue
                if record.queue not in missing:
                    missing[record.queue] = self._ledger.missing_wakeups(record.queue)
                if missing[record.queue] > 0:
                    missing[record.queue] -= 1
                    self._outbox.add(job_id, record.queue)
                self._ledger.mark_rung(job_id)

    def take_over_expired(self) -> None:
        """Requeue, or end, every job whose worker fell silent."""
        for job_id in self._ledger.expired_leases():
            with apart(job_id):
                self._take_over(job_id)

    def _take_over(self, job_id: str) -> None:
        record = self._ledger.get(job_id)
        if record is not None and record.status in HELD:
            # A restored record may name a run that had ended before Valkey was lost: no run was lost here.
            lapse = replace(LOST, counts=not record.restored)
            hand_back(self._ledger, self._archive, self._outbox, record, lapse, expired=True)
