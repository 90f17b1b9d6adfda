"""Restores from the bucket what Valkey has lost: everything in `grpo admin rebuild`, the most recent writes in
`valkey_recovery`.

Owns how a record is made or corrected from a job's objects. Restores records, lists of owners, API keys, jobs'
Idempotency-Keys, event numbers and the events of unfinished jobs; not sessions and the counters of limits.
It may run at any time, beside workers and the API, and any number of times. Invariant: an existing record is never
replaced, only corrected by the outcome, the commands and the runs in the bucket, which are authoritative.

A job that had started is restored as held by its last run, with a new lease: a worker that is still training continues,
and without one the lease expires and the job resumes from its last checkpoint.
"""

from __future__ import annotations

import re
import socket
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import islice
from typing import Any, Self, TypeVar

import structlog
from ulid import ULID

from grpo_core.run_dir.records import STOPPED_EARLY
from jobs.auth.api_keys import KeyStore
from jobs.errors import JobsError, Unavailable
from jobs.lifecycle.admission import REMEMBER_SECONDS
from jobs.lifecycle.celery_app import WakeupSender
from jobs.lifecycle.commands import Commands
from jobs.lifecycle.deletion import Deletion
from jobs.lifecycle.outcomes import apply_outcome, write_outcome
from jobs.lifecycle.wakeups import WakeupPublisher
from jobs.settings import QueueSettings, StorageSettings
from jobs.store import commits as job_commits
from jobs.store import event_log, object_keys
from jobs.store.bucket import ObjectStore
from jobs.store.event_log import EventFile
from jobs.store.job import HELD, TERMINAL, JobRecord, JobStatus, Priority, record_of, utc
from jobs.store.job_store import JobStore
from jobs.store.write_once import WRITE_ONCE_VERSION, Outcome, WriteOnceStore

log = structlog.get_logger()

THREADS = 16
BATCH = 500

TIME_PART = len("job-") + 10
"""Length of the part of a job's id that holds the time of its creation."""

_RUN = re.compile(r"e(\d+)/")
_TICKET = re.compile(r"epochs/(\d+)\.json")

T = TypeVar("T")


class _Unreadable(JobsError):
    """The objects of a job cannot be interpreted."""


@dataclass(frozen=True, kw_only=True)
class RebuildReport:
    """What a rebuild did, or would do in a dry run."""

    dry_run: bool
    jobs: int
    """Number of jobs in the bucket."""
    present: int
    """Number of jobs among them with a record."""
    restored: dict[str, int]
    """Number of jobs that got a record, by status."""
    corrected: int
    """Number of records that lacked an outcome or a command."""
    keys: int
    """Number of API keys that Valkey did not have."""
    unreadable: dict[str, str] = field(default_factory=dict)
    """Jobs that were left unchanged, with the reason."""


@dataclass(frozen=True, kw_only=True)
class _Found:
    """A record made from the bucket, with its events and Idempotency-Key."""

    record: JobRecord
    event_seq: int
    events: list[dict[str, Any]]
    """Events to restore in Valkey; none if readers find them in the bucket."""
    request: tuple[str, str] | None = None
    """Digests of its Idempotency-Key and of the request's body."""

    @property
    def shipped(self) -> int | None:
        """Number of its run's events among them; None if an earlier release did not count them."""
        told = [event for event in self.events if event["epoch"] == self.record.epoch]
        counted = max((event.get("n", 0) for event in told), default=0)
        return None if told and not counted else counted


