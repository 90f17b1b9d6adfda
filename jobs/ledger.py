"""The job records in Valkey: create, read, list, and the one compare-and-set through which all else changes.

Owns the Lua scripts and the shape of the keys. Knows nothing of storage or of Celery. Invariant: no field of a
record is written outside a script, and only the server's clock is read.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from importlib.resources import files
from typing import Any, Literal

import redis
from redis.backoff import ExponentialBackoff, NoBackoff
from redis.retry import Retry

from grpo_core import strict_json
from jobs.errors import Unavailable
from jobs.record import HELD, RECORD_VERSION, TERMINAL, TRANSITIONS, JobRecord, JobStatus, utc
from jobs.settings import QueueSettings

SOCKET_SECONDS = 3.0
"""A hung server must not hang a request or a heartbeat."""
REPLAYED_AT_ONCE = 500
"""Events put back in one script, which nothing else can run beside."""

Refusal = Literal["missing", "status", "epoch", "lease", "order"]
Begun = Literal["submitting", "ordering", "erasing"]
"""What a process may begin and not live to finish."""


@dataclass(frozen=True, kw_only=True)
class JobEvent:
    """One event to append: `data` is any JSON object."""

    type: str
    data: Mapping[str, Any]
    step: int = 0
    time: str | None = None
    """ISO 8601 UTC; None is the server's now."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """What a compare-and-set did."""

    refusal: Refusal | None
    status: JobStatus | None
    """The job's status after the change, or as found when refused."""
    epoch: int
    shipped: int
    """Events of the current run that were taken so far."""

    @property
    def done(self) -> bool:
        """Whether the change was made."""
        return self.refusal is None


