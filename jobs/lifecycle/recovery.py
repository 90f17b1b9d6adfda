"""Finishes operations of processes that died or lost their connection: submissions, commands, deletions.

Each operation is marked in Valkey before it writes to the bucket, and the bucket decides: a `job.json` is an accepted
job, also if its client got no answer, and a command is applied. The sweeper calls this. Invariant: every step can be
repeated, also while the process that began it is still running.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator

import structlog

from jobs.errors import Unavailable, UnreadableRecord
from jobs.lifecycle.commands import Commands
from jobs.lifecycle.deletion import Deletion
from jobs.lifecycle.wakeups import WakeupPublisher
from jobs.store.bucket import ObjectStore
from jobs.store.job import record_of
from jobs.store.job_store import JobStore
from jobs.store.write_once import WriteOnceStore

log = structlog.get_logger()

SUBMITTING_SECONDS = 300.0
"""Age of an unfinished submission after which its process no longer writes: its retries have ended."""
ORDERING_SECONDS = 10.0
ERASING_SECONDS = 1800.0
"""Time after which no worker still holds a deleted job: one that lost its connection gives up after 15 minutes."""


@contextlib.contextmanager
def apart(job_id: str, store: ObjectStore) -> Generator[None]:
    """Log an error in one job so that a sweep continues with the others; only an unavailable server ends it."""
    try:
        yield
    except Unavailable as error:
        if store.is_at_fault(error):
            raise
        log.error("job_unreadable", job_id=job_id, reason=str(error))  # noqa: TRY400 - an error of the store
    except UnreadableRecord as error:  # at every sweep, so one line without a traceback
        log.error("record_unreadable", job_id=job_id, reason=str(error))  # noqa: TRY400
    except Exception:
        log.exception("sweep_broken", job_id=job_id)


class Recovery:
    """Finishes unfinished operations."""

    def __init__(self, job_store: JobStore, write_once: WriteOnceStore, wakeups: WakeupPublisher, *, by: str) -> None:
        self._job_store = job_store
        self._write_once = write_once
        self._wakeups = wakeups
        self._commands = Commands(job_store, write_once, wakeups, by=by)
        self._deletion = Deletion(job_store, write_once.store)

    def finish(self) -> None:
        """Finish every operation that began too long ago. Raises `Unavailable`."""
        for job_id in self._job_store.begun("submitting", SUBMITTING_SECONDS):
            with apart(job_id, self._write_once.store):
                self._accept(job_id)
        for note in self._job_store.begun("ordering", ORDERING_SECONDS):
            job_id = note.split(" ")[0]
            with apart(job_id, self._write_once.store):
                self._commands.apply_pending(job_id)
                self._job_store.end("ordering", note)
        for name in self._job_store.begun("erasing", ERASING_SECONDS):
            with apart(name, self._write_once.store):
                if self._deletion.is_erased(name):
                    self._deletion.finish(name)
                self._job_store.end("erasing", name)

    def _accept(self, job_id: str) -> None:
        """Create the record of a job with a `job.json`; drop the mark of a submission that wrote none."""
        asked = self._write_once.job(job_id)
        if asked is not None and self._job_store.create(record := record_of(asked), may_be_known=True):
            log.warning("submission_finished", job_id=job_id)
            self._wakeups.add(job_id, record.queue)
        self._job_store.end("submitting", job_id)
