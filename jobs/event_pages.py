"""A job's events, in order and by pages: from Valkey while they are there, then from the bucket.

Owns where events are read, not how they are kept (`jobs.journal`, `jobs.ledger`). Invariant: a reader that goes on from
the number it was given last misses none, also where the events move to the bucket meanwhile.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from jobs import journal
from jobs.archive import Archive
from jobs.ledger import Ledger
from jobs.record import TERMINAL, JobRecord
from jobs.storage import ObjectStore

PAGE_EVENTS = 50
"""Events handed to a stream at a time: samples may be of 10 kB, and each reader holds a page."""
STORED_PAGE_EVENTS = 1000
"""The same for events from the bucket, where a page costs as much as all."""


@dataclass(frozen=True, kw_only=True)
class EventPage:
    """Some of a job's events, in order."""

    events: list[dict[str, Any]]
    after: int
    """Where to go on; also past events that were left out."""
    more: bool
    """There may be others at once."""
    ended: bool
    """The job has ended, and these are its last."""


class EventPages:
    """Reads the events of any job."""

    def __init__(self, ledger: Ledger, store: ObjectStore, archive: Archive) -> None:
        self._ledger = ledger
        self._store = store
        self._archive = archive

    def read(self, record: JobRecord, *, after: int, limit: int, types: Collection[str]) -> list[dict[str, Any]]:
        """A job's events above a number, in order; no types are all."""
        if self._ledger.has_events(record.id) or record.manifest is None:
            return self._live(record.id, after=after, limit=limit, types=types)
        return journal.stored_events(self._store, self._archive, record.manifest, after=after, limit=limit, types=types)

    def _live(self, job_id: str, *, after: int, limit: int, types: Collection[str]) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        while len(found) < limit:
            batch = self._ledger.events(job_id, after=after, limit=1000 if types else limit)
            found += [event for event in batch if not types or event["type"] in types]
            if len(batch) < (1000 if types else limit):
                break
            after = batch[-1]["seq"]
        return found[:limit]

    def read_on(self, job_id: str, *, after: int, types: Collection[str] = ()) -> EventPage:
        """The next events of a job whose reader was checked before, and whether they are the last."""
        # The status first: an ended job's last event is in what is read after it.
        status, manifest = self._ledger.standing(job_id)
        limit = PAGE_EVENTS
        batch = self._ledger.events(job_id, after=after, limit=limit)
        if not batch and manifest is not None and not self._ledger.has_events(job_id):
            limit = STORED_PAGE_EVENTS
            batch = journal.stored_events(self._store, self._archive, manifest, after=after, limit=limit, types=())
        return EventPage(
            events=[event for event in batch if not types or event["type"] in types],
            after=batch[-1]["seq"] if batch else after,
            more=len(batch) == limit,
            ended=(status is None or status in TERMINAL) and len(batch) < limit,
        )