class Ledger:
    """All job records below one key prefix. Thread-safe; raises `Unavailable` when the server does not answer."""

    def __init__(self, settings: QueueSettings) -> None:
        self.prefix = settings.prefix
        self._broker_prefix = settings.broker_prefix
        self._url = settings.redis_url.get_secret_value()

    @cached_property
    def client(self) -> redis.Redis:
        """The connection pool, also used by the locks and registries beside this class."""
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
        """Ask the server for a sign of life, once and briefly: who asks wants an answer, not success."""
        self._call(lambda: self._impatient.ping())

    @cached_property
    def _impatient(self) -> redis.Redis:
        return redis.Redis.from_url(
            self._url, socket_timeout=1.0, socket_connect_timeout=1.0, retry=Retry(NoBackoff(), retries=0)
        )

    def create(self, record: JobRecord, *, key: str | None = None, remember_seconds: float = 0) -> bool:
        """Write a new record; False where the id is taken. `key`: the Idempotency-Key's digest, done with this."""
        fields = strict_json.dumps(_to_fields(record))
        return bool(self.run_script("create", record.id, fields, key or "", str(int(remember_seconds * 1000))))

    def get(self, job_id: str) -> JobRecord | None:
        """One record, or None."""
        fields: dict[str, str] = self._call(lambda: self.client.hgetall(f"{self.prefix}:job:{job_id}"))
        return _from_fields(fields) if fields else None

    def claim(self, job_id: str, *, epoch: int, worker: str, lease_seconds: float) -> bool:
        """Give a queued job to a worker at a new epoch; False where it is not to be had."""
        return bool(self.run_script("claim", job_id, str(epoch), worker, str(int(lease_seconds * 1000))))

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
        events: Iterable[JobEvent] = (),
        first_ordinal: int | None = None,
        expire_events_seconds: float | None = None,
        settles: bool = False,
    ) -> Change:
        """Compare, then set: nothing happens unless status, epoch and lease are as named and `to` is allowed.

        `first_ordinal` is the place of the first event in its run; events taken before are passed over. `settles`: an
        outcome stands, so the job may end in whatever state it is.
        """
        event_list = list(events)
        if to is not None and not any(event.type == "status" for event in event_list):
            event_list.append(JobEvent(type="status", data={"status": to.value}))
        order: dict[str, Any] = {
            "from": sorted(from_statuses) if from_statuses is not None else None,
            "epoch": epoch,
            "expired": expired or None,
            "to": to.value if to else None,
            "set": {name: _to_text(value) for name, value in fields.items()} if fields else None,
            "lease": int(lease_seconds * 1000) if lease_seconds is not None else None,
            "first": first_ordinal,
            "events": [_to_order(event) for event in event_list] or None,
            "expire": int(expire_events_seconds * 1000) if expire_events_seconds is not None else None,
            "settles": settles or None,
        }
        present = {key: value for key, value in order.items() if value is not None}
        return _to_change(self.run_script("change", job_id, strict_json.dumps(present)))

    def obey(self, job_id: str, number: int, moves: Mapping[JobStatus, JobStatus]) -> Change:
        """Carry out the order of this number, once: `moves` names where it leads from each status it knows.

        Refused with `order` where it was carried out before, with `status` where `moves` does not know the status.
        """
        targets = strict_json.dumps({old.value: new.value for old, new in moves.items()})
        return _to_change(self.run_script("obey", job_id, str(number), targets))

    def replay(self, job_id: str, events: list[dict[str, Any]]) -> None:
        """Put events from the bucket back, numbered as they were, for a job whose record is not there yet."""
        for start in range(0, len(events), REPLAYED_AT_ONCE):
            batch = events[start : start + REPLAYED_AT_ONCE]
            self.run_script("replay", job_id, strict_json.dumps([_to_replay(event) for event in batch]))

    def restore(self, record: JobRecord, *, event_seq: int, lease_seconds: float | None) -> bool:
        """Put back a record that was lost; False where there is one. Its next event has a number above `event_seq`."""
        times = {name: _to_ms(getattr(record, name)) for name in ("started_at", "finished_at")}
        fields = {**_to_fields(record), "event_seq": str(event_seq), **{n: time for n, time in times.items() if time}}
        lease = str(int(lease_seconds * 1000)) if lease_seconds is not None else ""
        return bool(self.run_script("restore", record.id, strict_json.dumps(fields), lease))

    def forget(self, job_id: str) -> bool:
        """Remove a record with its events; False where there is none."""
        return bool(self.run_script("forget", job_id))

    def missing(self, job_ids: list[str]) -> list[str]:
        """Those of these jobs that have no record."""
        if not job_ids:
            return []

        def read() -> list[int]:
            pipeline = self.client.pipeline(transaction=False)
            for job_id in job_ids:
                pipeline.exists(f"{self.prefix}:job:{job_id}")
            return pipeline.execute()

        return [job_id for job_id, exists in zip(job_ids, self._call(read), strict=True) if not exists]

    def begin(self, what: Begun, member: str) -> None:
        """Note what is about to be done, for others to finish should this process die."""
        now = self.now_ms()
        self._call(lambda: self.client.zadd(f"{self.prefix}:{what}", {member: now}))

    def end(self, what: Begun, member: str) -> None:
        """Note that it is done."""
        self._call(lambda: self.client.zrem(f"{self.prefix}:{what}", member))

    def begun(self, what: Begun, seconds: float, limit: int = 100) -> list[str]:
        """What was begun longer ago than that and never noted as done."""
        return self._due(what, seconds, limit)

    def beat(self, job_id: str, *, epoch: int, lease_seconds: float | None) -> Change:
        """Keep the lease, or with None only look; refused when the epoch is over."""
        return self.change(job_id, from_statuses=HELD, epoch=epoch, lease_seconds=lease_seconds)

    def list_ids(
        self, owner: str, *, limit: int, before: str | None = None, status: JobStatus | None = None
    ) -> list[str]:
        """Ids of an owner's jobs, newest first, starting after `before`."""
        key = f"{self.prefix}:owner:{owner}" + (f":{status.value}" if status else "")
        top = f"({before}" if before else "+"
        ids: list[str] = self._call(lambda: self.client.zrevrangebylex(key, top, "-", start=0, num=limit))
        return ids

    def get_many(self, job_ids: list[str]) -> list[JobRecord]:
        """The records that exist among these, in order."""
        if not job_ids:
            return []

        def read() -> list[dict[str, str]]:
            pipeline = self.client.pipeline(transaction=False)
            for job_id in job_ids:
                pipeline.hgetall(f"{self.prefix}:job:{job_id}")
            return pipeline.execute()

        return [_from_fields(fields) for fields in self._call(read) if fields]

    def events(self, job_id: str, *, after: int, limit: int) -> list[dict[str, Any]]:
        """Events numbered above `after`, in order."""
        key = f"{self.prefix}:events:{job_id}"
        entries: list[tuple[str, dict[str, str]]] = self._call(
            lambda: self.client.xrange(key, min=f"({after}-0" if after else "-", count=limit)
        )
        return [_from_entry(entry_id, fields) for entry_id, fields in entries]

    def newest_events(self, job_ids: list[str]) -> dict[str, int]:
        """The number of each job's last event so far, in one round trip."""

        def read() -> list[str | None]:
            pipeline = self.client.pipeline(transaction=False)
            for job_id in job_ids:
                pipeline.hget(f"{self.prefix}:job:{job_id}", "event_seq")
            return pipeline.execute()

        return {job_id: int(number or 0) for job_id, number in zip(job_ids, self._call(read), strict=True)}

    def standing(self, job_id: str) -> tuple[JobStatus | None, str | None]:
        """A job's status and the key of its manifest: what decides where its events are, and whether more come."""
        status, manifest = self._call(lambda: self.client.hmget(f"{self.prefix}:job:{job_id}", ["status", "manifest"]))
        return JobStatus(status) if status else None, manifest or None

    def has_events(self, job_id: str) -> bool:
        """Whether the job's events are still in Valkey."""
        return bool(self._call(lambda: self.client.exists(f"{self.prefix}:events:{job_id}")))

    def expired_leases(self, limit: int = 100) -> list[str]:
        """Ids of jobs whose lease has run out by the server's clock."""
        return self._due("leases", 0, limit)

    def unclaimed(self, seconds: float, limit: int = 100) -> list[str]:
        """Ids of queued jobs not rung for so long."""
        return self._due("queued", seconds, limit)

    def missing_wakeups(self, queue: str) -> int:
        """How many jobs more wait in a queue than wake-ups lie in its list, whichever jobs these are for."""
        jobs = self._call(lambda: self.client.zcard(f"{self.prefix}:waiting:{queue}"))
        return int(jobs) - int(self._call(lambda: self.client.llen(f"{self._broker_prefix}{queue}")))

    def jobs_ahead(self, job_id: str, queue: str) -> int | None:
        """How many jobs were queued before this one and wait in the same queue; None where it waits no longer."""
        place: int | None = self._call(lambda: self.client.zrank(f"{self.prefix}:waiting:{queue}", job_id))
        return place

    def mark_rung(self, job_id: str) -> None:
        """Note that a queued job was looked at just now, and a worker woken where none was yet."""
        now = self.now_ms()
        self._call(lambda: self.client.zadd(f"{self.prefix}:queued", {job_id: now}, xx=True))

    def now_ms(self) -> int:
        """The server's clock."""
        seconds, micros = self._call(lambda: self.client.time())
        return int(seconds) * 1000 + int(micros) // 1000

    def _due(self, index: str, seconds: float, limit: int) -> list[str]:
        latest = self.now_ms() - int(seconds * 1000)
        ids: list[str] = self._call(
            lambda: self.client.zrangebyscore(f"{self.prefix}:{index}", 0, latest, start=0, num=limit)
        )
        return ids

    @cached_property
    def _scripts(self) -> dict[str, Any]:
        folder = files("jobs") / "scripts"
        prelude = (folder / "prelude.lua").read_text()
        prelude = _states() + prelude
        names = ("create", "claim", "change", "obey", "replay", "restore", "admit", "withdraw", "take", "forget")
        return {name: self.client.register_script(prelude + (folder / f"{name}.lua").read_text()) for name in names}

    def run_script(self, name: str, subject: str, *arguments: str) -> Any:
        """Run one of `jobs/scripts` about a job or another id, for this class and the modules beside it."""
        return self._call(lambda: self._scripts[name](keys=[self.prefix], args=[subject, *arguments]))

    def _call(self, function: Any) -> Any:
        return guarded(function)


