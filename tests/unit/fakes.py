"""An in-memory stand-in for `jobs.service.JobService`: the same methods and errors, no server.

tests/integration/test_doubles.py runs the same tests on both.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

from ulid import ULID

from grpo_core import strict_json
from grpo_core.datasets import DatasetSummary
from grpo_core.datasets.preview import records_of
from grpo_core.estimates import SpecWarning, estimate
from grpo_core.spec import SPEC_FORMAT, DataSection, JobSpec, Problem
from jobs.auth.api_keys import OPERATOR, SCOPES, KeyRecord, ListedKey, granted
from jobs.auth.rate_limit import RateLimited
from jobs.auth.sessions import Session, TooManyAttempts
from jobs.errors import Conflict, NotFound, Rejected
from jobs.lifecycle.admission import KeyReused, RequestKey
from jobs.read.archive import Archive
from jobs.read.events import EventPage
from jobs.read.fleet import FleetWorker, WorkerState
from jobs.read.groups import GroupSummary, summarise
from jobs.read.job_order import JobOrder
from jobs.read.job_rows import JobRowPage, JobRows, RowQuery
from jobs.read.queue_position import QueuePosition, WaitReason
from jobs.read.rollout_query import RolloutQuery, decode_cursor
from jobs.read.rollouts import Rollout, RolloutStep
from jobs.read.telemetry import QueueState, Telemetry
from jobs.service import Artifact, JobFilter, LinkedCheckpoint, Page, Preview
from jobs.store.datasets import DatasetRecord
from jobs.store.drains import Drain, DrainMode
from jobs.store.job import TERMINAL, JobRecord, JobStatus, Priority, member_ids, new_group_id, new_job_id
from jobs.store.row_files import Place as RowPlace
from jobs.store.row_files import RowFile, RowPage, StoredRow
from jobs.store.serving import ServedModels
from jobs.usage.prices import Prices, PriceSettings
from jobs.usage.quotas import Usage
from jobs.usage.report import Period, UsageRow
from jobs.usage.stored_bytes import Stored

ALICE = "grpo_alice-key"
BOB = "grpo_bob-key"
READER = "grpo_reader-key"
CHIEF = "grpo_chief-key"


def bearer(key: str = ALICE) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


class FakeValkey:
    """A server without a fault."""

    def warnings(self) -> list[str]:
        return []


class FakeJobService:
    """Keeps everything in dictionaries; `fail` makes every call raise what it holds."""

    def __init__(self) -> None:
        self.judged_runs: list[str] = []
        self.repeated: dict[tuple[str, str, str, str], str] = {}
        self.only_cpu_workers = False
        self.purposes: dict[str, str] = {}
        self.most_judged_runs = 100
        self.jobs: dict[str, JobRecord] = {}
        self.uploads: dict[str, tuple[DatasetRecord, bytes]] = {}
        self.once: dict[tuple[str, str], tuple[str, str]] = {}
        self.job_events: dict[str, list[dict[str, Any]]] = {}
        self.job_artifacts: dict[str, list[Artifact]] = {}
        self.job_rollouts: dict[str, list[Rollout]] = {}
        self.rollout_queries: list[RolloutQuery] = []
        self.queues: list[QueueState] = []
        self.workers = 1
        self.fleet: dict[str, FleetWorker] = {}
        self.used: list[UsageRow] = []
        self.keys: dict[str, ListedKey] = {}
        self.prices = Prices(PriceSettings())
        self.verdicts = {"valkey": "ok", "storage": "ok"}
        self.valkey = FakeValkey()
        self.fail: Exception | None = None
        self.limited: Exception | None = None
        self.logins: dict[str, str] = {}
        self.too_many_attempts = False
        self.running = False
        self.known_keys = {
            ALICE: key_record("alice"),
            BOB: key_record("bob"),
            READER: key_record("alice", ["jobs:read"]),
            CHIEF: key_record("chief", list(SCOPES)),
        }

    def start(self) -> None:
        self.running = True

    def close(self) -> None:
        self.running = False

    def authenticate(self, key: str) -> KeyRecord | None:
        if self.limited is not None and key in self.known_keys:
            raise self.limited
        return self.known_keys.get(key)

    authenticate_scraper = authenticate

    def log_in(self, key: str, address: str) -> Session | None:
        record = self.known_keys.get(key)
        if record is None:
            if self.too_many_attempts:
                raise TooManyAttempts(4.2)
            return None
        token = f"{len(self.logins):043}"
        self.logins[token] = key
        return Session(token=token, record=record, expires_at=datetime.now(UTC) + timedelta(hours=1))

    def authenticate_session(self, token: str) -> KeyRecord | None:
        key = self.logins.get(token)
        return self.authenticate(key) if key else None

    def log_out(self, token: str) -> KeyRecord | None:
        return self.known_keys.get(self.logins.pop(token, ""))

    def submit(self, spec: JobSpec, owner: str, *, priority: Priority = Priority.NORMAL) -> JobRecord:
        self.preview(spec, owner)
        record = replace(make_record(owner=owner, spec=spec), requested_spec=spec.requested, priority=priority)
        self.jobs[record.id] = record
        return record

    def submit_once(
        self, spec: JobSpec, owner: str, request: RequestKey, *, priority: Priority = Priority.NORMAL
    ) -> tuple[JobRecord, bool]:
        self._check()
        known = self.once.get((owner, request.digest))
        if known is None:
            record = self.submit(spec, owner, priority=priority)
            self.once[owner, request.digest] = (request.fingerprint, record.id)
            return record, False
        if known[0] != request.fingerprint:
            raise KeyReused
        return self.jobs[known[1]], True

    def repeatable(self, owner: str, key_id: str, operation: str, body: str, *, again: bool) -> RequestKey:
        self._check()
        name = (owner, key_id, operation, body)
        if not again or name not in self.repeated:
            self.repeated[name] = str(ULID())
        return RequestKey.of(operation, self.repeated[name], body)

    def note(self, job_id: str, warnings: Sequence[Mapping[str, Any]]) -> None:
        for data in warnings:
            self.add_event(job_id, "warning", **data)

    def has_only_cpu_workers(self) -> bool:
        return self.only_cpu_workers

    def submit_group(
        self,
        specs: Sequence[JobSpec],
        owner: str,
        request: RequestKey | None = None,
        *,
        priority: Priority = Priority.NORMAL,
    ) -> tuple[str, list[JobRecord], bool]:
        self._check()
        known = self.once.get((owner, request.digest)) if request else None
        if known and request and known[0] != request.fingerprint:
            raise KeyReused
        if known:
            return known[1], self.group(known[1], owner), True
        group = new_group_id()
        records = [self.submit(spec, owner, priority=priority) for spec in specs]
        for record, job_id in zip(records, member_ids(group, len(records)), strict=True):
            del self.jobs[record.id]
            self.jobs[job_id] = replace(record, id=job_id, group=group)
        if request:
            self.once[owner, request.digest] = (request.fingerprint, group)
        return group, self.group(group, owner), False

    def group(self, group: str, owner: str) -> list[JobRecord]:
        self._check()
        records = [record for record in self.jobs.values() if (record.group, record.owner) == (group, owner)]
        if not records:
            raise NotFound("group", group)
        return sorted(records, key=lambda record: record.id)

    def summarise(self, records: Sequence[JobRecord]) -> GroupSummary:
        events = {record.id: self.job_events.get(record.id, []) for record in records}
        return summarise(
            records,
            {
                job_id: next((e["data"] for e in told if e["type"] == "evaluation" and "paired" in e["data"]), None)
                for job_id, told in events.items()
            },
        )

    def cancel_group(self, group: str, owner: str) -> list[JobRecord]:
        for record in self.group(group, owner):
            if record.status not in TERMINAL:
                self.cancel(record.id, owner)
        return self.group(group, owner)

    def warnings(self, _spec: JobSpec) -> list[SpecWarning]:
        self._check()
        return [SpecWarning(pointer="/resources", code="no_worker", message="No worker is connected.")]

    def preview(self, spec: JobSpec, owner: str) -> Preview:
        self._check()
        if spec.data.source == "upload":
            self._upload(spec.data.dataset, owner)
        return Preview(estimate=estimate(spec), warnings=self.warnings(spec))

    def records(self, spec: JobSpec, owner: str) -> list[Mapping[str, Any]]:
        self._check()
        return records_of(self._upload(spec.data.dataset, owner))

    def _upload(self, dataset_id: str, owner: str) -> bytes:
        record, body = self.uploads.get(dataset_id, (None, b""))
        if record is None or record.owner != owner:
            remedy = "Upload it first."
            raise Rejected(
                Problem(pointer="/data/dataset", code="no_such_dataset", detail="does not exist", remedy=remedy)
            )
        return body

    def get(self, job_id: str, owner: str) -> JobRecord:
        self._check()
        record = self.jobs.get(job_id)
        if record is None or record.owner != owner:
            raise NotFound("job", job_id)
        return record

    def waiting(self, record: JobRecord) -> QueuePosition | None:
        if record.status is not JobStatus.QUEUED:
            return None
        queued = [job.id for job in self.jobs.values() if job.status is JobStatus.QUEUED]
        return QueuePosition(
            queue=record.queue,
            ahead=queued.index(record.id),
            workers=self.workers,
            reason=WaitReason.TURN if self.workers else WaitReason.NO_WORKER,
            spec_format=record.spec_format,
            workers_spec_format=SPEC_FORMAT if self.workers else None,
            hosts=1,
            gpus=record.spec["resources"]["gpus"],
            hosts_found=None,
        )

    def trial_result(self, record: JobRecord) -> dict[str, Any] | None:
        events = self.job_events.get(record.id, [])
        return next((event["data"]["result"] for event in events if event["data"].get("code") == "trial"), None)

    def list_jobs(
        self,
        owner: str | None,
        *,
        limit: int,
        cursor: str | None,
        status: JobStatus | None,
        metadata: dict[str, str],
        group: str | None = None,
        find: JobFilter | None = None,
        order: JobOrder | None = None,
    ) -> Page[JobRecord]:
        self._check()
        find = find or JobFilter()
        if order is not None:
            every = self.list_jobs(
                owner, limit=10**6, cursor=None, status=status, metadata=metadata, group=group, find=find
            ).items
            texts = [(record.id, _text_of(getattr(record, order.field))) for record in every]
            ids, following = order.page(texts, limit=limit, cursor=cursor)
            return Page(items=[self.jobs[job_id] for job_id in ids], next_cursor=following)
        mine = [
            record
            for record in sorted(self.jobs.values(), key=lambda r: r.id, reverse=True)
            if owner in (None, record.owner)
            and (cursor is None or record.id < cursor)
            and (status is None or record.status is status)
            and metadata.items() <= record.metadata.items()
            and group in (None, record.group)
            and find.kind in (None, record.spec.get("kind", "training"))
            and find.priority in (None, record.priority)
            and (find.words or "").lower() in _words_of(record)
        ]
        return Page(items=mine[:limit], next_cursor=mine[limit - 1].id if len(mine) > limit else None)

    def owner_of(self, job_id: str) -> str | None:
        record = self.jobs.get(job_id)
        return record and record.owner

    def prioritise(self, job_id: str, owner: str, priority: Priority) -> JobRecord:
        record = self.get(job_id, owner)
        if record.status not in (JobStatus.QUEUED, JobStatus.PAUSED):
            raise Conflict(job_id, record.status.value, "given another priority")
        return self.put(record, priority=priority)

    def cancel(self, job_id: str, owner: str) -> JobRecord:
        record = self.get(job_id, owner)
        if record.status in TERMINAL:
            raise Conflict(job_id, record.status.value, "cancelled")
        status = JobStatus.CANCELLED if record.status is JobStatus.QUEUED else JobStatus.CANCELLING
        return self.put(record, status=status)

    def pause(self, job_id: str, owner: str) -> JobRecord:
        record = self.get(job_id, owner)
        if record.status in TERMINAL:
            raise Conflict(job_id, record.status.value, "paused", "Submit a new job.")
        moves = {JobStatus.QUEUED: JobStatus.PAUSED, JobStatus.RUNNING: JobStatus.PAUSING}
        return self.put(record, status=moves.get(record.status, record.status))

    def resume(self, job_id: str, owner: str) -> JobRecord:
        record = self.get(job_id, owner)
        if record.status in TERMINAL or record.status is JobStatus.PAUSING:
            raise Conflict(job_id, record.status.value, "resumed", "Wait until it is paused, then resume it.")
        return self.put(record, status=JobStatus.QUEUED if record.status is JobStatus.PAUSED else record.status)

    def events(
        self, job_id: str, owner: str, *, after: int, limit: int, types: Collection[str] = ()
    ) -> list[dict[str, Any]]:
        self.get(job_id, owner)
        found = [e for e in self.job_events.get(job_id, []) if e["seq"] > after and (not types or e["type"] in types)]
        return found[:limit]

    def latest_events(
        self, job_id: str, owner: str, *, before: int | None, limit: int, types: Collection[str]
    ) -> tuple[list[dict[str, Any]], bool]:
        found = self.events(job_id, owner, after=0, limit=10**6, types=types)[::-1]
        left = [event for event in found if before is None or event["seq"] < before]
        return left[:limit], len(left) > limit

    def read_on(self, job_id: str, *, after: int, types: Collection[str] = ()) -> EventPage:
        self._check()
        found = [event for event in self.job_events.get(job_id, []) if event["seq"] > after]
        return EventPage(
            events=[event for event in found if not types or event["type"] in types],
            after=found[-1]["seq"] if found else after,
            more=False,
            ended=self.jobs[job_id].status in TERMINAL,
        )

    def archive(self, job_id: str, owner: str, folder: str) -> Archive | None:
        self.get(job_id, owner)
        return None

    def sessions(self, owner: str) -> list[ServedModels]:
        return []

    def session(self, session: str) -> ServedModels | None:
        return None

    def ask_session(self, served: ServedModels, order: Mapping[str, Any]) -> None:
        raise NotImplementedError

    def answers(self, reader: str, after: str, *, block_ms: int) -> tuple[str, list[dict[str, Any]]]:
        raise NotImplementedError

    def forget_answers(self, reader: str) -> None:
        raise NotImplementedError

    def newest_events(self, job_ids: list[str]) -> dict[str, int]:
        return {job_id: len(self.job_events.get(job_id, [])) for job_id in job_ids}

    def metrics(self, job_id: str, owner: str, *, after_step: int = 0) -> list[dict[str, Any]]:
        events = self.events(job_id, owner, after=0, limit=10**6, types={"metric"})
        return [{**event["data"], "step": event["step"]} for event in events if event["step"] > after_step]

    def artifacts(self, job_id: str, owner: str) -> list[Artifact]:
        self.get(job_id, owner)
        return self.job_artifacts.get(job_id, [])

    def checkpoints(self, job_id: str, owner: str) -> list[LinkedCheckpoint]:
        self.get(job_id, owner)
        files = self.job_artifacts.get(job_id, [])
        return [LinkedCheckpoint(step=5, epoch=1, created_at=datetime.now(UTC), files=files)] if files else []

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
        self._check()
        known = self.once.get((owner, request.digest)) if request else None
        if request and known:
            if known[0] != request.fingerprint:
                raise KeyReused
            return self.uploads[known[1]][0], True
        record = DatasetRecord(
            id=f"ds-{ULID()}",
            owner=owner,
            name=name,
            rows=summary.rows,
            bytes=summary.bytes,
            sha256=summary.sha256,
            columns=summary.columns,
            created_at=datetime.now(UTC),
        )
        self.uploads[record.id] = (record, path.read_bytes())
        self.purposes[record.id] = purpose or "fine-tune"
        if request:
            self.once[owner, request.digest] = (request.fingerprint, record.id)
        return record, False

    def get_dataset(self, dataset_id: str, owner: str) -> DatasetRecord:
        self._check()
        found = self.uploads.get(dataset_id)
        if found is None or found[0].owner != owner:
            raise NotFound("data set", dataset_id)
        return found[0]

    def dataset_owner(self, dataset_id: str) -> str | None:
        found = self.uploads.get(dataset_id)
        return found and found[0].owner

    def dataset_rows(self, dataset_id: str, owner: str, *, limit: int, place: RowPlace | None = None) -> RowPage:
        self.get_dataset(dataset_id, owner)
        lines = [strict_json.loads(line) for line in self.uploads[dataset_id][1].splitlines()]
        first = place.row if place else 0
        found = [StoredRow(row=first + at, values=one) for at, one in enumerate(lines[first : first + limit])]
        more = RowPlace(row=first + limit, byte=0) if len(lines) > first + limit else None
        return RowPage(rows=found, next=more)

    def job_rows(self, job_id: str, owner: str, query: RowQuery) -> JobRowPage:
        def row_file(data: DataSection, of: str) -> RowFile:
            self.get_dataset(data.dataset, of)
            body = self.uploads[data.dataset][1]
            return RowFile(name=data.dataset, open=lambda: BytesIO(body), rows=None)

        return JobRows(row_file).page(self.get(job_id, owner).spec, owner, query)

    def dataset_jobs(self, dataset_id: str, owner: str, *, limit: int, cursor: str | None = None) -> Page[JobRecord]:
        self.get_dataset(dataset_id, owner)
        users = [job for job in self.jobs.values() if job.owner == owner and dataset_id in str(job.spec)]
        left = sorted((job for job in users if cursor is None or job.id < cursor), key=lambda j: j.id, reverse=True)
        return Page(items=left[:limit], next_cursor=left[limit - 1].id if len(left) > limit else None)

    def list_datasets(self, owner: str | None, *, limit: int, cursor: str | None = None) -> Page[DatasetRecord]:
        self._check()
        mine = sorted(
            (r for r, _ in self.uploads.values() if owner in (None, r.owner)), key=lambda r: r.id, reverse=True
        )
        rest = [record for record in mine if cursor is None or record.id < cursor]
        return Page(items=rest[:limit], next_cursor=rest[limit - 1].id if len(rest) > limit else None)

    def list_files(
        self, owner: str, *, limit: int, after: str | None, oldest_first: bool, purpose: str | None
    ) -> Page[tuple[DatasetRecord, str]]:
        self._check()
        mine = sorted((r for r, _ in self.uploads.values() if r.owner == owner), key=lambda r: r.id)
        if not oldest_first:
            mine.reverse()
        rest = [r for r in mine if after is None or (r.id > after if oldest_first else r.id < after)]
        found = [(r, self.purposes[r.id]) for r in rest if purpose in (None, self.purposes[r.id])]
        return Page(items=found[:limit], next_cursor=found[limit - 1][0].id if len(found) > limit else None)

    def purpose_of(self, record: DatasetRecord) -> str:
        return self.purposes[record.id]

    def open_dataset(self, dataset_id: str, owner: str) -> tuple[DatasetRecord, BinaryIO]:
        return self.get_dataset(dataset_id, owner), BytesIO(self.uploads[dataset_id][1])

    def delete_dataset(self, dataset_id: str, owner: str) -> None:
        self.get_dataset(dataset_id, owner)
        del self.uploads[dataset_id]

    def delete(self, job_id: str, owner: str) -> None:
        record = self.get(job_id, owner)
        if record.status not in TERMINAL:
            raise Conflict(job_id, record.status.value, "deleted", "Cancel it first.")
        del self.jobs[job_id]

    def rollouts(
        self, job_id: str, owner: str, query: RolloutQuery, *, limit: int, cursor: str | None = None
    ) -> Page[Rollout]:
        self.get(job_id, owner)
        self.rollout_queries.append(query)
        if cursor is not None:
            decode_cursor(cursor, query, job_id)
        return Page(items=self.job_rollouts.get(job_id, [])[:limit], next_cursor=None)

    def rollout_steps(self, job_id: str, owner: str) -> list[RolloutStep]:
        self.get(job_id, owner)
        return []

    def count_judged_run(self, key_id: str) -> None:
        self.judged_runs.append(key_id)
        if len(self.judged_runs) > self.most_judged_runs:
            raise RateLimited("Too many.", 3.0)

    def telemetry(self) -> Telemetry:
        self._check()
        jobs = Counter(record.status for record in self.jobs.values())
        states = {status: jobs[status] for status in JobStatus}
        return Telemetry(jobs=states, queues=self.queues, leases=0, lease_age_seconds=0.0, workers=[])

    def list_workers(self, *, limit: int, cursor: str | None = None) -> Page[FleetWorker]:
        self._check()
        names = sorted(name for name in self.fleet if cursor is None or name > cursor)
        more = len(names) > limit
        return Page(items=[self.fleet[n] for n in names[:limit]], next_cursor=names[limit - 1] if more else None)

    def get_worker(self, name: str) -> FleetWorker:
        self._check()
        if name not in self.fleet:
            raise NotFound("worker", name)
        return self.fleet[name]

    def drain_worker(self, name: str, mode: DrainMode | None, *, by: str) -> FleetWorker:
        drain = Drain(mode=mode, by=by, at=datetime.now(UTC)) if mode else None
        state = WorkerState.DRAINING if drain else WorkerState.IDLE
        self.fleet[name] = replace(self.get_worker(name), drain=drain, state=state)
        return self.fleet[name]

    def usage(self, owner: str) -> tuple[Usage, int, int | None]:
        self._check()
        stored = Stored(bytes=0, measured_at=None)
        used = Usage(
            owner=owner,
            gpu_hours=0.0,
            max_gpu_hours=None,
            window_days=30,
            frees_at=None,
            stored=stored,
            max_stored_bytes=None,
        )
        return used, 0, None

    def list_keys(self, owner: str | None, *, limit: int, cursor: str | None = None) -> Page[ListedKey]:
        self._check()
        every = sorted(
            (one for one in self.keys.values() if owner in (None, one.record.owner)), key=lambda k: k.record.id
        )
        left = [one for one in reversed(every) if cursor is None or one.record.id < cursor]
        return Page(items=left[:limit], next_cursor=left[limit - 1].record.id if len(left) > limit else None)

    def create_key(
        self,
        holder: KeyRecord,
        owner: str,
        scopes: Sequence[str],
        *,
        name: str | None = None,
        expires_at: datetime | None = None,
    ) -> tuple[str, ListedKey]:
        self._check()
        if problems := granted(holder, owner, scopes, expires_at):
            raise Rejected(*problems)
        record = KeyRecord(
            id=f"key-{ULID()}",
            owner=owner,
            scopes=list(scopes),
            created_at=datetime.now(UTC),
            expires_at=expires_at,
            name=name,
        )
        made = ListedKey(record=record, hint="grpo_test", created_by=holder.id, last_used_at=None)
        self.keys[record.id] = made
        return "grpo_test-of-a-key", made

    def revoke_key(self, key_id: str, owner: str | None) -> ListedKey:
        self._check()
        if key_id not in self.keys or owner not in (None, self.keys[key_id].record.owner):
            raise NotFound("key", key_id)
        found = self.keys[key_id]
        self.keys[key_id] = replace(found, record=replace(found.record, revoked_at=datetime.now(UTC)))
        return self.keys[key_id]

    def list_usage(self, *, limit: int, cursor: str | None = None) -> Page[tuple[Usage, int, int | None]]:
        owners = sorted({job.owner for job in self.jobs.values()} - {name for name in [cursor] if name})
        left = [owner for owner in owners if cursor is None or owner > cursor]
        more = left[limit - 1] if len(left) > limit else None
        return Page(items=[self.usage(owner) for owner in left[:limit]], next_cursor=more)

    def usage_rows(self, owner: str | None, first: date, last: date, period: Period) -> list[UsageRow]:
        self._check()
        return [row for row in self.used if owner in (None, row.owner)]

    def storage_is_up(self) -> bool:
        return self.verdicts["storage"] == "ok"

    def health(self) -> dict[str, str]:
        return self.verdicts

    # What tests arrange.

    def reset(self) -> None:
        """Forget everything, so that one application can serve many tests."""
        running = self.running
        self.__init__()
        self.running = running

    def put(self, record: JobRecord, **changes: Any) -> JobRecord:
        """Store a record, changed."""
        changed = JobRecord(**{**record.__dict__, **changes})
        self.jobs[record.id] = changed
        return changed

    def add_event(self, job_id: str, kind: str, *, step: int = 0, **data: Any) -> None:
        """Append an event."""
        events = self.job_events.setdefault(job_id, [])
        time = "2026-01-02T03:04:05.678Z"
        events.append(
            {"v": 1, "seq": len(events) + 1, "epoch": 1, "type": kind, "time": time, "step": step, "data": data}
        )

    def add_artifact(self, job_id: str, path: str, content: bytes) -> Artifact:
        """Append a stored file."""
        artifact = Artifact(
            path=path,
            key=f"jobs/{job_id}/e1/{path}",
            size=len(content),
            sha256=hashlib.sha256(content).hexdigest(),
            url=f"http://storage.test/{path}?X-Amz-Signature=secret",
            expires_at=datetime.now(UTC) + timedelta(minutes=15),
        )
        self.job_artifacts.setdefault(job_id, []).append(artifact)
        return artifact

    def _check(self) -> None:
        if self.fail is not None:
            raise self.fail


def _text_of(value: Any) -> str:
    """A field as Valkey holds it."""
    if isinstance(value, datetime):
        return str(round(value.timestamp() * 1000))
    return "" if value is None else str(value)


def _words_of(record: JobRecord) -> str:
    return " ".join((record.id, record.name or "", record.spec["model"]["name"], str(record.metadata))).lower()


def key_record(owner: str, scopes: list[str] | None = None) -> KeyRecord:
    return KeyRecord(
        id=f"key-{owner}",
        owner=owner,
        scopes=scopes or [scope for scope in SCOPES if scope != OPERATOR],
        created_at=datetime.now(UTC),
    )


def make_record(*, owner: str = "alice", spec: JobSpec | None = None, **fields: Any) -> JobRecord:
    spec = spec or JobSpec()
    now = datetime.now(UTC)
    values: dict[str, Any] = {
        "id": new_job_id(),
        "owner": owner,
        "status": JobStatus.QUEUED,
        "spec": spec.as_dict(),
        "spec_sha256": spec.digest(),
        "created_at": now,
        "updated_at": now,
        "queue": "grpo-cpu",
        "name": spec.name,
        "metadata": dict(spec.metadata),
        "total_steps": spec.training.steps,
    }
    return JobRecord(**{**values, **fields})
