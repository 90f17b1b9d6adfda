"""A worker's lease of one job: a thread that sends heartbeats and reads the owner's commands.

The thread is separate from training, uploads and everything else that can hang. Invariant: once `lost` is set it stays
set, and a run that sees it writes nothing more. Times are of this host's monotonic clock; the server decides who holds
a job.
"""

from __future__ import annotations

import threading
import time

import structlog

from jobs.errors import Unavailable
from jobs.store.job import JobStatus
from jobs.store.job_store import JobStore

log = structlog.get_logger()

POLL_SECONDS = 1.0
"""Seconds between two reads of the job's status, which is also the delay of a cancel."""
HOLD_SECONDS = 900.0
"""Seconds without an accepted heartbeat after which a run gives its job up."""


class Lease:
    """The lease of one epoch of one job. Start it after a claim, stop it after the outcome."""

    def __init__(
        self,
        job_store: JobStore,
        job_id: str,
        epoch: int,
        seconds: float,
        *,
        worker: str = "",
        orders: int = 0,
        gpu: str = "",
        hosts: int = 0,
    ) -> None:
        """`orders` is the number of the last command applied before the claim; `gpu` and `hosts` as the claim had
        them."""
        self._job_store = job_store
        self._job_id = job_id
        self._epoch = epoch
        self._seconds = seconds
        self._worker = worker
        self._commands = orders
        self._gpu, self._hosts = gpu, hosts
        self._began = time.monotonic()
        self._status = JobStatus.RUNNING
        self._beaten = time.monotonic()
        self._stop = threading.Event()
        self._lost = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"lease-{job_id}", daemon=True)

    def start(self) -> None:
        """Start the heartbeats."""
        self._thread.start()

    def stop(self) -> None:
        """Stop the heartbeats. The lease expires unless the job has ended."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=1)

    @property
    def lost(self) -> bool:
        """Whether another run holds the job, or Valkey was unavailable for too long."""
        return self._lost.is_set()

    @property
    def fresh(self) -> bool:
        """Whether the lease is valid, by the last answered heartbeat."""
        return not self.lost and time.monotonic() - self._beaten < self._seconds

    @property
    def pausing(self) -> bool:
        """Whether the owner has paused the job."""
        return self._status is JobStatus.PAUSING

    @property
    def cancelled(self) -> bool:
        """Whether the owner has cancelled the job."""
        return self._status is JobStatus.CANCELLING

    def lose(self) -> None:
        """Mark the lease as lost, after a refused write."""
        self._lost.set()

    def reclaim(self) -> bool:
        """Restore the claim in a record from which it was lost. No other run can have the epoch.

        Returns False if the job has ended or has a later run.
        """
        log.warning("claim_forgotten", job_id=self._job_id, epoch=self._epoch)
        return self._job_store.reclaim(
            self._job_id,
            epoch=self._epoch,
            worker=self._worker,
            lease_seconds=self._seconds,
            orders=self._commands,
            gpu=self._gpu,
            hosts=self._hosts,
            held_seconds=time.monotonic() - self._began,
        )

    def _run(self) -> None:
        heard = time.monotonic()
        while not self._stop.wait(min(POLL_SECONDS, self._seconds / 6)):
            asked = time.monotonic()
            due = asked - self._beaten >= self._seconds / 6
            try:
                change = self._job_store.beat(
                    self._job_id,
                    epoch=self._epoch,
                    lease_seconds=self._seconds if due else None,
                    held_seconds=asked - self._began,
                )
                if change.refusal == "epoch" and change.epoch < self._epoch and self.reclaim():
                    continue
            except Unavailable as error:
                log.warning("beat_failed", job_id=self._job_id, epoch=self._epoch, reason=str(error))
            except Exception:  # the thread's outermost loop: no error may end it
                log.exception("beat_broken", job_id=self._job_id)
            else:
                if self._stop.is_set():
                    return  # this run has ended the job
                if change.refusal in ("epoch", "status"):
                    log.warning("fenced", job_id=self._job_id, epoch=self._epoch, status=change.status)
                    self._lost.set()
                    return
                if change.done and change.status:  # without a record, Valkey has lost its data: keep the lease
                    self._status = change.status
                    if due:  # a replica answers a read too, and a server whose disk is full
                        heard, self._beaten = time.monotonic(), asked
            if time.monotonic() - heard > HOLD_SECONDS:
                log.error("contact_lost", job_id=self._job_id, epoch=self._epoch)
                self._lost.set()
                return