_PASSING = frozenset({"MISCONF", "BUSY", "NOREPLICAS"})
"""Answers that say nothing of the request: the server's disk is full, a script runs too long, replicas are away."""


def guarded(function: Any) -> Any:
    """Run one exchange with Valkey; its failures become `Unavailable`."""
    try:
        return function()
    except (redis.ConnectionError, redis.TimeoutError) as error:
        raise Unavailable("Valkey", type(error).__name__) from error
    except (redis.ReadOnlyError, redis.OutOfMemoryError, redis.BusyLoadingError) as error:
        raise Unavailable("Valkey", str(error)) from error
    except redis.ResponseError as error:
        # Of a command in a pipeline, redis-py tells first which it was.
        answer = str(error).rpartition("caused error: ")[2]
        if (code := answer.partition(" ")[0]) in _PASSING:
            raise Unavailable("Valkey", code) from error
        raise


_JSON_FIELDS = ("spec", "metadata", "error")
_TIME_FIELDS = ("created_at", "updated_at", "started_at", "finished_at")
_INTEGER_FIELDS = (
    *("epoch", "attempts", "step", "total_steps", "orders"),
    *("checkpoint_step", "accumulation", "stopped_epoch"),
)
_TEXT_FIELDS = ("id", "owner", "spec_sha256", "queue", "name", "phase", "worker", "manifest")