class Rebuild:
    """One rebuild. Raises `Unavailable`; then the next rebuild does the rest."""

    def __init__(
        self,
        store: ObjectStore,
        job_store: JobStore,
        wakeups: WakeupPublisher,
        *,
        lease_seconds: float,
        dry_run: bool = False,
    ) -> None:
        """`wakeups` must not have been started."""
        self._dry_run = dry_run
        self._lease_seconds = lease_seconds
        self._store = store
        self._job_store = job_store
        self._write_once = WriteOnceStore(store)
        self._keys = KeyStore(store, job_store)
        self._deletion = Deletion(job_store, store)
        self._wakeups = wakeups
        self._by = f"rebuild-{socket.gethostname()}"
        self._commands = Commands(self._job_store, self._write_once, self._wakeups, by=self._by)
        self._unreadable: dict[str, str] = {}
        self._unread: set[str] = set()
        """Unreadable jobs that may be readable later."""

    @classmethod
    def of(cls, storage: StorageSettings, queue: QueueSettings, *, dry_run: bool = False) -> Self:
        """Make a rebuild of the service on these servers."""
        job_store = JobStore(queue)
        wakeups = WakeupPublisher(WakeupSender(queue), job_store)
        return cls(ObjectStore(storage), job_store, wakeups, lease_seconds=queue.lease_seconds, dry_run=dry_run)

    def run(self) -> RebuildReport:
        """Examine every job in the bucket once."""
        self._wakeups.start()
        try:
            with ThreadPoolExecutor(THREADS) as pool:
                return self._run(pool)
        finally:
            self._wakeups.close()

    def catch_up(self, since: datetime | None) -> None:
        """Correct what Valkey may have lost since then: new jobs, and jobs that are held or paused.

        `since` is None if Valkey has lost everything. The caller starts and stops `wakeups`.
        """
        with ThreadPoolExecutor(THREADS) as pool:
            self._keys.load()
            erased = self._deletion.erased()
            self._each(pool, self._deletion.finish, erased - set(self._job_store.missing(sorted(erased))))
            after = f"job-{ULID.from_datetime(since)}"[:TIME_PART] if since else ""
            recent = (job_id for job_id in self._store.folders(object_keys.JOBS, after=after) if job_id not in erased)
            while batch := list(islice(recent, BATCH)):
                for record in self._each(pool, self._restore_ours, self._job_store.missing(batch)):
                    if record is not None:
                        self._ring_for(record)
            held = self._job_store.held()
            self._each(pool, self._catch_up, self._job_store.get_many([*held, *self._job_store.paused()]))
        self._note_unread()

    def look_again(self, job_ids: list[str]) -> None:
        """Compare jobs whose objects could not be read earlier."""
        with ThreadPoolExecutor(THREADS) as pool:
            missing = self._job_store.missing(job_ids)
            for record in self._each(pool, self._restore_ours, missing):
                if record is not None:
                    self._ring_for(record)
            self._each(pool, self._catch_up, self._job_store.get_many([j for j in job_ids if j not in set(missing)]))
        for job_id in set(job_ids) - self._unread:
            self._job_store.end("unread", job_id)
        self._note_unread()

    def _note_unread(self) -> None:
        for job_id, reason in self._unreadable.items():
            log.error("job_unreadable", job_id=job_id, reason=reason)
        for job_id in self._unread:
            self._job_store.begin("unread", job_id)

    def catch_up_queued(self) -> None:
        """Do the rest of `catch_up`, for queued jobs: these are only shown wrongly, because a claim checks them too."""
        with ThreadPoolExecutor(THREADS) as pool:
            queued = self._job_store.queued()
            for start in range(0, len(queued), BATCH):
                self._each(pool, self._catch_up, self._job_store.get_many(queued[start : start + BATCH]))
        self._note_unread()

    def _catch_up(self, record: JobRecord) -> None:
        """Correct an existing record by the bucket."""
        keys = [item.key for item in self._store.list(object_keys.folder(record.id))]
        files = event_log.event_files(keys)
        told = self._job_store.newest_events([record.id])[record.id]
        self._job_store.replay(record.id, list(event_log.read_events(self._store, files, after=told)))
        if object_keys.outcome(record.id) not in keys:
            self._find_run(record, keys)
            self._commands.apply_pending(record.id)
        elif outcome := self._write_once.outcome(record.id):
            apply_outcome(self._job_store, record.id, outcome, add_error=True)

    def _find_run(self, record: JobRecord, keys: list[str]) -> None:
        """Give the job back to a run that Valkey has lost. If the run has ended, its lease expires without an
        attempt."""
        # A ticket alone is not a run: its claim may have been refused. If not, its worker reclaims the job with a
        # heartbeat.
        epoch = _last_run(record.id, keys)
        if record.status in HELD:
            epoch = max(epoch, record.epoch)
        if epoch < record.epoch or not epoch or (epoch == record.epoch and record.status not in HELD):
            return
        ticket = self._store.get_json(object_keys.epoch(record.id, epoch)) or {}
        self._job_store.reclaim(
            record.id,
            epoch=epoch,
            worker=ticket.get("worker", ""),
            lease_seconds=self._lease_seconds,
            orders=ticket.get("orders", record.orders),
            restored=True,
            gpu=ticket.get("gpu", ""),
            hosts=ticket.get("hosts", 0),
        )

    def _run(self, pool: ThreadPoolExecutor) -> RebuildReport:
        self._job_store.ping()
        erased = self._finish_deletions(pool)
        keys = self._restore_keys()
        jobs = present = corrected = 0
        restored: Counter[str] = Counter()
        ids = (job_id for job_id in self._store.folders(object_keys.JOBS) if job_id not in erased)
        while batch := list(islice(ids, BATCH)):
            missing = self._job_store.missing(batch)
            known = self._get_known([job_id for job_id in batch if job_id not in set(missing)])
            jobs += len(batch)
            present += len(known)
            corrected += sum(1 for done in self._each(pool, self._correct, known) if done)
            for record in self._each(pool, self._restore_ours, missing):
                if record is not None:
                    restored[record.status.value] += 1
                    self._ring_for(record)
        return RebuildReport(
            dry_run=self._dry_run,
            jobs=jobs,
            present=present,
            restored={status.value: restored[status.value] for status in JobStatus if restored[status.value]},
            corrected=corrected,
            keys=keys,
            unreadable=dict(sorted(self._unreadable.items())),
        )

    def _each(self, pool: ThreadPoolExecutor, act: Callable[[Any], T], subjects: Iterable[Any]) -> list[T | None]:
        """Call `act` for each subject. Errors are recorded and do not stop the others."""

        def carefully(subject: Any) -> T | None:
            try:
                return act(subject)
            except Unavailable as error:
                if self._store.is_at_fault(error):
                    raise
                job_id = subject if isinstance(subject, str) else subject.id
                self._unreadable[job_id] = str(error)
                self._unread.add(job_id)
                return None
            except Exception as error:  # noqa: BLE001 - an error in one job must not stop the others
                job_id = subject if isinstance(subject, str) else subject.id
                reason = str(error) if isinstance(error, _Unreadable) else f"{type(error).__name__}: {error}"
                self._unreadable[job_id] = reason
                return None

        return list(pool.map(carefully, subjects))

    def _get_known(self, job_ids: list[str]) -> list[JobRecord]:
        """Return the existing records; those that cannot be read are recorded as unreadable."""
        known = self._job_store.get_many(job_ids)
        left = sorted(set(job_ids) - {record.id for record in known})
        for job_id in set(left) - set(self._job_store.missing(left)):
            self._unreadable[job_id] = "this release cannot read its record in Valkey"
        return known

    def _finish_deletions(self, pool: ThreadPoolExecutor) -> set[str]:
        """Finish deletions, also of jobs that an old backup of Valkey has brought back."""
        erased = self._deletion.erased()
        if not self._dry_run:
            list(pool.map(self._deletion.finish, erased))
        return erased

    def _restore_keys(self) -> int:
        missing = self._keys.missing()
        if not self._dry_run:
            self._keys.load()
        return missing

    def _correct(self, record: JobRecord) -> bool:
        """Correct an existing record by its outcome and commands. Returns True if it lacked one."""
        outcome = self._write_once.outcome(record.id)
        if record.status in TERMINAL:
            is_late = outcome is not None and outcome.status != record.status.value
        else:
            is_late = outcome is not None or bool(self._write_once.commands(record.id, after=record.orders))
        if self._dry_run:
            return is_late
        if is_late and outcome is not None:
            apply_outcome(self._job_store, record.id, outcome, add_error=True)
        elif is_late:
            self._commands.apply_pending(record.id)
        return is_late

    def _ring_for(self, record: JobRecord) -> None:
        """Publish a wake-up for a job."""
        if record.status is JobStatus.QUEUED and not self._dry_run:
            self._wakeups.add(record.id, record.queue)

    def _restore(self, job_id: str) -> JobRecord | None:
        """Restore a record; None if another rebuild was first, or if the record has been retired."""
        found = self._find(job_id)
        if found is None:
            return None
        record = found.record
        if self._dry_run:
            return record
        self._job_store.replay(job_id, found.events)
        lease = self._lease_seconds if record.restored else None
        is_new = self._job_store.restore(
            record,
            event_seq=found.event_seq,
            lease_seconds=lease,
            shipped=found.shipped,
            request=found.request,
            remember_seconds=REMEMBER_SECONDS - (datetime.now(UTC) - record.created_at).total_seconds(),
        )
        return record if is_new else None

    def _restore_ours(self, job_id: str) -> JobRecord | None:
        """Restore a record, unless the job belongs to another service with the same bucket."""
        asked = self._write_once.job(job_id)
        ours = f"{self._job_store.prefix}."
        is_theirs = asked is not None and not asked.get("queue", ours).startswith(ours)
        return None if is_theirs else self._restore(job_id)

    def _find(self, job_id: str) -> _Found | None:
        asked = self._write_once.job(job_id)
        if asked is None:
            raise _Unreadable("job.json is missing, so the request is not known")
        if asked["v"] > WRITE_ONCE_VERSION:
            raise _Unreadable(f"job.json has version {asked['v']}: rebuild with the release that wrote it")
        keys = [item.key for item in self._store.list(object_keys.folder(job_id))]
        if object_keys.record(job_id) in keys:
            return None  # it had left Valkey before: readers find it in the bucket
        request = (asked["request"]["key"], asked["request"]["print"]) if "request" in asked else None
        record = self._begun(self._prioritised(record_of(asked), keys), keys)
        orders = self._write_once.commands(job_id)
        record = replace(record, orders=orders[-1][0] if orders else 0)
        outcome = self._write_once.outcome(job_id) if object_keys.outcome(job_id) in keys else None
        if outcome is None and any(order == "cancel" for _, order in orders):
            outcome = self._cancelled(record)
        if outcome is not None:
            return replace(self._ended(record, outcome, keys), request=request)
        steering = [order for _, order in orders]
        found = self._unfinished(record, event_log.event_files(keys), is_paused=steering[-1:] == ["pause"])
        return replace(found, request=request)

    def _prioritised(self, record: JobRecord, keys: list[str]) -> JobRecord:
        """Add the priority that its owner has set since."""
        if object_keys.priority(record.id) not in keys:
            return record
        kept = self._store.get_json(object_keys.priority(record.id)) or {}
        return replace(record, priority=Priority(kept.get("priority", record.priority)))

    def _begun(self, record: JobRecord, keys: list[str]) -> JobRecord:
        """Add to a record what its runs have stored: tickets, commits, and where the last one started."""
        epoch, latest = _runs(record.id, keys)
        if not latest:
            return record
        commits = job_commits.commits_up_to(self._store, record.id, latest)
        base = job_commits.read_base(self._store, record.id, epoch)
        first, held, last = (self._store.get_json(object_keys.epoch(record.id, n)) or {} for n in (1, epoch, latest))
        return replace(
            record,
            epoch=epoch,
            attempts=last.get("attempts", 0),
            run_ms=last.get("run_ms", 0),
            gpu_ms=last.get("gpu_ms", {}),
            gpu=held.get("gpu", ""),
            run_hosts=held.get("hosts", 0),
            worker=held["worker"],
            started_at=datetime.fromisoformat(first["time"]),
            checkpoint_step=commits[0].step if commits else 0,
            accumulation=(base.gradient_accumulation if base else None) or 0,
        )

    def _cancelled(self, record: JobRecord) -> Outcome:
        """Write the outcome of a cancelled job that has none; it fences a worker that still holds the job."""
        if self._dry_run:
            return Outcome(job=record.id, status="cancelled", epoch=record.epoch, time=event_log.now_iso(), by=self._by)
        return write_outcome(self._write_once, record.id, "cancelled", by=self._by)

    def _ended(self, record: JobRecord, outcome: Outcome, keys: list[str]) -> _Found:
        manifest = self._write_once.manifest(outcome.manifest) if outcome.manifest else None
        files = (
            event_log.event_files(entry.key for entry in manifest.objects) if manifest else event_log.event_files(keys)
        )
        closing = event_log.closing_events(self._store, files, outcome)
        record = replace(
            record,
            status=JobStatus(outcome.status),
            epoch=outcome.epoch,
            worker=None,
            error=outcome.error,
            manifest=outcome.manifest,
            finished_at=datetime.fromisoformat(outcome.time),
        )
        for file in reversed(files[-3:]):
            progressed = _progressed(record, event_log.read_events(self._store, [file]))
            if progressed is not record:
                record = progressed
                break
        if manifest:
            return _Found(record=record, event_seq=closing[-1]["seq"], events=[])
        # Without a manifest, readers would not find them in the bucket.
        events = list(event_log.read_events(self._store, files))
        unused = self._unused(record, events)
        events += [{**event, "seq": unused + place} for place, event in enumerate(closing, start=1)]
        return _Found(record=record, event_seq=events[-1]["seq"], events=events)

    def _unfinished(self, record: JobRecord, files: list[EventFile], *, is_paused: bool) -> _Found:
        events = list(event_log.read_events(self._store, files))
        record = _progressed(record, events)
        if is_paused:
            record = replace(record, status=JobStatus.PAUSED, worker=None)
        elif record.epoch:
            # From now on, because the time since its last ticket is not known; a worker that still has it knows.
            now = utc(self._job_store.now_ms())
            record = replace(record, status=JobStatus.RUNNING, restored=True, run_at=now)
        return _Found(record=record, event_seq=self._unused(record, events), events=events)

    def _unused(self, record: JobRecord, events: list[dict[str, Any]]) -> int:
        age_seconds = self._job_store.now_ms() / 1000 - record.created_at.timestamp()
        return event_log.unused_number(age_seconds, events[-1]["seq"] if events else 0)


