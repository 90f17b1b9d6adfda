"""Quotas of owners: GPU time within a window of days, and bytes in the bucket; with their use.

Owns the settings and the refusals. Invariant: a quota refuses new jobs and uploads and ends no accepted job. The limits
on unfinished jobs and on a job's time bound those.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from datetime import time as time_of_day

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from jobs.errors import JobsError
from jobs.usage.gpu_time import KEEP_DAYS, GpuTime
from jobs.usage.stored_bytes import Census, Stored

GB = 1_000_000_000


class QuotaSettings(BaseSettings):
    """Quotas of each owner. 0 means no limit."""

    model_config = SettingsConfigDict(frozen=True, populate_by_name=True, extra="ignore")

    gpu_hours: float = Field(default=0, ge=0, validation_alias="GRPO_OWNER_GPU_HOURS")
    """GPU-hours of one owner's runs that started within the last `days`."""
    days: int = Field(default=30, ge=1, le=KEEP_DAYS - 1, validation_alias="GRPO_QUOTA_DAYS")
    """Length of the window in days, today included."""
    storage_gb: float = Field(default=0, ge=0, validation_alias="GRPO_OWNER_STORAGE_GB")
    """Gigabytes of one owner's data sets and jobs in the bucket."""


class GpuQuotaUsedUp(JobsError):
    """An owner has used the quota of GPU-hours; `seconds` until some is available again."""

    def __init__(self, usage: Usage) -> None:
        assert usage.frees_at is not None
        self.seconds = max(1.0, (usage.frees_at - datetime.now(UTC)).total_seconds())
        super().__init__(
            f"Your runs of the last {usage.window_days} days used {usage.gpu_hours:.2f} GPU-hours of the "
            f"{usage.max_gpu_hours:g} that you may use. Submit again after "
            f"{usage.frees_at.isoformat(timespec='minutes')}, or ask the service's operator for more."
        )


class StorageQuotaUsedUp(JobsError):
    """An owner has used the quota of storage."""

    def __init__(self, used: int, limit: int) -> None:
        super().__init__(
            f"You store {used / GB:.2f} GB of the {limit / GB:g} GB that you may store. Delete ended jobs or data sets "
            "and send the request again, or ask the service's operator for more."
        )


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Use and limits of one owner; None means no limit."""

    owner: str
    gpu_hours: float
    """GPU-hours of runs that started within the window, current runs included."""
    max_gpu_hours: float | None
    window_days: int
    frees_at: datetime | None
    """When the use falls below the limit; None if it is below now."""
    stored: Stored
    max_stored_bytes: int | None

    @property
    def gpu_hours_left(self) -> float | None:
        """GPU-hours that are left; None: no limit."""
        return None if self.max_gpu_hours is None else max(0.0, self.max_gpu_hours - self.gpu_hours)

    @property
    def bytes_left(self) -> int | None:
        """Bytes that are left; None: no limit."""
        return None if self.max_stored_bytes is None else max(0, self.max_stored_bytes - self.stored.bytes)


class Quotas:
    """The quotas of all owners."""

    def __init__(self, gpu_time: GpuTime, census: Census, settings: QuotaSettings | None = None) -> None:
        self._gpu_time = gpu_time
        self._census = census
        self._settings = settings or QuotaSettings()

    @property
    def _max_bytes(self) -> int | None:
        return round(self._settings.storage_gb * GB) or None

    def usage(self, owner: str) -> Usage:
        """Return the use and limits of one owner."""
        settings = self._settings
        today = datetime.now(UTC).date()
        first = today - timedelta(days=settings.days - 1)
        days = {day: used / 3600 for day, used in self._gpu_time.by_day(owner).items() if day >= first}
        running = self._gpu_time.running(owner) / 3600
        used = sum(days.values()) + running
        limit = settings.gpu_hours or None
        full = limit is not None and used >= limit
        return Usage(
            owner=owner,
            gpu_hours=used,
            max_gpu_hours=limit,
            window_days=settings.days,
            frees_at=_frees_at({**days, today: days.get(today, 0) + running}, limit, settings.days) if full else None,
            stored=self._census.of(owner),
            max_stored_bytes=self._max_bytes,
        )

    def all(self) -> list[Usage]:
        """Return the use and limits of all owners, by name."""
        return [self.usage(owner) for owner in self.owners()]

    def owners(self) -> list[str]:
        """Return every owner who has used GPUs or storage, by name."""
        return sorted(self._gpu_time.owners() | self._census.owners())

    def check_job(self, owner: str) -> None:
        """Check that an owner may submit a job. Raises `GpuQuotaUsedUp` and `StorageQuotaUsedUp`."""
        if self._settings.gpu_hours:
            usage = self.usage(owner)
            if usage.frees_at is not None:
                raise GpuQuotaUsedUp(usage)
        self.check_bytes(owner, 0)

    def check_bytes(self, owner: str, more: int) -> None:
        """Check that an owner may store `more` bytes. Raises `StorageQuotaUsedUp`."""
        limit = self._max_bytes
        if limit is None:
            return
        used = self._census.of(owner).bytes
        if used >= limit or used + more > limit:
            raise StorageQuotaUsedUp(used, limit)


def _frees_at(days: dict[date, float], limit: float | None, window: int) -> datetime | None:
    """Return the midnight (UTC) at which enough days have left the window."""
    if limit is None:
        return None
    left = sum(days.values())
    for day in sorted(days):
        left -= days[day]
        if left < limit:
            return datetime.combine(day + timedelta(days=window), time_of_day(), UTC)
    return None
