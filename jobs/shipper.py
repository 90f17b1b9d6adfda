"""Copies a run folder into the bucket while the run goes on, commits its checkpoints, and lists what is valid.

Owns which files are sent, when, and what is deleted; all of it in a thread of its own, so that slow storage holds up
neither a heartbeat nor an order. Invariants: it writes only below its own epoch's prefix, a commit is put after all it
names and deleted before any of it, and the newest commit always has its checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import threading
from pathlib import Path
from typing import Any, Literal

import structlog

from jobs import journal, layout, lineage, rollouts
from jobs.archive import ManifestEntry
from jobs.errors import Fenced, Unavailable
from jobs.lease import Lease
from jobs.ledger import Ledger
from jobs.lineage import Base, Commit, Point
from jobs.patience import LONGEST_RETRY_SECONDS, RETRY_SECONDS
from jobs.storage import ObjectStore

log = structlog.get_logger()

SYNC_SECONDS = 1.0
EVENTS_AT_ONCE = 500
"""Events are sent in files of about so many between commits, so that a long job leaves few."""
FINAL_FILES = (
    *("metrics.jsonl", "evaluation.parquet", "report.json", "report.html", "spec.json", "stderr.log"),
    *("adapter/*", "tensorboard/**/*"),
)
"""Files that change until the run ends."""
COMMITS_KEPT = 2
"""A checkpoint that the run has pruned is deleted once so many later ones are committed."""

HELD_FOLDER = ".shipping"
"""In the run folder: checkpoints that are being sent, or wait for storage."""

Goal = Literal["whole", "resumable"]

_CHECKPOINT = re.compile(r"checkpoints/step-(\d+)/")


class Shipper:
    """The copy of one run in the bucket. `start` it, ask it to `finish`, then `wait`."""

    def __init__(
        self, store: ObjectStore, ledger: Ledger, lease: Lease, job_id: str, epoch: int, folder: Path, base: Base
    ) -> None:
        self._store = store
        self._ledger = ledger
        self._lease = lease
        self._job_id = job_id
        self._epoch = epoch
        self._folder = folder
        self._base = base
        self._prefix = layout.run(job_id, epoch)
        self._sent: dict[str, ManifestEntry] = {}
        self._stamps: dict[str, tuple[int, int]] = {}
        """Of each file sent: its size and time of change just before."""
        self._discarded: list[str] = []
        """Names of what was sent, is no longer wanted and is still to be deleted, in this order."""
        self._commits: list[int] = []
        self._damaged: set[int] = set()
        """Steps whose checkpoint is not, on this disk, what its manifest says."""
        self._told = 0
        self._last_event = max((file.last for file in journal.event_files(e.key for e in base.objects)), default=0)
        self._goal: Goal | None = None
        self._failures = 0
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._abandoned = threading.Event()
        self._done = threading.Event()
        self.error: Exception | None = None
        """What made it give up, for the run to judge; None after it finished."""
        self.objects: list[ManifestEntry] = []
        """After `finish(whole=True)`: every object that may be read."""

    def start(self) -> None:
        """Begin to copy."""
        threading.Thread(target=self._run, name=f"shipper-{self._job_id}", daemon=True).start()

    def finish(self, *, whole: bool) -> None:
        """The child is gone: send all it left, or only what a later run needs. Returns at once."""
        with self._lock:
            self._goal = "whole" if whole else "resumable"
            if self._done.is_set():  # it had finished what was asked before
                self._done.clear()
                self.start()
        self._wake.set()

    def wait(self, seconds: float) -> bool:
        """Whether it has finished, or given up, within that time."""
        return self._done.wait(seconds)

    def abandon(self) -> None:
        """Begin no further exchange; one that is under way ends by itself."""
        self._abandoned.set()
        self._wake.set()

    def _run(self) -> None:
        self.error = None
        while not self._abandoned.is_set():
            goal = self._goal
            try:
                self._round(goal)
                self._failures = 0
                if goal is not None and self._is_reached(goal):
                    return
            except Unavailable as error:
                self._failures += 1
                log.warning("ship_failed", job_id=self._job_id, reason=str(error))
            except Fenced:
                break
            except Exception as error:  # such as a full disk, on which room may come while the run goes on
                log.exception("ship_broken", job_id=self._job_id)
                self._failures += 1
                if goal is not None:
                    self.error = error
                    break
            self._wake.wait(self._pause())
            self._wake.clear()
        with self._lock:
            self._done.set()

    def _is_reached(self, goal: Goal) -> bool:
        """Whether that is still what was asked for; then it is done."""
        with self._lock:
            if goal == self._goal:
                self._done.set()
            return goal == self._goal

    def _pause(self) -> float:
        if self._failures:
            return min(RETRY_SECONDS * 2 ** min(self._failures, 10), LONGEST_RETRY_SECONDS)
        return SYNC_SECONDS

    def _round(self, goal: Goal | None) -> None:
        """One pass over the folder; safe to repeat from any point."""
        names = {path.name for place in ("checkpoints", HELD_FOLDER) for path in self._folder.glob(f"{place}/step-*")}
        for name in sorted(names):
            step = int(name.removeprefix("step-"))
            if step not in self._commits and step not in self._damaged:
                self._commit(self._hold(name), step)
                shutil.rmtree(self._folder / HELD_FOLDER / name)
        self._tell_progress()
        if goal == "whole":
            self._send_rest()
            return
        if goal == "resumable":
            if (self._folder / "stderr.log").exists():
                self._send(self._folder / "stderr.log")
            return
        for _, path in rollouts.step_files(self._folder / "rollouts"):
            self._send(path)
        self._drop_pruned()
        self._send_events(at_least=EVENTS_AT_ONCE)

    def _hold(self, name: str) -> Path:
        """Link a checkpoint's files, since the run may prune it before slow storage has taken it."""
        held = self._folder / HELD_FOLDER / name
        held.mkdir(parents=True, exist_ok=True)
        for path in sorted(self._folder.glob(f"checkpoints/{name}/*")):
            # Pruned meanwhile: without its manifest, which goes first, what was held is no checkpoint.
            with contextlib.suppress(FileNotFoundError, FileExistsError):
                (held / path.name).hardlink_to(path)
        return held

    def _commit(self, folder: Path, step: int) -> None:
        """Send a checkpoint, its manifest last, then the rollouts up to it as one part, then the commit."""
        if not self._send_checkpoint(folder):
            return
        self._merge_rollouts(step)
        try:
            self._send_events(at_least=1)
        except Unavailable as error:
            if error.server != "Valkey":
                raise
            log.warning("events_not_sent", job_id=self._job_id, reason=str(error))  # the next commit has them
        checkpoint = f"{self._prefix}checkpoints/{folder.name}/"
        objects = [entry for entry in self._valid() if not _is_later(entry, step)]
        self._guard()
        lineage.put_commit(
            self._store,
            Commit(job=self._job_id, epoch=self._epoch, step=step, checkpoint=checkpoint, objects=objects),
        )
        self._commits.append(step)
        log.info("committed", job_id=self._job_id, epoch=self._epoch, step=step)

    def _send_checkpoint(self, folder: Path) -> bool:
        """Whether a checkpoint is in the bucket, whole and as its manifest says."""
        try:
            manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_bytes())
        except (FileNotFoundError, ValueError):
            return False  # pruned
        for file in manifest["files"]:
            entry = self._send(folder / Path(file["path"]).name)
            if entry is None:
                return False  # pruned while it was linked
            if entry.sha256 != file["sha256"]:
                log.error("checkpoint_damaged", job_id=self._job_id, file=entry.path)
                self._damaged.add(int(folder.name.removeprefix("step-")))
                return False
        return self._send(folder / "manifest.json") is not None

    def _drop_pruned(self) -> None:
        """Delete the checkpoints that are gone here and not needed: commit first, then manifest, then the rest."""
        steps = {int(match[1]) for name in self._sent if (match := _CHECKPOINT.match(name))}
        for step in sorted(steps):
            folder = f"checkpoints/step-{step:06d}"
            later = sum(committed > step for committed in self._commits)
            if (self._folder / folder).exists() or later < COMMITS_KEPT:
                continue
            if not self._lease.fresh:
                return  # another run may be going on from it
            lineage.delete_commit(self._store, self._job_id, Point(step=step, epoch=self._epoch))
            names = [name for name in self._sent if name.startswith(f"{folder}/")]
            self._discard(sorted(names, key=lambda name: not name.endswith("/manifest.json")))
        self._delete_discarded()

    def _merge_rollouts(self, up_to: int | None) -> None:
        merged = rollouts.merge(self._folder / "rollouts", up_to)
        if merged is not None:
            part, replaced = merged
            self._send(part)
            # All at once: steps left here by a deletion that failed would be merged into a second part.
            self._discard([name for path in replaced if (name := self._name(path)) in self._sent])
            for path in replaced:
                path.unlink()
        self._delete_discarded()

    def _discard(self, names: list[str]) -> None:
        """Name these to nobody from now on, whatever becomes of their deletion."""
        for name in names:
            del self._sent[name]
            self._stamps.pop(name, None)
        self._discarded += names

    def _delete_discarded(self) -> None:
        while self._discarded:
            self._guard()
            self._store.delete(self._prefix + self._discarded[0])
            del self._discarded[0]

    def _send_rest(self) -> None:
        """Send everything a run that has ended left, and list all that may be read."""
        self._merge_rollouts(None)
        self._keep_known_metrics()
        for pattern in FINAL_FILES:
            for path in sorted(self._folder.glob(pattern)):
                if path.is_file():
                    self._send(path)
        self._send_events(at_least=1)
        # A zombie of an earlier run may have pruned a checkpoint of its own.
        self.objects = lineage.without_pruned(self._store, self._valid())

    def _keep_known_metrics(self) -> None:
        """A run that ended before it wrote metrics still knows those of the steps before it."""
        metrics, known = self._folder / "metrics.jsonl", self._folder / "inputs" / "resume" / "metrics.jsonl"
        if not metrics.exists() and known.exists():
            shutil.copyfile(known, metrics)

    def _valid(self) -> list[ManifestEntry]:
        """Inherited and own objects by path; half-sent checkpoints are no objects yet."""
        objects = {entry.path: entry for entry in self._base.objects}
        objects |= {name: entry for name, entry in self._sent.items() if self._is_whole(name)}
        return [objects[path] for path in sorted(objects)]

    def _is_whole(self, name: str) -> bool:
        match = _CHECKPOINT.match(name)
        return match is None or f"{match[0]}manifest.json" in self._sent

    def _send_events(self, at_least: int) -> None:
        """Send the events the ledger numbered since the last time, unless they are too few."""
        self._guard()
        entries = journal.store_events(
            self._store, self._ledger, self._job_id, self._prefix, after=self._last_event, at_least=at_least
        )
        for entry in entries:
            self._sent[entry.path] = entry
            self._last_event = max(file.last for file in journal.event_files([entry.key]))

    def _tell_progress(self) -> None:
        """Note in the record what is committed; late rather than at the cost of a round."""
        step = max(self._commits, default=0)
        if step <= self._told:
            return
        try:
            self._ledger.change(self._job_id, epoch=self._epoch, fields={"checkpoint_step": step})
        except Unavailable:
            if self._goal is None:
                return
            raise  # the run ends: there is no later round to tell it in
        self._told = step

    def _send(self, path: Path) -> ManifestEntry | None:
        """Send a file unless it is in the bucket as it is; None where it is gone."""
        name = self._name(path)
        self._guard()
        try:
            state = path.stat()
            stamp = (state.st_size, state.st_mtime_ns)
            if self._stamps.get(name) == stamp:
                return self._sent[name]
            sha256, size = self._store.upload(path, self._prefix + name)
        except FileNotFoundError:
            return None
        self._sent[name] = ManifestEntry(path=name, key=self._prefix + name, sha256=sha256, size=size)
        self._stamps[name] = stamp
        return self._sent[name]

    def _guard(self) -> None:
        if self._lease.lost or self._abandoned.is_set():
            raise Fenced(f"epoch {self._epoch} of {self._job_id} is over")

    def _name(self, path: Path) -> str:
        """What a reader knows a file as."""
        return path.relative_to(self._folder).as_posix().replace(f"{HELD_FOLDER}/", "checkpoints/", 1)


def _is_later(entry: ManifestEntry, step: int) -> bool:
    """Whether an object holds steps after this one."""
    match = _CHECKPOINT.match(entry.path)
    if match:
        return int(match[1]) > step
    return any(file.last > step for file in lineage.listed_rollouts([entry]))
