"""The job records in Valkey: create, read and list them, and change them by compare-and-set.

Owns the Lua scripts and the names of keys. Uses neither storage nor Celery. Invariants: only scripts write fields of a
record, and only the server's clock is read.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from importlib.resources import files
from typing import Any, Literal, get_type_hints

import redis
import structlog
from redis.backoff import ExponentialBackoff, NoBackoff
from redis.retry import Retry

from grpo_core import strict_json
from grpo_core.reasons import EventType, Phase
from grpo_core.shown import plain_type
from jobs.errors import Unavailable, UnreadableRecord
from jobs.settings import QueueSettings
from jobs.store.job import HELD, RECORD_VERSION, TERMINAL, TRANSITIONS, JobRecord, JobStatus, Priority, utc

log = structlog.get_logger()

SOCKET_SECONDS = 3.0
"""Timeout of a request to Valkey, so that a hung server does not block requests and heartbeats."""
REPLAYED_AT_ONCE = 500
"""Number of events restored in one script, which blocks Valkey."""

EVENT_ROOM = 1_000_000_000
"""Event numbers to skip after a loss, for clocks that differ by up to 1000 s (in microseconds)."""

Refusal = Literal["missing", "status", "epoch", "lease", "order", "events"]
Begun = Literal["submitting", "ordering", "erasing", "unread"]
"""Operations that a process may begin and not finish. `unread`: the comparison of a job whose objects were
unreadable."""


@dataclass(frozen=True, kw_only=True)
class JobEvent:
    """One event to append. `data` is any JSON object."""

    type: EventType
    data: Mapping[str, Any]
    step: int = 0
    time: str | None = None
    """ISO 8601 UTC; None: the server's time."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """The result of a compare-and-set."""

    refusal: Refusal | None
    status: JobStatus | None
    """The job's status after the change, or its present status if the change was refused."""
    epoch: int
    shipped: int
    """Number of events of the current run that were accepted so far."""

    @property
    def done(self) -> bool:
        """Whether the change was made."""
        return self.refusal is None


@dataclass(frozen=True, kw_only=True)
class HeldJob:
    """A job that a worker holds, for displays."""

    id: str
    worker: str
    owner: str
    status: str
    phase: str
    step: int
    total_steps: int
    name: str


@dataclass(frozen=True, kw_only=True)
class Look:
    """The identity of this Valkey server, and of the one whose records were last compared with the bucket."""

    here: str
    """Identity of this server, which changes with each start and promotion; empty if the server does not show it."""
    compared: str | None
    seen_ms: int | None
    """When the compared server was last seen, as stored in this one; not older than this server's records."""

    @property
    def may_have_forgotten(self) -> bool:
        """Whether its records must be compared first. Always False if the server does not show its identity."""
        return bool(self.here) and self.compared != self.here


