"""Lists a job's complete checkpoints in the bucket, also while it runs. The manifest of a checkpoint is written last.

Owns the reading; workers write them. Invariant: a step that several runs reached is listed once, from the last run,
which is the one from which a later job would start.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime

from jobs.store import object_keys
from jobs.store.bucket import ObjectStore
from jobs.store.write_once import WriteOnceStore

_MANIFEST = re.compile(r"checkpoints/step-(\d+)/manifest\.json$")


@dataclass(frozen=True, kw_only=True)
class CheckpointFile:
    """One file of a checkpoint."""

    path: str
    key: str
    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """One complete checkpoint."""

    step: int
    epoch: int
    created_at: datetime
    files: list[CheckpointFile]


def list_checkpoints(bucket: ObjectStore, job_id: str) -> list[Checkpoint]:
    """Return a job's checkpoints, in order of steps."""
    found: dict[int, Checkpoint] = {}
    for epoch in range(1, WriteOnceStore(bucket).latest_epoch(job_id) + 1):
        for item in bucket.list(f"{object_keys.run(job_id, epoch)}checkpoints/"):
            match = _MANIFEST.search(item.key)
            checkpoint = _read(bucket, item.key, int(match[1]), epoch) if match else None
            if checkpoint is not None:
                found[checkpoint.step] = checkpoint
    return [found[step] for step in sorted(found)]


def _read(bucket: ObjectStore, key: str, step: int, epoch: int) -> Checkpoint | None:
    """Return None for a checkpoint that has just been pruned."""
    head, manifest = bucket.head(key), bucket.get_json(key)
    if head is None or manifest is None:
        return None
    folder = key.removesuffix("manifest.json")
    files = [
        # Only the file name is used, because a manifest comes from the training process and must not name other
        # objects.
        CheckpointFile(path=name, key=folder + name, size=entry["size"], sha256=entry["sha256"])
        for entry in manifest["files"]
        if (name := entry["path"].rsplit("/", 1)[-1])
    ]
    return Checkpoint(step=step, epoch=epoch, created_at=head.modified, files=files)
