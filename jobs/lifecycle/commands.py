"""Commands of a job's owner: cancel, pause, resume. They are written to the bucket first, then applied to the record.

Owns the state to which a command leads from each state, and which states refuse it. A command in the bucket is applied
even if the process that wrote it died: by the next command, by a sweep or by a rebuild. Invariant: each command is
applied once, in the order of their numbers; the record holds the number of the last one.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Literal

from jobs.errors import Conflict
from jobs.lifecycle.outcomes import apply_outcome, write_outcome
from jobs.lifecycle.wakeups import WakeupPublisher
from jobs.store.event_log import now_iso
from jobs.store.job import HELD, TERMINAL, JobRecord, JobStatus
from jobs.store.job_store import JobStore
from jobs.store.write_once import Command, WriteOnceStore

MAX_ORDERS = 1000
"""Largest number of commands of one job, because each is an object that stays in the bucket. Cancel is always
accepted."""

_STAY: Mapping[JobStatus, JobStatus] = {status: status for status in JobStatus}

MOVES: dict[Command, Mapping[JobStatus, JobStatus]] = {
    "pause": {**_STAY, JobStatus.QUEUED: JobStatus.PAUSED, JobStatus.RUNNING: JobStatus.PAUSING},
    "resume": {**_STAY, JobStatus.PAUSED: JobStatus.QUEUED},
    # Not from queued and paused: no worker holds such a job, so the command itself ends it, with an outcome first.
    "cancel": {
        **{status: status for status in (*TERMINAL, JobStatus.CANCELLING)},
        JobStatus.RUNNING: JobStatus.CANCELLING,
        JobStatus.PAUSING: JobStatus.CANCELLING,
    },
}
"""The new state after each command, by the old one. A command that comes too late changes nothing."""

_ALREADY_APPLIED: dict[Command, frozenset[JobStatus]] = {
    "pause": frozenset({JobStatus.PAUSING, JobStatus.PAUSED}),
    "resume": frozenset({JobStatus.QUEUED, JobStatus.RUNNING}),
    "cancel": frozenset({JobStatus.CANCELLING}),
}
"""States in which a command has nothing left to do."""

_REMEDIES: dict[JobStatus, str] = {
    JobStatus.PAUSING: "It is saving a checkpoint; wait until it is paused, then resume it.",
    JobStatus.CANCELLING: "It is about to end.",
}
_PARTICIPLES: dict[Command, Literal["cancelled", "paused", "resumed"]] = {
    "pause": "paused",
    "resume": "resumed",
    "cancel": "cancelled",
}


class Commands:
    """Writes the commands of owners, and applies those in the bucket."""

    def __init__(self, job_store: JobStore, write_once: WriteOnceStore, wakeups: WakeupPublisher, *, by: str) -> None:
        self._job_store = job_store
        self._write_once = write_once
        self._wakeups = wakeups
        self._by = by

    def give(self, job_id: str, command: Command) -> JobRecord | None:
        """Give a command to a job. Returns the job after it; None if the job is unknown. Raises `Conflict`."""
        # First apply commands that another process wrote and has not applied: they are older.
        record = self.apply_pending(job_id)
        if record is not None and record.status in HELD and (outcome := self._write_once.outcome(job_id)):
            # The job has ended, even if its worker does not know yet: no more commands are accepted.
            apply_outcome(self._job_store, job_id, outcome, add_error=True)
            record = self._job_store.get(job_id)
        if record is None or _is_applied(record, command):
            return record
        if command != "cancel" and record.orders >= MAX_ORDERS:
            remedy = f"It has had {MAX_ORDERS} commands, which is the limit; cancel it, or let it run."
            raise Conflict(record.id, record.status.value, _PARTICIPLES[command], remedy)
        note = f"{job_id} {secrets.token_hex(4)}"
        self._job_store.begin("ordering", note)
        self._write_once.put_command(job_id, command, self._by, now_iso(), after=record.orders)
        record = self.apply_pending(job_id)
        self._job_store.end("ordering", note)
        if record is not None and record.status in TERMINAL and _PARTICIPLES[command] != record.status.value:
            raise conflict(record, command)  # the job ended first
        return record

    def apply_pending(self, job_id: str) -> JobRecord | None:
        """Apply every command in the bucket that was not applied yet. Returns the job; None if it is unknown."""
        record = self._job_store.get(job_id)
        if record is None:
            return None
        late = self._write_once.commands(job_id, after=record.orders)
        if record.status in HELD:
            # After a loss of Valkey: a pause that was later revoked must not stop the run.
            steering = [number for number, command in late if command != "cancel"]
            late = [(number, command) for number, command in late if command == "cancel" or number == steering[-1]]
        for number, command in late:
            self._apply(record, number, command)
        return self._job_store.get(job_id) if late else record

    def _apply(self, record: JobRecord, number: int, command: Command) -> None:
        change = self._job_store.apply_command(record.id, number, MOVES[command])
        if change.refusal == "status":
            # A worker that claims the job meanwhile is fenced, because the outcome exists.
            outcome = write_outcome(self._write_once, record.id, "cancelled", by=self._by, job_store=self._job_store)
            apply_outcome(self._job_store, record.id, outcome)
            change = self._job_store.apply_command(record.id, number, MOVES[command])
        if change.done and command == "resume" and change.status is JobStatus.QUEUED:
            self._wakeups.add(record.id, record.queue)


def _is_applied(record: JobRecord, command: Command) -> bool:
    """Whether the command has nothing left to do. Raises `Conflict` if the job's state refuses it."""
    if record.status in _ALREADY_APPLIED[command]:
        return True
    if command == "cancel" and record.status not in TERMINAL:
        return False
    if record.status in TERMINAL or record.status in _REMEDIES:
        raise conflict(record, command)
    return False


def conflict(record: JobRecord, command: Command) -> Conflict:
    """Return the error for a command that the job's state refuses, with the remedy."""
    remedy = _REMEDIES.get(record.status, "It has ended and stays as it is; submit a new job.")
    return Conflict(record.id, record.status.value, _PARTICIPLES[command], remedy)
