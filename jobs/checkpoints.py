"""A job's checkpoints in the bucket, also while it runs: those whose manifest, which is written last, is there.

Owns the reading; workers write them. Invariant: a step that several runs reached is listed once, as the last of them
left it, so that it is the one a later job would start from.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime

from jobs import layout
from jobs.archive import Archive
from jobs.storage import ObjectStore

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
    """One whole checkpoint."""

    step: int
    epoch: int
    created_at: datetime
    files: list[CheckpointFile]


def list_checkpoints(bucket: ObjectStore, job_id: str) -> list[Checkpoint]:
    """A job's checkpoints, in order of steps."""
    found: dict[int, Checkpoint] = {}
    for epoch in range(1, Archive(bucket).latest_epoch(job_id) + 1):
        for item in bucket.list(f"{layout.run(job_id, epoch)}checkpoints/"):
            match = _MANIFEST.search(item.key)
            checkpoint = _read(bucket, item.key, int(match[1]), epoch) if match else None
            if checkpoint is not None:
                found[checkpoint.step] = checkpoint
    return [found[step] for step in sorted(found)]


def _read(bucket: ObjectStore, key: str, step: int, epoch: int) -> Checkpoint | None:
    """None for one that is pruned just now."""
    head, manifest = bucket.head(key), bucket.get_json(key)
    if head is None or manifest is None:
        return None
    folder = key.removesuffix("manifest.json")
    files = [
        # The name alone: a manifest comes from the training process, and must not lead to another object.
        CheckpointFile(path=name, key=folder + name, size=entry["size"], sha256=entry["sha256"])
        for entry in manifest["files"]
        if (name := entry["path"].rsplit("/", 1)[-1])
    ]
    return Checkpoint(step=step, epoch=epoch, created_at=head.modified, files=files)
