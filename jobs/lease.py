"""A worker's hold on one job: a thread that beats, and hears what the job's owner wants.

Runs apart from training, uploads and everything else that can hang. Invariant: once `lost` is set it stays set,
and a run that sees it writes nothing more. Time is this host's monotonic clock; the server decides who holds what.
"""

from __future__ import annotations

import threading
import time

import structlog

from jobs.errors import Unavailable
from jobs.ledger import Ledger
from jobs.record import JobStatus

log = structlog.get_logger()

POLL_SECONDS = 1.0
"""How often the job's status is looked at: a cancel is obeyed about so late."""
HOLD_SECONDS = 900.0
"""How long a run goes on without hearing from Valkey before it gives the job up."""


class Lease:
    """The lease of one epoch of one job. Start it after a claim, stop it after the outcome."""

    def __init__(self, ledger: Ledger, job_id: str, epoch: int, seconds: float) -> None:
        self._ledger = ledger
        self._job_id = job_id
        self._epoch = epoch
        self._seconds = seconds
        self._status = JobStatus.RUNNING
        self._beaten = time.monotonic()
        self._stop = threading.Event()
        self._lost = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"lease-{job_id}", daemon=True)

    def start(self) -> None:
        """Begin to beat."""
        self._thread.start()

    def stop(self) -> None:
        """Stop beating; the lease runs out by itself unless the job has ended."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=1)

    @property
    def lost(self) -> bool:
        """Whether another epoch has the job, or nobody could be reached for too long."""
        return self._lost.is_set()

    @property
    def fresh(self) -> bool:
        """Whether the lease cannot have run out, by the last beat that was answered."""
        return not self.lost and time.monotonic() - self._beaten < self._seconds

    @property
    def pausing(self) -> bool:
        """Whether the owner wants the job set aside."""
        return self._status is JobStatus.PAUSING

    @property
    def cancelled(self) -> bool:
        """Whether the owner wants the job ended."""
        return self._status is JobStatus.CANCELLING

    def lose(self) -> None:
        """Note that a write was refused: the epoch is over."""
        self._lost.set()

    def _run(self) -> None:
        heard = time.monotonic()
        while not self._stop.wait(min(POLL_SECONDS, self._seconds / 6)):
            asked = time.monotonic()
            due = asked - self._beaten >= self._seconds / 6
            try:
                change = self._ledger.beat(
                    self._job_id, epoch=self._epoch, lease_seconds=self._seconds if due else None
                )
            except Unavailable as error:
                log.warning("beat_failed", job_id=self._job_id, epoch=self._epoch, reason=str(error))
            except Exception:  # an edge of the process: a beat that breaks must not end the beating
                log.exception("beat_broken", job_id=self._job_id)
            else:
                if self._stop.is_set():
                    return  # the job has ended, by this very run
                if change.refusal in ("epoch", "status"):
                    log.warning("fenced", job_id=self._job_id, epoch=self._epoch, status=change.status)
                    self._lost.set()
                    return
                if change.done and change.status:  # a missing record is a server that lost its data: hold on
                    heard, self._status = time.monotonic(), change.status
                    self._beaten = asked if due else self._beaten
            if time.monotonic() - heard > HOLD_SECONDS:
                log.error("contact_lost", job_id=self._job_id, epoch=self._epoch)
                self._lost.set()
                return