class JobStore:
    """All job records below one key prefix. Thread-safe. Raises `Unavailable` if the server does not answer."""

    def __init__(self, settings: QueueSettings) -> None:
        self.prefix = settings.prefix
        self._broker_prefix = settings.broker_prefix
        self._url = settings.redis_url.get_secret_value()

    @cached_property
    def client(self) -> redis.Redis:
        """The connection pool, which locks and registries use too."""
        return redis.Redis.from_url(
            self._url,
            socket_timeout=SOCKET_SECONDS,
            socket_connect_timeout=SOCKET_SECONDS,
            socket_keepalive=True,
            health_check_interval=15,
            decode_responses=True,
            retry=Retry(ExponentialBackoff(cap=0.5, base=0.05), retries=1),
        )

    def ping(self) -> None:
        """Ping Valkey with a timeout of 1 s and no retry."""
        self._call(lambda: self._impatient.ping())

    @cached_property
    def _impatient(self) -> redis.Redis:
        return redis.Redis.from_url(
            self._url, socket_timeout=1.0, socket_connect_timeout=1.0, retry=Retry(NoBackoff(), retries=0)
        )

    def create(
        self, record: JobRecord, *, key: str | None = None, remember_seconds: float = 0, may_be_known: bool = False
    ) -> bool:
        """Create a record; False if the id exists. `key` is the digest of the Idempotency-Key, which becomes done.

        With `may_be_known`, an earlier record may have been lost, so event numbers start above the old ones.
        """
        fields = _to_fields(record) | ({"server": "unknown"} if may_be_known else {})
        arguments = (strict_json.dumps(fields), key or "", str(int(remember_seconds * 1000)))
        return bool(self.run_script("create", record.id, *arguments))

    def get(self, job_id: str) -> JobRecord | None:
        """Return a record, or None. Raises `UnreadableRecord`."""
        fields: dict[str, str] = self._call(lambda: self.client.hgetall(f"{self.prefix}:job:{job_id}"))
        return _read(job_id, fields) if fields else None

    def claim(
        self, job_id: str, *, epoch: int, worker: str, lease_seconds: float, gpu: str = "", hosts: int = 0
    ) -> bool:
        """Give a queued job to a worker with a new epoch; False if it cannot be claimed.

        `gpu` is the name of the worker's GPUs, and `hosts` how many hosts the run has, 0 for as many as the job asks
        for: usage is counted by them.
        """
        lease = str(int(lease_seconds * 1000))
        return bool(self.run_script("claim", job_id, str(epoch), worker, lease, gpu, str(hosts or "")))

    def pick(self, job_id: str, worker: str, refused: Collection[str] = (), *, now_ms: int | None = None) -> str | None:
        """Return the job whose turn it is in the queue of the job `job_id`, and keep it for this worker for seconds.

        `refused` are jobs that the worker cannot run. `now_ms` replaces the server's time. None: no job waits.
        """
        now = "" if now_ms is None else str(now_ms)
        return self.run_script("pick", job_id, worker, strict_json.dumps([*refused]), now) or None

    def release_pick(self, job_id: str) -> None:
        """Let other workers have a job that was picked and not claimed."""
        self._call(lambda: self.client.delete(f"{self.prefix}:picked:{job_id}"))

    def prioritise(self, job_id: str, priority: Priority) -> JobStatus | None:
        """Change the priority of a queued or paused job. Returns the job's status, in others unchanged; None without
        a record."""
        status = self.run_script("prioritise", job_id, priority.value)
        return JobStatus(status) if status else None

    def owners(self) -> set[str]:
        """Return every owner who has submitted a job. Releases before this one have noted those whose jobs ran."""
        names = [f"{self.prefix}:{index}" for index in ("owners", "users", "enders")]
        found: set[str] = self._call(lambda: self.client.sunion(names))
        return found

    def owner_of(self, job_id: str) -> str | None:
        """Return the owner of a job; None without a record."""
        owner: str | None = self._call(lambda: self.client.hget(f"{self.prefix}:job:{job_id}", "owner"))
        return owner

    def change(
        self,
        job_id: str,
        *,
        from_statuses: Collection[JobStatus] | None = None,
        epoch: int | None = None,
        expired: bool = False,
        to: JobStatus | None = None,
        fields: Mapping[str, Any] | None = None,
        lease_seconds: float | None = None,
        held_seconds: float | None = None,
        events: Iterable[JobEvent] = (),
        first_ordinal: int | None = None,
        expire_events_seconds: float | None = None,
        settles: bool = False,
    ) -> Change:
        """Compare and set: changes nothing unless status, epoch and lease are as given and `to` is allowed.

        `first_ordinal` is the position of the first event in its run. Events that were accepted before are skipped. If
        earlier events are missing, the change is refused with `events`: send them again from `shipped` on. With
        `settles`, an outcome exists, so the job ends from any state.
        """
        event_list = list(events)
        if to is not None and not any(event.type == EventType.STATUS for event in event_list):
            event_list.append(JobEvent(type=EventType.STATUS, data={"status": to.value}))
        order: dict[str, Any] = {
            "from": sorted(from_statuses) if from_statuses is not None else None,
            "epoch": epoch,
            "expired": expired or None,
            "to": to.value if to else None,
            "set": {name: _to_text(value) for name, value in fields.items()} if fields else None,
            "lease": int(lease_seconds * 1000) if lease_seconds is not None else None,
            "held": int(held_seconds * 1000) if held_seconds is not None else None,
            "first": first_ordinal,
            "events": [_to_order(event) for event in event_list] or None,
            "expire": int(expire_events_seconds * 1000) if expire_events_seconds is not None else None,
            "settles": settles or None,
        }
        present = {key: value for key, value in order.items() if value is not None}
        return _to_change(self.run_script("change", job_id, strict_json.dumps(present)))

    def apply_command(self, job_id: str, number: int, moves: Mapping[JobStatus, JobStatus]) -> Change:
        """Apply the command with this number once. `moves` has the new status for each old one.

        Refused with `order` if it was applied before, and with `status` if `moves` lacks the present status.
        """
        targets = strict_json.dumps({old.value: new.value for old, new in moves.items()})
        return _to_change(self.run_script("obey", job_id, str(number), targets))

    def replay(self, job_id: str, events: list[dict[str, Any]]) -> None:
        """Restore events from the bucket with their numbers, for a job without a record.

        Also for a job on a server that lost some events and has added none since.
        """
        for start in range(0, len(events), REPLAYED_AT_ONCE):
            batch = events[start : start + REPLAYED_AT_ONCE]
            self.run_script("replay", job_id, strict_json.dumps([_to_replay(event) for event in batch]))

    def restore(
        self,
        record: JobRecord,
        *,
        event_seq: int,
        lease_seconds: float | None,
        shipped: int | None = None,
        request: tuple[str, str] | None = None,
        remember_seconds: float = 0,
    ) -> bool:
        """Restore a lost record; False if one exists. Its next event gets a number above `event_seq`.

        `shipped` is the number of its run's stored events, None if unknown. `request` has the digests of its
        Idempotency-Key and body, which are restored too.
        """
        times = {name: _to_ms(getattr(record, name)) for name in TIMES - {"created_at", "updated_at"}}
        fields = {**_to_fields(record), "event_seq": str(event_seq), **{n: time for n, time in times.items() if time}}
        if shipped is not None:
            fields["shipped"] = str(shipped)
        lease = str(int(lease_seconds * 1000)) if lease_seconds is not None else ""
        key, digest = request or ("", "")
        keep = str(int(remember_seconds * 1000))
        return bool(self.run_script("restore", record.id, strict_json.dumps(fields), lease, key, digest, keep))

    def reclaim(
        self,
        job_id: str,
        *,
        epoch: int,
        worker: str,
        lease_seconds: float,
        orders: int,
        restored: bool = False,
        gpu: str = "",
        hosts: int = 0,
        held_seconds: float = 0.0,
    ) -> bool:
        """Give a record back to the run that had claimed it; False if the job has ended or has a later run.

        `orders` is the number of the last command applied before that claim. With `restored`, the run has not been
        heard of since. `gpu` and `hosts` as for `claim`; `held_seconds` is how long it has had the job.
        """
        lease, mark = str(int(lease_seconds * 1000)), "1" if restored else ""
        about = (gpu, str(hosts or ""), str(int(held_seconds * 1000)))
        return bool(self.run_script("reclaim", job_id, str(epoch), worker, lease, str(orders), mark, *about))

    def look(self) -> Look:
        """Return which server this is. If its records were compared, record that it was seen."""
        here, compared, seen, _ = self.run_script("look", "")
        return Look(here=here, compared=compared or None, seen_ms=int(seen) if seen else None)

    def note_compared(self, server: str) -> bool:
        """Record that this server's records were compared with the bucket; False if another server answers."""
        return bool(self.run_script("note_compared", "", server))

    def release(self, lock: str, holder: str) -> None:
        """Release a lock if this holder has it."""
        self.run_script("release", lock, holder)

    def held(self) -> list[str]:
        """Return the ids of all jobs that a run holds."""
        return self._whole(f"{self.prefix}:leases")

    def held_jobs(self) -> list[HeldJob]:
        """Return all jobs that a run holds, without their specs."""
        ids = self.held()
        names = ("worker", "owner", "status", "phase", "step", "total_steps", "name")

        def read() -> list[list[str | None]]:
            pipeline = self.client.pipeline(transaction=False)
            for job_id in ids:
                pipeline.hmget(f"{self.prefix}:job:{job_id}", names)
            return pipeline.execute()

        found = [
            (job_id, {name: value or "" for name, value in zip(names, values, strict=True)})
            for job_id, values in zip(ids, self._call(read) if ids else [], strict=True)
        ]
        return [
            HeldJob(
                id=job_id,
                worker=fields["worker"],
                owner=fields["owner"],
                status=fields["status"],
                phase=fields["phase"],
                step=_progress(fields)[0],
                total_steps=int(fields["total_steps"] or 0),
                name=fields["name"],
            )
            for job_id, fields in found
            if fields["worker"]
        ]

    def paused(self) -> list[str]:
        """Return the ids of all paused jobs. Scans the names of all keys, so it is for rare use."""
        pattern = f"{self.prefix}:owner:*:{JobStatus.PAUSED.value}"

        def scan() -> list[str]:
            return [str(name) for name in self.client.scan_iter(pattern, count=1000)]

        return [job_id for name in self._call(scan) for job_id in self._whole(name)]

    def queued(self) -> list[str]:
        """Return the ids of all queued jobs."""
        return self._whole(f"{self.prefix}:queued")

    def _whole(self, index: str) -> list[str]:
        ids: list[str] = self._call(lambda: self.client.zrange(index, 0, -1))
        return ids

    def forget(self, job_id: str) -> bool:
        """Delete a record with its events; False if it does not exist."""
        return bool(self.run_script("forget", job_id))

    def missing(self, job_ids: list[str]) -> list[str]:
        """Return the jobs among these that have no record."""
        if not job_ids:
            return []

        def read() -> list[int]:
            pipeline = self.client.pipeline(transaction=False)
            for job_id in job_ids:
                pipeline.exists(f"{self.prefix}:job:{job_id}")
            return pipeline.execute()

        return [job_id for job_id, exists in zip(job_ids, self._call(read), strict=True) if not exists]

    def begin(self, what: Begun, member: str) -> None:
        """Mark an operation as begun, so that another process can finish it if this one dies."""
        now = self.now_ms()
        self._call(lambda: self.client.zadd(f"{self.prefix}:{what}", {member: now}))

    def end(self, what: Begun, member: str) -> None:
        """Mark an operation as done."""
        self._call(lambda: self.client.zrem(f"{self.prefix}:{what}", member))
        if what == "submitting":
            self._call(lambda: self.client.hdel(f"{self.prefix}:references", member))

    def begun(self, what: Begun, seconds: float) -> list[str]:
        """Return operations that began more than `seconds` ago and are not done."""
        return self._due(what, seconds)

    def note_references(self, job_id: str, owner: str, names: Collection[str]) -> None:
        """Record the names that a submission uses, until its record exists."""
        self._call(lambda: self.client.hset(f"{self.prefix}:references", job_id, " ".join((owner, *names))))

    def references(self, owner: str) -> dict[str, list[str]]:
        """Return the names that an owner's submissions without a record use, by the id of the future job."""
        noted: dict[str, str] = self._call(lambda: self.client.hgetall(f"{self.prefix}:references"))
        return {job_id: rest for job_id, note in noted.items() for by, *rest in [note.split(" ")] if by == owner}

    def is_being_deleted(self, name: str) -> bool:
        """Whether the deletion of a job or a data set has begun.

        A deletion marks itself before it checks for references, and a submission records its references before it calls
        this, so at least one of them sees the other.
        """
        return self._call(lambda: self.client.zscore(f"{self.prefix}:erasing", name)) is not None

    def beat(
        self, job_id: str, *, epoch: int, lease_seconds: float | None, held_seconds: float | None = None
    ) -> Change:
        """Renew the lease, or with None only read it. Refused if the epoch has ended.

        `held_seconds` is how long the run has had the job, for a record that was restored.
        """
        if lease_seconds is None:
            return self._read_claim(job_id, epoch)
        return self.change(
            job_id, from_statuses=HELD, epoch=epoch, lease_seconds=lease_seconds, held_seconds=held_seconds
        )

    def _read_claim(self, job_id: str, epoch: int) -> Change:
        """Answer as a change of nothing would, without a write: every worker asks this each second."""
        fields = self._call(lambda: self.client.hmget(f"{self.prefix}:job:{job_id}", ["status", "epoch", "shipped"]))
        status, present, shipped = fields
        if status is None:
            return Change(refusal="missing", status=None, epoch=0, shipped=0)
        is_held = JobStatus(status) in HELD
        refusal: Refusal | None = "epoch" if int(present) != epoch else None if is_held else "status"
        return Change(refusal=refusal, status=JobStatus(status), epoch=int(present), shipped=int(shipped or 0))

    def list_ids(
        self,
        owner: str,
        *,
        limit: int,
        before: str | None = None,
        status: JobStatus | None = None,
        group: str | None = None,
    ) -> list[str]:
        """Return the ids of an owner's jobs, newest first, starting after `before`; of one status, or one group."""
        part = group or (status.value if status else "")
        key = f"{self.prefix}:owner:{owner}" + (f":{part}" if part else "")
        top = f"({before}" if before else "+"
        ids: list[str] = self._call(lambda: self.client.zrevrangebylex(key, top, "-", start=0, num=limit))
        return ids

    def count(self, owner: str, status: JobStatus) -> int:
        """Return the number of an owner's jobs with a status."""
        return int(self._call(lambda: self.client.zcard(f"{self.prefix}:owner:{owner}:{status.value}")))

    def search(
        self,
        owner: str,
        *,
        limit: int,
        before: str | None = None,
        status: JobStatus | None = None,
        metadata: Mapping[str, str] | None = None,
        text: str | None = None,
        words: str | None = None,
        kind: str | None = None,
        priority: str | None = None,
    ) -> tuple[list[str], str | None]:
        """Search the next `limit` jobs of a list for metadata, for a text in the spec, for `words` (in any case) in id,
        name, model or metadata, for a kind, or for a priority.

        Returns the ids found and where to continue; None at the end of the list.
        """
        words = words and words.lower()
        asked = {"metadata": metadata, "text": text, "words": words, "kind": kind, "priority": priority}
        order = strict_json.dumps({name: value for name, value in asked.items() if value is not None})
        name = f"owner:{owner}" + (f":{status.value}" if status else "")
        seen, last, found = self.run_script("search", name, f"({before}" if before else "+", str(limit), order)
        return found, last if int(seen) == limit else None

    def get_many(self, job_ids: list[str]) -> list[JobRecord]:
        """Return the existing records among these, in order. Unreadable records are logged and left out."""
        if not job_ids:
            return []

        def read() -> list[dict[str, str]]:
            pipeline = self.client.pipeline(transaction=False)
            for job_id in job_ids:
                pipeline.hgetall(f"{self.prefix}:job:{job_id}")
            return pipeline.execute()

        records: list[JobRecord] = []
        for job_id, fields in zip(job_ids, self._call(read), strict=True):
            try:
                records += [_read(job_id, fields)] if fields else []
            except UnreadableRecord as error:
                log.error("record_unreadable", job_id=job_id, reason=str(error))  # noqa: TRY400 - needs no traceback
        return records

    def values(self, job_ids: list[str], field: str) -> list[str]:
        """Return one field of each record as its text, in order; an empty text where there is none."""

        def read() -> list[str | None]:
            pipeline = self.client.pipeline(transaction=False)
            for job_id in job_ids:
                pipeline.hget(f"{self.prefix}:job:{job_id}", field)
            return pipeline.execute()

        return [value or "" for value in self._call(read)]

    def times(self, job_ids: list[str]) -> dict[str, tuple[int, int]]:
        """Return the start of each job's current run (0 without one) and the duration of earlier runs, in ms."""

        def read() -> list[list[str | None]]:
            pipeline = self.client.pipeline(transaction=False)
            for job_id in job_ids:
                pipeline.hmget(f"{self.prefix}:job:{job_id}", ["run_at", "run_ms"])
            return pipeline.execute()

        found = zip(job_ids, self._call(read), strict=True) if job_ids else ()
        return {job_id: (int(run_at or 0), int(run_ms or 0)) for job_id, (run_at, run_ms) in found}

    def events(self, job_id: str, *, after: int, limit: int) -> list[dict[str, Any]]:
        """Return events numbered above `after`, in order."""
        key = f"{self.prefix}:events:{job_id}"
        entries: list[tuple[str, dict[str, str]]] = self._call(
            lambda: self.client.xrange(key, min=f"({after}-0" if after else "-", count=limit)
        )
        return [_from_entry(entry_id, fields) for entry_id, fields in entries]

    def newest_events(self, job_ids: list[str]) -> dict[str, int]:
        """Return the number of each job's last event, in one round trip."""

        def read() -> list[str | None]:
            pipeline = self.client.pipeline(transaction=False)
            for job_id in job_ids:
                pipeline.hget(f"{self.prefix}:job:{job_id}", "event_seq")
            return pipeline.execute()

        return {job_id: int(number or 0) for job_id, number in zip(job_ids, self._call(read), strict=True)}

    def standing(self, job_id: str) -> tuple[JobStatus | None, str | None]:
        """Return a job's status and the key of its manifest, which decide where its events are and whether more
        follow."""
        status, manifest = self._call(lambda: self.client.hmget(f"{self.prefix}:job:{job_id}", ["status", "manifest"]))
        return JobStatus(status) if status else None, manifest or None

    def has_events(self, job_id: str) -> bool:
        """Whether the job's events are still in Valkey."""
        return bool(self._call(lambda: self.client.exists(f"{self.prefix}:events:{job_id}")))

    def expired_leases(self) -> list[str]:
        """Return the ids of jobs whose lease has expired by the server's clock."""
        return self._due("leases", 0)

    def unclaimed(self, seconds: float, limit: int = 100) -> list[str]:
        """Return the ids of queued jobs without a wake-up for `seconds`."""
        return self._due("queued", seconds, limit)

    def missing_wakeups(self, queue: str) -> int:
        """Return how many more jobs wait in a queue than its list has wake-ups, for any job."""
        jobs = self._call(lambda: self.client.zcard(f"{self.prefix}:waiting:{queue}"))
        return int(jobs) - int(self._call(lambda: self.client.llen(f"{self._broker_prefix}{queue}")))

    def jobs_ahead(self, job_id: str, *, now_ms: int | None = None) -> int | None:
        """Return the number of jobs in the same queue whose turn comes before this one's, as far as is known now; None
        if it no longer waits. `now_ms` replaces the server's time."""
        ahead = int(self.run_script("ahead", job_id, "" if now_ms is None else str(now_ms)))
        return None if ahead < 0 else ahead

    def mark_rung(self, job_id: str) -> None:
        """Record that a queued job was just checked, and that it has a wake-up."""
        now = self.now_ms()
        self._call(lambda: self.client.zadd(f"{self.prefix}:queued", {job_id: now}, xx=True))

    def now_ms(self) -> int:
        """Return the server's time in milliseconds."""
        seconds, micros = self._call(lambda: self.client.time())
        return int(seconds) * 1000 + int(micros) // 1000

    def _due(self, index: str, seconds: float, limit: int = -1) -> list[str]:
        """Return all due members, unless limited: a sweep that fails for some must still reach the others."""
        latest = self.now_ms() - int(seconds * 1000)
        ids: list[str] = self._call(
            lambda: self.client.zrangebyscore(f"{self.prefix}:{index}", 0, latest, start=0, num=limit)
        )
        return ids

    @cached_property
    def _scripts(self) -> dict[str, Any]:
        folder = files("jobs.store") / "scripts"
        prelude = (folder / "prelude.lua").read_text()
        prelude = _states() + prelude
        names = (
            *("create", "claim", "reclaim", "change", "obey", "replay", "restore", "forget"),
            *("admit", "withdraw", "take", "look", "note_compared", "release", "tally"),
            *("search", "prune", "census", "deliver", "redeliver"),
            *("search", "prune", "census", "pick", "ahead", "prioritise"),
        )
        return {name: self.client.register_script(prelude + (folder / f"{name}.lua").read_text()) for name in names}

    def run_script(self, name: str, subject: str, *arguments: str) -> Any:
        """Run one of `jobs/store/scripts` for a job or another id."""
        return self._call(lambda: self._scripts[name](keys=[self.prefix], args=[subject, *arguments]))

    def _call(self, function: Any) -> Any:
        return guarded(function)


