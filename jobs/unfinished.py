"""What a process began, and died or was cut off before it could finish: submissions, orders of owners, deletions.

Valkey notes each before anything is written to the bucket; what the bucket then holds decides. A `job.json` is an
accepted job, whatever its client heard, and an order is carried out. The sweeper calls this. Invariant: everything
here may be done any number of times, also beside the process that began it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator

import structlog

from jobs.archive import Archive
from jobs.erasure import Erasure
from jobs.errors import Unavailable
from jobs.ledger import Ledger
from jobs.orders import Orders
from jobs.outbox import Outbox
from jobs.record import record_of

log = structlog.get_logger()

SUBMITTING_SECONDS = 300.0
"""A submission that wrote nothing for so long wrote nothing: its retries on the way to storage are over."""
ORDERING_SECONDS = 10.0
ERASING_SECONDS = 1800.0
"""Until no worker is left that had the job before it was deleted: a lost one gives up after 15 minutes."""


@contextlib.contextmanager
def apart(job_id: str) -> Generator[None]:
    """What is wrong with one job must not keep a sweep from the others; only a server that is away ends it."""
    try:
        yield
    except Unavailable:
        raise
    except Exception:
        log.exception("sweep_broken", job_id=job_id)


class Unfinished:
    """Finishes what others began."""

    def __init__(self, ledger: Ledger, archive: Archive, outbox: Outbox, *, by: str) -> None:
        self._ledger = ledger
        self._archive = archive
        self._outbox = outbox
        self._orders = Orders(ledger, archive, outbox, by=by)
        self._erasure = Erasure(ledger, archive.store)

    def finish(self) -> None:
        """One round over everything that has been under way for too long. Raises `Unavailable`."""
        for job_id in self._ledger.begun("submitting", SUBMITTING_SECONDS):
            with apart(job_id):
                self._accept(job_id)
        for note in self._ledger.begun("ordering", ORDERING_SECONDS):
            job_id = note.split(" ")[0]
            with apart(job_id):
                self._orders.carry_out(job_id)
                self._ledger.end("ordering", note)
        for name in self._ledger.begun("erasing", ERASING_SECONDS):
            with apart(name):
                if self._erasure.is_erased(name):
                    self._erasure.finish(name)
                self._ledger.end("erasing", name)

    def _accept(self, job_id: str) -> None:
        """Make the record of a job that was written down; forget one that was not."""
        asked = self._archive.job(job_id)
        if asked is not None and self._ledger.create(record := record_of(asked)):
            log.warning("submission_finished", job_id=job_id)
            self._outbox.add(job_id, record.queue)
        self._ledger.end("submitting", job_id)
