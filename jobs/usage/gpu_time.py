"""GPU time of owners: seconds times GPUs of every run, by the UTC day of its start, in Valkey and in the bucket.

The script that ends a run counts it, in the same step (`prelude.lua`): whole for quotas, and in parts by day and kind
of GPU for reports (`jobs.usage.report`). The housekeeper saves new runs to `usage/{owner}/{day}.json`; after a loss of
Valkey, the counts are read from there. Invariant: a run counts once, even if Valkey was lost, and for at most the
seconds for which a worker held the job.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from datetime import time as time_of_day
from functools import partial
from typing import Any

import structlog

from grpo_core import strict_json
from jobs.errors import Unavailable
from jobs.store import object_keys
from jobs.store.bucket import ObjectStore
from jobs.store.job import HELD, JobRecord, utc
from jobs.store.job_store import JobStore, guarded

log = structlog.get_logger()

KEEP_DAYS = 400
"""Days of runs that are kept; `prelude.lua` keeps the runs of a day in Valkey for longer."""
SAVED_AT_ONCE = 20
OWNERS_AT_ONCE = 500
"""Number of owners in one request to Valkey."""
READS_AT_ONCE = 1000
"""Number of days of owners in one request to Valkey."""
_LOADED = "loaded"


@dataclass(frozen=True, kw_only=True)
class Part:
    """What one run used within one day (UTC)."""

    owner: str
    day: date
    gpu: str
    """Name of its GPUs; empty: a release before this one counted it, or the worker did not name them."""
    job: str
    """Id of its job; empty: not known."""
    gpu_seconds: float


class GpuTime:
    """The GPU time of all owners."""

    def __init__(self, job_store: JobStore, store: ObjectStore) -> None:
        self._job_store = job_store
        self._store = store
        self._prefix = f"{job_store.prefix}:usage"

    def by_day(self, owner: str) -> dict[date, float]:
        """Return the GPU-seconds of an owner's ended runs, by the day of their start."""
        name = f"{self._prefix}:{owner}"
        days: dict[str, str] = guarded(lambda: self._job_store.client.hgetall(name))
        if _LOADED not in days:
            self._load(owner)
            days = guarded(lambda: self._job_store.client.hgetall(name))
        return {_date(int(day)): int(ms) / 1000 for day, ms in days.items() if day != _LOADED}

    def running(self, owner: str) -> float:
        """Return the GPU-seconds of an owner's current runs."""
        now = utc(self._job_store.now_ms())
        ids = [each for status in HELD for each in self._job_store.list_ids(owner, limit=10_000, status=status)]
        records = self._job_store.get_many(ids)
        return sum(max(0.0, (now - r.run_at).total_seconds()) * r.gpus for r in records if r.run_at is not None)

    def parts(self, owners: Collection[str], first: date, last: date) -> list[Part]:
        """Return what owners used from one day to another, both included, current runs up to now included."""
        # Before what has ended: a run that ends in between is then seen twice, and counted once.
        current = list(self._current(owners))
        for owner in owners:
            self.by_day(owner)  # reads the bucket if Valkey has lost it
        days = [first + timedelta(days=number) for number in range((last - first).days + 1)]
        places = [(owner, day) for owner in sorted(owners) for day in days]
        ended: dict[tuple[str, str, date], Part] = {}
        for start in range(0, len(places), READS_AT_ONCE):
            for run, part in self._ended(places[start : start + READS_AT_ONCE]):
                ended[part.owner, run, part.day] = part
        going = [p for run, p in current if first <= p.day <= last and (p.owner, run, p.day) not in ended]
        return [*ended.values(), *going]

    def _current(self, owners: Collection[str]) -> Iterator[tuple[str, Part]]:
        now = utc(self._job_store.now_ms())
        for record in self._job_store.get_many(self._job_store.held()):
            if record.owner in owners and record.run_at is not None and record.gpus:
                run = f"{record.id}:{record.epoch}"
                for day, seconds in _by_day(record.run_at, now):
                    yield run, _part_of(record, day, seconds * record.gpus)

    def _ended(self, places: Sequence[tuple[str, date]]) -> Iterator[tuple[str, Part]]:
        """Yield the parts of ended runs of some owners' days, each with the run's name."""

        def read() -> list[Any]:
            pipeline = self._job_store.client.pipeline(transaction=False)
            for owner, day in places:
                pipeline.hgetall(self._parts_of(owner, _number(day)))
                pipeline.hgetall(f"{self._prefix}:{owner}:{_number(day)}")
                pipeline.hget(f"{self._prefix}:{owner}", str(_number(day)))
            return pipeline.execute()

        answers: list[Any] = guarded(read)
        for place, (owner, day) in enumerate(places):
            parts, runs, total = answers[place * 3 : place * 3 + 3]
            # A release before this one counts a run whole, on the day of its start, and names no GPUs.
            told: dict[str, tuple[str, str]] = {run: (ms, "") for run, ms in runs.items()}
            told |= {run: _read_part(part) for run, part in parts.items()}
            if total and not runs:
                told[""] = (total, "")
            for run, (ms, gpu) in told.items():
                job, seconds = run.rpartition(":")[0], int(ms) / 1000
                yield run, Part(owner=owner, day=day, gpu=gpu, job=job, gpu_seconds=seconds)

    def _parts_of(self, owner: str, day: int) -> str:
        return f"{self._prefix}-parts:{owner}:{day}"

    def owners(self) -> set[str]:
        """Return every owner who ever used GPU time, by the bucket."""
        folders = self._store.folders(object_keys.USAGE)
        known: set[str] = guarded(lambda: self._job_store.client.smembers(f"{self._job_store.prefix}:users"))
        return {object_keys.unquoted(name) for name in folders} | known

    def save(self) -> None:
        """Save some of the new runs. Raises `Unavailable`; runs that were not saved stay marked."""
        client, unsaved, saving = self._job_store.client, f"{self._prefix}-unsaved", f"{self._prefix}-saving"
        fresh: list[str] = guarded(lambda: client.srandmember(unsaved, SAVED_AT_ONCE))
        for note in fresh:
            guarded(lambda note=note: client.smove(unsaved, saving, note))
        notes: set[str] = guarded(lambda: client.smembers(saving))
        for note in notes:
            try:
                owner, day = note.rsplit(" ", 1)
                self._save(owner, day)
            except Unavailable:
                raise
            except Exception:  # an error in one object must not prevent saving the others
                log.exception("usage_unreadable", note=note)
                guarded(lambda note=note: client.smove(saving, f"{self._prefix}-aside", note))
            else:
                guarded(lambda note=note: client.srem(saving, note))

    def _save(self, owner: str, day: str) -> None:
        client = self._job_store.client
        runs: dict[str, str] = guarded(lambda: client.hgetall(f"{self._prefix}:{owner}:{day}"))
        parts: dict[str, str] = guarded(lambda: client.hgetall(self._parts_of(owner, int(day))))
        key = object_keys.usage(owner, _date(int(day)).isoformat())
        body = self._store.get_json(key) or {"v": 1, "owner": owner, "runs": {}}
        added = {**{run: int(ms) for run, ms in runs.items()}, **body["runs"]}
        kept: dict[str, str] = {**parts, **body.get("parts", {})}
        if added != body["runs"] or kept != body.get("parts", {}):
            self._store.put_json(key, {**body, "runs": added, "parts": kept})

    def _load(self, owner: str) -> None:
        """Count an owner's runs in the bucket; runs that Valkey knows too count once."""
        for item in self._store.list(object_keys.usages(owner)):
            try:
                day = date.fromisoformat(item.key.rsplit("/", 1)[-1].removesuffix(".json"))
                body: Mapping[str, Any] | None = self._store.get_json(item.key)
                runs = strict_json.dumps(body["runs"]) if body else "{}"
                parts = strict_json.dumps(body.get("parts", {})) if body else "{}"
            except (ValueError, KeyError, TypeError):
                log.exception("usage_unreadable", key=item.key)  # a lost day must not stop jobs
                continue
            self._job_store.run_script("tally", owner, str(_number(day)), runs, parts)
        guarded(lambda: self._job_store.client.hset(f"{self._prefix}:{owner}", _LOADED, "1"))

    def forget_old(self) -> None:
        """Delete days before every window, and mark runs that could not be saved, so that saving is retried."""
        client = self._job_store.client
        aside: set[str] = guarded(lambda: client.smembers(f"{self._prefix}-aside"))
        for note in aside:
            guarded(lambda note=note: client.smove(f"{self._prefix}-aside", f"{self._prefix}-unsaved", note))
        oldest = datetime.now(UTC).date() - timedelta(days=KEEP_DAYS)
        for item in self._store.list(object_keys.USAGE):
            if item.key.rsplit("/", 1)[-1].removesuffix(".json") < oldest.isoformat():
                self._store.delete(item.key)
        known: set[str] = guarded(lambda: client.smembers(f"{self._job_store.prefix}:users"))
        owners = sorted(known)
        for start in range(0, len(owners), OWNERS_AT_ONCE):
            guarded(partial(self._forget_days, owners[start : start + OWNERS_AT_ONCE], _number(oldest)))

    def _forget_days(self, owners: list[str], oldest: int) -> None:
        pipeline = self._job_store.client.pipeline(transaction=False)
        for owner in owners:
            pipeline.hkeys(f"{self._prefix}:{owner}")
        days_of: dict[str, list[str]] = dict(zip(owners, pipeline.execute(), strict=True))
        for owner, days in days_of.items():
            old = [day for day in days if day != _LOADED and int(day) < oldest]
            if old:
                pipeline.hdel(f"{self._prefix}:{owner}", *old)
        pipeline.execute()
        for owner, days in days_of.items():
            if all(day == _LOADED or int(day) < oldest for day in days):
                self._job_store.run_script("prune", owner)


def _part_of(record: JobRecord, day: date, gpu_seconds: float) -> Part:
    return Part(owner=record.owner, day=day, gpu=record.gpu, job=record.id, gpu_seconds=gpu_seconds)


def _by_day(began: datetime, ended: datetime) -> Iterator[tuple[date, float]]:
    """Yield each day (UTC) of a stretch of time, with its seconds in it."""
    while began < ended:
        midnight = datetime.combine(began.date() + timedelta(days=1), time_of_day(), UTC)
        until = min(midnight, ended)
        yield began.date(), (until - began).total_seconds()
        began = until


def _read_part(text: str) -> tuple[str, str]:
    ms, _, gpu = text.partition(" ")
    return ms, gpu


def _date(number: int) -> date:
    return date(1970, 1, 1) + timedelta(days=number)


def _number(day: date) -> int:
    return (day - date(1970, 1, 1)).days
