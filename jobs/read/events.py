"""A job's events in order and in pages: from Valkey while it has them, then from the bucket.

Owns where events are read; `jobs.store.event_log` and `jobs.store.job_store` own how they are stored. Invariant: a
reader that continues from the last number it got misses no event, also if the events move to the bucket meanwhile.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from jobs.store import event_log
from jobs.store.bucket import ObjectStore
from jobs.store.job import TERMINAL, JobRecord
from jobs.store.job_store import JobStore
from jobs.store.retired import Retired
from jobs.store.write_once import WriteOnceStore

PAGE_EVENTS = 50
"""Events per page of a stream: a sample may have 10 kB, and each reader holds a page in memory."""
STORED_PAGE_EVENTS = 1000
"""Events per page from the bucket, where reading a page costs as much as reading all."""


@dataclass(frozen=True, kw_only=True)
class EventPage:
    """Some of a job's events, in order."""

    events: list[dict[str, Any]]
    after: int
    """Number from which to continue; it also passes events that were left out."""
    more: bool
    """Whether more events may be available at once."""
    ended: bool
    """Whether the job has ended and these are its last events."""


class EventPages:
    """Reads the events of any job."""

    def __init__(self, job_store: JobStore, store: ObjectStore, write_once: WriteOnceStore, retired: Retired) -> None:
        self._job_store = job_store
        self._store = store
        self._write_once = write_once
        self._retired = retired

    def read(self, record: JobRecord, *, after: int, limit: int, types: Collection[str]) -> list[dict[str, Any]]:
        """Return a job's events numbered above `after`, in order. Without `types`, returns all types."""
        if record.status not in TERMINAL or self._job_store.has_events(record.id):
            return self._live(record.id, after=after, limit=limit, types=types)
        return self._retired.events(record, after=after, limit=limit, types=types)

    def _live(self, job_id: str, *, after: int, limit: int, types: Collection[str]) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        while len(found) < limit:
            batch = self._job_store.events(job_id, after=after, limit=1000 if types else limit)
            found += [event for event in batch if not types or event["type"] in types]
            if len(batch) < (1000 if types else limit):
                break
            after = batch[-1]["seq"]
        return found[:limit]

    def read_on(self, job_id: str, *, after: int, types: Collection[str] = ()) -> EventPage:
        """Return the next events of a job, and whether they are its last. The caller has checked the reader's
        rights."""
        # The status first, so that the events read after it include the last one of an ended job.
        status, manifest = self._job_store.standing(job_id)
        limit = PAGE_EVENTS
        batch = self._job_store.events(job_id, after=after, limit=limit)
        over = status is None or status in TERMINAL
        if not batch and over and not self._job_store.has_events(job_id):
            limit = STORED_PAGE_EVENTS
            batch = self._stored(job_id, manifest, after=after, limit=limit)
        return EventPage(
            events=[event for event in batch if not types or event["type"] in types],
            after=batch[-1]["seq"] if batch else after,
            more=len(batch) == limit,
            ended=over and len(batch) < limit,
        )

    def _stored(self, job_id: str, manifest: str | None, *, after: int, limit: int) -> list[dict[str, Any]]:
        """Return the events of an ended job that Valkey has no events of, or does not know."""
        if manifest is not None:
            return event_log.stored_events(self._store, self._write_once, manifest, after=after, limit=limit, types=())
        record = self._retired.find(job_id)
        return self._retired.events(record, after=after, limit=limit) if record else []
