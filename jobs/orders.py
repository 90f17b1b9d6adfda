"""What a job's owner orders: cancel, pause, resume. Written to the bucket first, then carried out on the record.

Owns where an order leads from each state and which states refuse it. An order that is in the bucket is carried out,
also where the process that put it died before it could: by the next order, by a sweep, or by a rebuild. Invariant:
each order is carried out once and in the order of their numbers; the record holds the number of the last.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Literal

from jobs.archive import Archive, Order
from jobs.ending import close, settle
from jobs.errors import Conflict
from jobs.journal import now_iso
from jobs.ledger import Ledger
from jobs.outbox import Outbox
from jobs.record import TERMINAL, JobRecord, JobStatus

_STAY: Mapping[JobStatus, JobStatus] = {status: status for status in JobStatus}

MOVES: dict[Order, Mapping[JobStatus, JobStatus]] = {
    "pause": {**_STAY, JobStatus.QUEUED: JobStatus.PAUSED, JobStatus.RUNNING: JobStatus.PAUSING},
    "resume": {**_STAY, JobStatus.PAUSED: JobStatus.QUEUED},
    # Without queued and paused: no worker has such a job, so the order itself ends it, and an outcome comes first.
    "cancel": {
        **{status: status for status in (*TERMINAL, JobStatus.CANCELLING)},
        JobStatus.RUNNING: JobStatus.CANCELLING,
        JobStatus.PAUSING: JobStatus.CANCELLING,
    },
}
"""Where each order leads. One that comes too late leads nowhere: what happened first stands."""

_OBEYED: dict[Order, frozenset[JobStatus]] = {
    "pause": frozenset({JobStatus.PAUSING, JobStatus.PAUSED}),
    "resume": frozenset({JobStatus.QUEUED, JobStatus.RUNNING}),
    "cancel": frozenset({JobStatus.CANCELLING}),
}
"""States in which a job already is what the order wants."""

_REMEDIES: dict[JobStatus, str] = {
    JobStatus.PAUSING: "It is saving a checkpoint; wait until it is paused, then resume it.",
    JobStatus.CANCELLING: "It is about to end.",
}
_PARTICIPLES: dict[Order, Literal["cancelled", "paused", "resumed"]] = {
    "pause": "paused",
    "resume": "resumed",
    "cancel": "cancelled",
}


class Orders:
    """Gives the orders of owners, and carries out those that are written down."""

    def __init__(self, ledger: Ledger, archive: Archive, outbox: Outbox, *, by: str) -> None:
        self._ledger = ledger
        self._archive = archive
        self._outbox = outbox
        self._by = by

    def give(self, job_id: str, order: Order) -> JobRecord | None:
        """Order something of a job; returns it as it is then, None where it is unknown. Raises `Conflict`."""
        # First what another process wrote down and has not carried out: it was ordered before.
        record = self.carry_out(job_id)
        if record is None or _is_obeyed(record, order):
            return record
        note = f"{job_id} {secrets.token_hex(4)}"
        self._ledger.begin("ordering", note)
        self._archive.put_order(job_id, order, self._by, now_iso())
        record = self.carry_out(job_id)
        self._ledger.end("ordering", note)
        if record is not None and record.status in TERMINAL and _PARTICIPLES[order] != record.status.value:
            raise _conflict(record, order)  # it ended first
        return record

    def carry_out(self, job_id: str) -> JobRecord | None:
        """Carry out every order in the bucket that was not yet; returns the job, None where it is unknown."""
        record = self._ledger.get(job_id)
        if record is None:
            return None
        late = self._archive.orders(job_id, after=record.orders)
        for number, order in late:
            self._obey(record, number, order)
        return self._ledger.get(job_id) if late else record

    def _obey(self, record: JobRecord, number: int, order: Order) -> None:
        change = self._ledger.obey(record.id, number, MOVES[order])
        if change.refusal == "status":
            # A worker that claims it meanwhile is fenced: the outcome stands.
            outcome = close(self._archive, record.id, "cancelled", by=self._by, ledger=self._ledger)
            settle(self._ledger, record.id, outcome)
            change = self._ledger.obey(record.id, number, MOVES[order])
        if change.done and order == "resume" and change.status is JobStatus.QUEUED:
            self._outbox.add(record.id, record.queue)


def _is_obeyed(record: JobRecord, order: Order) -> bool:
    """Whether there is nothing left to order; raises `Conflict` where the job's state does not allow it."""
    if record.status in _OBEYED[order]:
        return True
    if order == "cancel" and record.status not in TERMINAL:
        return False
    if record.status in TERMINAL or record.status in _REMEDIES:
        raise _conflict(record, order)
    return False


def _conflict(record: JobRecord, order: Order) -> Conflict:
    remedy = _REMEDIES.get(record.status, "It has ended and stays as it is; submit a new job.")
    return Conflict(record.id, record.status.value, _PARTICIPLES[order], remedy)
