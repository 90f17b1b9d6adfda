"""Finds abandoned jobs: expired leases, queued jobs whose wake-up was lost, unfinished operations, and first of all
records that Valkey has lost.

Runs as a thread in every API and worker process; a lock in Valkey lets one act at a time. Only the sweeper takes a job
from a silent worker. Invariant: it never touches a job whose lease is valid by the server's clock, and it waits for one
lease after its start, so that workers that lost their connection can send a heartbeat first.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import structlog

from jobs.errors import Unavailable
from jobs.lifecycle.housekeeping import Housekeeper
from jobs.lifecycle.outcomes import LOST, hand_back
from jobs.lifecycle.recovery import Recovery, apart
from jobs.lifecycle.time_limit import Overdue
from jobs.lifecycle.turns import Turns
from jobs.lifecycle.valkey_recovery import ValkeyRecovery
from jobs.lifecycle.wakeups import WakeupPublisher
from jobs.settings import QueueSettings
from jobs.store.job import HELD, JobStatus
from jobs.store.job_store import JobStore
from jobs.store.write_once import WriteOnceStore

log = structlog.get_logger()

RING_AGAIN_SECONDS = 30.0
"""Seconds after which the wake-up of a queued job is published again, or half a lease if that is shorter."""
INTERVAL_SECONDS = 5.0
"""Seconds between sweeps, or a quarter of a lease if that is shorter."""
TAKEOVERS_AT_ONCE = 8
"""Number of jobs that are taken from silent workers at the same time, for hundreds that are lost with a network."""


class Sweeper:
    """The thread that takes over abandoned jobs."""

    def __init__(
        self,
        job_store: JobStore,
        write_once: WriteOnceStore,
        wakeups: WakeupPublisher,
        settings: QueueSettings,
        *,
        valkey_recovery: ValkeyRecovery | None = None,
    ) -> None:
        """`valkey_recovery` is that of the process, if it has one."""
        self._job_store = job_store
        self._write_once = write_once
        self._wakeups = wakeups
        self._lease_seconds = settings.lease_seconds
        self._interval = min(INTERVAL_SECONDS, settings.lease_seconds / 4)
        self._ring_again_seconds = min(RING_AGAIN_SECONDS, settings.lease_seconds / 2)
        self._stop = threading.Event()
        # Older releases, which compare nothing with the bucket, use a lock `sweeper` and keep it during an upgrade.
        self._turns = Turns(job_store, "sweep", self._interval)
        self._housekeeper = Housekeeper(job_store, write_once)
        self._valkey_recovery = valkey_recovery or ValkeyRecovery(write_once.store, job_store, wakeups, settings)
        self._recovery = Recovery(job_store, write_once, wakeups, by="sweeper")
        self._overdue = Overdue(job_store, write_once)
        self._thread = threading.Thread(target=self._run, name="sweeper", daemon=True)

    def start(self) -> None:
        """Start the sweeper and the housekeeper."""
        self._thread.start()
        self._housekeeper.start()

    def close(self) -> None:
        """Stop after the current sweep."""
        self._stop.set()
        self._housekeeper.close()
        if self._thread.is_alive():
            self._thread.join(timeout=5)

    def _run(self) -> None:
        leases_from = self._lease_seconds
        waited = 0.0
        while not self._stop.wait(self._interval):
            waited += self._interval
            try:
                if self._turns.mine():
                    self._valkey_recovery.ensure()
                    self._valkey_recovery.look_again()
                    self._recovery.finish()
                    self.ring_again(self._ring_again_seconds)
                    if waited >= leases_from:
                        self.take_over_expired()
                        self._overdue.end()
            except Unavailable as error:
                self._turns.pass_on()
                waited = 0.0  # heartbeats may have been lost too, so wait for a whole lease again
                log.warning("sweep_failed", reason=str(error))
            except Exception:  # the thread's outermost loop: no error may end it
                log.exception("sweep_broken")

    def ring_again(self, seconds: float = RING_AGAIN_SECONDS) -> None:
        """Publish wake-ups for jobs that have waited unclaimed, if their queue holds fewer wake-ups than jobs.

        While all workers are busy, no wake-up is consumed. Without this bound, they would fill Valkey and start
        machines in a cluster that counts them. Wake-ups for other jobs are consumed by the next free worker.
        """
        missing: dict[str, int] = {}
        for job_id in self._job_store.unclaimed(seconds):
            with apart(job_id, self._write_once.store):
                try:
                    self._ring(job_id, missing)
                finally:
                    self._job_store.mark_rung(job_id)  # so that an unreadable job does not stay first in the list

    def _ring(self, job_id: str, missing: dict[str, int]) -> None:
        record = self._job_store.get(job_id)
        if record is None or record.status is not JobStatus.QUEUED:
            return
        if record.queue not in missing:
            missing[record.queue] = self._job_store.missing_wakeups(record.queue)
        if missing[record.queue] > 0:
            missing[record.queue] -= 1
            self._wakeups.add(job_id, record.queue)

    def take_over_expired(self) -> None:
        """Requeue or end every job whose worker fell silent, several at once: each waits for storage several times.

        Raises `Unavailable`; the jobs that are left are taken over by the next sweep.
        """
        expired = self._job_store.expired_leases()
        if not expired:
            return
        with ThreadPoolExecutor(min(TAKEOVERS_AT_ONCE, len(expired)), thread_name_prefix="takeover") as pool:
            takeovers = [pool.submit(self._take_over, job_id) for job_id in expired]
            try:
                for takeover in takeovers:
                    takeover.result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)  # after an error; otherwise all are done

    def _take_over(self, job_id: str) -> None:
        with apart(job_id, self._write_once.store):
            record = self._job_store.get(job_id)
            if record is not None and record.status in HELD:
                # A restored record may name a run that had ended before Valkey was lost, so this is not a lost attempt.
                handback = replace(LOST, counts=not record.restored)
                hand_back(self._job_store, self._write_once, self._wakeups, record, handback, expired=True)
