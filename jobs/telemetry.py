"""How the service as a whole is doing: queues, leases, workers and step times, read from Valkey in one go.

For displays and alarms, never for decisions. The scripts of `jobs/scripts` keep the counts, in the same step as what
they count. Invariant: the values are the service's, so every process that asks gets the same ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jobs.ledger import Ledger, guarded
from jobs.record import JobStatus
from jobs.registry import WorkerInfo, WorkerRegistry


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    """Seconds a step took, as a histogram since the service began."""

    buckets: Mapping[str, int]
    """Steps by the upper bound of their bucket, `+Inf` for the longest; not cumulative, empty ones left out."""
    sum: float


@dataclass(frozen=True, kw_only=True)
class QueueState:
    """One queue."""

    name: str
    depth: int
    """Jobs that wait in it."""
    oldest_seconds: float
    """How long the first of them has waited; 0 where none does."""
    workers: int
    """Connected workers that serve it."""
    steps: StepTimes


@dataclass(frozen=True, kw_only=True)
class Telemetry:
    """The service at one moment."""

    jobs: Mapping[JobStatus, int]
    """Every status, also those of no job."""
    queues: list[QueueState]
    """Those that ever had a job or are served now."""
    leases: int
    """Jobs that a worker holds."""
    lease_age_seconds: float
    """Since the last beat of the worker that was silent longest; 0 where none holds a job."""
    workers: list[WorkerInfo]


def read_telemetry(ledger: Ledger, workers: WorkerRegistry, *, lease_seconds: float) -> Telemetry:
    """Ask Valkey; raises `Unavailable`."""
    ledger.ping()  # brief: a scrape must be answered before it is given up, above all where this fails
    connected = workers.all()
    known: set[str] = guarded(lambda: ledger.client.smembers(f"{ledger.prefix}:queues"))
    names = sorted(known | {queue for worker in connected for queue in worker.queues})
    now, counts, leases, first_lease, *of_queues = guarded(lambda: _ask(ledger, names))
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
        # A lease is kept as the time it runs out, which is that long after the beat.
        lease_age_seconds=_age(now + lease_seconds * 1000, first_lease),
        workers=connected,
    )


def _ask(ledger: Ledger, queues: list[str]) -> list[Any]:
    prefix = ledger.prefix
    pipeline = ledger.client.pipeline(transaction=False)
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
    """Seconds since the time of the first member of a sorted set."""
    return max(0.0, (now_ms - first[0][1]) / 1000) if first else 0.0


def _step_times(fields: Mapping[str, str]) -> StepTimes:
    return StepTimes(
        buckets={bound: int(count) for bound, count in fields.items() if bound != "sum"},
        sum=float(fields.get("sum", 0)),
    )