_PASSING = frozenset({"MISCONF", "BUSY", "NOREPLICAS"})
"""Temporary errors that do not concern the request: a full disk, a script that runs too long, missing replicas."""


def guarded(function: Any) -> Any:
    """Run one exchange with Valkey and convert its failures to `Unavailable`."""
    try:
        return function()
    except (redis.ConnectionError, redis.TimeoutError) as error:
        raise Unavailable("Valkey", type(error).__name__) from error
    except (redis.ReadOnlyError, redis.OutOfMemoryError, redis.BusyLoadingError) as error:
        raise Unavailable("Valkey", str(error)) from error
    except redis.ResponseError as error:
        # For a command in a pipeline, redis-py first names the command.
        answer = str(error).rpartition("caused error: ")[2]
        if (code := answer.partition(" ")[0]) in _PASSING:
            raise Unavailable("Valkey", code) from error
        raise


_STEP = re.compile(r"[0-9]{1,15}")
_KINDS: dict[str, Any] = {name: plain_type(hint) for name, hint in get_type_hints(JobRecord).items()}
"""The type of each field of a record, without None."""
TIMES = frozenset(name for name, kind in _KINDS.items() if kind is datetime)


def _to_text(value: Any) -> str:
    """Convert a field to Valkey's text; None and False become the empty string."""
    if value is None or value is False:
        return ""
    if value is True:
        return "1"
    return strict_json.dumps(value) if isinstance(value, dict) else str(value)


