"""Retention: removes records of ended jobs from Valkey, and deletes old jobs from the bucket if the operator wants it.

Owns the settings and what is removed; `retired` removes records and `deletion` deletes jobs. The housekeeper calls
`step`, which does a little at a time. Invariant: nothing is removed that belongs to an unfinished job or that one
starts from; and when a record leaves Valkey its owner can still read the job, except in lists.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import partial

import structlog
from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict
from ulid import ULID

from jobs.errors import InUse, Unavailable
from jobs.lifecycle.admission import REMEMBER_SECONDS
from jobs.lifecycle.deletion import Deletion
from jobs.lifecycle.recovery import apart
from jobs.store import object_keys
from jobs.store.job import TERMINAL, JobRecord
from jobs.store.job_store import JobStore, guarded
from jobs.store.retired import Retired
from jobs.store.write_once import Outcome, WriteOnceStore
from jobs.usage.gpu_time import GpuTime

log = structlog.get_logger()

STEP_SECONDS = 2.0
"""Approximate duration of each half of a step."""
BATCH = 20
OWNERS_AT_ONCE = 500
"""Number of owners examined in one step; the next step continues after them."""
FAR = 10
"""At this multiple of the allowed records, an owner's records are retired even if there is a reason to keep them."""
WALK_EVERY_SECONDS = 3600.0
"""How often the bucket is searched for old jobs."""
SCAN = 500


class RetentionSettings(BaseSettings):
    """How long ended jobs are kept; equal in all processes. 0 means forever, or any number."""

    model_config = SettingsConfigDict(frozen=True, populate_by_name=True, extra="ignore")

    record_days: float = Field(default=365, ge=0, le=36_500, validation_alias="GRPO_KEEP_RECORDS_DAYS")
    """Days for which the record of an ended job stays in Valkey, and the job in lists."""
    records: int = Field(default=2000, ge=0, validation_alias="GRPO_KEEP_RECORDS")
    """Largest number of records of ended jobs per owner in Valkey."""
    job_days: float = Field(default=0, ge=0, le=36_500, validation_alias="GRPO_KEEP_JOBS_DAYS")
    """Days for which an ended job is kept in the bucket; then it is deleted as by its owner."""
    checkpoint_days: float = Field(default=0, ge=0, le=36_500, validation_alias="GRPO_KEEP_CHECKPOINTS_DAYS")
    """Days for which the checkpoints of an ended job are kept; adapter, completions and report stay."""
    erased_days: float = Field(default=400, ge=0, le=36_500, validation_alias="GRPO_KEEP_ERASED_DAYS")
    """Days for which markers of deletion are kept: longer than the age of the oldest backup of Valkey."""


@dataclass(frozen=True, kw_only=True)
class Surplus:
    """Numbers of what is past its retention."""

    records: int
    """Records of ended jobs in Valkey."""
    jobs: int
    """Ended jobs in the bucket."""
    checkpoints: int
    """Ended jobs whose checkpoints would be deleted."""
    erased: int
    """Markers of deletions."""


