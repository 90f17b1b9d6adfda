"""A run's records in the bucket, read back: its events, and the checkpoints it kept.

Writing them is the shipper's. Invariant: only what a manifest lists, or what a checkpoint's own manifest
completes, is ever read.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from datetime import UTC, datetime
from typing import Any

from grpo_core import strict_json
from jobs import layout
from jobs.archive import Archive
from jobs.storage import ObjectStore

_EVENTS_FILE = re.compile(r"/events-\d+-\d+\.jsonl$")


def now_iso() -> str:
    """This host's time as RFC 3339 UTC; for reading, never for deciding."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def events_name(first: int, last: int) -> str:
    """The file of a run that holds events `first` to `last`."""
    return f"events-{first:09d}-{last:09d}.jsonl"


def stored_events(
    store: ObjectStore, archive: Archive, manifest_key: str, *, after: int, limit: int, types: Collection[str]
) -> list[dict[str, Any]]:
    """A finished job's events numbered above `after`: from the files its manifest lists, closed by its outcome."""
    manifest = archive.manifest(manifest_key)
    if manifest is None:
        return []
    events: list[dict[str, Any]] = []
    for entry in manifest.objects:
        if _EVENTS_FILE.search(entry.key):
            events += [strict_json.loads(line) for line in (store.get(entry.key) or b"").splitlines()]
    events.sort(key=lambda event: event["seq"])
    events += _closing_events(archive, manifest.job, events)
    return [event for event in events if event["seq"] > after and (not types or event["type"] in types)][:limit]


def _closing_events(archive: Archive, job_id: str, events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The last events were numbered after the files were written, in this order and without a gap."""
    outcome = archive.outcome(job_id)
    if outcome is None:
        return []
    closing: list[tuple[str, dict[str, Any]]] = [("status", {"status": outcome.status})]
    if outcome.error and not any(event["type"] == "error" for event in events):
        closing.insert(0, ("error", outcome.error))
    last = events[-1] if events else {"v": 1, "seq": 0, "step": 0}
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