def _to_fields(record: JobRecord) -> dict[str, str]:
    # Scripts write all times but the first.
    fields = {name: _to_text(getattr(record, name)) for name, kind in _KINDS.items() if kind is not datetime}
    return {**fields, "v": str(RECORD_VERSION), "created_at": _to_ms(record.created_at)}


def _to_ms(moment: datetime | None) -> str:
    # Rounded, because a float of seconds may be slightly below its millisecond.
    return "" if moment is None else str(round(moment.timestamp() * 1000))


def _read(job_id: str, fields: dict[str, str]) -> JobRecord:
    try:
        return _from_fields(fields)
    except (ValueError, TypeError, KeyError, OverflowError, OSError, RecursionError) as error:
        raise UnreadableRecord(job_id, f"{type(error).__name__}: {error}"[:200]) from error


_READ: dict[Any, Callable[[str], Any]] = {
    bool: bool,
    datetime: lambda text: utc(int(text)),
    dict: json.loads,
    # A phase of a later release becomes None.
    Phase: lambda text: Phase(text) if text in list(Phase) else None,
}


def _from_fields(fields: dict[str, str]) -> JobRecord:
    step, reward = _progress(fields)
    values: dict[str, Any] = {"status": JobStatus(fields["status"]), "step": step, "reward": reward}
    for field in dataclasses.fields(JobRecord):
        kind: Callable[[str], Any] = _KINDS[field.name]
        read, text = _READ.get(kind, kind), fields.get(field.name)
        if field.name in values:
            continue
        if text:
            values[field.name] = read(text)
        elif field.default is field.default_factory:  # both are MISSING
            values[field.name] = None
    return JobRecord(**values)


