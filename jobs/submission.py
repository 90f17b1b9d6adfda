"""How a job is accepted: admitted, written down in the bucket, entered in the ledger, announced to workers.

Owns the order of those writes. Invariant: once `job.json` is in the bucket the job is run, whatever its client was
told; so a refusal frees its key, and an outage leaves it for the next attempt with it (`jobs.admission`).
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from grpo_core.spec import JobSpec
from jobs.admission import REMEMBER_SECONDS, Admission, RequestKey, Ticket
from jobs.archive import Archive
from jobs.erasure import Erasure
from jobs.errors import NotFound, Rejected, Unavailable
from jobs.ledger import Ledger
from jobs.outbox import Outbox
from jobs.queue import queue_for
from jobs.record import JobRecord, new_job_id, record_of
from jobs.references import References


class Submission:
    """The way in for jobs."""

    def __init__(
        self,
        ledger: Ledger,
        archive: Archive,
        admission: Admission,
        references: References,
        erasure: Erasure,
        outbox: Outbox,
        *,
        prefix: str,
    ) -> None:
        self._ledger = ledger
        self._archive = archive
        self._admission = admission
        self._references = references
        self._erasure = erasure
        self._outbox = outbox
        self._prefix = prefix

    def submit(self, spec: JobSpec, owner: str, request: RequestKey | None = None) -> tuple[JobRecord, bool]:
        """Accept a job, or return the one that this very request made before; with whether it did.

        Raises `Rejected`, `TooManyJobs`, `KeyReused`, `InProgress`, `Unavailable`; `NotFound` where the
        job that the request made was deleted.
        """
        ticket = self._admission.admit_job(owner, new_job_id(), request)
        if ticket.state == "done":
            return self._as_accepted(ticket), True
        if ticket.state == "resumed" and self._erasure.is_erased(ticket.id):
            raise NotFound("job", ticket.id)  # it was accepted all the same, has ended, and was deleted
        try:
            record = self._write_down(ticket, spec)
            key = request.digest if request else None
            self._ledger.create(record, key=key, remember_seconds=REMEMBER_SECONDS)
        except Rejected:
            self._admission.withdraw(ticket, forget=True)
            raise
        except Unavailable:
            # `job.json` may be there, and then it is run: see jobs.unfinished.
            self._admission.withdraw(ticket, forget=False)
            raise
        self._outbox.add(record.id, record.queue)
        return record, False

    def _write_down(self, ticket: Ticket, spec: JobSpec) -> JobRecord:
        """Put `job.json`, unless an earlier attempt has: then that is what was asked for."""
        asked = self._archive.job(ticket.id) if ticket.state == "resumed" else None
        if asked is None:
            self._references.check(spec, ticket.owner)
            asked = self._as_asked(ticket, spec)
            if not self._archive.put_job(ticket.id, asked):
                asked = self._archive.job(ticket.id) or asked
        return record_of(asked)

    def _as_asked(self, ticket: Ticket, spec: JobSpec) -> dict[str, Any]:
        """`job.json`: enough to make the record again."""
        # To the millisecond, as Valkey keeps it: a repeated answer is the same to the letter.
        now = datetime.now(UTC)
        return {
            "id": ticket.id,
            "owner": ticket.owner,
            "created_at": now.replace(microsecond=now.microsecond // 1000 * 1000).isoformat(),
            "queue": queue_for(spec, self._prefix),
            "spec": spec.as_dict(),
            "spec_sha256": spec.digest(),
        }

    def _as_accepted(self, ticket: Ticket) -> JobRecord:
        """A job as it was when it was accepted: what the first answer said."""
        record = self._ledger.get(ticket.id)
        if record is None:
            raise NotFound("job", ticket.id)
        return record_of({**record.__dict__, "created_at": record.created_at.isoformat()})