def _to_text(value: Any) -> str:
    """A field as Valkey holds it; None is the empty string."""
    if value is None:
        return ""
    return strict_json.dumps(value) if isinstance(value, dict) else str(value)


def _to_fields(record: JobRecord) -> dict[str, str]:
    names = (*_TEXT_FIELDS, *_JSON_FIELDS, *_INTEGER_FIELDS, "status", "reward")
    fields = {name: _to_text(getattr(record, name)) for name in names}
    fields["restored"] = "1" if record.restored else ""
    return {**fields, "v": str(RECORD_VERSION), "created_at": _to_ms(record.created_at)}


def _to_ms(moment: datetime | None) -> str:
    # Rounded: a float of seconds may lie just below the millisecond it came from.
    return "" if moment is None else str(round(moment.timestamp() * 1000))


def _from_fields(fields: dict[str, str]) -> JobRecord:
    values: dict[str, Any] = {name: fields.get(name) or None for name in _TEXT_FIELDS}
    values |= {name: json.loads(fields[name]) if fields.get(name) else None for name in _JSON_FIELDS}
    values |= {name: int(fields.get(name) or 0) for name in _INTEGER_FIELDS}
    values |= {name: utc(int(fields[name])) if fields.get(name) else None for name in _TIME_FIELDS}
    reward = fields.get("reward")
    values["metadata"] = values["metadata"] or {}
    values["status"] = JobStatus(fields["status"])
    values["reward"] = float(reward) if reward else None
    values["restored"] = bool(fields.get("restored"))
    return JobRecord(**values)


def _to_change(answer: list[Any]) -> Change:
    code, status, epoch, shipped = answer
    return Change(
        refusal=None if code == "ok" else code,
        status=JobStatus(status) if status else None,
        epoch=int(epoch),
        shipped=int(shipped),
    )


def _states() -> str:
    """What the scripts must know of states, as Lua: `held`, `terminal`, `transitions`."""

    def table(names: Iterable[JobStatus]) -> str:
        return "{ " + ", ".join(f"{name.value} = true" for name in sorted(names)) + " }"

    rows = ", ".join(f"{old.value} = {table(new)}" for old, new in TRANSITIONS.items())
    return f"local held = {table(HELD)}\nlocal terminal = {table(TERMINAL)}\nlocal transitions = {{ {rows} }}\n"


def _to_replay(event: dict[str, Any]) -> dict[str, Any]:
    """A stored event as the stream holds it."""
    texts = {name: str(event[name]) for name in ("seq", "epoch", "type", "time", "step")}
    return {**texts, "data": strict_json.dumps(event["data"])}


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
    }


def iso(milliseconds: int) -> str:
    """RFC 3339 in UTC with milliseconds."""
    return utc(milliseconds).isoformat(timespec="milliseconds").replace("+00:00", "Z")
