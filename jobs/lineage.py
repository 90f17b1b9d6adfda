"""What a job's runs hand on to each other: commits, and at the start of each run what stays valid of those before.

Owns `e{n}/commits/step-*.json` and `e{n}/base.json`; shipping what they name is the shipper's, choosing where a run
starts is `resumption`'s. Invariant: every object a commit names was in the bucket, whole, before the commit was put,
and a commit is deleted before any object it needs for resuming.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import structlog

from jobs import layout
from jobs.archive import ManifestEntry
from jobs.storage import ObjectStore

log = structlog.get_logger()

LINEAGE_VERSION = 1

RUN_LOGS = 10
"""Earlier runs whose output is kept for readers."""

_COMMIT = re.compile(r"/e(\d+)/commits/step-(\d+)\.json$")
_PART = re.compile(r"rollouts/part-(\d+)-(\d+)\.parquet$")
_STEP = re.compile(r"rollouts/step-(\d+)\.parquet$")
_EPOCH = re.compile(r"/e(\d+)/")
_CHECKPOINT = re.compile(r"^(.+/checkpoints/)step-\d+/")


@dataclass(frozen=True, kw_only=True, order=True)
class Point:
    """A step of a run. Ordered by step, then epoch: the largest is where a job is to go on."""

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
    """Of this run and of those it was resumed from."""

    @property
    def point(self) -> Point:
        """Where it is."""
        return Point(step=self.step, epoch=self.epoch)


@dataclass(frozen=True, kw_only=True)
class Base:
    """What a run was given by the runs before it."""

    job: str
    epoch: int
    resumed: Point | None
    """The commit it started from; None where it started from the beginning."""
    objects: list[ManifestEntry] = field(default_factory=list)
    """What stays valid of earlier runs."""
    gradient_accumulation: int | None = None
    """Parts a step is split into, where an out-of-memory made it more than the spec's."""


@dataclass(frozen=True, kw_only=True)
class RolloutFile:
    """A Parquet object that holds every rollout of the steps `first` to `last`."""

    first: int
    last: int
    epoch: int
    """The run that drew them."""
    key: str


def put_commit(store: ObjectStore, commit: Commit) -> None:
    """Write a commit; all it names must be in the bucket. Repeating it changes nothing."""
    body = {"v": LINEAGE_VERSION, **commit.__dict__, "objects": _dump(commit.objects)}
    store.put_json(layout.commit(commit.job, commit.epoch, commit.step), body)


def delete_commit(store: ObjectStore, job_id: str, point: Point) -> None:
    """Take a commit back, before its checkpoint is deleted; no error where there is none."""
    store.delete(layout.commit(job_id, point.epoch, point.step))


def list_commits(store: ObjectStore, job_id: str, epoch: int) -> list[Point]:
    """The commits of one run, in order of steps."""
    matches = (_COMMIT.search(item.key) for item in store.list(layout.commits(job_id, epoch)))
    return sorted(Point(step=int(match[2]), epoch=int(match[1])) for match in matches if match)


def commits_up_to(store: ObjectStore, job_id: str, epoch: int) -> list[Point]:
    """The commits of the runs 1 to `epoch`, the best to resume from first."""
    found = [point for number in range(1, epoch + 1) for point in list_commits(store, job_id, number)]
    return sorted(found, reverse=True)


def read_commit(store: ObjectStore, job_id: str, point: Point) -> Commit | None:
    """A commit, or None where it was taken back or cannot be read: then the one before it counts."""
    try:
        body = store.get_json(layout.commit(job_id, point.epoch, point.step))
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
        log.warning("commit_unreadable", job_id=job_id, step=point.step, epoch=point.epoch, error=repr(error))
        return None


def newest_commit(store: ObjectStore, job_id: str, epoch: int) -> Commit | None:
    """The commit with the highest step of the runs 1 to `epoch`, not verified."""
    commits = (read_commit(store, job_id, point) for point in commits_up_to(store, job_id, epoch))
    return next((commit for commit in commits if commit is not None), None)


def made_progress(store: ObjectStore, job_id: str, epoch: int) -> bool:
    """Whether a run committed a step that no run before it had reached."""
    before = [point.step for point in commits_up_to(store, job_id, epoch - 1)]
    return any(point.step > max(before, default=0) for point in list_commits(store, job_id, epoch))


