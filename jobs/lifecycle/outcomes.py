"""The end of a run: its job ends too, or goes back to the queue for another worker.

Owns the rule of attempts and the order of writes (outcome first, then record). Workers and the sweeper use it.

The rule: `attempts` counts runs in a row that were lost, hung or ran out of memory without committing a step that no
earlier run had reached. Committing such a step sets it to 0, no matter how the run ended. A pause, a stopped worker, a
lowered micro-batch and an unreadable checkpoint leave it unchanged. At `MAX_ATTEMPTS` the job fails with the class of
the last loss. Invariant: a record follows the outcome in the bucket, no matter which process wrote it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import structlog

from grpo_core.errors import FailureReport
from grpo_core.reasons import EventType, FailureCode, FetchFailure, WarningCode
from jobs.lifecycle.wakeups import WakeupPublisher
from jobs.store import commits, event_log, object_keys
from jobs.store.event_log import now_iso
from jobs.store.job import JobRecord, JobStatus
from jobs.store.job_store import Change, JobEvent, JobStore
from jobs.store.write_once import FinalStatus, Manifest, Outcome, WriteOnceStore

log = structlog.get_logger()

MAX_ATTEMPTS = 3
"""Number of runs in a row, lost without a new checkpoint, after which the job fails."""
KEEP_EVENTS_SECONDS = 7 * 24 * 3600.0
"""How long the events of an ended job stay in Valkey if its manifest lists them too; the bucket keeps them."""

SILENCE = FailureReport.of(
    FailureCode.WORKER_LOST,
    "The worker fell silent.",
    hint="Look at the worker's log and memory; submit the job again once the cause is repaired.",
)
"""The failure of a run whose lease expired: a sweeper knows no more about it."""


@dataclass(frozen=True, kw_only=True)
class HandBack:
    """Why a run ends before its job."""

    report: FailureReport | None = None
    """The failure; None if the run was asked to stop."""
    counts: bool = True
    """Whether the run counts as an attempt if it made no new checkpoint."""
    fields: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Fields of the record to set for the next run."""
    events: tuple[JobEvent, ...] = ()
    """Further events for the owner."""


LOST = HandBack(report=SILENCE)
STOPPED = HandBack(
    counts=False,
    events=(
        JobEvent(
            type=EventType.LOG,
            data={"code": "worker_stopped", "message": "The worker was asked to stop or is drained."},
        ),
    ),
)


def attempts_after(record: JobRecord, handback: HandBack, *, progressed: bool) -> int:
    """Apply the rule of attempts (see the module)."""
    if progressed:
        return 0
    asked = record.status is JobStatus.PAUSING or record.stopped_epoch == record.epoch
    return record.attempts + (1 if handback.counts and not asked else 0)


def last_failure(write_once: WriteOnceStore, record: JobRecord, handback: HandBack) -> FailureReport | None:
    """Return the job's failure if this run was its last attempt. All commits of the run must be in the bucket."""
    progressed = commits.made_progress(write_once.store, record.id, record.epoch)
    return _used_up(attempts_after(record, handback, progressed=progressed), handback)


def hand_back(
    job_store: JobStore,
    write_once: WriteOnceStore,
    wakeups: WakeupPublisher,
    record: JobRecord,
    handback: HandBack,
    *,
    by: str = "sweeper",
    expired: bool = False,
) -> bool:
    """Take a job from its run: back to the queue, to its pause, or to its end if it was cancelled or lost too often.

    With `expired`, only if the lease has expired. Returns False if the record changed meanwhile; then read it again.
    """
    if (
        expired
        and not job_store.change(record.id, from_statuses={record.status}, epoch=record.epoch, expired=True).done
    ):
        return False  # its worker sent a heartbeat after it was listed
    progressed = commits.made_progress(write_once.store, record.id, record.epoch)
    attempts = attempts_after(record, handback, progressed=progressed)
    standing = write_once.outcome(record.id)
    if standing is None and record.status is JobStatus.CANCELLING:
        standing = write_outcome(write_once, record.id, "cancelled", by=by, job_store=job_store)
    error = _used_up(attempts, handback)
    if standing is None and error is not None:
        standing = write_outcome(write_once, record.id, "failed", by=by, error=error.as_dict(), job_store=job_store)
    if standing is not None:
        apply_outcome(job_store, record.id, standing, add_error=True)
        return True
    to = JobStatus.PAUSED if record.status is JobStatus.PAUSING else JobStatus.QUEUED
    change = job_store.change(
        record.id,
        from_statuses={record.status},
        epoch=record.epoch,
        expired=expired,
        to=to,
        fields={**handback.fields, "attempts": attempts, "worker": None, "phase": None},
        events=[
            *_loss_warning(handback, attempts, to, has_steps=record.total_steps > 0),
            *handback.events,
            JobEvent(type=EventType.STATUS, data={"status": to.value}),
        ],
    )
    if change.done and change.status is JobStatus.QUEUED:
        log.info("job_requeued", job_id=record.id, epoch=record.epoch, attempts=attempts)
        wakeups.add(record.id, record.queue)
    return change.done


