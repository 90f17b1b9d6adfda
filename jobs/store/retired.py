"""Retired jobs: ended jobs whose record is no longer in Valkey but in the bucket.

Owns `record.json`, the last state of the record; `job.json` keeps the request and `outcome.json` the end of the job.
`retention` decides when a record is retired. Invariant: a record leaves Valkey only once readers can get everything
about the job from the bucket.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import fields, replace
from datetime import datetime
from itertools import chain, islice
from typing import Any

from jobs.store import event_log, object_keys
from jobs.store.job import JobRecord, JobStatus, record_of
from jobs.store.job_store import TIMES, JobStore
from jobs.store.write_once import WRITE_ONCE_VERSION, Outcome, WriteOnceStore

_ASKED = frozenset(
    {"id", "owner", "spec", "spec_sha256", "created_at", "queue", "name", "metadata", "total_steps"}
    | {"spec_format", "requested_spec"}
)
"""Fields of the record that are in `job.json`."""
_KEPT = tuple(field.name for field in fields(JobRecord) if field.name not in _ASKED)
_TIMES = tuple(name for name in _KEPT if name in TIMES)


class Retired:
    """The retired jobs in one bucket."""

    def __init__(self, write_once: WriteOnceStore) -> None:
        self._write_once = write_once
        self._store = write_once.store

    def retire(self, record: JobRecord, job_store: JobStore) -> bool:
        """Remove an ended job's record from Valkey; False if the bucket lacks a part of it."""
        outcome = self._write_once.outcome(record.id)
        if outcome is None or self._write_once.job(record.id) is None:
            return False
        if not self._has_manifest(outcome.manifest):
            # No worker held this job, so its events were not stored.
            for _ in event_log.store_events(self._store, job_store, record.id, object_keys.run(record.id, 0), after=0):
                pass
        self._store.put_json(object_keys.record(record.id), _to_json(_as_ended(record, outcome)))
        for item in self._store.list(object_keys.controls(record.id)):
            self._store.delete(item.key)  # with an outcome, commands have no effect
        job_store.forget(record.id)
        return True

    def find(self, job_id: str, owner: str | None = None) -> JobRecord | None:
        """Return the record of a retired job, or None; with `owner`, only if that owner has it."""
        kept = self._store.get_json(object_keys.record(job_id))
        if kept is None or owner not in (None, kept["owner"]):
            return None  # after the same number of requests, so that the time does not reveal other owners' jobs
        asked = self._write_once.job(job_id)
        return _from_json(record_of(asked), kept) if kept and asked else None

    def events(self, record: JobRecord, *, after: int, limit: int, types: Collection[str] = ()) -> list[dict[str, Any]]:
        """Return an ended job's events numbered above `after`, in order. Without `types`, returns all types."""
        if record.manifest and self._has_manifest(record.manifest):
            return event_log.stored_events(
                self._store, self._write_once, record.manifest, after=after, limit=limit, types=types
            )
        files = event_log.event_files(item.key for item in self._store.list(object_keys.run(record.id, 0)))
        outcome = self._write_once.outcome(record.id)
        closing = event_log.closing_events(self._store, files, outcome) if outcome else []
        events = chain(
            event_log.read_events(self._store, files, after=after), (event for event in closing if event["seq"] > after)
        )
        return list(islice((event for event in events if not types or event["type"] in types), limit))

    def _has_manifest(self, key: str | None) -> bool:
        """Whether the manifest exists: a job cancelled while storage was unavailable may name one that was not
        written."""
        return key is not None and self._write_once.manifest(key) is not None


def _as_ended(record: JobRecord, outcome: Outcome) -> JobRecord:
    """Return the record with the end from its outcome, which is authoritative."""
    return replace(record, status=JobStatus(outcome.status), error=outcome.error, manifest=outcome.manifest)


def _to_json(record: JobRecord) -> dict[str, Any]:
    body: dict[str, Any] = {name: getattr(record, name) for name in _KEPT}
    for name in _TIMES:
        body[name] = body[name].isoformat() if body[name] else None
    return {"v": WRITE_ONCE_VERSION, "owner": record.owner, **body, "status": record.status.value}


def _from_json(asked: JobRecord, body: dict[str, Any]) -> JobRecord:
    kept: dict[str, Any] = {name: body[name] for name in _KEPT if name in body}
    for name in _TIMES:
        kept[name] = datetime.fromisoformat(kept[name]) if kept.get(name) else None
    return replace(asked, **{**kept, "status": JobStatus(kept["status"])})
