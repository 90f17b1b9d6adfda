"""A job's metrics by step: from its events, and from the bucket for steps without events.

Owns how the two are joined, and how evaluations are added to the step that they are of. A run that lost its connection
to Valkey continues to train and commits. If another run resumes from such a commit, or Valkey was lost, those steps
have no events, but the checkpoint's `metrics.jsonl` has them. Invariant: each logged step occurs once, in order.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from grpo_core import strict_json
from grpo_core.run_dir.metrics import metrics_of_evaluation
from jobs.store import commits
from jobs.store.bucket import ObjectStore
from jobs.store.job import TERMINAL, JobRecord, JobStatus
from jobs.store.write_once import ManifestEntry, WriteOnceStore

Row = dict[str, Any]
FILE = "metrics.jsonl"


def join(store: ObjectStore, write_once: WriteOnceStore, record: JobRecord, events: Iterable[Row]) -> list[Row]:
    """Return the metrics of every logged step. For a step that was trained twice, the later run's. Raises
    `Unavailable`."""
    events = list(events)
    told = {event["step"]: _row(event) for event in events if event.get("type", "metric") == "metric"}
    last = record.total_steps if record.status is JobStatus.SUCCEEDED else max(told, default=0)
    every = record.spec["training"]["log_every"]
    if not all(step in told for step in range(every, last + 1, every)):
        stored = {row["step"]: row for row in _stored(store, write_once, record)}
        told = {step: row for step, row in stored.items() if step % every == 0 or step == record.total_steps} | told
    evaluated = _evaluations(events)
    return [{**told[step], **evaluated.get(step, {})} for step in sorted(told)]


def _evaluations(events: Iterable[Row]) -> dict[int, Row]:
    """Return what evaluations add, by step; of a step that was evaluated twice, the later one counts."""
    found: dict[int, Row] = {}
    for event in events:
        point = event["data"].get("curve") if event.get("type") == "evaluation" else None
        try:
            if point:
                found[point["step"]] = metrics_of_evaluation(point)
        except (KeyError, TypeError, ValueError):  # the training process wrote something else
            continue
    return found


def _row(event: Row) -> Row:
    return {**event["data"], "step": event["step"], "epoch": event["epoch"], "time": event["time"]}


def _stored(store: ObjectStore, write_once: WriteOnceStore, record: JobRecord) -> list[Row]:
    """Return the lines of an ended job's `metrics.jsonl`; for a running job, those from which its run resumed."""
    entry = _find(store, write_once, record)
    body = store.get(entry.key) if entry else None
    rows: list[Row] = [strict_json.loads(line) for line in (body or b"").splitlines()]
    return [{"epoch": record.epoch, **{name: value for name, value in row.items() if name != "v"}} for row in rows]


def _find(store: ObjectStore, write_once: WriteOnceStore, record: JobRecord) -> ManifestEntry | None:
    if record.status in TERMINAL:
        manifest = write_once.manifest(record.manifest) if record.manifest else None
        return _entry(manifest.objects, FILE) if manifest else None
    base = commits.read_base(store, record.id, record.epoch)
    if base is None or base.resumed is None:
        return None
    return _entry(base.objects, f"checkpoints/step-{base.resumed.step:06d}/{FILE}")


def _entry(objects: Iterable[ManifestEntry], path: str) -> ManifestEntry | None:
    return next((entry for entry in objects if entry.path == path), None)
