"""What a queued job waits for: the jobs before it, and the workers that can run it.

For people only, never for decisions. The order is that in which jobs were queued; a worker that serves several
queues takes from each in turn, so it tells how long a job waits roughly, and nothing promises it.
"""

from __future__ import annotations

from dataclasses import dataclass

from jobs.ledger import Ledger
from jobs.record import JobRecord, JobStatus
from jobs.registry import WorkerRegistry


@dataclass(frozen=True, kw_only=True)
class Waiting:
    """A queued job's place."""

    queue: str
    ahead: int
    """Jobs that were queued before it in this queue, and wait too."""
    workers: int
    """Workers connected that serve the queue, busy or not; with 0 the job waits until one is started."""


def waiting_of(record: JobRecord, ledger: Ledger, workers: WorkerRegistry) -> Waiting | None:
    """What a job waits for; None where it is not queued. Raises `Unavailable`."""
    if record.status is not JobStatus.QUEUED:
        return None
    ahead = ledger.jobs_ahead(record.id, record.queue)
    if ahead is None:  # claimed just now
        return None
    return Waiting(queue=record.queue, ahead=ahead, workers=len(workers.serving(record.queue)))
