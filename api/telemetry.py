"""The service's own metrics in Prometheus' form: what this process served, and how queues and workers are doing.

Owns their names; `deploy/grafana` draws them. Values from Valkey are read at each scrape and are the same in every API
process (aggregate with `max`); `grpo_event_streams` and what begins with `grpo_http` or `process` is of one process
(aggregate with `sum`). Invariant: labels are routes, statuses and queues, never an id or a path that a client chose.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import structlog
from prometheus_client import CollectorRegistry, Histogram, ProcessCollector, exposition
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from jobs.errors import Unavailable
from jobs.read.telemetry import QueueState, StepTimes, Telemetry
from jobs.store.valkey_checks import FAULTS

if TYPE_CHECKING:
    from litestar.types import HTTPScope

log = structlog.get_logger(__name__)

STEP_BOUNDS = ("0.5", "1", "2", "5", "10", "20", "30", "60", "120", "300", "600", "+Inf")
"""Of `jobs/store/scripts/prelude.lua`, which counts."""
_METHODS = frozenset({"GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"})
_PARAMETER_TYPE = re.compile(r":\w+}")


class ServiceMetrics:
    """The metrics of one API process."""

    def __init__(
        self,
        read: Callable[[], Telemetry],
        streams: Callable[[], int],
        audit_failures: Callable[[], int],
        storage: Callable[[], bool],
    ) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        self._requests = Histogram(
            "grpo_http_request_seconds",
            "Time until an answer began, so that event streams count as what they are.",
            ("method", "route", "status"),
            registry=self._registry,
        )
        ProcessCollector(registry=self._registry)
        self._registry.register(_ServiceCollector(read, streams, audit_failures, storage))

    def observe(self, scope: HTTPScope, status: int, seconds: float) -> None:
        """Count one answered request."""
        # Set by the router, so it is missing where nothing is served.
        route = _PARAMETER_TYPE.sub("}", scope.get("path_template") or "") or "unmatched"
        method = scope["method"] if scope["method"] in _METHODS else "other"
        self._requests.labels(method, route, str(status)).observe(seconds)

    def expose(self, accept: str) -> tuple[bytes, str]:
        """The exposition in the format that a scraper accepts, and its content type."""
        encode, content_type = exposition.choose_encoder(accept)
        return encode(self._registry), content_type


class _ServiceCollector(Collector):
    """Asks for the service's state when it is scraped."""

    def __init__(
        self,
        read: Callable[[], Telemetry],
        streams: Callable[[], int],
        audit_failures: Callable[[], int],
        storage: Callable[[], bool],
    ) -> None:
        self._read, self._streams, self._audit_failures, self._storage = read, streams, audit_failures, storage

    def collect(self) -> Iterator[Metric]:
        yield _gauge("grpo_event_streams", "Event streams that this process serves.", self._streams())
        lost = "Lines of the audit log that this process could not write."
        yield CounterMetricFamily("grpo_audit_failures", lost, value=self._audit_failures())
        is_up = self._storage()
        yield _gauge("grpo_storage_up", "Whether object storage was ready, as /readyz asks, at this scrape.", is_up)
        try:
            telemetry = self._read()
        except Unavailable as error:
            log.warning("telemetry_unavailable", reason=str(error))
            yield _gauge("grpo_valkey_up", "Whether Valkey answered this scrape.", 0)
            return
        yield _gauge("grpo_valkey_up", "Whether Valkey answered this scrape.", 1)
        yield from _of_service(telemetry)
        yield from _of_operation(telemetry)


def _of_service(telemetry: Telemetry) -> Iterator[Metric]:
    jobs = {status.value: count for status, count in telemetry.jobs.items()}
    yield _gauges("grpo_jobs", "Jobs by status.", "status", jobs)
    busy = sum(worker.job is not None for worker in telemetry.workers)
    workers = {"busy": busy, "idle": len(telemetry.workers) - busy}
    yield _gauges("grpo_workers", "Connected workers by state.", "state", workers)
    yield _gauge("grpo_leases", "Jobs that a worker holds.", telemetry.leases)
    yield _gauge(
        "grpo_lease_age_seconds",
        "Since the last beat of the worker that was silent longest.",
        telemetry.lease_age_seconds,
    )

    def by_queue(value: Callable[[QueueState], float]) -> Mapping[str, float]:
        return {queue.name: value(queue) for queue in telemetry.queues}

    yield _gauges("grpo_queue_depth", "Jobs that wait for a worker.", "queue", by_queue(lambda q: q.depth))
    yield _gauges(
        "grpo_queue_oldest_seconds",
        "How long the first waiting job has waited.",
        "queue",
        by_queue(lambda q: q.oldest_seconds),
    )
    yield _gauges("grpo_queue_workers", "Connected workers that serve a queue.", "queue", by_queue(lambda q: q.workers))
    steps = HistogramMetricFamily("grpo_step_seconds", "Time a logged training step took.", labels=["queue"])
    for queue in telemetry.queues:
        steps.add_metric([queue.name], _cumulative(queue.steps), queue.steps.sum)
    yield steps


def _of_operation(telemetry: Telemetry) -> Iterator[Metric]:
    """What an operator bounds, and the server that holds it."""
    yield _gauge("grpo_jobs_overdue", "Jobs in workers' hands for longer than they may.", telemetry.overdue)
    backlog = "Records of ended jobs in Valkey that have outlived their time."
    yield _gauge("grpo_retention_backlog", backlog, telemetry.retention_backlog)
    state = telemetry.valkey
    if state is None:
        return
    yield _gauge("grpo_valkey_memory_bytes", "Memory that Valkey uses.", state.memory_bytes)
    yield _gauge("grpo_valkey_memory_limit_bytes", "Its maxmemory; 0 is none.", state.max_memory_bytes)
    yield _gauge("grpo_valkey_replicas", "Replicas that are connected to it.", state.replicas)
    lag = "Since the slowest of its replicas was heard."
    yield _gauge("grpo_valkey_replica_lag_seconds", lag, state.replica_lag_seconds)
    wrong = {code: float(code in state.faults) for code in FAULTS}
    yield _gauges("grpo_valkey_fault", "What is wrong with it: 1.", "code", wrong)


def _cumulative(times: StepTimes) -> list[tuple[str, float]]:
    total = 0
    buckets: list[tuple[str, float]] = []
    for bound in STEP_BOUNDS:
        total += times.buckets.get(bound, 0)
        buckets.append((bound if math.isinf(float(bound)) else str(float(bound)), total))
    return buckets


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, value=value)


def _gauges(name: str, text: str, label: str, values: Mapping[str, float]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, text, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family
