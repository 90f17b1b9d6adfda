"""The facade of `jobs` for the API: jobs with their events and files, data sets, keys and sessions.

The API uses no other module of `jobs` to change anything. Synchronous and thread-safe. Invariant: a request is in the
bucket before it is in the job store, and in the job store before the client gets an answer.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any, BinaryIO, Generic, Self, TypeVar

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from grpo_core.datasets import DatasetSummary
from grpo_core.datasets.preview import records_of
from grpo_core.estimates import Estimate, SpecWarning, estimate
from grpo_core.estimates import warnings as suspicious_settings
from grpo_core.reasons import EventType
from grpo_core.row_warnings import warnings_of_lines
from grpo_core.schedule import with_evaluation
from grpo_core.spec import JobSpec
from grpo_core.spec.sweep import MAX_JOBS
from jobs.auth.api_keys import MAX_KEYS, KeyRecord, KeyStore, ListedKey, granted
from jobs.auth.rate_limit import RateLimiter
from jobs.auth.scraper_keys import ScraperKeys
from jobs.auth.sessions import Session, SessionStore
from jobs.errors import Conflict, JobsError, NotFound, Rejected, TooManyKeys, Unavailable, UnsafeStorage
from jobs.lifecycle.admission import Admission, RequestKey
from jobs.lifecycle.celery_app import WakeupSender
from jobs.lifecycle.commands import Commands, conflict
from jobs.lifecycle.deletion import Deletion, used_by
from jobs.lifecycle.reference_checks import ReferenceChecks
from jobs.lifecycle.retention import Retention
from jobs.lifecycle.retries import Retries
from jobs.lifecycle.source_jobs import SourceJobs
from jobs.lifecycle.submit import Submission
from jobs.lifecycle.sweeper import Sweeper
from jobs.lifecycle.time_limit import Overdue
from jobs.lifecycle.valkey_recovery import ValkeyRecovery
from jobs.lifecycle.wakeups import WakeupPublisher
from jobs.read import metrics
from jobs.read.archive import Archive
from jobs.read.events import EventPage, EventPages
from jobs.read.fleet import Fleet, FleetWorker
from jobs.read.groups import GroupSummary, summarise
from jobs.read.hub_look import hub_records
from jobs.read.job_order import JobOrder
from jobs.read.job_rows import JobRowPage, JobRows, RowQuery
from jobs.read.queue_position import QueuePosition, WaitReason, queue_position_of, workers_for
from jobs.read.readiness import Readiness
from jobs.read.rollout_query import RolloutQuery, decode_cursor, encode_cursor
from jobs.read.rollouts import Rollout, RolloutStep, RolloutStore
from jobs.read.telemetry import Telemetry, read_telemetry
from jobs.sealing import SealingSettings
from jobs.settings import QueueSettings, StorageSettings
from jobs.store import object_keys
from jobs.store.bucket import ObjectStore
from jobs.store.checkpoints import list_checkpoints
from jobs.store.commits import RolloutFile, listed_rollouts, live_rollouts
from jobs.store.datasets import DatasetRecord, DatasetStore, new_dataset_id
from jobs.store.drains import DrainMode
from jobs.store.job import TERMINAL, JobRecord, JobStatus, Priority
from jobs.store.job_store import JobEvent, JobStore
from jobs.store.retired import Retired
from jobs.store.row_files import Place as RowPlace
from jobs.store.row_files import RowPage
from jobs.store.s3_datasets import S3Datasets, SourceSettings
from jobs.store.serving import ServedModels, ServingStore
from jobs.store.valkey_checks import ValkeyWatch
from jobs.store.workers import WorkerRegistry
from jobs.store.write_once import Command, WriteOnceStore
from jobs.usage.gpu_time import GpuTime
from jobs.usage.prices import Prices, PriceSettings
from jobs.usage.quotas import Quotas, QuotaSettings, StorageQuotaUsedUp, Usage
from jobs.usage.report import Period, UsageRow, usage_rows
from jobs.usage.stored_bytes import Census
from jobs.webhooks.service import WebhookService
from jobs.webhooks.settings import WebhookSettings

LIST_SCAN = 250
"""Number of jobs that one script examines, which blocks Valkey, when a list is filtered by metadata."""
EVERY = 10**9
"""More than any owner has jobs."""
MAX_SCANS = 40
FIRST_ANSWER_SECONDS = 5.0
BACKLOG_SECONDS = 15.0
"""Largest age of the number of records to retire, whose computation sends a request for each owner."""
"""How long a start waits for the servers to answer before it continues without them."""

_EVALUATION: Collection[str] = ("evaluation",)
WINDOWS_OF_EVENTS = 4
"""Events that are read for each one of a page from the end, and by how much more if they are too few."""

T = TypeVar("T")


class ServiceSettings(BaseSettings):
    """Settings of the facade."""

    model_config = SettingsConfigDict(frozen=True, populate_by_name=True, extra="ignore")

    presign_seconds: int = Field(default=900, ge=10, le=604_800, validation_alias="GRPO_PRESIGN_SECONDS")
    """Seconds for which a download link works."""
    max_queued_jobs: int = Field(default=50_000, ge=0, validation_alias="GRPO_MAX_QUEUED_JOBS")
    """Largest number of queued jobs in total; 0 means no limit."""
    max_owner_jobs: int = Field(default=10_000, ge=0, validation_alias="GRPO_MAX_OWNER_JOBS")
    """Largest number of unfinished jobs per owner; 0 means no limit."""
    orders_per_minute: int = Field(default=600, ge=0, le=1_000_000, validation_alias="GRPO_ORDERS_PER_MINUTE")
    """Commands per minute and owner: cancel, pause, resume, delete; 0 means no limit."""
    requests_per_second: float = Field(default=100, ge=0, le=1_000_000, validation_alias="GRPO_REQUESTS_PER_SECOND")
    """Requests per second of one API key, on average; 0 means no limit."""
    requests_burst: int = Field(default=1000, ge=1, le=1_000_000, validation_alias="GRPO_REQUESTS_BURST")
    """Number of requests that a key may send at once after a pause."""
    judged_runs_per_minute: int = Field(default=20, ge=0, le=100_000, validation_alias="GRPO_JUDGED_RUNS_PER_MINUTE")
    """Requests per minute and key that try graders with a judge or an endpoint; 0 means no limit."""
    session_hours: float = Field(default=12, gt=0, le=24 * 90, validation_alias="GRPO_SESSION_HOURS")
    """Hours for which a browser stays logged in."""


@dataclass(frozen=True, kw_only=True)
class Page(Generic[T]):
    """One page of a list. `next_cursor` is None on the last page."""

    items: list[T]
    next_cursor: str | None


@dataclass(frozen=True, kw_only=True)
class JobFilter:
    """What listed jobs must have; None: anything."""

    words: str | None = None
    """A text in id, name, model or metadata, in any case."""
    kind: str | None = None
    priority: Priority | None = None

    def __bool__(self) -> bool:
        return any((self.words, self.kind, self.priority))


@dataclass(frozen=True, kw_only=True)
class Preview:
    """The result of a dry run."""

    estimate: Estimate
    warnings: list[SpecWarning]
    """Warnings about valid settings that are probably mistakes."""
    spec: JobSpec | None = None
    """The job as it would be accepted, if that differs from the request."""


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """A stored file of a job, with a link that works for a while."""

    path: str
    key: str
    size: int
    sha256: str
    url: str
    expires_at: datetime


@dataclass(frozen=True, kw_only=True)
class LinkedCheckpoint:
    """A complete checkpoint, with links to its files that work for a while."""

    step: int
    epoch: int
    created_at: datetime
    files: list[Artifact]


class JobService:
    """The facade over job store, bucket and queue."""

    def __init__(
        self,
        storage: StorageSettings,
        queue: QueueSettings,
        settings: ServiceSettings | None = None,
        sources: SourceSettings | None = None,
        quotas: QuotaSettings | None = None,
        webhooks: WebhookSettings | None = None,
        prices: PriceSettings | None = None,
        sealing: SealingSettings | None = None,
    ) -> None:
        self._settings = settings or ServiceSettings()
        self._queue_settings = queue
        self.store = ObjectStore(storage)
        self.job_store = JobStore(queue)
        self.write_once = WriteOnceStore(self.store)
        self.valkey = ValkeyWatch(self.job_store)
        self._overdue = Overdue(self.job_store, self.write_once)
        self._retention = Retention(self.job_store, self.write_once)
        self.keys = KeyStore(self.store, self.job_store)
        self._sessions = SessionStore(self.job_store, self.keys, hours=self._settings.session_hours)
        self.datasets = DatasetStore(self.store, S3Datasets(storage, sources))
        self._job_rows = JobRows(self.datasets.row_file)
        self._deletion = Deletion(self.job_store, self.store)
        self._retired = Retired(self.write_once)
        self._wakeups = WakeupPublisher(WakeupSender(queue), self.job_store)
        self._valkey_recovery = ValkeyRecovery(self.store, self.job_store, self._wakeups, queue)
        self._rollouts = RolloutStore(storage)
        self._retries = Retries(self.job_store)
        self._admission = Admission(
            self.job_store,
            max_queued=self._settings.max_queued_jobs,
            max_owned=self._settings.max_owner_jobs,
            recover=self._valkey_recovery.ensure_soon,
        )
        self._census = Census(self.job_store, self.write_once)
        self._gpu_time = GpuTime(self.job_store, self.store)
        self.quotas = Quotas(self._gpu_time, self._census, quotas)
        self.prices = Prices(prices)
        self._rates = RateLimiter(
            self.job_store, rate=self._settings.requests_per_second, burst=self._settings.requests_burst
        )
        per_minute = self._settings.orders_per_minute
        self._order_rates = RateLimiter(
            self.job_store,
            rate=per_minute / 60,
            burst=max(1, per_minute),
            name="commands",
            refusal=f"You may send {per_minute} commands per minute (GRPO_ORDERS_PER_MINUTE), and have sent more.",
        )
        per_minute = self._settings.judged_runs_per_minute
        self._judged_rates = RateLimiter(
            self.job_store,
            rate=per_minute / 60,
            burst=max(1, per_minute),
            name="judged-runs",
            refusal=f"A key may try graders that ask judges or endpoints {per_minute} times per minute "
            "(GRPO_JUDGED_RUNS_PER_MINUTE), and this one has done so more often.",
        )
        self._scrapers = ScraperKeys(self.keys, self.job_store, self._rates)
        self.workers = WorkerRegistry(self.job_store)
        self.webhooks = WebhookService(self.store, self.job_store, webhooks, sealing)
        self._fleet = Fleet(self.job_store, self.workers)
        self._serving = ServingStore(self.job_store)
        self._sweeper = Sweeper(
            self.job_store, self.write_once, self._wakeups, queue, valkey_recovery=self._valkey_recovery
        )
        self._reference_checks = ReferenceChecks(self._find, self.store, self.datasets)
        self._source_jobs = SourceJobs(self._find, self.store)
        self._submission = Submission(
            self.job_store,
            self.write_once,
            self._admission,
            self._reference_checks,
            self._source_jobs,
            self._deletion,
            self._wakeups,
            self._retired,
            self.quotas,
            prefix=queue.prefix,
        )
        self._events = EventPages(self.job_store, self.store, self.write_once, self._retired)
        self._commands = Commands(
            self.job_store, self.write_once, self._wakeups, by=f"api-{socket.gethostname()}-{os.getpid()}"
        )
        self._is_checked = False
        self._checking = threading.Lock()
        self._unsafe: UnsafeStorage | None = None
        self._is_started = self._works = self._is_closed = False
        self.readiness = Readiness({"valkey": self._ask_valkey, "storage": self._ask_storage})

    @classmethod
    def from_settings(cls) -> Self:
        """Make a service on the servers in the environment."""
        return cls(StorageSettings(), QueueSettings())

    def start(self) -> None:
        """Start to check the servers; and to publish wake-ups and sweep, once storage is known to be safe.

        Returns also if storage does not answer yet. Raises `UnsafeStorage` and `UnsafeValkey`.
        """
        if self._is_started:
            return
        self._is_started = True
        self.readiness.start(FIRST_ANSWER_SECONDS)
        try:
            if self._unsafe is not None:
                raise self._unsafe
            self.valkey.refuse()
        except JobsError:
            self.close()
            raise

    def check_storage(self) -> None:
        """Check that storage can hold jobs, until it succeeded once. Raises `UnsafeStorage` or `Unavailable`."""
        with self._checking:
            if not self._is_checked:
                self.store.ensure_ready()
                self._is_checked = True

    def _ask_storage(self) -> None:
        try:
            self.check_storage()
        except UnsafeStorage as error:
            self._unsafe = error
            raise
        with self._checking:
            if not self._works and not self._is_closed:
                self._works = True
                self._wakeups.start()
                self._sweeper.start()
                self.webhooks.start()
        self.store.ping()

    def _require_servers(self) -> None:
        """Raise `Unavailable` until storage and Valkey have passed their checks."""
        if not self._is_started:
            return
        if not self._is_checked:
            raise Unavailable("Object storage", "it has not answered since this process started")
        self.valkey.require_passed()

    def _ask_valkey(self) -> None:
        self.job_store.ping()
        self.valkey.state()

    def close(self) -> None:
        """Stop the threads."""
        self._is_closed = True
        self.readiness.close()
        self.webhooks.courier.close()
        self._sweeper.close()
        self._wakeups.close()

    def submit(self, spec: JobSpec, owner: str, *, priority: Priority = Priority.NORMAL) -> JobRecord:
        """Accept a job; from then on it is run until it ends. Raises `Rejected`, `TooManyJobs` and `Unavailable`.

        After `Unavailable` the job may have been accepted; only `submit_once` can be repeated safely.
        """
        self._require_servers()
        return self._submission.submit(spec, owner, priority=priority)[0]

    def submit_once(
        self, spec: JobSpec, owner: str, request: RequestKey, *, priority: Priority = Priority.NORMAL
    ) -> tuple[JobRecord, bool]:
        """Accept a job, or return the job that an earlier attempt of this request created, and whether it did.

        Raises what `submit` raises, `KeyReused` and `InProgress`. A failed attempt leaves what it wrote, and the next
        attempt with the key continues from there.
        """
        self._require_servers()
        return self._submission.submit(spec, owner, request, priority)

    def repeatable(self, owner: str, key_id: str, operation: str, body: str, *, again: bool) -> RequestKey:
        """Return the key of a request without Idempotency-Key, whose sender says whether it repeats an earlier one.

        Raises `Unavailable`.
        """
        return self._retries.key(owner, key_id, operation, body, again=again)

    def note(self, job_id: str, warnings: Sequence[Mapping[str, Any]]) -> None:
        """Add warning events to an accepted job, if Valkey answers: the job's answer has them too."""
        events = [JobEvent(type=EventType.WARNING, data=data) for data in warnings]
        with contextlib.suppress(Unavailable):
            self.job_store.change(job_id, events=events)

    def submit_group(
        self,
        specs: Sequence[JobSpec],
        owner: str,
        request: RequestKey | None = None,
        *,
        priority: Priority = Priority.NORMAL,
    ) -> tuple[str, list[JobRecord], bool]:
        """Accept jobs together, all or none. Returns the id of their group, them in order, and whether it was known.

        Raises what `submit_once` raises. Without a `request`, it cannot be repeated safely after `Unavailable`.
        """
        self._require_servers()
        return self._submission.submit_group(specs, owner, request, priority)

    def group(self, group: str, owner: str) -> list[JobRecord]:
        """Return the jobs of a group in the order of their submission. Raises `NotFound`."""
        records = self.job_store.get_many(self.job_store.list_ids(owner, limit=MAX_JOBS, group=group)[::-1])
        if not records and self._valkey_recovery.ensure_soon():
            records = self.job_store.get_many(self.job_store.list_ids(owner, limit=MAX_JOBS, group=group)[::-1])
        if not records:
            raise NotFound("group", group)
        return records

    def summarise(self, records: Sequence[JobRecord]) -> GroupSummary:
        """Return an owner's jobs as a table, with the mean and spread of each setting's repeats."""
        after = {
            record.id: next(
                (e["data"] for e in self.events(record.id, record.owner, types=_EVALUATION) if "paired" in e["data"]),
                None,
            )
            for record in records
            if record.status is JobStatus.SUCCEEDED
        }
        return summarise(records, after)

    def cancel_group(self, group: str, owner: str) -> list[JobRecord]:
        """Cancel every job of a group that has not ended, and return all its jobs. Raises `NotFound`."""
        self._order_rates.take(f"orders:{owner}")
        self._require_servers()
        records = self.group(group, owner)
        for record in records:
            if record.status not in TERMINAL:
                with contextlib.suppress(Conflict):  # it has ended meanwhile
                    self._commands.give(record.id, "cancel")
        return self.group(group, owner)

    def preview(self, spec: JobSpec, owner: str) -> Preview:
        """Return the result of a dry run. Raises `Rejected` and `NotFound` as `submit` does."""
        spec = self._source_jobs.resolve(spec, owner)
        upload = self._reference_checks.check(spec, owner)
        rows = upload.rows if upload else None
        spec = with_evaluation(spec, rows)
        # The run checks rows of hub data sets.
        of_rows = warnings_of_lines(spec, self.datasets.first_lines(spec.data, upload))
        return Preview(
            estimate=estimate(spec, rows=rows, devices=self._devices()),
            warnings=self.warnings(spec) + of_rows,
            spec=spec,
        )

    def _devices(self) -> list[str]:
        """The devices of connected workers; none where Valkey does not answer, since an estimate does not need them."""
        try:
            return [worker.device for worker in self.workers.all()]
        except Unavailable:
            return []

    def has_only_cpu_workers(self) -> bool:
        """Whether workers are connected and none of them has a GPU; also False where Valkey does not answer."""
        try:
            workers = self.workers.all()
        except Unavailable:
            return False
        cpu = f"{self._queue_settings.prefix}.cpu"
        return bool(workers) and all(name.startswith(cpu) for worker in workers for name in worker.queues)

    def records(self, spec: JobSpec, owner: str) -> list[Mapping[str, Any]]:
        """Return the first records of a spec's data set. Raises `Rejected`, also where the hub cannot be read here."""
        if spec.data.source == "hub":
            return hub_records(spec, owner)
        return records_of(self.datasets.first_lines(spec.data, self._reference_checks.file_of(spec, owner)))

    def warnings(self, spec: JobSpec) -> list[SpecWarning]:
        """Return warnings about an accepted spec, for example that no worker can run it. Raises `Unavailable`."""
        found = list(suspicious_settings(spec))
        queue, workers = workers_for(spec, self._queue_settings.prefix, self.workers)
        if workers.reason is WaitReason.NO_WORKER:
            message = f"No worker that can run this is connected now ({queue}); the job would wait for one."
            found.append(SpecWarning(pointer="/resources", code="no_worker", message=message))
        if workers.reason is WaitReason.NEWER_WORKER:
            message = (
                f"This needs a newer worker: it uses spec format {spec.needed_format()}, and the connected workers "
                f"read up to {workers.newest_format}; the job would wait for one. Upgrade the workers."
            )
            found.append(SpecWarning(pointer="", code="newer_worker", message=message))
        if workers.reason is WaitReason.NO_CONFINEMENT:
            message = (
                "No connected worker can confine the code of these graders; the job would wait for one. Start a worker "
                "on Linux 5.19 or newer with Landlock, or use graders other than python and math."
            )
            found.append(SpecWarning(pointer="/rewards/graders", code="no_confinement", message=message))
        return found

    def get(self, job_id: str, owner: str) -> JobRecord:
        """Return an owner's job. Raises `NotFound`."""
        record = self._find(job_id, owner)
        if record is None:
            raise NotFound("job", job_id)
        return record

    def _find(self, job_id: str, owner: str) -> JobRecord | None:
        """Return a job from Valkey, or from the bucket once it is retired. Also looks there for other owners' jobs."""
        record = self.job_store.get(job_id)
        # Another owner's id and an unknown id cause the same requests, so that the time does not reveal which it is.
        if (record is None or record.owner != owner) and self._valkey_recovery.ensure_soon():
            record = self.job_store.get(job_id)  # Valkey had lost it
        return record if record is not None and record.owner == owner else self._retired.find(job_id, owner)

    def waiting(self, record: JobRecord) -> QueuePosition | None:
        """Return the position of a queued job; None for other jobs. Raises `Unavailable`."""
        return queue_position_of(record, self.job_store, self.workers)

    def trial_result(self, record: JobRecord) -> dict[str, Any] | None:
        """What a trial that has succeeded found; None for other jobs."""
        if record.spec.get("kind") != "try" or record.status is not JobStatus.SUCCEEDED:
            return None
        logs = self._events.read(record, after=0, limit=1_000_000, types={"log"})
        return next((event["data"].get("result") for event in logs if event["data"].get("code") == "trial"), None)

    def list_jobs(
        self,
        owner: str | None,
        *,
        limit: int,
        cursor: str | None = None,
        status: JobStatus | None = None,
        metadata: dict[str, str] | None = None,
        group: str | None = None,
        find: JobFilter | None = None,
        order: JobOrder | None = None,
    ) -> Page[JobRecord]:
        """Return a page of jobs of one owner, or of all: newest first or in another order. Raises `BadCursor`.

        Newest first, the cursor is the last id of the previous page.
        """
        if order is not None:
            ids = self._every_id(owner, status, metadata or {}, group, find)
            values = ids if order.field == "id" else self._values(ids, order.field)
            ids, cursor = order.page(zip(ids, values, strict=True), limit=limit, cursor=cursor)
            return Page(items=self.job_store.get_many(ids), next_cursor=cursor)
        if owner is None:
            pages = [self._ids(each, limit, cursor, status, metadata, group, find) for each in self.job_store.owners()]
            ids, before = _merged(pages, limit)
        else:
            ids, before = self._ids(owner, limit, cursor, status, metadata, group, find)
        if len(ids) > limit:
            ids, before = ids[:limit], ids[limit - 1]
        return Page(items=self.job_store.get_many(ids), next_cursor=before)

    def _ids(
        self,
        owner: str,
        limit: int,
        cursor: str | None,
        status: JobStatus | None,
        metadata: dict[str, str] | None,
        group: str | None,
        find: JobFilter | None,
    ) -> tuple[list[str], str | None]:
        """Return more ids than `limit` if there are, or where the search for them continues."""
        if group:
            return self._of_group(owner, group, cursor, status, metadata or {}), None
        if metadata or find:
            return self._search(owner, limit, cursor, status, metadata or {}, find)
        return self.job_store.list_ids(owner, limit=limit + 1, before=cursor, status=status), None

    def _every_id(
        self,
        owner: str | None,
        status: JobStatus | None,
        metadata: dict[str, str],
        group: str | None,
        find: JobFilter | None,
    ) -> list[str]:
        """Return the ids of all jobs that fit, of one owner or of all."""
        found: list[str] = []
        for each in [owner] if owner is not None else sorted(self.job_store.owners()):
            before: str | None = None
            while True:
                ids, before = self._ids(each, EVERY, before, status, metadata, group, find)
                found += ids
                if before is None:
                    break
        return found

    def _values(self, ids: list[str], field: str) -> list[str]:
        """Return one field of each job, asked for in parts, so that Valkey also serves others."""
        parts = (ids[start : start + LIST_SCAN] for start in range(0, len(ids), LIST_SCAN))
        return [value for part in parts for value in self.job_store.values(part, field)]

    def _of_group(
        self, owner: str, group: str, cursor: str | None, status: JobStatus | None, metadata: dict[str, str]
    ) -> list[str]:
        """Return the ids of a group's jobs that fit, newest first; there are few."""
        records = self.job_store.get_many(self.job_store.list_ids(owner, limit=MAX_JOBS, before=cursor, group=group))
        return [
            record.id
            for record in records
            if (status is None or record.status is status) and metadata.items() <= record.metadata.items()
        ]

    def _search(
        self,
        owner: str,
        limit: int,
        cursor: str | None,
        status: JobStatus | None,
        metadata: dict[str, str],
        find: JobFilter | None,
    ) -> tuple[list[str], str | None]:
        """Return ids of jobs that match, and where the next page continues."""
        find = find or JobFilter()
        ids: list[str] = []
        before = cursor
        for _ in range(MAX_SCANS):
            found, before = self.job_store.search(
                owner,
                limit=LIST_SCAN,
                before=before,
                status=status,
                metadata=metadata or None,
                words=find.words,
                kind=find.kind,
                priority=find.priority,
            )
            ids += found
            if len(ids) > limit or before is None:
                break
        return ids, before

    def cancel(self, job_id: str, owner: str) -> JobRecord:
        """Cancel a job: at once if no worker holds it, otherwise as soon as its worker reacts. Raises `Conflict`."""
        return self._command(job_id, owner, "cancel")

    def pause(self, job_id: str, owner: str) -> JobRecord:
        """Pause a job: at once if no worker holds it, otherwise at its next checkpoint. Raises `Conflict`."""
        return self._command(job_id, owner, "pause")

    def resume(self, job_id: str, owner: str) -> JobRecord:
        """Put a paused job back into the queue; it resumes from its last checkpoint. Raises `Conflict`."""
        return self._command(job_id, owner, "resume")

    def prioritise(self, job_id: str, owner: str, priority: Priority) -> JobRecord:
        """Change the priority of a job that is queued or paused. Raises `Conflict` and `NotFound`."""
        self._order_rates.take(f"orders:{owner}")
        self._require_servers()
        record = self.get(job_id, owner)
        if record.status in (JobStatus.QUEUED, JobStatus.PAUSED):
            self.store.put_json(object_keys.priority(job_id), {"v": 1, "priority": priority.value})
            self.job_store.prioritise(job_id, priority)
            record = self.get(job_id, owner)
        if record.status not in (JobStatus.QUEUED, JobStatus.PAUSED):
            remedy = "Only a job that is queued or paused has one that matters."
            raise Conflict(job_id, record.status.value, "given another priority", remedy)
        return record

    def owner_of(self, job_id: str) -> str | None:
        """Return whose job it is, for operators; None if it is not in Valkey."""
        return self.job_store.owner_of(job_id)

    def delete(self, job_id: str, owner: str) -> None:
        """Delete an ended job and all its files permanently. Raises `Conflict`; after `Unavailable` it can be
        repeated."""
        self._order_rates.take(f"orders:{owner}")
        record = self.get(job_id, owner)
        if record.status not in TERMINAL:
            self._deletion.erase_job(record)  # raises the reason
            return
        size = sum(item.size for item in self.store.list(object_keys.folder(job_id)))
        with self._census.change(owner, object_keys.folder(job_id), before=size, after=0):
            self._deletion.erase_job(record)

    def count_judged_run(self, key_id: str) -> None:
        """Count a request of a key that asks judges or endpoints. Raises `RateLimited` and `Unavailable`."""
        self._judged_rates.take(f"judged:{key_id}")

    def _command(self, job_id: str, owner: str, order: Command) -> JobRecord:
        self._order_rates.take(f"orders:{owner}")
        self._require_servers()
        known = self.get(job_id, owner)
        record = self._commands.give(job_id, order)
        if record is None:
            if known.status in TERMINAL:
                raise conflict(known, order)
            raise NotFound("job", job_id)
        return record

    def sessions(self, owner: str) -> list[ServedModels]:
        """Return an owner's sessions of served models that answer now, the newest first. Raises `Unavailable`."""
        return self._serving.of_owner(owner)

    def session(self, session: str) -> ServedModels | None:
        """Return a session that answers now. The caller has checked the reader's rights. Raises `Unavailable`."""
        return self._serving.find(session)

    def ask_session(self, served: ServedModels, order: Mapping[str, Any]) -> None:
        """Send a request, or its cancellation, to a session. Raises `Unavailable`."""
        self._serving.ask(served, order)

    def answers(self, reader: str, after: str, *, block_ms: int) -> tuple[str, list[dict[str, Any]]]:
        """Wait for pieces of answers to a reader's requests. Raises `Unavailable`."""
        return self._serving.answers(reader, after, block_ms=block_ms)

    def forget_answers(self, reader: str) -> None:
        """Remove the answers that a reader will not read. Raises `Unavailable`."""
        self._serving.forget(reader)

    def events(
        self, job_id: str, owner: str, *, after: int = 0, limit: int = 1000, types: Collection[str] = ()
    ) -> list[dict[str, Any]]:
        """Return a job's events numbered above `after`, in order: from Valkey, or later from the bucket."""
        return self._events.read(self.get(job_id, owner), after=after, limit=limit, types=types)

    def latest_events(
        self, job_id: str, owner: str, *, before: int | None, limit: int, types: Collection[str]
    ) -> tuple[list[dict[str, Any]], bool]:
        """Return a job's last events numbered below `before`, newest first, and whether there are earlier ones."""
        record = self.get(job_id, owner)
        newest = self.job_store.newest_events([job_id])[job_id]
        last = newest if before is None else before - 1
        window = WINDOWS_OF_EVENTS * limit
        while True:
            # Without a newest one the events are in the bucket, where reading a part costs as much as reading all.
            after = max(0, last - window) if newest else 0
            read = self._events.read(record, after=after, limit=last - after if newest else 1_000_000, types=())
            found = [event for event in read if event["type"] in types and (before is None or event["seq"] < before)]
            if len(found) > limit or not after:
                return found[::-1][:limit], len(found) > limit
            window *= WINDOWS_OF_EVENTS

    def read_on(self, job_id: str, *, after: int, types: Collection[str] = ()) -> EventPage:
        """Return the next events of a job, and whether they are its last. The caller has checked the reader's
        rights."""
        return self._events.read_on(job_id, after=after, types=types)

    def newest_events(self, job_ids: list[str]) -> dict[str, int]:
        """Return the number of each job's last event."""
        return self.job_store.newest_events(job_ids)

    def metrics(self, job_id: str, owner: str, *, after_step: int = 0) -> list[dict[str, Any]]:
        """Return the metrics of each logged step above `after_step`; for a step trained twice, the later run's."""
        record = self.get(job_id, owner)
        events = self.events(job_id, owner, limit=1_000_000, types={"metric", "evaluation"})
        rows = metrics.join(self.store, self.write_once, record, events)
        return [row for row in rows if row["step"] > after_step]

    def rollouts(
        self, job_id: str, owner: str, query: RolloutQuery, *, limit: int, cursor: str | None = None
    ) -> Page[Rollout]:
        """Return a page of a job's completions, also while it runs. Raises `BadCursor`."""
        self.get(job_id, owner)
        after = decode_cursor(cursor, query, job_id) if cursor is not None else None
        found, end = self._rollouts.page(lambda: self._rollout_files(job_id, owner), query, limit=limit, after=after)
        return Page(items=found, next_cursor=encode_cursor(end, query, job_id) if end else None)

    def rollout_steps(self, job_id: str, owner: str) -> list[RolloutStep]:
        """Return the steps of a job whose completions can be read."""
        return self._rollouts.steps(lambda: self._rollout_files(job_id, owner))

    def _rollout_files(self, job_id: str, owner: str) -> list[RolloutFile]:
        record = self.get(job_id, owner)
        if record.status not in TERMINAL:
            return live_rollouts(self.store, record.id, record.epoch)
        manifest = self.write_once.manifest(record.manifest) if record.manifest else None
        return listed_rollouts(manifest.objects) if manifest else []

    def artifacts(self, job_id: str, owner: str) -> list[Artifact]:
        """Return the files of an ended job with links; empty until its manifest exists."""
        record = self.get(job_id, owner)
        manifest = self.write_once.manifest(record.manifest) if record.manifest else None
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

    def archive(self, job_id: str, owner: str, folder: str) -> Archive | None:
        """Return the files of an ended job below a folder, such as `adapter/`, as one archive; None if it has none."""
        record = self.get(job_id, owner)
        manifest = self.write_once.manifest(record.manifest) if record.manifest else None
        entries = [entry for entry in manifest.objects if entry.path.startswith(folder)] if manifest else []
        return Archive(self.store, entries) if entries else None

    def checkpoints(self, job_id: str, owner: str) -> list[LinkedCheckpoint]:
        """Return a job's complete checkpoints with links to their files, also while it runs."""
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
        self,
        path: Path,
        summary: DatasetSummary,
        owner: str,
        name: str | None,
        request: RequestKey | None = None,
        *,
        purpose: str | None = None,
    ) -> tuple[DatasetRecord, bool]:
        """Store a checked upload, or return what an earlier attempt of this request stored, and whether it did."""
        self._require_servers()
        if request is None:
            self.quotas.check_bytes(owner, summary.bytes)
            dataset_id = new_dataset_id()
            with self._census.change(owner, object_keys.dataset_folder(dataset_id), before=0, after=summary.bytes):
                return self.datasets.put(path, summary, owner, name, dataset_id, purpose=purpose), False
        ticket = self._admission.admit(owner, new_dataset_id(), request)
        if ticket.state == "done":
            return self.datasets.get(ticket.id, owner), True
        try:
            self.quotas.check_bytes(owner, summary.bytes)
            with self._census.change(owner, object_keys.dataset_folder(ticket.id), before=0, after=summary.bytes):
                record = self.datasets.put(path, summary, owner, name, ticket.id, purpose=purpose)
                self._admission.finish(ticket)
        except StorageQuotaUsedUp:
            self._admission.withdraw(ticket, forget=True)
            raise
        except Unavailable:
            self._admission.withdraw(ticket, forget=False)
            raise
        return record, False

    def get_dataset(self, dataset_id: str, owner: str) -> DatasetRecord:
        """Return an owner's data set. Raises `NotFound`."""
        return self.datasets.get(dataset_id, owner)

    def list_datasets(self, owner: str | None, *, limit: int, cursor: str | None = None) -> Page[DatasetRecord]:
        """Return a page of an owner's data sets, newest first; with None those of all owners. The cursor is the last id
        of the previous page."""
        owners = self.datasets.owners() if owner is None else [owner]
        every = [record for each in owners for record in self.datasets.list_of(each, limit=limit + 1, before=cursor)]
        found = sorted(every, key=lambda record: record.id, reverse=True)
        page = found[:limit]
        return Page(items=page, next_cursor=page[-1].id if len(found) > limit else None)

    def dataset_owner(self, dataset_id: str) -> str | None:
        """Return whose data set it is, for operators; None if there is none."""
        return self.datasets.owner_of(dataset_id)

    def dataset_rows(self, dataset_id: str, owner: str, *, limit: int, place: RowPlace | None = None) -> RowPage:
        """Return some rows of an upload as they are stored. Raises `NotFound` and `BadCursor`."""
        return self.datasets.rows(self.datasets.get(dataset_id, owner), limit, place)

    def job_rows(self, job_id: str, owner: str, query: RowQuery) -> JobRowPage:
        """Return rows of a job's data set as its prompts, or why they cannot be shown. Raises `NotFound` and
        `BadCursor`."""
        return self._job_rows.page(self.get(job_id, owner).spec, owner, query)

    def dataset_jobs(self, dataset_id: str, owner: str, *, limit: int, cursor: str | None = None) -> Page[JobRecord]:
        """Return a page of the owner's jobs that train or evaluate on an upload, newest first. Raises `NotFound`."""
        self.datasets.get(dataset_id, owner)
        found: list[JobRecord] = []
        before = cursor
        for _ in range(MAX_SCANS):
            ids, before = self.job_store.search(owner, limit=LIST_SCAN, before=before, text=dataset_id)
            records = self.job_store.get_many(ids)
            found += [record for record in records if dataset_id in used_by(record.spec).values()]
            if len(found) > limit or before is None:
                break
        if len(found) > limit:
            found, before = found[:limit], found[limit - 1].id
        return Page(items=found, next_cursor=before)

    def list_files(
        self, owner: str, *, limit: int, after: str | None, oldest_first: bool, purpose: str | None
    ) -> Page[tuple[DatasetRecord, str]]:
        """Return a page of an owner's data sets, each with its purpose. The cursor is the last id of the previous
        page."""
        found: list[tuple[DatasetRecord, str]] = []
        cursor = after
        while len(found) <= limit:
            page = self.datasets.list_of(owner, limit=limit + 1, before=cursor, oldest_first=oldest_first)
            found += [
                (record, known)
                for record, known in zip(page, self.datasets.purposes(page), strict=True)
                if purpose in (None, known)
            ]
            if len(page) <= limit:
                break
            cursor = page[-1].id
        items = found[:limit]
        return Page(items=items, next_cursor=items[-1][0].id if len(found) > limit else None)

    def purpose_of(self, record: DatasetRecord) -> str:
        """Return what an upload is for, in OpenAI's words."""
        return self.datasets.purposes([record])[0]

    def open_dataset(self, dataset_id: str, owner: str) -> tuple[DatasetRecord, BinaryIO]:
        """Return an owner's data set and its rows, open for reading. Raises `NotFound`."""
        record = self.datasets.get(dataset_id, owner)
        return record, self.datasets.open(record)

    def delete_dataset(self, dataset_id: str, owner: str) -> None:
        """Delete an upload permanently. Raises `InUse`; after `Unavailable` it can be repeated."""
        record = self.datasets.get(dataset_id, owner)
        with self._census.change(owner, object_keys.dataset_folder(dataset_id), before=record.bytes, after=0):
            self._deletion.erase_dataset(record)

    def usage(self, owner: str) -> tuple[Usage, int, int | None]:
        """Return an owner's use and quotas, the number of unfinished jobs, and the limit of those."""
        unfinished = sum(self.job_store.count(owner, status) for status in JobStatus if status not in TERMINAL)
        return self.quotas.usage(owner), unfinished, self._settings.max_owner_jobs or None

    def list_usage(self, *, limit: int, cursor: str | None = None) -> Page[tuple[Usage, int, int | None]]:
        """Return a page of what `usage` returns of each owner, by name. The cursor is the last owner of the previous
        page."""
        owners = [owner for owner in self.quotas.owners() if cursor is None or owner > cursor]
        found = [self.usage(owner) for owner in owners[:limit]]
        return Page(items=found, next_cursor=owners[limit - 1] if len(owners) > limit else None)

    def usage_rows(self, owner: str | None, first: date, last: date, period: Period) -> list[UsageRow]:
        """Return who used what from one day (UTC) to another, both included; with None of all owners."""
        owners = self.quotas.owners() if owner is None else [owner]
        return usage_rows(self._gpu_time, self.prices, owners, first, last, period)

    def authenticate(self, key: str) -> KeyRecord | None:
        """Return the record of a valid key, or None, and count the request. Raises `RateLimited`."""
        record = self.keys.authenticate(key)
        if record is not None:
            self._rates.take(record.id)
        return record

    def authenticate_scraper(self, key: str) -> KeyRecord | None:
        """Do as `authenticate`, for monitoring, also while Valkey is unavailable."""
        return self._scrapers.authenticate(key)

    def list_keys(self, owner: str | None, *, limit: int, cursor: str | None = None) -> Page[ListedKey]:
        """Return a page of an owner's keys, newest first; with None those of all owners. The cursor is the last id of
        the previous page."""
        found = [one for one in self.keys.listed(owner) if cursor is None or one.record.id < cursor]
        return Page(items=found[:limit], next_cursor=found[limit - 1].record.id if len(found) > limit else None)

    def create_key(
        self,
        holder: KeyRecord,
        owner: str,
        scopes: Sequence[str],
        *,
        name: str | None = None,
        expires_at: datetime | None = None,
    ) -> tuple[str, ListedKey]:
        """Create a key as another one asks, which can grant only what it has. Raises `Rejected` and `TooManyKeys`."""
        self._require_servers()
        if problems := granted(holder, owner, scopes, expires_at):
            raise Rejected(*problems)
        now = datetime.now(UTC)
        if sum(1 for one in self.keys.listed(owner) if one.record.is_valid(now)) >= MAX_KEYS:
            raise TooManyKeys(owner, MAX_KEYS)
        key, record = self.keys.create(owner, scopes, name=name, expires_at=expires_at, created_by=holder.id)
        return key, self.keys.listed_as(record)

    def revoke_key(self, key_id: str, owner: str | None) -> ListedKey:
        """Revoke a key permanently; with an owner only one of that owner's. Raises `NotFound`."""
        return self.keys.listed_as(self.keys.revoke(key_id, owner))

    def log_in(self, key: str, address: str) -> Session | None:
        """Start a browser's session; None for a wrong key. Raises `TooManyAttempts`."""
        return self._sessions.open(key, address)

    def authenticate_session(self, token: str) -> KeyRecord | None:
        """Do as `authenticate`, for a session's token."""
        record = self._sessions.find(token)
        if record is not None:
            self._rates.take(record.id)
        return record

    def log_out(self, token: str) -> KeyRecord | None:
        """End a session and return the record of its key; None if it had ended."""
        return self._sessions.close(token)

    def list_workers(self, *, limit: int, cursor: str | None = None) -> Page[FleetWorker]:
        """Return a page of the fleet, by name. The cursor is the last name of the previous page."""
        found = [worker for worker in self._fleet.all() if cursor is None or worker.name > cursor]
        return Page(items=found[:limit], next_cursor=found[limit - 1].name if len(found) > limit else None)

    def get_worker(self, name: str) -> FleetWorker:
        """Return one worker. Raises `NotFound`."""
        return self._fleet.get(name)

    def drain_worker(self, name: str, mode: DrainMode | None, *, by: str) -> FleetWorker:
        """Order a worker to take no new job, or with None take that back. Raises `NotFound` and `CannotDrain`."""
        return self._fleet.drain(name, mode, by=by)

    def telemetry(self) -> Telemetry:
        """Return the state of the service for monitoring. Raises `Unavailable`."""
        telemetry = read_telemetry(self.job_store, self.workers, lease_seconds=self._queue_settings.lease_seconds)
        return replace(
            telemetry,
            valkey=self.valkey.state(),
            retention_backlog=self._retention.backlog(max_age_seconds=BACKLOG_SECONDS),
            overdue=len(self._overdue.jobs()),
        )

    def storage_is_up(self) -> bool:
        """Whether object storage was ready at its latest check."""
        return self.health()["storage"] == "ok"

    def health(self) -> dict[str, str]:
        """Return `ok` or the fault of each server, from its latest check. Never waits."""
        return self.readiness.verdicts()


def _merged(pages: list[tuple[list[str], str | None]], limit: int) -> tuple[list[str], str | None]:
    """Merge the pages of several lists. No id below the place where one of the searches stopped is certain yet."""
    floor = max((before for _, before in pages if before), default=None)
    ids = sorted({job_id for found, _ in pages for job_id in found}, reverse=True)
    certain = [job_id for job_id in ids if floor is None or job_id >= floor]
    return certain, floor if len(certain) <= limit else None
