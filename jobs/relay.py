"""The way of a child's events from its file to the ledger.

Owns what has been sent and what is still to be. Invariant: each event is sent until the ledger has taken it, in order;
sending one again does no harm, since the ledger counts the child's own numbers.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from jobs.errors import Unavailable
from jobs.lease import Lease
from jobs.ledger import JobEvent, Ledger
from jobs.record import HELD
from jobs.tail import EventTail


class Relay:
    """Sends a child's events to the ledger; what an outage holds up is sent later."""

    def __init__(self, ledger: Ledger, lease: Lease, job_id: str, epoch: int, folder: Path) -> None:
        self._ledger = ledger
        self._lease = lease
        self._job_id = job_id
        self._epoch = epoch
        self._stop_noted = False
        self.tail = EventTail(folder / "events.jsonl")

    def send_new(self) -> None:
        """Send what there is, as far as the ledger takes it now."""
        try:
            self.send_all()
        except Unavailable:
            return

    def send_all(self) -> None:
        """Send everything the child wrote; raises `Unavailable` while the ledger does not take it."""
        self.tail.read()
        while True:
            first, batch = self.tail.batch()
            if not batch:
                return
            change = self._ledger.change(
                self._job_id,
                from_statuses=HELD,
                epoch=self._epoch,
                fields=_progress(batch),
                events=batch,
                first_ordinal=first,
            )
            if change.refusal == "missing":
                raise Unavailable("Valkey", "it has lost the record")
            if not change.done:
                self._lease.lose()
                return
            self.tail.taken(change.shipped)

    def note_stop(self) -> None:
        """Have the record say that this run's worker was asked to stop, in case it is killed before it is done."""
        if self._stop_noted:
            return
        with contextlib.suppress(Unavailable):
            self._ledger.change(self._job_id, epoch=self._epoch, fields={"stopped_epoch": self._epoch})
            self._stop_noted = True


def _progress(events: list[JobEvent]) -> dict[str, object] | None:
    """What a batch of events says of the job as a whole."""
    fields: dict[str, object] = {}
    for event in events:
        if event.type == "metric":
            fields["step"] = event.step
            if event.data.get("reward") is not None:
                fields["reward"] = event.data["reward"]
        elif event.type == "status" and "phase" in event.data:
            fields["phase"] = event.data["phase"]
    return fields or None
