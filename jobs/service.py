"""What the API may do with jobs: submit, look, cancel, read events and artifacts, keep data sets and keys.

The one way into `jobs` for code that serves people; synchronous and thread-safe. Owns the order of writes: what
was asked is in the bucket before it is in the ledger, and in the ledger before anyone is told.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from grpo_core.datasets import DatasetSummary
from grpo_core.estimates import warnings as suspicious_settings
from grpo_core.spec import JobSpec, Problem
from jobs import journal
from jobs.archive import Archive, Outcome
from jobs.datasets import DatasetRecord, DatasetStore
from jobs.ending import settle
from jobs.errors import Conflict, JobsError, NotFound, Rejected, Unavailable
from jobs.keys import KeyRecord, KeyStore
from jobs.ledger import Ledger
from jobs.outbox import Outbox
from jobs.queue import Doorbell, queue_for
from jobs.record import TERMINAL, JobRecord, JobStatus, new_job_id
from jobs.registry import WorkerRegistry
from jobs.settings import QueueSettings, StorageSettings
from jobs.storage import ObjectStore
from jobs.sweeper import Sweeper

LIST_SCAN = 200
"""Records looked through at a time when a list is filtered by metadata."""
MAX_SCANS = 50

T = TypeVar("T")


class ServiceSettings(BaseSettings):
    """What the facade itself needs to know."""

    model_config = SettingsConfigDict(frozen=True, populate_by_name=True, extra="ignore")

    presign_seconds: int = Field(default=900, ge=10, le=604_800, validation_alias="GRPO_PRESIGN_SECONDS")
    """How long a download link works."""


@dataclass(frozen=True, kw_only=True)
class Page(Generic[T]):
    """Part of a list; `next_cursor` is None on the last one."""

    items: list[T]
    next_cursor: str | None


@dataclass(frozen=True, kw_only=True)
class SpecWarning:
    """Something legal in a spec that its author may not mean."""

    pointer: str
    code: str
    message: str


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """A file of a finished job, and a link that reads it for a while."""

    path: str
    key: str
    size: int
    sha256: str
    url: str
    expires_at: datetime


class JobService:
    """The facade over ledger, bucket and queue."""

    def __init__(self, storage: StorageSettings, queue: QueueSettings, settings: ServiceSettings | None = None) -> None:
        self._settings = settings or ServiceSettings()
        self._queue_settings = queue
        self.store = ObjectStore(storage)
        self.ledger = Ledger(queue)
        self.archive = Archive(self.store)
        self.keys = KeyStore(self.store, self.ledger)
        self.datasets = DatasetStore(self.store)
        self.workers = WorkerRegistry(self.ledger)
        self._outbox = Outbox(Doorbell(queue), self.ledger)
        self._sweeper = Sweeper(self.ledger, self.archive, self._outbox, queue)
        self._name = f"api-{socket.gethostname()}-{os.getpid()}"
        self._started = threading.Event()

    @classmethod
    def from_settings(cls) -> Self:
        """A service on the servers named in the environment."""
        return cls(StorageSettings(), QueueSettings())

    def start(self) -> None:
        """Check that storage is safe to use, then begin to ring and to sweep."""
        self.store.ensure_ready()
        self._outbox.start()
        self._sweeper.start()

    def close(self) -> None:
        """Stop the threads."""
        self._sweeper.close()
        self._outbox.close()

    def submit(self, spec: JobSpec, owner: str) -> JobRecord:
        """Accept a job: from here on it is run to an end. Raises `Rejected`, `Unavailable`."""
        self._check_references(spec, owner)
        now = datetime.now(UTC)
        record = JobRecord(
            id=new_job_id(),
            owner=owner,
            status=JobStatus.QUEUED,
            spec=spec.as_dict(),
            spec_sha256=spec.digest(),
            created_at=now,
            updated_at=now,
            queue=queue_for(spec, self._queue_settings.prefix),
            name=spec.name,
            metadata=dict(spec.metadata),
            total_steps=spec.training.steps,
        )
        self.archive.put_job(record.id, _as_asked(record))
        try:
            self.ledger.create(record)
        except Unavailable:
            self._take_back(record.id)
            raise
        self._outbox.add(record.id, record.queue)
        return record

    def _take_back(self, job_id: str) -> None:
        """The client is about to hear that the job was not accepted: leave nothing that would run it later."""
        try:
            self.archive.forget_job(job_id)
        except Unavailable:
            return  # both servers are away; `job.json` alone never starts a job while Valkey keeps its data

    def warnings(self, spec: JobSpec, owner: str) -> list[SpecWarning]:
        """What a dry run tells: settings that are legal and probably not meant. Raises `Rejected` as `submit` does."""
        self._check_references(spec, owner)
        found = [SpecWarning(pointer=w.pointer, code=w.code, message=w.message) for w in suspicious_settings(spec)]
        queue = queue_for(spec, self._queue_settings.prefix)
        if not self.workers.serving(queue):
            found.append(
                SpecWarning(
                    pointer="/resources",
                    code="no_worker",
                    message=f"No worker that can run this is connected now ({queue}); the job would wait for one.",
                )
            )
        return found

    def _check_references(self, spec: JobSpec, owner: str) -> None:
        """What only the service can check: that what a spec names exists and is its owner's."""
        problems: list[Problem] = []
        if spec.data.source == "file":
            problems.append(
                Problem(
                    pointer="/data/source",
                    code="local_file",
                    detail="the service reads no local files",
                    remedy="Upload the file with POST /datasets and use source upload.",
                )
            )
        if spec.data.source == "upload":
            problems += self._check_upload(spec, owner)
        if spec.from_checkpoint is not None:
            problems += self._check_checkpoint(spec.from_checkpoint.job, spec.from_checkpoint.step, owner)
        if problems:
            raise Rejected(*problems)

    def _check_upload(self, spec: JobSpec, owner: str) -> list[Problem]:
        try:
            dataset = self.datasets.get(spec.data.dataset, owner)
        except NotFound:
            remedy = "Upload it first with POST /datasets and use the id that returns."
            return [Problem(pointer="/data/dataset", code="no_such_dataset", detail="does not exist", remedy=remedy)]
        columns = {"question_column": spec.data.question_column, "answer_column": spec.data.answer_column}
        return [
            Problem(
                pointer=f"/data/{field}",
                code="no_such_column",
                detail=f"the data set has no column {column!r} in every row",
                remedy=f"Use one of {', '.join(dataset.columns)}.",
            )
            for field, column in columns.items()
            if column not in dataset.columns
        ]

    def _check_checkpoint(self, job_id: str, step: int, owner: str) -> list[Problem]:
        """A checkpoint can be started from once its manifest, which is written last, is there."""
        try:
            record = self.get(job_id, owner)
        except NotFound:
            return [_no_checkpoint("job", "does not exist", "Use the id of one of your jobs.")]
        if journal.find_checkpoint(self.store, record.id, step) is None:
            return [_no_checkpoint("step", "was not kept", "Use a step at which that job saved its adapter.")]
        return []

    def get(self, job_id: str, owner: str) -> JobRecord:
        """An owner's job; raises `NotFound`."""
        record = self.ledger.get(job_id)
        if record is None or record.owner != owner:
            raise NotFound("job", job_id)
        return record

    def list_jobs(
        self,
        owner: str,
        *,
        limit: int,
        cursor: str | None = None,
        status: JobStatus | None = None,
        metadata: dict[str, str] | None = None,
    ) -> Page[JobRecord]:
        """An owner's jobs, newest first; the cursor is the last id of the page before."""
        found: list[JobRecord] = []
        before = cursor
        for _ in range(MAX_SCANS if metadata else 1):
            wanted = LIST_SCAN if metadata else limit + 1
            ids = self.ledger.list_ids(owner, limit=wanted, before=before, status=status)
            records = self.ledger.get_many(ids)
            found += [record for record in records if _has_metadata(record, metadata)]
            if len(found) > limit or len(ids) < wanted:
                break
            before = ids[-1]
        page = found[:limit]
        return Page(items=page, next_cursor=page[-1].id if len(found) > limit else None)

    def cancel(self, job_id: str, owner: str) -> JobRecord:
        """End a job: at once where no worker has it, else as soon as its worker hears. Raises `Conflict`."""
        record = self.get(job_id, owner)
        if record.status in TERMINAL:
            raise Conflict(job_id, record.status.value, "cancelled")
        if record.status is not JobStatus.CANCELLING:
            self.archive.put_order(job_id, "cancel", self._name, journal.now_iso())
        for _ in range(5):
            if record.status in TERMINAL or record.status is JobStatus.CANCELLING:
                break
            if record.status in (JobStatus.QUEUED, JobStatus.PAUSED):
                record = self._cancel_waiting(record)
            else:
                self.ledger.change(job_id, from_statuses={record.status}, to=JobStatus.CANCELLING)
                record = self.get(job_id, owner)
        return record

    def _cancel_waiting(self, record: JobRecord) -> JobRecord:
        """Cancel a job no worker holds; a worker that claims it first makes the caller look again."""
        change = self.ledger.change(record.id, from_statuses={record.status}, to=JobStatus.CANCELLED)
        if change.done:
            outcome = Outcome(
                job=record.id, status="cancelled", epoch=record.epoch, time=journal.now_iso(), by=self._name
            )
            standing = self.archive.put_outcome(outcome)
            if standing.status != "cancelled":
                settle(self.ledger, record.id, standing)
        return self.get(record.id, record.owner)

    def events(
        self, job_id: str, owner: str, *, after: int = 0, limit: int = 1000, types: Collection[str] = ()
    ) -> list[dict[str, Any]]:
        """A job's events above a number, in order: from Valkey, or from the bucket once they have gone there."""
        record = self.get(job_id, owner)
        if self.ledger.has_events(job_id) or record.manifest is None:
            return self._live_events(job_id, after=after, limit=limit, types=types)
        return journal.stored_events(self.store, self.archive, record.manifest, after=after, limit=limit, types=types)

    def _live_events(self, job_id: str, *, after: int, limit: int, types: Collection[str]) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        while len(found) < limit:
            batch = self.ledger.events(job_id, after=after, limit=1000 if types else limit)
            found += [event for event in batch if not types or event["type"] in types]
            if len(batch) < (1000 if types else limit):
                break
            after = batch[-1]["seq"]
        return found[:limit]

    def metrics(self, job_id: str, owner: str, *, after_step: int = 0) -> list[dict[str, Any]]:
        """The metrics of each step above `after_step`; of a step trained twice, the later epoch's."""
        events = self.events(job_id, owner, limit=1_000_000, types={"metric"})
        by_step = {event["step"]: {**event["data"], "step": event["step"], "epoch": event["epoch"]} for event in events}
        return [by_step[step] for step in sorted(by_step) if step > after_step]

    def artifacts(self, job_id: str, owner: str) -> list[Artifact]:
        """What a finished job left, each with a link; empty until there is a manifest."""
        record = self.get(job_id, owner)
        manifest = self.archive.manifest(record.manifest) if record.manifest else None
        if manifest is None:
            return []
        seconds = self._settings.presign_seconds
        expires_at = datetime.now(UTC) + timedelta(seconds=seconds)
        return [
            Artifact(
                path=entry.path,
                key=entry.key,
                size=entry.size,
                sha256=entry.sha256,
                url=self.store.presign(entry.key, seconds),
                expires_at=expires_at,
            )
            for entry in manifest.objects
        ]

    def store_dataset(self, path: Path, summary: DatasetSummary, owner: str, name: str | None) -> DatasetRecord:
        """Keep a checked upload."""
        return self.datasets.put(path, summary, owner, name)

    def get_dataset(self, dataset_id: str, owner: str) -> DatasetRecord:
        """An owner's data set; raises `NotFound`."""
        return self.datasets.get(dataset_id, owner)

    def authenticate(self, key: str) -> KeyRecord | None:
        """The record of a valid key, else None."""
        return self.keys.authenticate(key)

    def health(self) -> dict[str, str]:
        """Whether each server answers: `ok`, or why not."""
        return {"valkey": _verdict(self.ledger.ping), "storage": _verdict(self.store.ping)}


def _verdict(check: Any) -> str:
    try:
        check()
    except JobsError as error:
        return str(error)
    return "ok"


def _as_asked(record: JobRecord) -> dict[str, Any]:
    """`job.json`: enough to make the record again."""
    return {
        "id": record.id,
        "owner": record.owner,
        "created_at": record.created_at.isoformat(),
        "queue": record.queue,
        "spec": record.spec,
        "spec_sha256": record.spec_sha256,
    }


def _has_metadata(record: JobRecord, wanted: dict[str, str] | None) -> bool:
    return all(record.metadata.get(key) == value for key, value in (wanted or {}).items())


def _no_checkpoint(field: str, detail: str, remedy: str) -> Problem:
    return Problem(pointer=f"/from_checkpoint/{field}", code="no_such_checkpoint", detail=detail, remedy=remedy)