def _loss_warning(handback: HandBack, attempts: int, to: JobStatus, *, has_steps: bool) -> list[JobEvent]:
    """Return a warning with the failure, after which a later run may succeed."""
    if handback.report is None:
        return []
    report = handback.report
    # What serves or exports has no checkpoints.
    again = "resumes from its last checkpoint" if has_steps else "starts over"
    what = "is paused" if to is JobStatus.PAUSED else again
    if to is not JobStatus.PAUSED and FetchFailure.sentence_of(report.code):
        what = f"tries again; this was attempt {attempts} of {MAX_ATTEMPTS}"
    loss = {"code": WarningCode.RUN_LOST, "class": report.failure_class, "cause": report.code, "attempts": attempts}
    return [JobEvent(type=EventType.WARNING, data={**loss, "message": f"{report.message} The job {what}."})]


def apply_outcome(
    job_store: JobStore,
    job_id: str,
    outcome: Outcome,
    *,
    add_error: bool = False,
    first_ordinal: int | None = None,
    epoch: int | None = None,
) -> Change:
    """Set a record to the state in its outcome.

    The outcome must be the one in the bucket: it is authoritative, so this corrects even a record with another end.
    `add_error` adds the error as an event, for failures that the run could not report. With a manifest, readers find
    the events in the bucket, and those in Valkey expire. `first_ordinal` is the position after all events of the run
    with the number `epoch`; without them in Valkey its record does not end.
    """
    final = JobStatus(outcome.status)
    events = [JobEvent(type=EventType.ERROR, data=outcome.error)] if outcome.error and add_error else []
    return job_store.change(
        job_id,
        from_statuses=set(JobStatus) - {final},
        epoch=epoch,
        to=final,
        fields={"error": outcome.error, "manifest": outcome.manifest, "phase": None, "worker": None},
        events=[*events, JobEvent(type=EventType.STATUS, data={"status": final.value})],
        first_ordinal=first_ordinal,
        expire_events_seconds=KEEP_EVENTS_SECONDS if outcome.manifest else None,
        settles=True,
    )


def write_outcome(
    write_once: WriteOnceStore,
    job_id: str,
    status: FinalStatus,
    *,
    by: str,
    error: dict[str, object] | None = None,
    job_store: JobStore | None = None,
) -> Outcome:
    """Write the outcome of a job that no worker holds. Returns the outcome in the bucket, which may be another one.

    Takes a new epoch, so that a run that wakes up later is fenced. The job's artifacts are the objects of the newest
    commit, the output of its runs and, with `job_store`, its events.
    """
    epoch = 0
    while not epoch and write_once.latest_epoch(job_id):
        epoch = write_once.allocate_epoch(job_id, by, now_iso()) or 0  # repeated until no worker takes the same number
    manifest = _put_committed(write_once, job_store, job_id, epoch) if epoch else None
    return write_once.put_outcome(
        Outcome(job=job_id, status=status, epoch=epoch, time=now_iso(), by=by, error=error, manifest=manifest)
    )


def _put_committed(write_once: WriteOnceStore, job_store: JobStore | None, job_id: str, epoch: int) -> str:
    """Write a manifest of the objects that the runs before `epoch` have committed. Returns its key."""
    store = write_once.store
    left = commits.inherited(store, job_id, epoch, commits.newest_commit(store, job_id, epoch))
    objects = {entry.path: entry for entry in commits.without_pruned(store, left)}
    if job_store is not None:
        last = max((file.last for file in event_log.event_files(entry.key for entry in objects.values())), default=0)
        for entry in event_log.store_events(store, job_store, job_id, object_keys.run(job_id, epoch), after=last):
            objects[entry.path] = entry
    return write_once.put_manifest(
        Manifest(job=job_id, epoch=epoch, objects=[objects[path] for path in sorted(objects)])
    )


def _used_up(attempts: int, handback: HandBack) -> FailureReport | None:
    """Return the failure of a job that was lost too often, with the class of the last loss."""
    if attempts < MAX_ATTEMPTS:
        return None
    last = handback.report or SILENCE
    if FetchFailure.sentence_of(last.code):
        # No run was lost: each one waited for what it could not fetch, and said so.
        return replace(last, message=f"{last.message} {attempts} runs waited for it in vain.")
    return FailureReport.of(
        FailureCode.ATTEMPTS_USED_UP,
        f"The job was lost {attempts} times in a row without a new checkpoint; the last time: {last.message}",
        hint=last.hint or SILENCE.hint,
        failure_class=last.failure_class,
        retryable=True,
    )
