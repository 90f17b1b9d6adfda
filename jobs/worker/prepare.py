"""Prepares a run folder: the spec, the data set, and the checkpoint from which to resume or to start.

A job that serves or exports gets the adapters of its source job in `inputs/adapters/` (`grpo_core.adapters`), and no
data. Owns `spec.json` and `inputs/`, and chooses where a run begins: at the best commit of earlier runs with a complete
checkpoint, or at the start. Invariants: `inputs/resume/` holds every file of one checkpoint with the hash in its
commit, or does not exist; and no folder is created after the run's folder was removed, so an abandoned download leaves
nothing.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from grpo_core import strict_json
from grpo_core.adapters import MAIN, LocalAdapter, name_of, write_index
from grpo_core.datasets import EVALUATION_UPLOAD_NAME, UPLOAD_NAME
from grpo_core.reasons import EventType, WarningCode
from grpo_core.retry import AT_ONCE, retry
from grpo_core.run_dir.layout import sha256_of
from grpo_core.spec import JobSpec
from grpo_core.spec.sections import SourceReference
from jobs.errors import Damaged, NotFound
from jobs.store import commits, event_log
from jobs.store.adapters import AdapterFinder, StoredAdapter
from jobs.store.bucket import ObjectStore
from jobs.store.commits import Commit, CommitRef, ResumeBase
from jobs.store.datasets import DatasetStore
from jobs.store.job import JobRecord
from jobs.store.job_store import JobEvent
from jobs.store.write_once import ManifestEntry, WriteOnceStore
from jobs.worker.interruptible_retry import Interrupt, InterruptibleRetry

log = structlog.get_logger()

RESUME_FOLDER = "resume"
INTERRUPTS: Collection[Interrupt] = ("cancel", "pause", "stop")
"""Interrupts of the preparation; stopping then loses nothing."""


class Preparation:
    """Fills the folder of one run. Raises `NotFound`, `Damaged`, `DatasetError`, and as `InterruptibleRetry` does."""

    def __init__(
        self,
        store: ObjectStore,
        datasets: DatasetStore,
        retry: InterruptibleRetry,
        folder: Path,
        *,
        find: Callable[[str], JobRecord | None] = lambda _: None,
    ) -> None:
        """`find` returns a job by its id, for the adapters that another job reads."""
        self._find = find
        self._store = store
        self._datasets = datasets
        self._retry = retry
        self._folder = folder
        self._inputs = folder / "inputs"

    def prepare(self, record: JobRecord, spec: JobSpec, epoch: int) -> Start:
        """Write the spec, fetch its data, and choose where the run begins."""
        self._inputs.mkdir(exist_ok=True)
        (self._folder / "spec.json").write_text(strict_json.dumps(spec.as_dict()), encoding="utf-8")
        if not spec.has_steps:
            if spec.source is not None:
                self._fetch_adapters(spec.source, record.owner)
        elif spec.data.source in ("upload", "s3"):
            files = {UPLOAD_NAME: spec.data.dataset, EVALUATION_UPLOAD_NAME: spec.evaluation.dataset}
            for file, dataset in files.items():
                if dataset is not None:
                    data, target = spec.data.model_copy(update={"dataset": dataset}), self._inputs / file
                    self._retry(lambda d=data, t=target: self._datasets.fetch(d, record.owner, t), INTERRUPTS)
        accumulation = record.accumulation or None
        start = self._retry(lambda: find_start(self._store, record.id, epoch, self._inputs, accumulation), INTERRUPTS)
        if spec.from_checkpoint is not None and start.base.resumed is None:
            self._fetch_checkpoint(spec.from_checkpoint.job, spec.from_checkpoint.step)
        return start

    def _fetch_adapters(self, source: SourceReference, owner: str) -> None:
        """Fetch the adapters that the job serves or exports, with their SHA-256 checked, and list them.

        The best or last one is `main`; an export of a step takes that in its place. Raises `NotFound` for one that was
        deleted since the job was accepted.
        """
        store, folder = self._store, self._inputs / "adapters"
        record = self._retry(lambda: self._find(source.job), INTERRUPTS)
        if record is None or record.owner != owner:
            raise NotFound("job", source.job)
        finder = AdapterFinder(store, source.job, record.best_step, record.manifest)
        wanted: dict[str, StoredAdapter | None] = {
            name_of(step): self._retry(lambda s=step: finder.at(s), INTERRUPTS) for step in source.steps
        }
        if source.section == "serving" or not source.steps:
            wanted[MAIN] = self._retry(finder.main, INTERRUPTS)
        folder.mkdir(exist_ok=True)
        found: list[LocalAdapter] = []
        for name, adapter in wanted.items():
            if adapter is None:
                raise NotFound("adapter", f"{name} of {source.job}")
            found.append(LocalAdapter(name=name, step=adapter.step, folder=folder / name))
            (folder / name).mkdir(exist_ok=True)
            for file in adapter.files:
                target = folder / name / file.path
                self._retry(lambda f=file, t=target: store.download(f.key, t, f.sha256), INTERRUPTS)
        write_index(folder, found)
        if source.section == "export":
            self._describe_source(record)

    def _describe_source(self, record: JobRecord) -> None:
        """Write down the spec and the report of the job that trained an adapter, for the model card of its export."""
        folder = self._inputs / "source"
        folder.mkdir(exist_ok=True)
        (folder / "spec.json").write_text(strict_json.dumps(record.spec), encoding="utf-8")
        written_once, key = WriteOnceStore(self._store), record.manifest
        manifest = self._retry(lambda: written_once.manifest(key), INTERRUPTS) if key else None
        for entry in manifest.objects if manifest else ():
            if entry.path == "report.json":
                target = folder / entry.name
                self._retry(lambda e=entry, t=target: self._store.download(e.key, t, e.sha256), INTERRUPTS)

    def _fetch_checkpoint(self, job_id: str, step: int) -> None:
        """Fetch the adapter from which the job starts, of this or another job."""
        store, target = self._store, self._inputs / "checkpoint"
        target.mkdir(exist_ok=True)
        prefix = self._retry(lambda: event_log.find_checkpoint(store, job_id, step), INTERRUPTS)
        if prefix is None:
            raise NotFound("checkpoint", f"{step} of {job_id}")
        manifest = self._retry(lambda: store.get_json(f"{prefix}manifest.json"), INTERRUPTS) or {"files": []}
        for entry in manifest["files"]:
            name, sha256 = Path(entry["path"]).name, entry["sha256"]
            self._retry(lambda n=name, s=sha256: store.download(prefix + n, target / n, s), INTERRUPTS)


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where a run begins."""

    base: ResumeBase
    warnings: list[JobEvent] = field(default_factory=list[JobEvent])
    """Events for the owner, one for each skipped checkpoint."""


