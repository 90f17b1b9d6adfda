"""A job: identity, state and progress. Values are frozen; only `job_store` changes a job.

Invariant: the allowed changes of state are defined here; the Lua scripts receive them and refuse every other change.
Only an outcome, which is authoritative, may end a job from any state.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Annotated, Any

from ulid import ULID

from grpo_core.reasons import Phase, Word
from grpo_core.shown import Shown
from grpo_core.spec.sections import STEPPING

RECORD_VERSION = 1


class JobStatus(Word):
    """Where a job is in its life."""

    QUEUED = "queued", "waiting for a worker", "排队中"
    RUNNING = "running", "a worker holds its lease", "运行中"
    PAUSING = "pausing", "asked to pause; the worker has yet to checkpoint", "正在暂停"
    PAUSED = "paused", "checkpointed, holds no GPU", "已暂停"
    CANCELLING = "cancelling", "asked to end; the worker has yet to stop", "正在取消"
    SUCCEEDED = "succeeded", "finished; of a training, the adapter is stored", "成功"
    FAILED = "failed", "ended by an error, which the job explains", "失败"
    CANCELLED = "cancelled", "ended on request", "已取消"


class Priority(Word):
    """How urgent a job is among its owner's."""

    LOW = "low", "waits six hours longer than the owner's other jobs", "低"
    NORMAL = "normal", "the default", "普通"
    HIGH = "high", "goes before the owner's other jobs that were queued up to six hours earlier", "高"


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
class JobState:
    """The fields that everyone is shown first."""

    id: Annotated[str, Shown()]
    owner: Annotated[str, Shown("The owner of the API key that submitted it")]
    status: Annotated[JobStatus, Shown()]
    phase: Annotated[Phase | None, Shown(Phase.described())] = None
    name: Annotated[str | None, Shown()] = None
    metadata: Annotated[dict[str, str], Shown()] = field(default_factory=dict[str, str])
    spec: Annotated[
        dict[str, Any],
        Shown("The resolved spec, every value explicit; fields of later formats only where used"),
    ]
    spec_sha256: Annotated[str, Shown(pattern="^[0-9a-f]{64}$")]
    epoch: Annotated[int, Shown("The run that holds or last held the job; 0 before the first", least=0)] = 0
    attempts: Annotated[int, Shown("Runs lost without a new checkpoint", least=0)] = 0
    step: Annotated[int, Shown(least=0)] = 0
    total_steps: Annotated[int, Shown(least=0)] = 0


@dataclass(frozen=True, kw_only=True)
class JobView(JobState):
    """All fields that everyone is shown, in the order of the API's answers."""

    checkpoint_step: Annotated[
        int, Shown("The last step that is safe in storage, from which the next run would resume; 0 for none", least=0)
    ] = 0
    reward: Annotated[float | None, Shown("Mean total reward of the last step")] = None
    best_step: Annotated[
        int | None, Shown("The step whose evaluation was best so far; its checkpoint is kept. Null without one")
    ] = None
    stopped: Annotated[
        str | None, Shown("Why an evaluation ended training before its last step (`evaluation.stop_when`)")
    ] = None
    created_at: Annotated[datetime, Shown()]
    updated_at: Annotated[datetime, Shown()]
    started_at: Annotated[datetime | None, Shown()] = None
    finished_at: Annotated[datetime | None, Shown()] = None
    group: Annotated[str | None, Shown("The group that it was submitted with, a sweep; null: alone")] = None
    priority: Annotated[Priority, Shown(f"How urgent it is. {Priority.described()}")] = Priority.NORMAL


@dataclass(frozen=True, kw_only=True)
class JobRequest:
    """What is shown only with a single job."""

    requested_spec: Annotated[
        dict[str, Any] | None,
        Shown("The spec as it was sent, before defaults; null: an earlier release accepted the job"),
    ] = None


