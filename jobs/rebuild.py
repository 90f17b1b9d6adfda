"""Puts back what Valkey has lost, from the bucket: `grpo admin rebuild`.

Owns what a job's objects say of a job that has no record. Records, the lists of owners, API keys, event numbers and
the events of unfinished jobs come back; Idempotency-Keys, sessions and the counters of limits do not. It may run at
any time, beside workers and the API, and any number of times. Invariant: a record that is there is never replaced,
only brought to the outcome and the orders that are in the bucket, which are stronger.

A job that had begun comes back as held by its last run, with a new lease: a worker that is still training goes on as
if nothing had happened, and where none is, the lease runs out and the job goes on from its last checkpoint.
"""

from __future__ import annotations

import re
import socket
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import datetime
from itertools import islice
from typing import Any, Self, TypeVar

from jobs import journal, layout, lineage
from jobs.archive import ARCHIVE_VERSION, Archive, Outcome
from jobs.ending import close, settle
from jobs.erasure import Erasure
from jobs.errors import JobsError
from jobs.journal import EventFile
from jobs.keys import KeyStore
from jobs.ledger import Ledger
from jobs.orders import Orders
from jobs.outbox import Outbox
from jobs.queue import Doorbell
from jobs.record import TERMINAL, JobRecord, JobStatus, record_of
from jobs.settings import QueueSettings, StorageSettings
from jobs.storage import ObjectStore

THREADS = 16
BATCH = 500
EVENT_ROOM = 1_000_000
"""Event numbers left out, for clocks that differ."""

_RUN = re.compile(r"e(\d+)/")

T = TypeVar("T")


class _Unreadable(JobsError):
    """A job whose objects cannot be made sense of."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a rebuild did, or would do."""

    dry_run: bool
    jobs: int
    """Jobs in the bucket."""
    present: int
    """Of these, jobs that had a record."""
    restored: dict[str, int]
    """Jobs that got one, by status."""
    corrected: int
    """Records that lagged behind an outcome or an order."""
    keys: int
    """API keys that Valkey did not know."""
    unreadable: dict[str, str] = field(default_factory=dict)
    """Jobs that were left alone, and why."""


@dataclass(frozen=True, kw_only=True)
class _Found:
    """A record as the bucket has it, with what goes beside it."""

    record: JobRecord
    event_seq: int
    events: list[dict[str, Any]]
    """To be put back in Valkey; none where readers find them in the bucket."""