def find_start(store: ObjectStore, job_id: str, epoch: int, inputs: Path, accumulation: int | None) -> Start:
    """Fetch the best checkpoint into `inputs/resume/` and write the run's base. May be repeated.

    Raises `Unavailable`; files of an earlier attempt are kept.
    """
    rejected = commits.rejected_up_to(store, job_id, epoch - 1)
    warnings: list[JobEvent] = []
    found: Commit | None = None
    for ref in commits.commits_up_to(store, job_id, epoch - 1):
        commit = commits.read_commit(store, job_id, ref) if ref not in rejected else None
        if commit is None:
            continue
        try:
            _fetch(store, commit, inputs / RESUME_FOLDER)
        except Damaged as error:
            shutil.rmtree(inputs / RESUME_FOLDER)
            log.warning("checkpoint_skipped", job_id=job_id, step=ref.step, epoch=ref.epoch, reason=str(error))
            warnings.append(skipped(ref, str(error)))
            continue
        found = commit
        break
    base = ResumeBase(
        job=job_id,
        epoch=epoch,
        resumed=found.ref if found else None,
        objects=commits.inherited(store, job_id, epoch, found),
        gradient_accumulation=accumulation,
    )
    commits.put_base(store, base)
    return Start(base=base, warnings=warnings)


def skipped(ref: CommitRef, reason: str) -> JobEvent:
    """Return the event for a checkpoint that could not be used."""
    message = (
        f"The checkpoint of step {ref.step} (run {ref.epoch}) cannot be read: {reason}. "
        "The job resumes from the previous one."
    )
    where = {"step": ref.step, "epoch": ref.epoch}
    return JobEvent(
        type=EventType.WARNING,
        step=ref.step,
        data={"code": WarningCode.CHECKPOINT_SKIPPED, "message": message, **where},
    )


def _fetch(store: ObjectStore, commit: Commit, folder: Path) -> None:
    """Download a commit's checkpoint. Raises `Damaged` if it is incomplete."""
    entries = [entry for entry in commit.objects if entry.key.startswith(commit.checkpoint)]
    if not any(entry.key == f"{commit.checkpoint}manifest.json" for entry in entries):
        raise Damaged(commit.checkpoint, "names no manifest")
    folder.mkdir(exist_ok=True)
    wanted = {entry.name for entry in entries}
    for other in folder.iterdir():
        if other.name not in wanted:  # left by an earlier attempt with another commit
            other.unlink()
    for entry in entries:
        _fetch_file(store, entry, folder / entry.name)


def _fetch_file(store: ObjectStore, entry: ManifestEntry, path: Path) -> None:
    if path.exists() and sha256_of(path) == entry.sha256:
        return
    path.unlink(missing_ok=True)
    # Twice, before the stored object counts as damaged.
    retry(lambda: store.download(entry.key, path, entry.sha256), Damaged, [AT_ONCE])