def put_base(store: ObjectStore, base: Base) -> None:
    """Write down what a run starts from, before it trains."""
    resumed = {"epoch": base.resumed.epoch, "step": base.resumed.step} if base.resumed else None
    body = {"v": LINEAGE_VERSION, **base.__dict__, "resumed": resumed, "objects": _dump(base.objects)}
    store.put_json(layout.base(base.job, base.epoch), body)


def read_base(store: ObjectStore, job_id: str, epoch: int) -> Base | None:
    """What a run started from, or None where it has not come so far."""
    body = store.get_json(layout.base(job_id, epoch))
    if body is None:
        return None
    return Base(
        job=body["job"],
        epoch=body["epoch"],
        resumed=Point(**body["resumed"]) if body["resumed"] else None,
        objects=_load(body["objects"]),
        gradient_accumulation=body.get("gradient_accumulation"),
    )


def put_rejected(store: ObjectStore, job_id: str, epoch: int, commit: Point) -> None:
    """Note, for all later runs, that the commit this run was to go on from cannot be read."""
    store.put_json(layout.rejected(job_id, epoch), {"v": LINEAGE_VERSION, "step": commit.step, "epoch": commit.epoch})


def rejected_up_to(store: ObjectStore, job_id: str, epoch: int) -> set[Point]:
    """The commits that the runs 1 to `epoch` could not read."""
    bodies = (store.get_json(layout.rejected(job_id, number)) for number in range(1, epoch + 1))
    return {Point(step=body["step"], epoch=body["epoch"]) for body in bodies if body}


def run_logs(store: ObjectStore, job_id: str, before: int) -> list[ManifestEntry]:
    """The output of earlier runs, which each left when it was handed back: `stderr-e1.log` and so on."""
    entries: list[ManifestEntry] = []
    for epoch in range(max(1, before - RUN_LOGS), before):
        key = f"{layout.run(job_id, epoch)}stderr.log"
        if found := store.digest(key):
            sha256, size = found
            entries.append(ManifestEntry(path=f"stderr-e{epoch}.log", key=key, sha256=sha256, size=size))
    return entries


def inherited(store: ObjectStore, job_id: str, epoch: int, commit: Commit | None) -> list[ManifestEntry]:
    """What a run starts with for readers: what a commit names, and the output that earlier runs left."""
    objects = {entry.path: entry for entry in commit.objects} if commit else {}
    objects |= {entry.path: entry for entry in run_logs(store, job_id, epoch)}
    return [objects[path] for path in sorted(objects)]


def without_pruned(store: ObjectStore, objects: Iterable[ManifestEntry]) -> list[ManifestEntry]:
    """These objects, less the checkpoints that their run has deleted since they were listed: the manifest goes first.

    A commit may name one: a run deletes its oldest checkpoint once a later one is committed.
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
    """The rollout files among the objects of a manifest, a commit or a base, in order of steps."""
    return _in_order(entry.key for entry in objects)


def live_rollouts(store: ObjectStore, job_id: str, epoch: int) -> list[RolloutFile]:
    """The rollout files of a job that has not ended, every step once, in order of steps.

    `epoch` is the run that has the job or had it last. Of a run that has not put its base yet, and before the first,
    what the newest commit names stands.
    """
    base = read_base(store, job_id, epoch)
    if base is None:
        commit = newest_commit(store, job_id, epoch)
        return listed_rollouts(commit.objects if commit else [])
    earlier = listed_rollouts(base.objects)
    own = _in_order(item.key for item in store.list(f"{layout.run(job_id, epoch)}rollouts/"))
    after = base.resumed.step if base.resumed else 0
    return earlier + [file for file in own if file.first > after]


def _in_order(keys: Iterable[str]) -> list[RolloutFile]:
    """Rollout files by step. A part wins over the files of single steps it was made from."""
    found = [file for key in keys if (file := _rollout_file(key)) is not None]
    chosen: list[RolloutFile] = []
    for file in sorted(found, key=lambda file: (file.first, -file.last)):
        if not chosen or file.first > chosen[-1].last:
            chosen.append(file)
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
