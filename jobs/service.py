"""What the API may do with jobs: submit, look, cancel, pause, read events and artifacts, keep data sets and keys.

The one way into `jobs` for code that serves people; synchronous and thread-safe. Owns the order of writes: what
was asked is in the bucket before it is in the ledger, and in the ledger before anyone is told.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from grpo_core.datasets import DatasetSummary
from grpo_core.estimates import Estimate, SpecWarning, estimate
from grpo_core.estimates import warnings as suspicious_settings
from grpo_core.spec import JobSpec
from jobs import metrics
from jobs.admission import Admission, RequestKey
from jobs.archive import Archive, Order
from jobs.checkpoints import list_checkpoints
from jobs.datasets import DatasetRecord, DatasetStore, new_dataset_id
from jobs.erasure import Erasure
from jobs.errors import JobsError, NotFound, Unavailable
from jobs.event_pages import EventPage, EventPages
from jobs.keys import KeyRecord, KeyStore
from jobs.ledger import Ledger
from jobs.lineage import RolloutFile, listed_rollouts, live_rollouts
from jobs.orders import Orders
from jobs.outbox import Outbox
from jobs.queue import Doorbell, queue_for
from jobs.ratelimit import RateLimiter
from jobs.record import TERMINAL, JobRecord, JobStatus
from jobs.references import References
from jobs.registry import WorkerRegistry
from jobs.rollout_query import RolloutQuery, decode_cursor, encode_cursor
from jobs.rollout_store import Rollout, RolloutStore, StepRollouts
from jobs.scrapers import ScraperKeys
from jobs.sessions import Session, SessionStore
from jobs.settings import QueueSettings, StorageSettings
from jobs.sources import Sources, SourceSettings
from jobs.storage import ObjectStore
from jobs.submission import Submission
from jobs.sweeper import Sweeper
from jobs.telemetry import Telemetry, read_telemetry
from jobs.waiting import Waiting, waiting_of

LIST_SCAN = 200
"""Records looked through at a time when a list is filtered by metadata."""
MAX_SCANS = 50

T = TypeVar("T")


class ServiceSettings(BaseSettings):
    """What the facade itself needs to know."""

    model_config = SettingsConfigDict(frozen=True, populate_by_name=True, extra="ignore")

    presign_seconds: int = Field(default=900, ge=10, le=604_800, validation_alias="GRPO_PRESIGN_SECONDS")
    """How long a download link works."""
    max_queued_jobs: int = Field(default=50_000, ge=0, validation_alias="GRPO_MAX_QUEUED_JOBS")
    """Jobs that may be queued in all; 0 is no limit."""
    max_owner_jobs: int = Field(default=10_000, ge=0, validation_alias="GRPO_MAX_OWNER_JOBS")
    """Jobs of one owner that may be queued, running or paused; 0 is no limit."""
    requests_per_second: float = Field(default=0, ge=0, le=1_000_000, validation_alias="GRPO_REQUESTS_PER_SECOND")
    """Requests one API key may send, on average; 0 is no limit."""
    requests_burst: int = Field(default=100, ge=1, le=1_000_000, validation_alias="GRPO_REQUESTS_BURST")
    """Requests a key may send at once after a pause."""
    session_hours: float = Field(default=12, gt=0, le=24 * 90, validation_alias="GRPO_SESSION_HOURS")
    """How long a browser stays logged in."""


@dataclass(frozen=True, kw_only=True)
class Page(Generic[T]):
    """Part of a list; `next_cursor` is None on the last one."""

    items: list[T]
    next_cursor: str | None


@dataclass(frozen=True, kw_only=True)
class Preview:
    """What a job would be."""

    estimate: Estimate
    warnings: list[SpecWarning]
    """Settings that are legal and probably not meant."""


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """A stored file of a job, and a link that reads it for a while."""

    path: str
    key: str
    size: int
    sha256: str
    url: str
    expires_at: datetime


@dataclass(frozen=True, kw_only=True)
class LinkedCheckpoint:
    """A whole checkpoint, and links that read its files for a while."""

    step: int
    epoch: int
    created_at: datetime
    files: list[Artifact]


class JobService:
    """The facade over ledger, bucket and queue."""

    def __init__(
        self,
        storage: StorageSettings,
        queue: QueueSettings,
        settings: ServiceSettings | None = None,
        sources: SourceSettings | None = None,
    ) -> None:
        self._settings = settings or ServiceSettings()
        self._queue_settings = queue
        self.store = ObjectStore(storage)
        self.ledger = Ledger(queue)
        self.archive = Archive(self.store)
        self.keys = KeyStore(self.store, self.ledger)
        self._sessions = SessionStore(self.ledger, self.keys, hours=self._settings.session_hours)
        self.datasets = DatasetStore(self.store, Sources(storage, sources))
        self._erasure = Erasure(self.ledger, self.store)
        self._rollouts = RolloutStore(storage)
        self._admission = Admission(
            self.ledger, max_queued=self._settings.max_queued_jobs, max_owned=self._settings.max_owner_jobs
        )
        self._rates = RateLimiter(
            self.ledger, rate=self._settings.requests_per_second, burst=self._settings.requests_burst
        )
        self._scrapers = ScraperKeys(self.keys, self.ledger, self._rates)
        self.workers = WorkerRegistry(self.ledger)
        self._outbox = Outbox(Doorbell(queue), self.ledger)
        self._sweeper = Sweeper(self.ledger, self.archive, self._outbox, queue)
        self._references = References(self.ledger, self.store, self.datasets)
        self._submission = Submission(
            self.ledger,
            self.archive,
            self._admission,
            self._references,
            self._erasure,
            self._outbox,
            prefix=queue.prefix,
        )
        self._events = EventPages(self.ledger, self.store, self.archive)
        self._orders = Orders(self.ledger, self.archive, self._outbox, by=f"api-{socket.gethostname()}-{os.getpid()}")
        self._is_checked = False

    @classmethod
    def from_settings(cls) -> Self:
        """A service on the servers named in the environment."""
        return cls(StorageSettings(), QueueSettings())

    def start(self) -> None:
        """Check that storage is safe to use, then begin to ring and to sweep."""
        self.check_storage()
        self._outbox.start()
        self._sweeper.start()

    def check_storage(self) -> None:
        """Raise `UnsafeStorage` or `Unavailable` where jobs cannot be kept; `start` does so too, and once is enough."""
        if not self._is_checked:
            self.store.ensure_ready()
            self._is_checked = True

    def close(self) -> None:
        """Stop the threads."""
        self._sweeper.close()
        self._outbox.close()

    def submit(self, spec: JobSpec, owner: str) -> JobRecord:
        """Accept a job: from here on it is run to an end. Raises `Rejected`, `TooManyJobs`, `Unavailable`.

        After `Unavailable` it may have been accepted all the same; only `submit_once` can ask again.
        """
        return self._submission.submit(spec, owner)[0]

    def submit_once(self, spec: JobSpec, owner: str, request: RequestKey) -> tuple[JobRecord, bool]:
        """Accept a job, or return the one that this very request made before; with whether it did.

        Raises what `submit` does, and `KeyReused`, `InProgress`. What a failed attempt wrote stays, for the next
        attempt with the key to go on with.
        """
        return self._submission.submit(spec, owner, request)

    def preview(self, spec: JobSpec, owner: str) -> Preview:
        """What a dry run tells. Raises `Rejected` as `submit` does."""
        upload = self._references.check(spec, owner)
        rows = upload.rows if upload else None
        return Preview(estimate=estimate(spec, rows=rows), warnings=self.warnings(spec))

    def warnings(self, spec: JobSpec) -> list[SpecWarning]:
        """What is accepted and may surprise, such as that no worker is there to run it. Raises `Unavailable`."""
        found = list(suspicious_settings(spec))
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

    def get(self, job_id: str, owner: str) -> JobRecord:
        """An owner's job; raises `NotFound`."""
        record = self.ledger.get(job_id)
        if record is None or record.owner != owner:
            raise NotFound("job", job_id)
        return record

    def waiting(self, record: JobRecord) -> Waiting | None:
        """What a queued job waits for, None for others. Raises `Unavailable`."""
        return waiting_of(record, self.ledger, self.workers)

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
            if len(found) > limit:
                return Page(items=found[:limit], next_cursor=found[limit - 1].id)
            if len(ids) < wanted:
                return Page(items=found, next_cursor=None)
            before = ids[-1]
        # Fewer than asked for among as many as are looked at for one page: the next one looks further.
        return Page(items=found, next_cursor=before)

    def cancel(self, job_id: str, owner: str) -> JobRecord:
        """End a job: at once where no worker has it, else as soon as its worker hears. Raises `Conflict`."""
        return self._order(job_id, owner, "cancel")

    def pause(self, job_id: str, owner: str) -> JobRecord:
        """Set a job aside: at once where no worker has it, else at its next checkpoint. Raises `Conflict`."""
        return self._order(job_id, owner, "pause")

    def resume(self, job_id: str, owner: str) -> JobRecord:
        """Put a paused job back into the queue; it goes on from its last checkpoint. Raises `Conflict`."""
        return self._order(job_id, owner, "resume")

    def delete(self, job_id: str, owner: str) -> None:
        """Delete an ended job and all it left, for good. Raises `Conflict`; after `Unavailable` ask again."""
        self._erasure.erase_job(self.get(job_id, owner))

    def _order(self, job_id: str, owner: str, order: Order) -> JobRecord:
        self.get(job_id, owner)
        record = self._orders.give(job_id, order)
        if record is None:
            raise NotFound("job", job_id)
        return record

    def events(
        self, job_id: str, owner: str, *, after: int = 0, limit: int = 1000, types: Collection[str] = ()
    ) -> list[dict[str, Any]]:
        """A job's events above a number, in order: from Valkey, or from the bucket once they have gone there."""
        return self._events.read(self.get(job_id, owner), after=after, limit=limit, types=types)

    def read_on(self, job_id: str, *, after: int, types: Collection[str] = ()) -> EventPage:
        """The next events of a job whose reader was checked before, and whether they are the last."""
        return self._events.read_on(job_id, after=after, types=types)

    def newest_events(self, job_ids: list[str]) -> dict[str, int]:
        """The number of each job's last event so far."""
        return self.ledger.newest_events(job_ids)

    def metrics(self, job_id: str, owner: str, *, after_step: int = 0) -> list[dict[str, Any]]:
        """The metrics of each logged step above `after_step`; of a step trained twice, the later epoch's."""
        record = self.get(job_id, owner)
        events = self.events(job_id, owner, limit=1_000_000, types={"metric"})
        rows = metrics.join(self.store, self.archive, record, events)
        return [row for row in rows if row["step"] > after_step]

    def rollouts(
        self, job_id: str, owner: str, query: RolloutQuery, *, limit: int, cursor: str | None = None
    ) -> Page[Rollout]:
        """A page of a job's completions, also while it runs. Raises `BadCursor`."""
        self.get(job_id, owner)
        after = decode_cursor(cursor, query, job_id) if cursor is not None else None
        found, end = self._rollouts.page(lambda: self._rollout_files(job_id, owner), query, limit=limit, after=after)
        return Page(items=found, next_cursor=encode_cursor(end, query, job_id) if end else None)

    def rollout_steps(self, job_id: str, owner: str) -> list[StepRollouts]:
        """The steps of a job whose completions can be read."""
        return self._rollouts.steps(lambda: self._rollout_files(job_id, owner))

    def _rollout_files(self, job_id: str, owner: str) -> list[RolloutFile]:
        record = self.get(job_id, owner)
        if record.status not in TERMINAL:
            return live_rollouts(self.store, record.id, record.epoch)
        manifest = self.archive.manifest(record.manifest) if record.manifest else None
        return listed_rollouts(manifest.objects) if manifest else []

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

    def checkpoints(self, job_id: str, owner: str) -> list[LinkedCheckpoint]:
        """The whole checkpoints a job has so far, each file with a link; also while it runs."""
        record = self.get(job_id, owner)
        seconds = self._settings.presign_seconds
        expires_at = datetime.now(UTC) + timedelta(seconds=seconds)
        return [
            LinkedCheckpoint(
                step=found.step,
                epoch=found.epoch,
                created_at=found.created_at,
                files=[
                    Artifact(**file.__dict__, url=self.store.presign(file.key, seconds), expires_at=expires_at)
                    for file in found.files
                ],
            )
            for found in list_checkpoints(self.store, record.id)
        ]

    def store_dataset(
        self, path: Path, summary: DatasetSummary, owner: str, name: str | None, request: RequestKey | None = None
    ) -> tuple[DatasetRecord, bool]:
        """Keep a checked upload, or return what this very request stored before; with whether it did."""
        if request is None:
            return self.datasets.put(path, summary, owner, name), False
        ticket = self._admission.admit(owner, new_dataset_id(), request)
        if ticket.state == "done":
            return self.datasets.get(ticket.id, owner), True
        try:
            record = self.datasets.put(path, summary, owner, name, ticket.id)
            self._admission.finish(ticket)
        except Unavailable:
            self._admission.withdraw(ticket, forget=False)
            raise
        return record, False

    def get_dataset(self, dataset_id: str, owner: str) -> DatasetRecord:
        """An owner's data set; raises `NotFound`."""
        return self.datasets.get(dataset_id, owner)

    def list_datasets(self, owner: str, *, limit: int, cursor: str | None = None) -> Page[DatasetRecord]:
        """An owner's data sets, newest first; the cursor is the last id of the page before."""
        found = self.datasets.list_of(owner, limit=limit + 1, before=cursor)
        page = found[:limit]
        return Page(items=page, next_cursor=page[-1].id if len(found) > limit else None)

    def delete_dataset(self, dataset_id: str, owner: str) -> None:
        """Delete an upload for good. Raises `InUse`; after `Unavailable` ask again."""
        self._erasure.erase_dataset(self.datasets.get(dataset_id, owner))

    def authenticate(self, key: str) -> KeyRecord | None:
        """The record of a valid key, else None; counts a request of it. Raises `RateLimited`."""
        record = self.keys.authenticate(key)
        if record is not None:
            self._rates.take(record.id)
        return record

    def authenticate_scraper(self, key: str) -> KeyRecord | None:
        """As `authenticate`, for who asks how the service is doing: also while Valkey is away."""
        return self._scrapers.authenticate(key)

    def log_in(self, key: str, address: str) -> Session | None:
        """Begin a browser's session; None for a wrong key. Raises `TooManyAttempts`."""
        return self._sessions.open(key, address)

    def authenticate_session(self, token: str) -> KeyRecord | None:
        """As `authenticate`, for a session's token."""
        record = self._sessions.find(token)
        if record is not None:
            self._rates.take(record.id)
        return record

    def log_out(self, token: str) -> None:
        """End a session."""
        self._sessions.close(token)

    def telemetry(self) -> Telemetry:
        """How the service as a whole is doing. Raises `Unavailable`."""
        return read_telemetry(self.ledger, self.workers, lease_seconds=self._queue_settings.lease_seconds)

    def health(self) -> dict[str, str]:
        """Whether each server answers: `ok`, or why not."""
        return {"valkey": _verdict(self.ledger.ping), "storage": _verdict(self.store.ping)}


def _verdict(check: Any) -> str:
    try:
        check()
    except JobsError as error:
        return str(error)
    return "ok"


def _has_metadata(record: JobRecord, wanted: dict[str, str] | None) -> bool:
    return all(record.metadata.get(key) == value for key, value in (wanted or {}).items())
