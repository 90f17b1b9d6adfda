"""A job's metrics by step: what its events told, and from the bucket what no event could tell.

Owns how the two are joined. A run that was cut off from Valkey goes on training and commits; where another run goes on
from such a commit, or Valkey was lost, nobody told of those steps, and the checkpoint's own `metrics.jsonl` has them.
Invariant: each logged step once, in order.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from grpo_core import strict_json
from jobs import lineage
from jobs.archive import Archive, ManifestEntry
from jobs.record import TERMINAL, JobRecord, JobStatus
from jobs.storage import ObjectStore

Row = dict[str, Any]
FILE = "metrics.jsonl"


def join(store: ObjectStore, archive: Archive, record: JobRecord, events: Iterable[Row]) -> list[Row]:
    """The metrics of every logged step, of a step trained twice the later run's. Raises `Unavailable`."""
    told = {event["step"]: {**event["data"], "step": event["step"], "epoch": event["epoch"]} for event in events}
    last = record.total_steps if record.status is JobStatus.SUCCEEDED else max(told, default=0)
    every = record.spec["training"]["log_every"]
    if not all(step in told for step in range(every, last + 1, every)):
        stored = {row["step"]: row for row in _stored(store, archive, record)}
        told = {step: row for step, row in stored.items() if step % every == 0 or step == record.total_steps} | told
    return [told[step] for step in sorted(told)]


def _stored(store: ObjectStore, archive: Archive, record: JobRecord) -> list[Row]:
    """The lines of the job's `metrics.jsonl`; while it goes on, those its run was given by the runs before."""
    entry = _find(store, archive, record)
    body = store.get(entry.key) if entry else None
    rows: list[Row] = [strict_json.loads(line) for line in (body or b"").splitlines()]
    return [{"epoch": record.epoch, **{name: value for name, value in row.items() if name != "v"}} for row in rows]


def _find(store: ObjectStore, archive: Archive, record: JobRecord) -> ManifestEntry | None:
    if record.status in TERMINAL:
        manifest = archive.manifest(record.manifest) if record.manifest else None
        return _entry(manifest.objects, FILE) if manifest else None
    base = lineage.read_base(store, record.id, record.epoch)
    if base is None or base.resumed is None:
        return None
    return _entry(base.objects, f"checkpoints/step-{base.resumed.step:06d}/{FILE}")


def _entry(objects: Iterable[ManifestEntry], path: str) -> ManifestEntry | None:
    return next((entry for entry in objects if entry.path == path), None)
