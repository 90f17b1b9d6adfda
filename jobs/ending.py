"""How a run leaves a job: at its end, or back in the queue for another worker.

Owns the rules of attempts and the order of writes (outcome first, then record). Used by workers and the sweeper
alike. Invariant: a record follows the outcome that stands, whoever wrote it.
"""

from __future__ import annotations

import structlog

from grpo_core.errors import FailureReport
from jobs import lineage
from jobs.archive import Archive, Ending, Manifest, Outcome
from jobs.journal import now_iso
from jobs.ledger import JobEvent, Ledger
from jobs.outbox import Outbox
from jobs.record import TERMINAL, JobRecord, JobStatus

log = structlog.get_logger()

MAX_ATTEMPTS = 3
"""Runs that may be lost without a new checkpoint before the job fails."""


def hand_back(
    ledger: Ledger,
    archive: Archive,
    outbox: Outbox,
    record: JobRecord,
    *,
    expired: bool = False,
    reason: str = "The worker fell silent.",
    counts: bool = True,
) -> None:
    """Take a job from its run: back to the queue, or to its end when it was cancelled or lost too often.

    `expired` demands that the lease has run out; `counts` is False for a run that was asked to stop.
    """
    if expired and not ledger.change(record.id, from_statuses={record.status}, epoch=record.epoch, expired=True).done:
        return  # it beat since it was listed
    attempts = record.attempts + (1 if counts else 0)
    standing = archive.outcome(record.id)
    if standing is None and record.status is JobStatus.CANCELLING:
        standing = close(archive, record.id, "cancelled", by="sweeper")
    if standing is None and attempts >= MAX_ATTEMPTS:
        standing = close(archive, record.id, "failed", by="sweeper", error=_lost(attempts, reason).as_dict())
    if standing is not None:
        settle(ledger, record.id, standing, tell_error=True)
        return
    to = JobStatus.PAUSED if record.status is JobStatus.PAUSING else JobStatus.QUEUED
    told = JobEvent(type="warning", data={"code": "run_lost", "message": reason})
    change = ledger.change(
        record.id,
        from_statuses={record.status},
        epoch=record.epoch,
        expired=expired,
        to=to,
        fields={"attempts": attempts, "worker": None, "phase": None},
        events=[told, JobEvent(type="status", data={"status": to.value})],
    )
    if change.done and change.status is JobStatus.QUEUED:
        log.info("job_requeued", job_id=record.id, epoch=record.epoch, attempts=attempts, reason=reason)
        outbox.add(record.id, record.queue)


def settle(
    ledger: Ledger,
    job_id: str,
    outcome: Outcome,
    *,
    tell_error: bool = False,
    expire_events_seconds: float | None = None,
) -> None:
    """Bring a record to the state its outcome names; the outcome is the stronger truth.

    `tell_error` adds the error as an event, for failures the run itself could not tell of.
    """
    final = JobStatus(outcome.status)
    events = [JobEvent(type="error", data=outcome.error)] if outcome.error and tell_error else []
    ledger.change(
        job_id,
        from_statuses=set(JobStatus) - TERMINAL,
        to=final,
        fields={"error": outcome.error, "manifest": outcome.manifest, "phase": None, "worker": None},
        events=[*events, JobEvent(type="status", data={"status": final.value})],
        expire_events_seconds=expire_events_seconds,
        settles=True,
    )


def close(
    archive: Archive, job_id: str, status: Ending, *, by: str, error: dict[str, object] | None = None
) -> Outcome:
    """Write the outcome of a job that no worker has; returns the one that stands.

    Takes an epoch for it, so that a run of the job that wakes up finds itself fenced, and keeps what the newest
    commit names as the job's artifacts.
    """
    latest = archive.latest_epoch(job_id)
    epoch = (archive.allocate_epoch(job_id, by, now_iso()) or latest) if latest else 0
    commit = lineage.newest_commit(archive.store, job_id, latest) if epoch > latest else None
    manifest = archive.put_manifest(Manifest(job=job_id, epoch=epoch, objects=commit.objects)) if commit else None
    return archive.put_outcome(
        Outcome(job=job_id, status=status, epoch=epoch, time=now_iso(), by=by, error=error, manifest=manifest)
    )


def _lost(attempts: int, reason: str) -> FailureReport:
    return FailureReport(
        failure_class="infra",
        code="attempts_used_up",
        message=f"The job was lost {attempts} times without a new checkpoint; the last time: {reason}",
        hint="Look at the worker's log and memory; submit the job again once the cause is mended.",
        retryable=True,
    )
