"""Uploads a run folder while the run continues, commits its checkpoints, and lists the valid objects.

Owns which files are uploaded, when, and what is deleted, in a separate thread, so that slow storage delays neither
heartbeats nor commands. Invariants: it writes only below its own epoch's prefix, a commit is written after all objects
that it names and deleted before them, the newest commit always has its checkpoint, and rollouts that were uploaded once
are in the bucket at any time, because the objects that a merge replaces are deleted minutes later (`Discards`).
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Collection, Iterator
from itertools import repeat
from pathlib import Path
from typing import Any, Literal

import structlog

from grpo_core.retry import backoff
from jobs.errors import Fenced, Unavailable
from jobs.store import commits, event_log, object_keys
from jobs.store.bucket import ObjectStore
from jobs.store.commits import Commit, CommitRef, ResumeBase, RolloutFile
from jobs.store.discards import Discards
from jobs.store.job_store import JobStore
from jobs.store.write_once import ManifestEntry
from jobs.worker import rollout_compaction, run_dirs, untrusted_files
from jobs.worker.interruptible_retry import LONGEST_RETRY_SECONDS, RETRY_SECONDS
from jobs.worker.lease import Lease

log = structlog.get_logger()

SYNC_SECONDS = 1.0
EVENTS_AT_ONCE = 500
"""Approximate number of events per file between commits, so that a long job has few files."""
FINAL_FILES = (
    *("metrics.jsonl", "evaluations.jsonl", "evaluation.parquet", "report.json", "report.html", "spec.json"),
    *("stderr.log", "adapter/*", "export/*", "tensorboard/**/*"),
)
"""Files that change until the run ends."""
ROLLOUT_SECONDS, ROLLOUT_SHARE = 30.0, 1 / 20
"""Longest time between two uploads of rollouts, and the same as a share of the run's age: somebody watches a young run,
and a long one should cost few requests."""
COMMITS_KEPT = 2
"""Number of later commits after which a checkpoint that the run has pruned is deleted."""

Goal = Literal["whole", "resumable"]

_CHECKPOINT = re.compile(r"checkpoints/step-(\d+)/")
_CHECKPOINT_FOLDER = re.compile(r"step-\d{6,15}")
HOLES_BYTES, HOLES_FACTOR = 16 * 1024**2, 64
"""A file larger than the first that takes less than its size divided by the second on disk is refused as sparse.
Compressing file systems stay below this factor."""
MAX_FILES = 20_000
MAX_RUN_BYTES = 1_000_000_000_000
MANIFEST_BYTES = 16 * 1024**2


class Uploader:
    """Uploads one run. Call `start`, then `finish`, then `wait`."""

    def __init__(
        self,
        store: ObjectStore,
        job_store: JobStore,
        lease: Lease,
        job_id: str,
        epoch: int,
        folder: Path,
        base: ResumeBase,
        *,
        committed: Callable[[], object] = lambda: None,
        max_bytes: int = MAX_RUN_BYTES,
    ) -> None:
        """`committed` is called after each commit and may raise `Unavailable`."""
        self._committed = committed
        self._max_bytes = max_bytes
        self.not_sent = ""
        """The first file that was refused for its size, with the reason; empty if none was."""
        self._store = store
        self._job_store = job_store
        self._lease = lease
        self._job_id = job_id
        self._epoch = epoch
        self._folder = folder
        self._private = run_dirs.private(folder)
        self._held = self._private / "checkpoints"
        """Folder of hard links to checkpoints that are being uploaded."""
        self._base = base
        self._prefix = object_keys.run(job_id, epoch)
        self._sent: dict[str, ManifestEntry] = {}
        self._stamps: dict[str, tuple[int, int]] = {}
        """Size and modification time of each uploaded file, from just before the upload."""
        self._discarded: list[str] = []
        """Names of uploaded objects that must still be deleted, in this order."""
        self._discards = Discards(job_store, store)
        self._replaced: list[str] = []
        """Keys of objects that a merge has replaced since they were last handed to `Discards`."""
        self._began = self._rollouts_due = time.monotonic()
        self._rollout_step = 0
        """The last step whose rollouts were uploaded."""
        self._batches: dict[str, RolloutFile] = {}
        """Uploaded rollouts of one or several steps by name, which the next commit merges into one part."""
        self._commits: list[int] = []
        self._damaged: set[int] = set()
        """Steps whose checkpoint on this disk differs from its manifest."""
        self._published_step = 0
        self._looked = 0
        self._last_event = max((file.last for file in event_log.event_files(e.key for e in base.objects)), default=0)
        self._goal: Goal | None = None
        self._failing = False
        self._pauses: Iterator[float] = repeat(SYNC_SECONDS)
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._abandoned = threading.Event()
        self._done = threading.Event()
        self.error: Exception | None = None
        """The error that ended it, for the run to handle; None after a normal end."""
        self.objects: list[ManifestEntry] = []
        """All valid objects, after `finish(whole=True)`."""

    def start(self) -> None:
        """Start the uploads."""
        threading.Thread(target=self._run, name=f"uploader-{self._job_id}", daemon=True).start()

    def finish(self, *, whole: bool) -> None:
        """Upload the rest after the child has ended: everything, or only what a later run needs. Returns at once."""
        with self._lock:
            self._goal = "whole" if whole else "resumable"
            if self._done.is_set():  # an earlier request was finished
                self._done.clear()
                self.start()
        self._wake.set()

    def wait(self, seconds: float) -> bool:
        """Wait for at most `seconds`. Returns whether it has finished or given up."""
        return self._done.wait(seconds)

    def abandon(self) -> None:
        """Start no further request; the current one ends by itself."""
        self._abandoned.set()
        self._wake.set()

    def _run(self) -> None:
        self.error = None
        while not self._abandoned.is_set():
            goal = self._goal
            try:
                self._round(goal)
                self._failing, self._pauses = False, repeat(SYNC_SECONDS)
                if goal is not None and self._is_reached(goal):
                    return
            except Unavailable as error:
                self._back_off()
                log.warning("ship_failed", job_id=self._job_id, reason=str(error))
            except Fenced:
                break
            except Exception as error:  # for example a full disk, which may get free space while the run continues
                log.exception("ship_broken", job_id=self._job_id)
                self._back_off()
                if goal is not None:
                    self.error = error
                    break
            self._wake.wait(next(self._pauses))
            self._wake.clear()
        with self._lock:
            self._done.set()

    def _is_reached(self, goal: Goal) -> bool:
        """Whether `goal` is still the requested one; then mark it as done."""
        with self._lock:
            if goal == self._goal:
                self._done.set()
            return goal == self._goal

    def _back_off(self) -> None:
        """Wait longer after each failure in a row."""
        if not self._failing:
            self._failing, self._pauses = True, backoff(2 * RETRY_SECONDS, LONGEST_RETRY_SECONDS)

    def _round(self, goal: Goal | None) -> None:
        """Pass over the folder once. May be interrupted and repeated."""
        places = (self._folder / "checkpoints", self._held)
        names = {path.name for place in places for path in place.glob("step-*")}
        for name in sorted(filter(_CHECKPOINT_FOLDER.fullmatch, names)):
            step = int(name.removeprefix("step-"))
            if step not in self._commits and step not in self._damaged:
                self._commit(self._hold(name), step)
                shutil.rmtree(self._held / name)
        self._publish_progress()
        self._apply_commands()
        if goal == "whole":
            self._send_rest()
        elif goal == "resumable":
            if (self._folder / "stderr.log").exists():
                self._send(self._folder / "stderr.log")
        else:
            if time.monotonic() >= self._rollouts_due:
                self._send_rollouts()
            self._drop_pruned()
            self._send_events(at_least=EVENTS_AT_ONCE)
        self._discard_replaced()

    def _hold(self, name: str) -> Path:
        """Link a checkpoint's files, because the run may prune it before it is uploaded."""
        held = self._held / name
        held.mkdir(parents=True, exist_ok=True)
        for path in sorted(self._folder.glob(f"checkpoints/{name}/*")):
            # If it is pruned meanwhile, its manifest is missing, so the linked files are not a checkpoint.
            with (
                contextlib.suppress(FileNotFoundError, FileExistsError, untrusted_files.Refused),
                untrusted_files.file(self._folder, path) as source,
            ):
                untrusted_files.link(source, held / path.name)
        return held

    def _commit(self, folder: Path, step: int) -> None:
        """Upload a checkpoint, its manifest last, then its rollouts as one part, then the commit."""
        if not self._send_checkpoint(folder):
            return
        self._merge_rollouts(step)
        try:
            self._send_events(at_least=1)
        except Unavailable as error:
            if error.server != "Valkey":
                raise
            log.warning("events_not_sent", job_id=self._job_id, reason=str(error))  # the next commit sends them
        checkpoint = f"{self._prefix}checkpoints/{folder.name}/"
        objects = [entry for entry in self._valid() if not _is_later(entry, step)]
        self._guard()
        commits.put_commit(
            self._store,
            Commit(job=self._job_id, epoch=self._epoch, step=step, checkpoint=checkpoint, objects=objects),
        )
        self._commits.append(step)
        log.info("committed", job_id=self._job_id, epoch=self._epoch, step=step)

    def _send_checkpoint(self, folder: Path) -> bool:
        """Upload a checkpoint. Returns whether it is complete in the bucket and equals its manifest."""
        try:
            with (folder / "manifest.json").open("rb") as text:
                manifest: dict[str, Any] = json.loads(text.read(MANIFEST_BYTES))
            files = [(Path(file["path"]).name, file["sha256"]) for file in manifest["files"]]
        except FileNotFoundError:
            return False  # pruned
        except (ValueError, TypeError, KeyError):
            return self._note_damage(folder, "manifest.json")
        for name, sha256 in files:
            entry = self._send(folder / name)
            if entry is None:
                # It was pruned while it was linked; or it was refused, which will not change.
                return self._note_damage(folder, name) if self.not_sent else False
            if entry.sha256 != sha256:
                return self._note_damage(folder, name)
        return self._send(folder / "manifest.json") is not None

    def _note_damage(self, folder: Path, name: str) -> Literal[False]:
        log.error("checkpoint_damaged", job_id=self._job_id, file=f"{folder.name}/{name}")
        self._damaged.add(int(folder.name.removeprefix("step-")))
        return False

    def _drop_pruned(self) -> None:
        """Delete pruned checkpoints that are not needed: first the commit, then the manifest, then the rest."""
        steps = {int(match[1]) for name in self._sent if (match := _CHECKPOINT.match(name))}
        for step in sorted(steps):
            folder = f"checkpoints/step-{step:06d}"
            later = sum(committed > step for committed in self._commits)
            if (self._folder / folder).exists() or later < COMMITS_KEPT:
                continue
            if not self._lease.fresh:
                return  # another run may be resuming from it
            commits.delete_commit(self._store, self._job_id, CommitRef(step=step, epoch=self._epoch))
            names = [name for name in self._sent if name.startswith(f"{folder}/")]
            self._discard(sorted(names, key=lambda name: not name.endswith("/manifest.json")))
        self._delete_discarded()

    def _send_rollouts(self) -> None:
        """Upload the rollouts of new steps."""
        last = max((step for step, _ in rollout_compaction.step_files(self._folder / "rollouts")), default=0)
        if last <= self._rollout_step:
            return
        self._send_batch(self._rollout_step, last)
        self._rollout_step = last
        now = time.monotonic()
        self._rollouts_due = now + min(ROLLOUT_SECONDS, ROLLOUT_SHARE * (now - self._began))

    def _send_batch(self, after: int, up_to: int) -> None:
        """Upload the rollouts of these steps in one object, until a commit merges them into a larger one."""
        into = self._private / "rollouts"
        into.mkdir(parents=True, exist_ok=True)
        merged = rollout_compaction.merge(self._folder / "rollouts", up_to, after=after, into=into)
        if merged is None:
            return
        entry = self._send(merged[0])
        merged[0].unlink()
        if entry is not None:
            (self._batches[entry.path],) = commits.listed_rollouts([entry])

    def _merge_rollouts(self, up_to: int | None) -> None:
        """Upload the rollouts of the steps up to `up_to` as one part, in place of all that were uploaded before."""
        merged = rollout_compaction.merge(self._folder / "rollouts", up_to)
        if merged is None:
            return
        part, files = merged
        old = [name for name, batch in self._batches.items() if up_to is None or batch.first <= up_to]
        for name in old:
            if up_to is not None and (last := self._batches[name].last) > up_to:
                # First the rest of that batch, and no more: readers of the last release would miss steps after it.
                self._send_batch(up_to, last)
        if self._send(part, instead_of=old) is None:
            return  # it was refused, so the batches stay
        for name in old:
            del self._batches[name]
        replaced = [name for name in old if name != self._name(part)]
        self._forget(replaced)
        self._replaced += [self._prefix + name for name in replaced]
        rollout_compaction.remove(self._folder / "rollouts", files)

    def _discard_replaced(self) -> None:
        if self._replaced:
            self._guard()
            self._discards.add(self._replaced)
            self._replaced = []

    def _discard(self, names: list[str]) -> None:
        """Remove these from the valid objects and delete them later."""
        self._forget(names)
        self._discarded += names

    def _forget(self, names: list[str]) -> None:
        """Remove these from the valid objects."""
        for name in names:
            del self._sent[name]
            self._stamps.pop(name, None)

    def _delete_discarded(self) -> None:
        while self._discarded:
            self._guard()
            self._store.delete(self._prefix + self._discarded[0])
            del self._discarded[0]

    def _send_rest(self) -> None:
        """Upload all files of an ended run, and list all valid objects."""
        self._merge_rollouts(None)
        self._delete_discarded()
        self._keep_known_metrics()
        for pattern in FINAL_FILES:
            for path in sorted(self._folder.glob(pattern)):
                if path.is_file():
                    self._send(path)
        self._send_events(at_least=1)
        # A zombie of an earlier run may have pruned its checkpoint meanwhile.
        self.objects = commits.without_pruned(self._store, self._valid())

    def _keep_known_metrics(self) -> None:
        """Keep the metrics of earlier steps for a run that ended before it wrote any."""
        metrics, known = self._folder / "metrics.jsonl", self._folder / "inputs" / "resume" / "metrics.jsonl"
        if not metrics.exists() and known.exists():
            with (
                contextlib.suppress(FileNotFoundError, FileExistsError, untrusted_files.Refused),
                untrusted_files.file(self._folder, known) as source,
                untrusted_files.new_file(self._folder, metrics) as target,
            ):
                shutil.copyfile(source, target)

    def _valid(self) -> list[ManifestEntry]:
        """Return inherited and own objects by path, without incomplete checkpoints."""
        objects = {entry.path: entry for entry in self._base.objects}
        objects |= {name: entry for name, entry in self._sent.items() if self._is_whole(name)}
        return [objects[path] for path in sorted(objects)]

    def _is_whole(self, name: str) -> bool:
        match = _CHECKPOINT.match(name)
        return match is None or f"{match[0]}manifest.json" in self._sent

    def _send_events(self, at_least: int) -> None:
        """Upload the job store's new events, unless there are fewer than `at_least`."""
        self._guard()
        entries = event_log.store_events(
            self._store, self._job_store, self._job_id, self._prefix, after=self._last_event, at_least=at_least
        )
        for entry in entries:
            self._sent[entry.path] = entry
            self._last_event = max(file.last for file in event_log.event_files([entry.key]))

    def _publish_progress(self) -> None:
        """Store the committed step in the record. After an error, a later round does it."""
        step = max(self._commits, default=0)
        if step <= self._published_step:
            return
        try:
            self._job_store.change(self._job_id, epoch=self._epoch, fields={"checkpoint_step": step})
        except Unavailable:
            if self._goal is None:
                return
            raise  # the run ends, so there is no later round
        self._published_step = step

    def _apply_commands(self) -> None:
        """Apply the owner's commands in the bucket after each commit, because Valkey may have lost them."""
        if len(self._commits) > self._looked:
            self._committed()
            self._looked = len(self._commits)

    def _send(self, path: Path, *, instead_of: Collection[str] = ()) -> ManifestEntry | None:
        """Upload a file unless the bucket has it unchanged; None if it no longer exists or was refused.

        The objects that it replaces, `instead_of`, do not count against the limits.
        """
        name = self._name(path)
        self._guard()
        root = self._private if path.is_relative_to(self._private) else self._folder
        try:
            with untrusted_files.file(root, path) as source:
                state = source.stat()
                stamp = (state.st_size, state.st_mtime_ns)
                if self._stamps.get(name) == stamp:
                    return self._sent[name]
                self._require_room(name, state, instead_of)
                sha256, size = self._store.upload(source, self._prefix + name)
        except FileNotFoundError:
            return None
        except untrusted_files.Refused as error:
            log.warning("file_refused", job_id=self._job_id, file=name, reason=str(error))
            return None
        self._sent[name] = ManifestEntry(path=name, key=self._prefix + name, sha256=sha256, size=size)
        self._stamps[name] = stamp
        return self._sent[name]

    def _require_room(self, name: str, state: os.stat_result, instead_of: Collection[str]) -> None:
        """Refuse a sparse file, which is small on this disk and large in the bucket, and files above the limits."""
        others = [entry.size for path, entry in self._sent.items() if path != name and path not in instead_of]
        fault = ""
        if state.st_size > HOLES_BYTES and state.st_blocks * 512 < state.st_size // HOLES_FACTOR:
            fault = f"has {state.st_size} bytes, almost none of them written"
        elif len(others) >= MAX_FILES:
            fault = f"is one more than {MAX_FILES} files"
        elif sum(others) + state.st_size > self._max_bytes:
            fault = f"makes the run larger than GRPO_MAX_RUN_MB, {self._max_bytes // 1_000_000} MB"
        if fault:
            self.not_sent = self.not_sent or f"{name[:200]} {fault}"
            raise untrusted_files.Refused(errno.EFBIG, fault, name)

    def _guard(self) -> None:
        if self._lease.lost or self._abandoned.is_set():
            raise Fenced(f"epoch {self._epoch} of {self._job_id} is over")

    def _name(self, path: Path) -> str:
        """Return a file's path for readers."""
        root = self._private if path.is_relative_to(self._private) else self._folder
        return path.relative_to(root).as_posix()


def _is_later(entry: ManifestEntry, step: int) -> bool:
    """Whether an object holds rollouts of later steps."""
    match = _CHECKPOINT.match(entry.path)
    if match:
        return int(match[1]) > step
    return any(file.last > step for file in commits.listed_rollouts([entry]))