def _runs(job_id: str, keys: list[str]) -> tuple[int, int]:
    """Return the run that holds or last held the job, and the highest number of a ticket; 0 before the first.

    Two workers that were woken for a job may both have taken a number. The one that has written objects holds the job.
    """
    names = [key.removeprefix(object_keys.folder(job_id)) for key in keys]
    latest = max((int(ticket[1]) for name in names if (ticket := _TICKET.fullmatch(name))), default=0)
    return _last_run(job_id, keys) or latest, latest


def _last_run(job_id: str, keys: list[str]) -> int:
    """Return the last run that has written objects; 0 if none has."""
    names = (key.removeprefix(object_keys.folder(job_id)) for key in keys)
    return max((int(run[1]) for name in names if (run := _RUN.match(name))), default=0)


def _progressed(record: JobRecord, events: Iterable[dict[str, Any]]) -> JobRecord:
    """Return the record with the step and reward of its last events, and what evaluations found."""
    events = list(events)
    evaluated = [e for e in events if e["type"] == "evaluation" and e["data"].get("best_step") is not None]
    best = max(evaluated, key=lambda e: e["seq"], default=None)
    stop = next((e for e in events if e["type"] == "log" and e["data"].get("code") == STOPPED_EARLY), None)
    if best is not None:
        record = replace(record, best_step=best["data"]["best_step"])
    if stop is not None:
        record = replace(record, stopped=stop["data"]["message"])
    last = max((event for event in events if event["type"] == "metric"), key=lambda e: e["seq"], default=None)
    if last is None:
        return record
    return replace(record, step=last["step"], reward=last["data"].get("reward"))