class Rebuild:
    """One rebuild. Raises `Unavailable`; then what was done is done, and the rest is for the next time."""

    def __init__(
        self, store: ObjectStore, ledger: Ledger, outbox: Outbox, *, lease_seconds: float, dry_run: bool = False
    ) -> None:
        """The outbox must not have been started."""
        self._dry_run = dry_run
        self._lease_seconds = lease_seconds
        self._store = store
        self._ledger = ledger
        self._archive = Archive(store)
        self._keys = KeyStore(store, ledger)
        self._outbox = outbox
        self._by = f"rebuild-{socket.gethostname()}"
        self._orders = Orders(self._ledger, self._archive, self._outbox, by=self._by)
        self._unreadable: dict[str, str] = {}

    @classmethod
    def of(cls, storage: StorageSettings, queue: QueueSettings, *, dry_run: bool = False) -> Self:
        """A rebuild of the service on these servers."""
        ledger = Ledger(queue)
        outbox = Outbox(Doorbell(queue), ledger)
        return cls(ObjectStore(storage), ledger, outbox, lease_seconds=queue.lease_seconds, dry_run=dry_run)

    def run(self) -> Report:
        """Look at every job in the bucket once."""
        self._outbox.start()
        try:
            with ThreadPoolExecutor(THREADS) as pool:
                return self._run(pool)
        finally:
            self._outbox.close()

    def _run(self, pool: ThreadPoolExecutor) -> Report:
        self._ledger.ping()
        erased = self._finish_erasures(pool)
        keys = self._restore_keys()
        jobs = present = corrected = 0
        restored: Counter[str] = Counter()
        ids = (job_id for job_id in self._store.folders(layout.JOBS) if job_id not in erased)
        while batch := list(islice(ids, BATCH)):
            missing = self._ledger.missing(batch)
            known = self._ledger.get_many([job_id for job_id in batch if job_id not in set(missing)])
            unfinished = [record for record in known if record.status not in TERMINAL]
            jobs += len(batch)
            present += len(known)
            corrected += sum(1 for done in self._each(pool, self._correct, unfinished) if done)
            for record in self._each(pool, self._restore, missing):
                if record is not None:
                    restored[record.status.value] += 1
                    self._ring_for(record)
        return Report(
            dry_run=self._dry_run,
            jobs=jobs,
            present=present,
            restored={status.value: restored[status.value] for status in JobStatus if restored[status.value]},
            corrected=corrected,
            keys=keys,
            unreadable=dict(sorted(self._unreadable.items())),
        )

    def _each(self, pool: ThreadPoolExecutor, act: Callable[[Any], T], subjects: Iterable[Any]) -> list[T | None]:
        """Do it for each; what cannot be read is noted, and stops nothing."""

        def carefully(subject: Any) -> T | None:
            try:
                return act(subject)
            except (_Unreadable, KeyError, TypeError, ValueError) as error:
                job_id = subject if isinstance(subject, str) else subject.id
                reason = str(error) if isinstance(error, _Unreadable) else f"{type(error).__name__}: {error}"
                self._unreadable[job_id] = reason
                return None

        return list(pool.map(carefully, subjects))

    def _finish_erasures(self, pool: ThreadPoolExecutor) -> set[str]:
        """Delete what is still there of what was deleted, or was brought back by an old backup of Valkey."""
        erasure = Erasure(self._ledger, self._store)
        erased = erasure.erased()
        if not self._dry_run:
            list(pool.map(erasure.finish, erased))
        return erased

    def _restore_keys(self) -> int:
        missing = self._keys.missing()
        if not self._dry_run:
            self._keys.load()
        return missing

    def _correct(self, record: JobRecord) -> bool:
        """Bring a record that is there to what is stronger; True where it lagged behind."""
        outcome = self._archive.outcome(record.id)
        is_late = outcome is not None or bool(self._archive.orders(record.id, after=record.orders))
        if self._dry_run:
            return is_late
        if outcome is not None:
            settle(self._ledger, record.id, outcome, tell_error=True)
        elif is_late:
            self._orders.carry_out(record.id)
        return is_late

    def _ring_for(self, record: JobRecord) -> None:
        """Wake a worker, oldest job first: ids are in the order of submission."""
        if record.status is JobStatus.QUEUED and not self._dry_run:
            self._outbox.add(record.id, record.queue)

    def _restore(self, job_id: str) -> JobRecord | None:
        """Put a record back; None where another rebuild was first."""
        found = self._find(job_id)
        record = found.record
        if self._dry_run:
            return record
        self._ledger.replay(job_id, found.events)
        lease = self._lease_seconds if record.restored else None
        is_new = self._ledger.restore(record, event_seq=found.event_seq, lease_seconds=lease)
        return record if is_new else None

    def _find(self, job_id: str) -> _Found:
        asked = self._archive.job(job_id)
        if asked is None:
            raise _Unreadable("job.json is not there, so what was asked for is not known")
        if asked["v"] > ARCHIVE_VERSION:
            raise _Unreadable(f"job.json is of version {asked['v']}: rebuild with the release that wrote it")
        keys = [item.key for item in self._store.list(layout.folder(job_id))]
        record = self._begun(record_of(asked), keys)
        orders = self._archive.orders(job_id)
        record = replace(record, orders=orders[-1][0] if orders else 0)
        outcome = self._archive.outcome(job_id) if layout.outcome(job_id) in keys else None
        if outcome is None and any(order == "cancel" for _, order in orders):
            outcome = self._cancelled(record)
        if outcome is not None:
            return self._ended(record, outcome, keys)
        steering = [order for _, order in orders]
        return self._unfinished(record, journal.event_files(keys), is_paused=steering[-1:] == ["pause"])

    def _begun(self, record: JobRecord, keys: list[str]) -> JobRecord:
        """What the runs of a job have left: tickets, commits, and what the last one started from."""
        latest = self._archive.latest_epoch(record.id)
        if not latest:
            return record
        # Of two workers that were woken for it, each may have taken a number, and one then has the job: the one that
        # has put something there.
        runs = (_RUN.match(key.removeprefix(layout.folder(record.id))) for key in keys)
        epoch = max((int(run[1]) for run in runs if run), default=latest)
        commits = lineage.commits_up_to(self._store, record.id, latest)
        base = lineage.read_base(self._store, record.id, epoch)
        first, held, last = (self._store.get_json(layout.epoch(record.id, n)) or {} for n in (1, epoch, latest))
        return replace(
            record,
            epoch=epoch,
            attempts=last.get("attempts", 0),
            worker=held["worker"],
            started_at=datetime.fromisoformat(first["time"]),
            checkpoint_step=commits[0].step if commits else 0,
            accumulation=(base.gradient_accumulation if base else None) or 0,
        )

    def _cancelled(self, record: JobRecord) -> Outcome:
        """The order stands and nobody wrote how it ended: a worker that still has the job is fenced by this."""
        if self._dry_run:
            return Outcome(job=record.id, status="cancelled", epoch=record.epoch, time=journal.now_iso(), by=self._by)
        return close(self._archive, record.id, "cancelled", by=self._by)

    def _ended(self, record: JobRecord, outcome: Outcome, keys: list[str]) -> _Found:
        manifest = self._archive.manifest(outcome.manifest) if outcome.manifest else None
        files = journal.event_files(entry.key for entry in manifest.objects) if manifest else journal.event_files(keys)
        closing = journal.closing_events(self._store, files, outcome)
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
            progressed = _progressed(record, journal.read_events(self._store, [file]))
            if progressed is not record:
                record = progressed
                break
        if manifest:
            return _Found(record=record, event_seq=closing[-1]["seq"], events=[])
        # Without a manifest nobody would find them in the bucket.
        events = list(journal.read_events(self._store, files))
        unused = self._unused(record, events)
        events += [{**event, "seq": unused + place} for place, event in enumerate(closing, start=1)]
        return _Found(record=record, event_seq=events[-1]["seq"], events=events)

    def _unfinished(self, record: JobRecord, files: list[EventFile], *, is_paused: bool) -> _Found:
        events = list(journal.read_events(self._store, files))
        record = _progressed(record, events)
        if is_paused:
            record = replace(record, status=JobStatus.PAUSED, worker=None)
        elif record.epoch:
            record = replace(record, status=JobStatus.RUNNING, restored=True)
        return _Found(record=record, event_seq=self._unused(record, events), events=events)

    def _unused(self, record: JobRecord, events: list[dict[str, Any]]) -> int:
        """A number above all that the job's events can have had, stored or not, after any number of losses.

        A job has had fewer events than milliseconds, so its age is above them all.
        """
        age = self._ledger.now_ms() - round(record.created_at.timestamp() * 1000)
        stored = events[-1]["seq"] if events else 0
        return max(stored, age) + EVENT_ROOM


def _progressed(record: JobRecord, events: Iterable[dict[str, Any]]) -> JobRecord:
    """The record with the step and the reward that its events tell of last."""
    last = max((event for event in events if event["type"] == "metric"), key=lambda e: e["seq"], default=None)
    if last is None:
        return record
    return replace(record, step=last["step"], reward=last["data"].get("reward"))