def _progress(fields: dict[str, str]) -> tuple[int, float | None]:
    """Return step and reward for displays. A worker of an earlier release may pass on invalid values from training."""
    step, reward = fields.get("step") or "0", fields.get("reward") or "nan"
    try:
        value = float(reward)
    except ValueError:
        value = math.nan
    return int(step) if _STEP.fullmatch(step) else 0, value if math.isfinite(value) else None


def _to_change(answer: list[Any]) -> Change:
    code, status, epoch, shipped = answer
    return Change(
        refusal=None if code == "ok" else code,
        status=JobStatus(status) if status else None,
        epoch=int(epoch),
        shipped=int(shipped),
    )


def _states() -> str:
    """Return the constants of the scripts as Lua: `held`, `terminal`, `transitions`, `event_room`."""

    def table(names: Iterable[JobStatus]) -> str:
        return "{ " + ", ".join(f"{name.value} = true" for name in sorted(names)) + " }"

    rows = ", ".join(f"{old.value} = {table(new)}" for old, new in TRANSITIONS.items())
    states = f"local held = {table(HELD)}\nlocal terminal = {table(TERMINAL)}\nlocal transitions = {{ {rows} }}\n"
    return f"{states}local event_room = {EVENT_ROOM}\n"


def _to_replay(event: dict[str, Any]) -> dict[str, Any]:
    """Convert a stored event to an entry of the stream."""
    texts = {name: str(event[name]) for name in ("seq", "epoch", "type", "time", "step")}
    return {**texts, "n": str(event.get("n", 0)), "data": strict_json.dumps(event["data"])}


def _to_order(event: JobEvent) -> dict[str, Any]:
    body: dict[str, Any] = {"type": event.type, "step": str(event.step), "data": strict_json.dumps(dict(event.data))}
    return {**body, "time": event.time} if event.time else body


def _from_entry(entry_id: str, fields: dict[str, str]) -> dict[str, Any]:
    time = fields["time"]
    return {
        "v": RECORD_VERSION,
        "seq": int(entry_id.partition("-")[0]),
        "epoch": int(fields["epoch"]),
        "type": fields["type"],
        "time": iso(int(time)) if time.isdecimal() else time,
        "step": int(fields["step"]),
        "data": json.loads(fields["data"]),
        # Its position among the events of its run, for a run that continues after a loss; readers do not see it.
        **({"n": int(n)} if (n := fields.get("n", "0")) != "0" else {}),
    }


def iso(milliseconds: int) -> str:
    """Format a time as RFC 3339 in UTC with milliseconds."""
    return utc(milliseconds).isoformat(timespec="milliseconds").replace("+00:00", "Z")
