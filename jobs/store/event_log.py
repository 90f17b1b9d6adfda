"""A job's events in the bucket, and the location of its checkpoints.

Owns the files of events, their names, and the last events of a job; the uploader decides when they are stored.
Invariants: a reader gets each event once and in order, even if several runs have stored it, and only complete
checkpoints.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from typing import Any

from ulid import ULID

from grpo_core import strict_json
from jobs.store import object_keys
from jobs.store.bucket import ObjectStore
from jobs.store.job import TERMINAL
from jobs.store.job_store import EVENT_ROOM, JobStore
from jobs.store.write_once import ManifestEntry, Outcome, WriteOnceStore

EVENTS_IN_A_FILE = 1000

_EVENTS_FILE = re.compile(r"/events-(\d+)-(\d+)\.jsonl$")


def now_iso() -> str:
    """Return this host's time as RFC 3339 UTC, for people and never for decisions."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def events_name(first: int, last: int) -> str:
    """Return the name of a run's file with the events `first` to `last`."""
    return f"events-{first:09d}-{last:09d}.jsonl"


@dataclass(frozen=True, kw_only=True)
class EventFile:
    """An object with every event of a job numbered `first` to `last`."""

    first: int
    last: int
    key: str


def event_files(keys: Iterable[str]) -> list[EventFile]:
    """Return the files of events among these keys, by number. Files that others cover completely are dropped."""
    matches = ((key, _EVENTS_FILE.search(key)) for key in keys)
    found = [EventFile(first=int(match[1]), last=int(match[2]), key=key) for key, match in matches if match]
    chosen: list[EventFile] = []
    for file in sorted(found, key=lambda file: (file.first, -file.last)):
        if not chosen or file.last > chosen[-1].last:
            chosen.append(file)
    return chosen


def read_events(store: ObjectStore, files: Iterable[EventFile], *, after: int = 0) -> Iterator[dict[str, Any]]:
    """Yield the events numbered above `after`, each once and in order. Only files with such events are read."""
    for file in files:
        if file.last > after:
            for line in (store.get(file.key) or b"").splitlines():
                event = json.loads(line)  # not strict_json: the service wrote it, and a completion may hold NUL
                if event["seq"] > after:
                    after = event["seq"]
                    yield event


def store_events(
    store: ObjectStore, job_store: JobStore, job_id: str, prefix: str, *, after: int, at_least: int = 1
) -> Iterator[ManifestEntry]:
    """Store the events numbered above `after` below a run's prefix, in files of at least `at_least` events.

    A job's last event is not stored: readers get it from the outcome.
    """
    while events := _not_the_end(job_store.events(job_id, after=after, limit=EVENTS_IN_A_FILE)):
        if len(events) < at_least:
            return
        name = events_name(events[0]["seq"], events[-1]["seq"])
        body = "".join(f"{strict_json.dumps(event)}\n" for event in events).encode()
        store.put(prefix + name, body, content_type="application/x-ndjson")
        after = events[-1]["seq"]
        yield ManifestEntry(path=name, key=prefix + name, sha256=hashlib.sha256(body).hexdigest(), size=len(body))


def _not_the_end(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    ends = events and events[-1]["type"] == "status" and events[-1]["data"].get("status") in TERMINAL
    return events[:-1] if ends else events


def stored_events(
    store: ObjectStore, write_once: WriteOnceStore, manifest_key: str, *, after: int, limit: int, types: Collection[str]
) -> list[dict[str, Any]]:
    """Return an ended job's events numbered above `after`: from the files in its manifest, then from its outcome."""
    manifest = write_once.manifest(manifest_key)
    if manifest is None:
        return []
    files = event_files(entry.key for entry in manifest.objects)
    events = (event for event in read_events(store, files, after=after) if not types or event["type"] in types)
    found = list(islice(events, limit))
    if len(found) == limit:
        return found
    outcome = write_once.outcome(manifest.job)
    closing = closing_events(store, files, outcome) if outcome else []
    found += [event for event in closing if event["seq"] > after and (not types or event["type"] in types)]
    return found[:limit]


def closing_events(store: ObjectStore, files: list[EventFile], outcome: Outcome) -> list[dict[str, Any]]:
    """Return the last events of a job. Their numbers follow those in the files without a gap."""
    # Only the end of the files, because hardly any event follows an error.
    end = list(read_events(store, files[-2:])) if files else []
    closing: list[tuple[str, dict[str, Any]]] = [("status", {"status": outcome.status})]
    if outcome.error and not any(event["type"] == "error" for event in end):
        closing.insert(0, ("error", outcome.error))
    last = end[-1] if end else {"v": 1, "seq": unused_number(_age_at_end(outcome)), "step": 0}
    return [
        {**last, "seq": last["seq"] + place, "epoch": outcome.epoch, "type": kind, "time": outcome.time, "data": data}
        for place, (kind, data) in enumerate(closing, start=1)
    ]


def unused_number(age_seconds: float, stored: int = 0) -> int:
    """Return a number above every event of a job of this age, no matter what Valkey lost.

    As in `prelude.lua`: a job has fewer events than microseconds of age. `stored` is the last number in the bucket. It
    is lower unless clocks differ; adding to it would repeat the same numbers after each loss.
    """
    return max(stored, max(0, round(age_seconds * 1e6)) + EVENT_ROOM)


def _age_at_end(outcome: Outcome) -> float:
    made = ULID.from_str(outcome.job.removeprefix("job-")).timestamp
    return datetime.fromisoformat(outcome.time).timestamp() - made


def find_checkpoint(store: ObjectStore, job_id: str, step: int) -> str | None:
    """Return the prefix of a job's newest complete checkpoint at a step, or None."""
    suffix = f"checkpoints/step-{step:06d}/"
    for epoch in range(_latest_epoch(store, job_id), 0, -1):
        prefix = object_keys.run(job_id, epoch) + suffix
        if store.get(f"{prefix}manifest.json") is not None:
            return prefix
    return None


def _latest_epoch(store: ObjectStore, job_id: str) -> int:
    return WriteOnceStore(store).latest_epoch(job_id)
