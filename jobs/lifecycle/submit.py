"""Submission of a job: it is admitted, written to the bucket, added to the job store, and a wake-up is published.

Owns the order of these writes. Invariant: once `job.json` is in the bucket the job is run, no matter what answer its
client got. So a refusal frees the Idempotency-Key, and after an outage the key stays reserved for the next attempt
(`jobs.lifecycle.admission`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from grpo_core.schedule import with_evaluation
from grpo_core.spec import JobSpec, Problem
from jobs.errors import NotFound, Rejected, Unavailable
from jobs.lifecycle.admission import REMEMBER_SECONDS, Admission, RequestKey, Ticket
from jobs.lifecycle.deletion import Deletion, used_by
from jobs.lifecycle.reference_checks import ReferenceChecks
from jobs.lifecycle.source_jobs import SourceJobs
from jobs.lifecycle.wakeups import WakeupPublisher
from jobs.store.job import JobRecord, Priority, member_ids, new_group_id, new_job_id, record_of
from jobs.store.job_store import JobStore
from jobs.store.queues import queue_for
from jobs.store.retired import Retired
from jobs.store.write_once import WriteOnceStore
from jobs.usage.quotas import GpuQuotaUsedUp, Quotas, StorageQuotaUsedUp


class Submission:
    """Submits jobs."""

    def __init__(
        self,
        job_store: JobStore,
        write_once: WriteOnceStore,
        admission: Admission,
        reference_checks: ReferenceChecks,
        source_jobs: SourceJobs,
        deletion: Deletion,
        wakeups: WakeupPublisher,
        retired: Retired,
        quotas: Quotas,
        *,
        prefix: str,
    ) -> None:
        self._job_store = job_store
        self._write_once = write_once
        self._admission = admission
        self._reference_checks = reference_checks
        self._source_jobs = source_jobs
        self._deletion = deletion
        self._wakeups = wakeups
        self._retired = retired
        self._quotas = quotas
        self._prefix = prefix

    def submit(
        self,
        spec: JobSpec,
        owner: str,
        request: RequestKey | None = None,
        priority: Priority = Priority.NORMAL,
    ) -> tuple[JobRecord, bool]:
        """Accept a job, or return the job that an earlier attempt of this request created, and whether it did.

        Raises `Rejected`, `TooManyJobs`, `GpuQuotaUsedUp`, `StorageQuotaUsedUp`, `KeyReused`, `InProgress`,
        `Unavailable`, and `NotFound` if the request's job was deleted, or the one that it serves or exports is none of
        the owner's.
        """
        ticket = self._admission.admit_job(owner, new_job_id(), request)
        if ticket.state == "done":
            return self._as_accepted(ticket), True
        if ticket.state == "resumed" and self._deletion.is_erased(ticket.id):
            raise NotFound("job", ticket.id)  # it was accepted, has ended, and was deleted
        try:
            record = self._write_down(ticket, spec, request, priority=priority)
            key = request.digest if request else None
            self._job_store.create(record, key=key, remember_seconds=REMEMBER_SECONDS)
        except (NotFound, Rejected, GpuQuotaUsedUp, StorageQuotaUsedUp):
            self._admission.withdraw(ticket, forget=True)
            raise
        except Unavailable:
            # `job.json` may exist, and then the job is run: see jobs.lifecycle.recovery.
            self._admission.withdraw(ticket, forget=False)
            raise
        self._wakeups.add(record.id, record.queue)
        return record, False

    def submit_group(
        self,
        specs: Sequence[JobSpec],
        owner: str,
        request: RequestKey | None = None,
        priority: Priority = Priority.NORMAL,
    ) -> tuple[str, list[JobRecord], bool]:
        """Accept jobs together, all or none: returns the id of their group, them in order, and whether it was known.

        Each `job.json` names the group, and their ids follow from it, so that a repeated submission finds the same
        jobs and adds those that are missing. Raises what `submit` raises.
        """
        ticket = self._admission.admit_group(owner, new_group_id(), len(specs), request)
        tickets = [replace(ticket, id=job_id, key=None) for job_id in member_ids(ticket.id, len(specs))]
        if ticket.state == "done":
            return ticket.id, [self._as_accepted(one) for one in tickets if not self._deletion.is_erased(one.id)], True
        written: list[JobRecord] = []
        try:
            left = [one for one in zip(tickets, specs, strict=True) if not self._deletion.is_erased(one[0].id)]
            self._check_group(ticket, left)
            for one, spec in left:
                record = self._write_down(one, spec, request, group=ticket.id, priority=priority)
                written.append(record)
                self._job_store.create(record)
                self._wakeups.add(record.id, record.queue)
            self._admission.finish_group(ticket)
        except (Rejected, GpuQuotaUsedUp, StorageQuotaUsedUp):
            self._admission.withdraw(ticket, forget=ticket.state == "new")
            raise
        except Unavailable:
            self._admission.withdraw(ticket, forget=False)
            raise
        return ticket.id, written, False

    def _check_group(self, ticket: Ticket, jobs: Sequence[tuple[Ticket, JobSpec]]) -> None:
        """Refuse all of them before any is written."""
        missing = [(one, spec) for one, spec in jobs if ticket.state == "new" or self._write_once.job(one.id) is None]
        try:
            if missing:
                self._quotas.check_job(ticket.owner)
            for one, spec in missing:
                self._job_store.begin("submitting", one.id)
                self._check_references(one, spec)
        except (Rejected, GpuQuotaUsedUp, StorageQuotaUsedUp):
            for one, _ in missing:
                self._job_store.end("submitting", one.id)
            raise

    def _write_down(
        self,
        ticket: Ticket,
        spec: JobSpec,
        request: RequestKey | None,
        *,
        group: str | None = None,
        priority: Priority,
    ) -> JobRecord:
        """Write `job.json`, unless an earlier attempt has: then that one is valid. A group was checked as a whole."""
        asked = self._write_once.job(ticket.id) if ticket.state == "resumed" else None
        if asked is None:
            if group is None:
                self._quotas.check_job(ticket.owner)
                spec = self._source_jobs.resolve(spec, ticket.owner)
                self._check_references(ticket, spec)
            asked = self._as_asked(ticket, with_evaluation(spec, self._reference_checks.rows_of(spec, ticket.owner)))
            if group is not None:
                asked["group"] = group
            if priority is not Priority.NORMAL:
                asked["priority"] = priority.value
            if request is not None:
                asked["request"] = {"key": request.digest, "print": request.fingerprint}
            if not self._write_once.put_job(ticket.id, asked):
                asked = self._write_once.job(ticket.id) or asked
        return record_of(asked)

    def _check_references(self, ticket: Ticket, spec: JobSpec) -> None:
        """Refuse a spec that names something missing or being deleted, and prevent deletion until its record exists."""
        used = used_by(spec.as_dict())
        if used:
            self._job_store.note_references(ticket.id, ticket.owner, used.values())
        self._reference_checks.check(spec, ticket.owner)
        problems = [
            Problem(pointer=pointer, code="being_deleted", detail=f"{name} is being deleted", remedy="Use another one.")
            for pointer, name in used.items()
            if self._job_store.is_being_deleted(name)
        ]
        if problems:
            raise Rejected(*problems)

    def _as_asked(self, ticket: Ticket, spec: JobSpec) -> dict[str, Any]:
        """Return `job.json`, from which the record can be restored."""
        # In milliseconds, as Valkey stores it, so that a repeated answer is exactly the same.
        now = datetime.now(UTC)
        return {
            "id": ticket.id,
            "owner": ticket.owner,
            "created_at": now.replace(microsecond=now.microsecond // 1000 * 1000).isoformat(),
            "queue": queue_for(spec, self._prefix),
            "spec": spec.as_dict(),
            "spec_sha256": spec.digest(),
            "spec_format": spec.needed_format(),
            "requested_spec": spec.requested,
        }

    def _as_accepted(self, ticket: Ticket) -> JobRecord:
        """Return a job as the first answer showed it."""
        record = self._job_store.get(ticket.id) or self._retired.find(ticket.id, ticket.owner)
        if record is None:
            raise NotFound("job", ticket.id)
        return record_of({**record.__dict__, "created_at": record.created_at.isoformat()})
