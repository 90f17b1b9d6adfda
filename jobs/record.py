"""A job as the service sees it: identity, state, progress. Frozen values; only `ledger` changes a job.

Invariant: the states a job may go to from each state are written here once; the Lua scripts are given them, and
refuse every other change. Only an outcome, which is stronger than a record, may end a job from any state.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, Literal

from ulid import ULID

Phase = Literal["preparing", "loading", "training", "evaluating", "uploading"]

RECORD_VERSION = 1


class JobStatus(StrEnum):
    """Where a job is in its life."""

    QUEUED = "queued"
    """Waiting for a worker."""
    RUNNING = "running"
    """A worker holds its lease."""
    PAUSING = "pausing"
    """Asked to pause; the worker has yet to checkpoint."""
    PAUSED = "paused"
    """Checkpointed, holds no GPU."""
    CANCELLING = "cancelling"
    """Asked to end; the worker has yet to stop."""
    SUCCEEDED = "succeeded"
    """Trained to the end; the adapter is stored."""
    FAILED = "failed"
    """Ended by an error, which the record explains."""
    CANCELLED = "cancelled"
    """Ended on request."""


TERMINAL: frozenset[JobStatus] = frozenset({JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED})

HELD: frozenset[JobStatus] = frozenset({JobStatus.RUNNING, JobStatus.PAUSING, JobStatus.CANCELLING})
"""States in which a worker holds a lease."""

TRANSITIONS: dict[JobStatus, frozenset[JobStatus]] = {
    JobStatus.QUEUED: frozenset({JobStatus.RUNNING, JobStatus.PAUSED, JobStatus.CANCELLED}),
    JobStatus.RUNNING: frozenset(
        {JobStatus.PAUSING, JobStatus.CANCELLING, JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.QUEUED}
    ),
    JobStatus.PAUSING: frozenset(
        {JobStatus.PAUSED, JobStatus.CANCELLING, JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.QUEUED}
    ),
    JobStatus.PAUSED: frozenset({JobStatus.QUEUED, JobStatus.CANCELLED}),
    JobStatus.CANCELLING: frozenset({JobStatus.CANCELLED, JobStatus.SUCCEEDED}),
    JobStatus.SUCCEEDED: frozenset(),
    JobStatus.FAILED: frozenset(),
    JobStatus.CANCELLED: frozenset(),
}


@dataclass(frozen=True, kw_only=True)
class JobRecord:
    """One job. Times are aware UTC."""

    id: str
    owner: str
    """Who submitted it: the owner of the API key."""
    status: JobStatus
    spec: dict[str, Any]
    """The resolved spec, every value explicit."""
    spec_sha256: str
    created_at: datetime
    updated_at: datetime
    queue: str
    """The Celery queue that workers fit for it listen on."""
    name: str | None = None
    metadata: dict[str, str] = field(default_factory=dict)
    phase: Phase | None = None
    epoch: int = 0
    """The run that holds or last held the job; 0 before the first."""
    attempts: int = 0
    """Runs that were lost without a new checkpoint."""
    checkpoint_step: int = 0
    """The highest step that is committed: where the next run would start, if its checkpoint can be read."""
    accumulation: int = 0
    """Parts a step is split into since an out-of-memory; 0: as many as the spec says."""
    stopped_epoch: int = 0
    """The run whose worker was asked to stop: losing it is no attempt."""
    orders: int = 0
    """Number of the last of its owner's orders that was carried out."""
    restored: bool = False
    """Put back after Valkey was lost, as held by a run nothing has been heard of since."""
    step: int = 0
    total_steps: int = 0
    reward: float | None = None
    """Mean total reward of the last step."""
    started_at: datetime | None = None
    finished_at: datetime | None = None
    worker: str | None = None
    error: dict[str, Any] | None = None
    """On failure: code, class, message, hint, retryable."""
    manifest: str | None = None
    """Key of the manifest in the bucket, once there is one."""


def record_of(asked: dict[str, Any]) -> JobRecord:
    """The record of a job that was only asked for so far, from its `job.json`."""
    created_at = datetime.fromisoformat(asked["created_at"])
    spec: dict[str, Any] = asked["spec"]
    return JobRecord(
        id=asked["id"],
        owner=asked["owner"],
        status=JobStatus.QUEUED,
        spec=spec,
        spec_sha256=asked["spec_sha256"],
        created_at=created_at,
        updated_at=created_at,
        queue=asked["queue"],
        name=spec["name"],
        metadata=spec["metadata"],
        total_steps=spec["training"]["steps"],
    )


def new_job_id() -> str:
    """A job id: random, and later jobs sort after earlier ones."""
    return f"job-{ULID()}"


def utc(milliseconds: int) -> datetime:
    """The moment so many milliseconds after the epoch."""
    return datetime.fromtimestamp(milliseconds / 1000, UTC)
