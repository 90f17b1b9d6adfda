"""Commits of checkpoints, and the objects of earlier runs that stay valid when a run starts.

Owns `e{n}/commits/step-*.json` and `e{n}/base.json`; the uploader uploads the objects they name, and `resume` chooses
where a run starts. Invariant: every object that a commit names was complete in the bucket before the commit was
written, and a commit is deleted before any object that it needs for resuming.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import structlog

from jobs.store import object_keys
from jobs.store.bucket import ObjectStore
from jobs.store.write_once import ManifestEntry

log = structlog.get_logger()

COMMIT_VERSION = 1

RUN_LOGS = 10
"""Number of earlier runs whose output is kept for readers."""

_COMMIT = re.compile(r"/e(\d+)/commits/step-(\d+)\.json$")
_PART = re.compile(r"rollouts/part-(\d+)-(\d+)\.parquet$")
_STEP = re.compile(r"rollouts/step-(\d+)\.parquet$")
_EPOCH = re.compile(r"/e(\d+)/")
_CHECKPOINT = re.compile(r"^(.+/checkpoints/)step-\d+/")


@dataclass(frozen=True, kw_only=True, order=True)
class CommitRef:
    """A step of a run. Ordered by step, then epoch: a job resumes from the largest."""

    step: int
    epoch: int


@dataclass(frozen=True, kw_only=True)
class Commit:
    """A checkpoint in the bucket, with every object that is valid for a reader as of its step."""

    job: str
    epoch: int
    step: int
    checkpoint: str
    """Prefix of the checkpoint's objects."""
    objects: list[ManifestEntry] = field(default_factory=list)
    """Objects of this run and of the runs from which it resumed."""

    @property
    def ref(self) -> CommitRef:
        """The step and run of the commit."""
        return CommitRef(step=self.step, epoch=self.epoch)


@dataclass(frozen=True, kw_only=True)
class ResumeBase:
    """What a run takes over from earlier runs."""

    job: str
    epoch: int
    resumed: CommitRef | None
    """The commit from which it resumed; None if it started from the beginning."""
    objects: list[ManifestEntry] = field(default_factory=list)
    """Objects of earlier runs that stay valid."""
    gradient_accumulation: int | None = None
    """Gradient accumulation, if an out-of-memory error raised it above the spec's."""


@dataclass(frozen=True, kw_only=True)
class RolloutFile:
    """A Parquet object that holds every rollout of the steps `first` to `last`."""

    first: int
    last: int
    epoch: int
    """The run that generated them."""
    key: str
    after: int = 0
    """Its steps up to this one are read from earlier files."""


def put_commit(store: ObjectStore, commit: Commit) -> None:
    """Write a commit. All objects that it names must be in the bucket. A repetition changes nothing."""
    body = {"v": COMMIT_VERSION, **commit.__dict__, "objects": _dump(commit.objects)}
    store.put_json(object_keys.commit(commit.job, commit.epoch, commit.step), body)


def delete_commit(store: ObjectStore, job_id: str, ref: CommitRef) -> None:
    """Delete a commit, before its checkpoint is deleted. A missing commit is no error."""
    store.delete(object_keys.commit(job_id, ref.epoch, ref.step))


def list_commits(store: ObjectStore, job_id: str, epoch: int) -> list[CommitRef]:
    """Return the commits of one run, in order of steps."""
    matches = (_COMMIT.search(item.key) for item in store.list(object_keys.commits(job_id, epoch)))
    return sorted(CommitRef(step=int(match[2]), epoch=int(match[1])) for match in matches if match)


def commits_up_to(store: ObjectStore, job_id: str, epoch: int) -> list[CommitRef]:
    """Return the commits of the runs 1 to `epoch`, the best one for resuming first."""
    found = [ref for number in range(1, epoch + 1) for ref in list_commits(store, job_id, number)]
    return sorted(found, reverse=True)


def read_commit(store: ObjectStore, job_id: str, ref: CommitRef) -> Commit | None:
    """Return a commit; None if it was deleted or cannot be read, and then the previous one counts."""
    try:
        body = store.get_json(object_keys.commit(job_id, ref.epoch, ref.step))
        if body is None:
            return None
        return Commit(
            job=body["job"],
            epoch=body["epoch"],
            step=body["step"],
            checkpoint=body["checkpoint"],
            objects=_load(body["objects"]),
        )
    except (ValueError, KeyError, TypeError) as error:
        log.warning("commit_unreadable", job_id=job_id, step=ref.step, epoch=ref.epoch, error=repr(error))
        return None


def newest_commit(store: ObjectStore, job_id: str, epoch: int) -> Commit | None:
    """Return the commit with the highest step of the runs 1 to `epoch`, without verifying it."""
    commits = (read_commit(store, job_id, ref) for ref in commits_up_to(store, job_id, epoch))
    return next((commit for commit in commits if commit is not None), None)


def made_progress(store: ObjectStore, job_id: str, epoch: int) -> bool:
    """Whether a run committed a step that no run before it had reached."""
    before = [ref.step for ref in commits_up_to(store, job_id, epoch - 1)]
    return any(ref.step > max(before, default=0) for ref in list_commits(store, job_id, epoch))


def put_base(store: ObjectStore, base: ResumeBase) -> None:
    """Write what a run takes over, before it trains."""
    resumed = {"epoch": base.resumed.epoch, "step": base.resumed.step} if base.resumed else None
    body = {"v": COMMIT_VERSION, **base.__dict__, "resumed": resumed, "objects": _dump(base.objects)}
    store.put_json(object_keys.base(base.job, base.epoch), body)


