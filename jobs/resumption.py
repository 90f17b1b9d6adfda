"""Where a run of a job begins: at the best commit of the runs before it whose checkpoint is whole, or at the start.

Owns the choice and the download into `inputs/resume/`; what a commit is stands in `lineage`. Invariant: the folder
holds every file of one checkpoint with the hash its commit recorded, or does not exist.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from grpo_core.runfolder import sha256_of
from jobs import lineage
from jobs.archive import ManifestEntry
from jobs.errors import Damaged
from jobs.ledger import JobEvent
from jobs.lineage import Base, Commit, Point
from jobs.storage import ObjectStore

log = structlog.get_logger()

RESUME_FOLDER = "resume"
TRIES = 2
"""Downloads of a file whose hash is wrong, before it is the stored object that is."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where a run begins."""

    base: Base
    warnings: list[JobEvent] = field(default_factory=list[JobEvent])
    """What the owner should know: each checkpoint that was passed over."""


def find_start(store: ObjectStore, job_id: str, epoch: int, inputs: Path, accumulation: int | None) -> Start:
    """Fetch the best checkpoint into `inputs/resume/` and write down the run's base. May be repeated.

    Raises `Unavailable`; what an earlier try has fetched is kept.
    """
    rejected = lineage.rejected_up_to(store, job_id, epoch - 1)
    warnings: list[JobEvent] = []
    found: Commit | None = None
    for point in lineage.commits_up_to(store, job_id, epoch - 1):
        commit = lineage.read_commit(store, job_id, point) if point not in rejected else None
        if commit is None:
            continue
        try:
            _fetch(store, commit, inputs / RESUME_FOLDER)
        except Damaged as error:
            shutil.rmtree(inputs / RESUME_FOLDER)
            log.warning("checkpoint_skipped", job_id=job_id, step=point.step, epoch=point.epoch, reason=str(error))
            warnings.append(skipped(point, str(error)))
            continue
        found = commit
        break
    base = Base(
        job=job_id,
        epoch=epoch,
        resumed=found.point if found else None,
        objects=lineage.inherited(store, job_id, epoch, found),
        gradient_accumulation=accumulation,
    )
    lineage.put_base(store, base)
    return Start(base=base, warnings=warnings)


def skipped(point: Point, reason: str) -> JobEvent:
    """Tells the owner that a checkpoint could not be used."""
    message = (
        f"The checkpoint of step {point.step} (run {point.epoch}) cannot be read: {reason}. "
        "The job goes on from the one before it."
    )
    where = {"step": point.step, "epoch": point.epoch}
    return JobEvent(type="warning", step=point.step, data={"code": "checkpoint_skipped", "message": message, **where})


def _fetch(store: ObjectStore, commit: Commit, folder: Path) -> None:
    """Download a commit's checkpoint; raises `Damaged` where it is not whole."""
    entries = [entry for entry in commit.objects if entry.key.startswith(commit.checkpoint)]
    if not any(entry.key == f"{commit.checkpoint}manifest.json" for entry in entries):
        raise Damaged(commit.checkpoint, "names no manifest")
    folder.mkdir(exist_ok=True)
    wanted = {entry.name for entry in entries}
    for other in folder.iterdir():
        if other.name not in wanted:  # of a commit that was tried before
            other.unlink()
    for entry in entries:
        _fetch_file(store, entry, folder / entry.name)


def _fetch_file(store: ObjectStore, entry: ManifestEntry, path: Path) -> None:
    if path.exists() and sha256_of(path) == entry.sha256:
        return
    path.unlink(missing_ok=True)
    for left in reversed(range(TRIES)):
        try:
            store.download(entry.key, path, entry.sha256)
        except Damaged:
            if not left:
                raise
        else:
            return