@dataclass(frozen=True, kw_only=True)
class JobRecord(JobRequest, JobView):
    """One job. Times are aware UTC. Fields that are not `Shown` are for the service alone."""

    queue: str
    """The Celery queue of workers that can run it."""
    spec_format: int = 1
    """The format of the spec that a worker must read to run it."""
    refused_format: int = 0
    """The newest format of a worker that could not read the spec."""
    hosts_found: int = -1
    """The number of hosts with enough cards when the job's were last not free at once; -1: not looked at."""
    accumulation: int = 0
    """Gradient accumulation since an out-of-memory error; 0: that of the spec."""
    stopped_epoch: int = 0
    """The run whose worker was asked to stop: its loss does not count as an attempt."""
    orders: int = 0
    """Number of the last command that was applied."""
    restored: bool = False
    """Whether the record was restored after a loss of Valkey, and its run has not been heard of since."""
    run_at: datetime | None = None
    """Start of the run that holds it."""
    run_ms: int = 0
    """Duration of its earlier runs together, in milliseconds."""
    gpu: str = ""
    """Name of the GPUs of the run that holds it; empty: without one, or not known."""
    run_hosts: int = 0
    """Number of hosts that this run has; 0: as many as the job asks for."""
    gpu_ms: dict[str, Any] = field(default_factory=dict[str, Any])
    """GPU-milliseconds of its ended runs, by the name of the GPUs."""
    worker: str | None = None
    error: dict[str, Any] | None = None
    """On failure: code, class, message, hint, retryable."""
    manifest: str | None = None
    """Key of the manifest in the bucket, once it exists."""

    @property
    def gpus(self) -> int:
        """The GPUs of its run, on all hosts together."""
        resources = self.spec["resources"]
        return resources["gpus"] * (self.run_hosts or resources.get("hosts", 1))

    def gpu_hours(self, now: datetime) -> dict[str, float]:
        """Return the GPU-hours of all its runs up to now, by the name of the GPUs."""
        used = {name: ms / 3_600_000 for name, ms in self.gpu_ms.items()}
        if self.run_at is not None and self.gpus:
            held = max(0.0, (now - self.run_at).total_seconds())
            used[self.gpu] = used.get(self.gpu, 0.0) + held * self.gpus / 3600
        return used

    def ran_seconds(self, now: datetime) -> float:
        """Return the duration of all its runs together, in seconds."""
        held = (now - self.run_at).total_seconds() if self.run_at else 0.0
        return self.run_ms / 1000 + max(0.0, held)


def record_of(asked: dict[str, Any]) -> JobRecord:
    """Make the record of a new job from its `job.json`."""
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
        spec_format=asked.get("spec_format", 1),
        requested_spec=asked.get("requested_spec"),
        group=asked.get("group"),
        priority=Priority(asked.get("priority", Priority.NORMAL)),
        name=spec["name"],
        metadata=spec["metadata"],
        total_steps=spec["training"]["steps"] if spec.get("kind", "training") in STEPPING else 0,
    )


def new_job_id() -> str:
    """Return a new job id: random, and later ids sort after earlier ones."""
    return f"job-{ULID()}"


def new_group_id() -> str:
    """Return a new id of a group of jobs."""
    return f"group-{ULID()}"


def member_ids(group: str, count: int) -> list[str]:
    """Return the ids of a group's jobs: always the same, so that a repeated submission makes no second set.

    They have the group's time and then their place, so they sort in the order of the group.
    """
    time = ULID.from_str(group.removeprefix("group-")).bytes[:6]
    places = [place.to_bytes(2, "big") for place in range(count)]
    return [f"job-{ULID(time + at + hashlib.sha256(group.encode() + at).digest()[:8])}" for at in places]


def utc(milliseconds: int) -> datetime:
    """Return the UTC time of a number of milliseconds since 1970."""
    return datetime.fromtimestamp(milliseconds / 1000, UTC)
