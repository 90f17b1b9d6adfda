"""How a run leaves a job: at its end, or back in the queue for another worker.

Owns the rule of attempts and the order of writes (outcome first, then record). Used by workers and the sweeper alike.

The rule: `attempts` counts the runs in a row that were lost, hung or out of memory and committed no step that no run
before them had reached. Such a step sets it to 0, whatever ended the run; a pause, a stopped worker, a lowered
micro-batch and a checkpoint that cannot be read leave it as it is. At `MAX_ATTEMPTS` the job fails with the class of
the last loss. Invariant: a record follows the outcome that stands, whoever wrote it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import structlog

from grpo_core.errors import FailureReport
from jobs import journal, layout, lineage
from jobs.archive import Archive, Ending, Manifest, Outcome
from jobs.journal import now_iso
from jobs.ledger import JobEvent, Ledger
from jobs.outbox import Outbox
from jobs.record import TERMINAL, JobRecord, JobStatus

log = structlog.get_logger()

MAX_ATTEMPTS = 3
"""Runs in a row that may be lost without a new checkpoint before the job fails."""
KEEP_EVENTS_SECONDS = 7 * 24 * 3600.0
"""How long the events of an ended job stay in Valkey, where its manifest lists them too: the bucket keeps them."""

SILENCE = FailureReport(
    failure_class="infra",
    code="worker_lost",
    message="The worker fell silent.",
    hint="Look at the worker's log and memory; submit the job again once the cause is mended.",
    retryable=True,
)
"""All that a sweeper knows of a run whose lease ran out."""


@dataclass(frozen=True, kw_only=True)
class Lapse:
    """Why a run leaves a job that has not ended."""

    report: FailureReport | None = None
    """What went wrong; None where the run was asked to stop."""
    counts: bool = True
    """Whether this is an attempt, should the run have made no new checkpoint."""
    fields: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """What the record must remember for the next run."""
    events: tuple[JobEvent, ...] = ()
    """What the owner is told besides."""


LOST = Lapse(report=SILENCE)
STOPPED = Lapse(
    counts=False,
    events=(JobEvent(type="log", data={"code": "worker_stopped", "message": "The worker was asked to stop."}),),
)


def attempts_after(record: JobRecord, lapse: Lapse, *, progressed: bool) -> int:
    """The rule of attempts, see above."""
    if progressed:
        return 0
    asked = record.status is JobStatus.PAUSING or record.stopped_epoch == record.epoch
    return record.attempts + (1 if lapse.counts and not asked else 0)


def last_failure(archive: Archive, record: JobRecord, lapse: Lapse) -> FailureReport | None:
    """How the job fails, if this run was its last attempt; all that the run commits must be in the bucket."""
    progressed = lineage.made_progress(archive.store, record.id, record.epoch)
    return _used_up(attempts_after(record, lapse, progressed=progressed), lapse)


def hand_back(
    ledger: Ledger,
    archive: Archive,
    outbox: Outbox,
    record: JobRecord,
    lapse: Lapse,
    *,
    by: str = "sweeper",
    expired: bool = False,
) -> bool:
    """Take a job from its run: to the queue, to its pause, or to its end when it was cancelled or lost too often.

    `expired` demands that the lease has run out. False where the record had changed meanwhile: look again.
    """
    if expired and not ledger.change(record.id, from_statuses={record.status}, epoch=record.epoch, expired=True).done:
        return False  # it beat since it was listed
    progressed = lineage.made_progress(archive.store, record.id, record.epoch)
    attempts = attempts_after(record, lapse, progressed=progressed)
    standing = archive.outcome(record.id)
    if standing is None and record.status is JobStatus.CANCELLING:
        standing = close(archive, record.id, "cancelled", by=by, ledger=ledger)
    error = _used_up(attempts, lapse)
    if standing is None and error is not None:
        standing = close(archive, record.id, "failed", by=by, error=error.as_dict(), ledger=ledger)
    if standing is not None:
        settle(ledger, record.id, standing, tell_error=True)
        return True
    to = JobStatus.PAUSED if record.status is JobStatus.PAUSING else JobStatus.QUEUED
    change = ledger.change(
        record.id,
        from_statuses={record.status},
        epoch=record.epoch,
        expired=expired,
        to=to,
        fields={**lapse.fields, "attempts": attempts, "worker": None, "phase": None},
        events=[*_told(lapse, attempts, to), *lapse.events, JobEvent(type="status", data={"status": to.value})],
    )
    if change.done and change.status is JobStatus.QUEUED:
        log.info("job_requeued", job_id=record.id, epoch=record.epoch, attempts=attempts)
        outbox.add(record.id, record.queue)
    return change.done


def _told(lapse: Lapse, attempts: int, to: JobStatus) -> list[JobEvent]:
    """A warning of what went wrong, which a later run may cure."""
    if lapse.report is None:
        return []
    report = lapse.report
    what = "is paused" if to is JobStatus.PAUSED else "goes on from its last checkpoint"
    told = {"code": "run_lost", "class": report.failure_class, "cause": report.code, "attempts": attempts}
    return [JobEvent(type="warning", data={**told, "message": f"{report.message} The job {what}."})]


def settle(
    ledger: Ledger,
    job_id: str,
    outcome: Outcome,
    *,
    tell_error: bool = False,
) -> None:
    """Bring a record to the state its outcome names; the outcome is the stronger truth.

    `tell_error` adds the error as an event, for failures the run itself could not tell of. Where there is a manifest
    readers find the events in the bucket, and those in Valkey go after a while.
    """
    final = JobStatus(outcome.status)
    events = [JobEvent(type="error", data=outcome.error)] if outcome.error and tell_error else []
    ledger.change(
        job_id,
        from_statuses=set(JobStatus) - TERMINAL,
        to=final,
        fields={"error": outcome.error, "manifest": outcome.manifest, "phase": None, "worker": None},
        events=[*events, JobEvent(type="status", data={"status": final.value})],
        expire_events_seconds=KEEP_EVENTS_SECONDS if outcome.manifest else None,
        settles=True,
    )


def close(
    archive: Archive,
    job_id: str,
    status: Ending,
    *,
    by: str,
    error: dict[str, object] | None = None,
    ledger: Ledger | None = None,
) -> Outcome:
    """Write the outcome of a job that no worker has; returns the one that stands.

    Takes an epoch for it, so that a run of the job that wakes up finds itself fenced, and keeps as the job's artifacts
    what the newest commit names, the output of its runs, and its events where there is a ledger to read them from.
    """
    epoch = 0
    while not epoch and archive.latest_epoch(job_id):
        epoch = archive.allocate_epoch(job_id, by, now_iso()) or 0  # until no worker takes the number meanwhile
    manifest = _put_committed(archive, ledger, job_id, epoch) if epoch else None
    return archive.put_outcome(
        Outcome(job=job_id, status=status, epoch=epoch, time=now_iso(), by=by, error=error, manifest=manifest)
    )


def _put_committed(archive: Archive, ledger: Ledger | None, job_id: str, epoch: int) -> str:
    """A manifest of what the runs before `epoch` have left for good."""
    store = archive.store
    left = lineage.inherited(store, job_id, epoch, lineage.newest_commit(store, job_id, epoch))
    objects = {entry.path: entry for entry in lineage.without_pruned(store, left)}
    if ledger is not None:
        last = max((file.last for file in journal.event_files(entry.key for entry in objects.values())), default=0)
        for entry in journal.store_events(store, ledger, job_id, layout.run(job_id, epoch), after=last):
            objects[entry.path] = entry
    return archive.put_manifest(Manifest(job=job_id, epoch=epoch, objects=[objects[path] for path in sorted(objects)]))


def _used_up(attempts: int, lapse: Lapse) -> FailureReport | None:
    """The end of a job that was lost too often, in the class of the last loss."""
    if attempts < MAX_ATTEMPTS:
        return None
    last = lapse.report or SILENCE
    return FailureReport(
        failure_class=last.failure_class,
        code="attempts_used_up",
        message=f"The job was lost {attempts} times in a row without a new checkpoint; the last time: {last.message}",
        hint=last.hint or SILENCE.hint,
        retryable=True,
    )