def read_base(store: ObjectStore, job_id: str, epoch: int) -> ResumeBase | None:
    """Return what a run took over; None if it has not been written yet."""
    body = store.get_json(object_keys.base(job_id, epoch))
    if body is None:
        return None
    return ResumeBase(
        job=body["job"],
        epoch=body["epoch"],
        resumed=CommitRef(**body["resumed"]) if body["resumed"] else None,
        objects=_load(body["objects"]),
        gradient_accumulation=body.get("gradient_accumulation"),
    )


def put_rejected(store: ObjectStore, job_id: str, epoch: int, commit: CommitRef) -> None:
    """Record for later runs that the commit from which this run should resume cannot be read."""
    store.put_json(
        object_keys.rejected(job_id, epoch), {"v": COMMIT_VERSION, "step": commit.step, "epoch": commit.epoch}
    )


def rejected_up_to(store: ObjectStore, job_id: str, epoch: int) -> set[CommitRef]:
    """Return the commits that the runs 1 to `epoch` could not read."""
    bodies = (store.get_json(object_keys.rejected(job_id, number)) for number in range(1, epoch + 1))
    return {CommitRef(step=body["step"], epoch=body["epoch"]) for body in bodies if body}


def run_logs(store: ObjectStore, job_id: str, before: int) -> list[ManifestEntry]:
    """Return the output of earlier runs, as `stderr-e1.log` and so on. Each run stores it when it ends."""
    entries: list[ManifestEntry] = []
    for epoch in range(max(1, before - RUN_LOGS), before):
        key = f"{object_keys.run(job_id, epoch)}stderr.log"
        if found := store.digest(key):
            sha256, size = found
            entries.append(ManifestEntry(path=f"stderr-e{epoch}.log", key=key, sha256=sha256, size=size))
    return entries


def inherited(store: ObjectStore, job_id: str, epoch: int, commit: Commit | None) -> list[ManifestEntry]:
    """Return the objects that readers see when a run starts: those of a commit, and the output of earlier runs."""
    objects = {entry.path: entry for entry in commit.objects} if commit else {}
    objects |= {entry.path: entry for entry in run_logs(store, job_id, epoch)}
    return [objects[path] for path in sorted(objects)]


def without_pruned(store: ObjectStore, objects: Iterable[ManifestEntry]) -> list[ManifestEntry]:
    """Return the objects without checkpoints that their run has deleted meanwhile, whose manifest is deleted first.

    A commit may name such a checkpoint, because a run deletes its oldest one once a later one is committed.
    """
    stored: dict[str, set[str]] = {}
    kept: list[ManifestEntry] = []
    for entry in objects:
        match = _CHECKPOINT.match(entry.key)
        if match and match[1] not in stored:
            stored[match[1]] = {item.key for item in store.list(match[1])}
        if match is None or f"{match[0]}manifest.json" in stored[match[1]]:
            kept.append(entry)
    return kept


def listed_rollouts(objects: Iterable[ManifestEntry]) -> list[RolloutFile]:
    """Return the rollout files among the objects of a manifest, commit or base, in order of steps."""
    return _in_order(entry.key for entry in objects)


def live_rollouts(store: ObjectStore, job_id: str, epoch: int) -> list[RolloutFile]:
    """Return the rollout files of an unfinished job, each step once, in order of steps.

    No step is missed while its worker merges files, because those that were replaced stay for longer than the listing
    takes (`jobs.store.discards`). `epoch` is the run that holds or last held the job. Until a run has written its base,
    the objects of the newest commit are valid.
    """
    base = read_base(store, job_id, epoch)
    if base is None:
        commit = newest_commit(store, job_id, epoch)
        return listed_rollouts(commit.objects if commit else [])
    earlier = listed_rollouts(base.objects)
    own = _in_order(item.key for item in store.list(f"{object_keys.run(job_id, epoch)}rollouts/"))
    after = base.resumed.step if base.resumed else 0
    return earlier + [file for file in own if file.first > after]


def _in_order(keys: Iterable[str]) -> list[RolloutFile]:
    """Return the files that together hold every step of all files, in order of steps, each step in one of them.

    Objects that a part has replaced may still be there, and one of them may end after the part.
    """
    found = [file for key in keys if (file := _rollout_file(key)) is not None]
    chosen: list[RolloutFile] = []
    for file in sorted(found, key=lambda file: (file.first, -file.last)):
        end = chosen[-1].last if chosen else 0
        if file.last > end:
            chosen.append(replace(file, after=end))
    return chosen


def _rollout_file(key: str) -> RolloutFile | None:
    epoch = _EPOCH.search(key)
    if epoch is None:
        return None
    if part := _PART.search(key):
        return RolloutFile(first=int(part[1]), last=int(part[2]), epoch=int(epoch[1]), key=key)
    if step := _STEP.search(key):
        return RolloutFile(first=int(step[1]), last=int(step[1]), epoch=int(epoch[1]), key=key)
    return None


def _dump(entries: Sequence[ManifestEntry]) -> list[dict[str, Any]]:
    return [dict(entry.__dict__) for entry in entries]


def _load(entries: Iterable[dict[str, Any]]) -> list[ManifestEntry]:
    return [ManifestEntry(**entry) for entry in entries]
