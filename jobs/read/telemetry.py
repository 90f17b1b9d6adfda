"""The state of the service for monitoring: queues, leases, workers and step times, read from Valkey at once.

For displays and alerts, never for decisions. The scripts in `jobs/store/scripts` update the counts in the same step as
what they count. Invariant: the values belong to the whole service, so every process reads the same ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jobs.store.job import JobStatus
from jobs.store.job_store import JobStore, guarded
from jobs.store.valkey_checks import ValkeyState
from jobs.store.workers import WorkerInfo, WorkerRegistry


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    """Histogram of the seconds per step since the service started."""

    buckets: Mapping[str, int]
    """Number of steps by the upper bound of their bucket, `+Inf` for the longest; not cumulative, without empty
    ones."""
    sum: float


@dataclass(frozen=True, kw_only=True)
class QueueState:
    """One queue."""

    name: str
    depth: int
    """Number of waiting jobs."""
    oldest_seconds: float
    """How long the first of them has waited; 0 if none waits."""
    workers: int
    """Number of connected workers that serve it."""
    steps: StepTimes


@dataclass(frozen=True, kw_only=True)
class Telemetry:
    """The service at one moment."""

    jobs: Mapping[JobStatus, int]
    """Number of jobs by status; every status is present."""
    queues: list[QueueState]
    """Queues that ever had a job or are served now."""
    leases: int
    """Number of jobs that a worker holds."""
    lease_age_seconds: float
    """Longest time since a worker's last heartbeat; 0 if no worker holds a job."""
    workers: list[WorkerInfo]
    valkey: ValkeyState | None = None
    """State of the Valkey server; None if it was not read."""
    retention_backlog: int = 0
    """Number of records in Valkey past their retention."""
    overdue: int = 0
    """Number of jobs whose runs took longer than allowed."""


def read_telemetry(job_store: JobStore, workers: WorkerRegistry, *, lease_seconds: float) -> Telemetry:
    """Read the state from Valkey. Raises `Unavailable`."""
    job_store.ping()  # short: a scrape must be answered before its timeout, above all if Valkey is unavailable
    connected = workers.all()
    known: set[str] = guarded(lambda: job_store.client.smembers(f"{job_store.prefix}:queues"))
    names = sorted(known | {queue for worker in connected for queue in worker.queues})
    now, counts, leases, first_lease, *of_queues = guarded(lambda: _ask(job_store, names))
    queues = [
        QueueState(
            name=name,
            depth=depth,
            oldest_seconds=_age(now, first),
            workers=sum(name in worker.queues for worker in connected),
            steps=_step_times(steps),
        )
        for name, depth, first, steps in zip(names, of_queues[::3], of_queues[1::3], of_queues[2::3], strict=True)
    ]
    return Telemetry(
        jobs={status: int(counts.get(status.value, 0)) for status in JobStatus},
        queues=queues,
        leases=leases,
        # A lease is stored as the time of its end, which is `lease_seconds` after the heartbeat.
        lease_age_seconds=_age(now + lease_seconds * 1000, first_lease),
        workers=connected,
    )


def _ask(job_store: JobStore, queues: list[str]) -> list[Any]:
    prefix = job_store.prefix
    pipeline = job_store.client.pipeline(transaction=False)
    pipeline.time()
    pipeline.hgetall(f"{prefix}:statuses")
    pipeline.zcard(f"{prefix}:leases")
    pipeline.zrange(f"{prefix}:leases", 0, 0, withscores=True)
    for queue in queues:
        pipeline.zcard(f"{prefix}:waiting:{queue}")
        pipeline.zrange(f"{prefix}:waiting:{queue}", 0, 0, withscores=True)
        pipeline.hgetall(f"{prefix}:steps:{queue}")
    (seconds, micros), *answers = pipeline.execute()
    return [int(seconds) * 1000 + int(micros) / 1000, *answers]


def _age(now_ms: float, first: list[tuple[str, float]]) -> float:
    """Return the seconds since the time of a sorted set's first member."""
    return max(0.0, (now_ms - first[0][1]) / 1000) if first else 0.0


def _step_times(fields: Mapping[str, str]) -> StepTimes:
    return StepTimes(
        buckets={bound: int(count) for bound, count in fields.items() if bound != "sum"},
        sum=float(fields.get("sum", 0)),
    )
