"""GPU time of owners: seconds times GPUs of every run, by the UTC day of its start, in Valkey and in the bucket.

The script that ends a run counts it, in the same step (`prelude.lua`). The housekeeper saves new runs to
`usage/{owner}/{day}.json`; after a loss of Valkey, the counts are read from there. Invariant: a run counts once, even
if Valkey was lost, and for at most the seconds for which a worker held the job.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, date, datetime, timedelta
from functools import partial
from typing import Any

import structlog

from grpo_core import strict_json
from jobs.errors import Unavailable
from jobs.store import object_keys
from jobs.store.bucket import ObjectStore
from jobs.store.job import HELD
from jobs.store.job_store import JobStore, guarded

log = structlog.get_logger()

KEEP_DAYS = 400
"""Days of runs that are kept; `prelude.lua` keeps the runs of a day in Valkey for longer."""
SAVED_AT_ONCE = 20
OWNERS_AT_ONCE = 500
"""Number of owners in one request to Valkey."""
_LOADED = "loaded"


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
        now = datetime.fromtimestamp(self._job_store.now_ms() / 1000, UTC)
        used = 0.0
        for status in HELD:
            for record in self._job_store.get_many(self._job_store.list_ids(owner, limit=10_000, status=status)):
                if record.run_at is not None:
                    seconds = max(0.0, (now - record.run_at).total_seconds())
                    resources = record.spec["resources"]
                    used += seconds * resources["gpus"] * resources.get("hosts", 1)
        return used

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
        runs: dict[str, str] = guarded(lambda: self._job_store.client.hgetall(f"{self._prefix}:{owner}:{day}"))
        key = object_keys.usage(owner, _date(int(day)).isoformat())
        body = self._store.get_json(key) or {"v": 1, "owner": owner, "runs": {}}
        added = {**{run: int(ms) for run, ms in runs.items()}, **body["runs"]}
        if added != body["runs"]:
            self._store.put_json(key, {**body, "runs": added})

    def _load(self, owner: str) -> None:
        """Count an owner's runs in the bucket; runs that Valkey knows too count once."""
        for item in self._store.list(object_keys.usages(owner)):
            try:
                day = date.fromisoformat(item.key.rsplit("/", 1)[-1].removesuffix(".json"))
                body: Mapping[str, Any] | None = self._store.get_json(item.key)
                runs = strict_json.dumps(body["runs"]) if body else "{}"
            except (ValueError, KeyError, TypeError):
                log.exception("usage_unreadable", key=item.key)  # a lost day must not stop jobs
                continue
            self._job_store.run_script("tally", owner, str(_number(day)), runs)
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


def _date(number: int) -> date:
    return date(1970, 1, 1) + timedelta(days=number)


def _number(day: date) -> int:
    return (day - date(1970, 1, 1)).days
