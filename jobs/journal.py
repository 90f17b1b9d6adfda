"""A job's events in the bucket, written and read back, and where a checkpoint of it lies.

Owns the files of events, their names, and the events that close a job; when they are sent is the shipper's business.
Invariants: a reader gets each event once and in order, however many runs have stored it, and no checkpoint that its
own manifest does not complete.
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

from grpo_core import strict_json
from jobs import layout
from jobs.archive import Archive, ManifestEntry, Outcome
from jobs.ledger import Ledger
from jobs.record import TERMINAL
from jobs.storage import ObjectStore

EVENTS_IN_A_FILE = 1000

_EVENTS_FILE = re.compile(r"/events-(\d+)-(\d+)\.jsonl$")


def now_iso() -> str:
    """This host's time as RFC 3339 UTC; for reading, never for deciding."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def events_name(first: int, last: int) -> str:
    """The file of a run that holds events `first` to `last`."""
    return f"events-{first:09d}-{last:09d}.jsonl"


@dataclass(frozen=True, kw_only=True)
class EventFile:
    """An object that holds every event of a job numbered `first` to `last`."""

    first: int
    last: int
    key: str


def event_files(keys: Iterable[str]) -> list[EventFile]:
    """The files of events among these keys, by number. Runs may have stored the same events: none that adds nothing."""
    matches = ((key, _EVENTS_FILE.search(key)) for key in keys)
    found = [EventFile(first=int(match[1]), last=int(match[2]), key=key) for key, match in matches if match]
    chosen: list[EventFile] = []
    for file in sorted(found, key=lambda file: (file.first, -file.last)):
        if not chosen or file.last > chosen[-1].last:
            chosen.append(file)
    return chosen


def read_events(store: ObjectStore, files: Iterable[EventFile], *, after: int = 0) -> Iterator[dict[str, Any]]:
    """The events of these files numbered above `after`, in order and each once; only files that hold some are read."""
    for file in files:
        if file.last > after:
            for line in (store.get(file.key) or b"").splitlines():
                event = json.loads(line)  # ours, and a completion may hold what is refused of others, as NUL
                if event["seq"] > after:
                    after = event["seq"]
                    yield event


def store_events(
    store: ObjectStore, ledger: Ledger, job_id: str, prefix: str, *, after: int, at_least: int = 1
) -> Iterator[ManifestEntry]:
    """Put the events numbered above `after` below a run's prefix, a file at a time, while there are so many.

    A job's last event is not among them: readers know it from the outcome.
    """
    while events := _not_the_end(ledger.events(job_id, after=after, limit=EVENTS_IN_A_FILE)):
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
    store: ObjectStore, archive: Archive, manifest_key: str, *, after: int, limit: int, types: Collection[str]
) -> list[dict[str, Any]]:
    """A finished job's events numbered above `after`: from the files its manifest lists, closed by its outcome."""
    manifest = archive.manifest(manifest_key)
    if manifest is None:
        return []
    files = event_files(entry.key for entry in manifest.objects)
    events = (event for event in read_events(store, files, after=after) if not types or event["type"] in types)
    found = list(islice(events, limit))
    if len(found) == limit:
        return found
    outcome = archive.outcome(manifest.job)
    closing = closing_events(store, files, outcome) if outcome else []
    found += [event for event in closing if event["seq"] > after and (not types or event["type"] in types)]
    return found[:limit]


def closing_events(store: ObjectStore, files: list[EventFile], outcome: Outcome) -> list[dict[str, Any]]:
    """The last events were numbered after the files were written, in this order and without a gap."""
    # The end of what was written: an error is followed by next to nothing.
    end = list(read_events(store, files[-2:])) if files else []
    closing: list[tuple[str, dict[str, Any]]] = [("status", {"status": outcome.status})]
    if outcome.error and not any(event["type"] == "error" for event in end):
        closing.insert(0, ("error", outcome.error))
    last = end[-1] if end else {"v": 1, "seq": 0, "step": 0}
    return [
        {**last, "seq": last["seq"] + place, "epoch": outcome.epoch, "type": kind, "time": outcome.time, "data": data}
        for place, (kind, data) in enumerate(closing, start=1)
    ]


def find_checkpoint(store: ObjectStore, job_id: str, step: int) -> str | None:
    """The prefix of the newest whole checkpoint a job made at a step, or None."""
    suffix = f"checkpoints/step-{step:06d}/"
    for epoch in range(_latest_epoch(store, job_id), 0, -1):
        prefix = layout.run(job_id, epoch) + suffix
        if store.get(f"{prefix}manifest.json") is not None:
            return prefix
    return None


def _latest_epoch(store: ObjectStore, job_id: str) -> int:
    return Archive(store).latest_epoch(job_id)