class Retention:
    """Removes what is past its retention."""

    def __init__(
        self, job_store: JobStore, write_once: WriteOnceStore, settings: RetentionSettings | None = None
    ) -> None:
        self._job_store = job_store
        self._write_once = write_once
        self._store = write_once.store
        self._settings = settings or RetentionSettings()
        self._retired = Retired(write_once)
        self._deletion = Deletion(job_store, write_once.store)
        self._state = f"{job_store.prefix}:retention"
        self._backlog, self._counted_at = 0, float("-inf")

    def step(self) -> None:
        """Remove a little of what is due. Raises `Unavailable`; the next step continues from there."""
        self._index()
        self._retire_some(time.monotonic() + STEP_SECONDS)
        self._walk(time.monotonic() + STEP_SECONDS)  # with its own time, so that a backlog of records cannot block it

    def backlog(self, *, max_age_seconds: float = 0) -> int:
        """Return the number of records in Valkey past their retention, now or `max_age_seconds` ago."""
        if max_age_seconds and time.monotonic() - self._counted_at < max_age_seconds:
            return self._backlog
        self._backlog = sum(surplus for _, _, surplus in self._counts(self._owners()))
        self._counted_at = time.monotonic()
        return self._backlog

    def surplus(self) -> Surplus:
        """Return the numbers of all that would be removed. Searches the whole bucket."""
        olds: list[str | None] = []
        for job_id in self._old_jobs():
            with apart(job_id, self._store):
                outcome = self._write_once.outcome(job_id)
                olds.append(self._due(outcome) if outcome else None)
        return Surplus(
            records=self.backlog(),
            jobs=olds.count("job"),
            checkpoints=olds.count("checkpoints"),
            erased=sum(1 for _ in self._old_marks()),
        )

    def _index(self) -> None:
        """Index jobs that ended under an older release without this index, some keys at a time, in every round."""
        client, prefix = self._job_store.client, f"{self._job_store.prefix}:job:"
        cursor: str | None = guarded(lambda: client.hget(self._state, "indexed"))
        if cursor == "all":
            return
        found: tuple[int, list[str]] = guarded(lambda: client.scan(int(cursor or 0), match=f"{prefix}*", count=SCAN))

        def read() -> list[list[str | None]]:
            pipeline = client.pipeline(transaction=False)
            for key in found[1]:
                pipeline.hmget(key, ["status", "owner", "finished_at", "updated_at"])
            return pipeline.execute()

        for key, (status, owner, finished, updated) in zip(found[1], guarded(read), strict=True):
            if owner and status in TERMINAL:
                self._note_ended(key.removeprefix(prefix), owner, int(finished or updated or 0))
        guarded(lambda: client.hset(self._state, "indexed", str(found[0]) if found[0] else "all"))

    def _note_ended(self, job_id: str, owner: str, ended_ms: int) -> None:
        def write() -> None:
            pipeline = self._job_store.client.pipeline()
            pipeline.sadd(f"{self._job_store.prefix}:enders", owner)
            pipeline.zadd(self._ended_of(owner), {job_id: ended_ms}, nx=True)
            pipeline.execute()

        guarded(write)

    def _ended_of(self, owner: str) -> str:
        return f"{self._job_store.prefix}:ended:{owner}"

    def _owners(self) -> list[str]:
        owners: set[str] = guarded(lambda: self._job_store.client.smembers(f"{self._job_store.prefix}:enders"))
        return sorted(owners)

    def _counts(self, owners: list[str]) -> Iterator[tuple[str, int, int]]:
        """Yield each owner with the number of records of ended jobs, and how many of them are surplus or too old."""
        settings, client, now = self._settings, self._job_store.client, self._job_store.now_ms()
        oldest = now - int(settings.record_days * 86_400_000) if settings.record_days else 0

        def ask(some: list[str]) -> list[int]:
            pipeline = client.pipeline(transaction=False)
            for owner in some:
                pipeline.zcard(self._ended_of(owner))
                # Records with a time in the future are kept for their Idempotency-Key and are not counted.
                pipeline.zcount(self._ended_of(owner), 0, now)
                pipeline.zcount(self._ended_of(owner), 0, f"({oldest}")
            return pipeline.execute()

        for start in range(0, len(owners), OWNERS_AT_ONCE):
            some = owners[start : start + OWNERS_AT_ONCE]
            answers = iter(guarded(partial(ask, some)))
            for owner, held, kept, old in zip(some, answers, answers, answers, strict=True):
                yield owner, held, max(old, kept - settings.records if settings.records else 0)

    def _retire_some(self, until: float) -> None:
        """Retire surplus records, owner by owner, starting after the last owner of the previous step."""
        client = self._job_store.client
        served: str | None = guarded(lambda: client.hget(self._state, "owner"))
        owners = self._owners()
        first = bisect_right(owners, served or "")
        next_ones = [*owners[first:], *owners[:first]][:OWNERS_AT_ONCE]
        for owner, held, surplus in self._counts(next_ones):
            if not held:
                self._job_store.run_script("prune", owner)
            if surplus > 0:
                # Stored first: if storage fails for this owner, the next step starts with another one.
                guarded(lambda owner=owner: client.hset(self._state, "owner", owner))
                for job_id in self._oldest(owner, min(surplus, BATCH)):
                    self._retire(job_id, owner, is_full=held > FAR * self._settings.records > 0)
                    if time.monotonic() > until:
                        return
        if next_ones:
            guarded(lambda: client.hset(self._state, "owner", next_ones[-1]))

    def _oldest(self, owner: str, count: int) -> list[str]:
        now = self._job_store.now_ms()
        return guarded(lambda: self._job_store.client.zrangebyscore(self._ended_of(owner), 0, now, start=0, num=count))

    def _retire(self, job_id: str, owner: str, *, is_full: bool) -> None:
        """Retire one record. One that cannot be retired is postponed, so that it does not block every step."""
        key, again = self._ended_of(owner), self._job_store.now_ms()
        try:
            record = self._job_store.get(job_id)
            if record is None:
                guarded(lambda: self._job_store.client.zrem(key, job_id))
                return
            key_ends = 0 if is_full else self._key_ends_ms(record)
            if key_ends > again:
                again = key_ends
            elif record.status in TERMINAL and self._retired.retire(record, self._job_store):
                log.info("record_retired", job_id=job_id)
                return
            else:
                # Storage lacks a part of it, for example if it was cancelled while storage was unavailable.
                log.warning("record_kept", job_id=job_id, reason="object storage has no outcome of it")
        except Unavailable:
            raise
        except Exception:  # an error in one job must not stop the others
            log.exception("record_unreadable", job_id=job_id)
        guarded(lambda: self._job_store.client.zadd(key, {job_id: again}, xx=True))

    def _key_ends_ms(self, record: JobRecord) -> int:
        """Return when its Idempotency-Key expires, or 0 without one: a rebuild cannot restore it without the record."""
        ends = round((record.created_at.timestamp() + REMEMBER_SECONDS) * 1000)
        if ends < self._job_store.now_ms() or "request" not in (self._write_once.job(record.id) or {}):
            return 0
        return ends

    def _walk(self, until: float) -> None:
        """Continue through the bucket: old jobs, then old markers of deletion. A round starts at most every hour."""
        client = self._job_store.client
        state: dict[str, str] = guarded(lambda: client.hgetall(self._state))
        now = self._job_store.now_ms()
        if "at" not in state and now < int(state.get("walk_from", 0)):
            return
        for job_id in self._old_jobs(after=state.get("at", "")):
            try:
                with apart(job_id, self._store):
                    outcome = self._write_once.outcome(job_id)
                    if outcome is not None:
                        self._let_go(job_id, outcome)
            except Unavailable:
                # The error may concern this object alone, so the next step continues after it.
                guarded(lambda job_id=job_id: client.hset(self._state, "at", job_id))
                raise
            if time.monotonic() > until:
                guarded(lambda job_id=job_id: client.hset(self._state, "at", job_id))
                return
        for name in self._old_marks():
            self._store.delete(object_keys.erased(name))
        GpuTime(self._job_store, self._store).forget_old()

        def end() -> None:
            pipeline = client.pipeline()
            pipeline.hdel(self._state, "at")
            pipeline.hset(self._state, "walk_from", now + int(WALK_EVERY_SECONDS * 1000))
            if state.get("indexed") == "all":
                # Index again: during an upgrade, jobs may end under an older release without the index.
                pipeline.hdel(self._state, "indexed")
            pipeline.execute()

        guarded(end)

    def _old_jobs(self, *, after: str = "") -> Iterator[str]:
        """Yield jobs in the bucket that may be too old, in the order of submission."""
        days = min((days for days in (self._settings.job_days, self._settings.checkpoint_days) if days), default=None)
        if days is None:
            return
        for job_id in self._store.folders(object_keys.JOBS, after=after):
            made = _made(job_id)
            if made is None:
                continue  # not a job's folder
            if datetime.now(UTC) - made <= timedelta(days=days):
                return  # all later jobs are younger
            yield job_id

    def _due(self, outcome: Outcome) -> str | None:
        """Return which part of an ended job is due."""
        age = datetime.now(UTC) - datetime.fromisoformat(outcome.time)
        if self._settings.job_days and age > timedelta(days=self._settings.job_days):
            return "job"
        if self._settings.checkpoint_days and age > timedelta(days=self._settings.checkpoint_days):
            return "checkpoints" if self._checkpoints(outcome) else None
        return None

    def _let_go(self, job_id: str, outcome: Outcome) -> None:
        due = self._due(outcome)
        record = (self._job_store.get(job_id) or self._retired.find(job_id)) if due else None
        if record is None or record.status not in TERMINAL:
            return
        with suppress(InUse):
            if due == "job":
                self._deletion.erase_job(record)
                log.info("job_expired", job_id=job_id, owner=record.owner)
            else:
                self._deletion.begin(record)
                self._drop_checkpoints(outcome)
                self._job_store.end("erasing", job_id)
                log.info("checkpoints_expired", job_id=job_id, owner=record.owner)

    def _checkpoints(self, outcome: Outcome) -> list[str]:
        """Return the keys of all objects in the checkpoints of a job's runs, without that of the best step."""
        folder = object_keys.folder(outcome.job)
        keys = [item.key for item in self._store.list(folder) if "/checkpoints/" in item.key.removeprefix(folder)]
        manifest = self._write_once.manifest(outcome.manifest) if keys and outcome.manifest else None
        if manifest is None or manifest.best_step is None:
            return keys
        best = f"checkpoints/step-{manifest.best_step:06d}/"
        kept = {entry.key for entry in manifest.objects if entry.path.startswith(best)}
        return [key for key in keys if key not in kept]

    def _drop_checkpoints(self, outcome: Outcome) -> None:
        """Delete the checkpoints, first from the manifest, so that it names no deleted object."""
        manifest = self._write_once.manifest(outcome.manifest) if outcome.manifest else None
        keys = self._checkpoints(outcome)
        if manifest is not None:
            gone = set(keys)
            self._write_once.put_manifest(replace(manifest, objects=[o for o in manifest.objects if o.key not in gone]))
        for key in keys:
            self._store.delete(key)

    def _old_marks(self) -> Iterator[str]:
        """Yield the ids of old markers of deletion, of which no backup can hold the job."""
        days = self._settings.erased_days
        if not days:
            return
        oldest = datetime.now(UTC) - timedelta(days=days)
        for item in self._store.list(object_keys.ERASED):
            name = item.key.removeprefix(object_keys.ERASED).removesuffix(".json")
            if item.modified is not None and item.modified < oldest:
                yield name


def _made(job_id: str) -> datetime | None:
    """Return when a job was created, by its id; None for any other text."""
    if not job_id.startswith("job-"):
        return None
    try:
        return ULID.from_str(job_id.removeprefix("job-")).datetime
    except ValueError:
        return None
