"""What /metrics says, on real servers: counts that follow jobs, and no more labels than there are routes."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from grpo_client import GrpoClient, ProblemError
from grpo_core.spec import parse_spec
from jobs.auth.api_keys import OWNER_SCOPES, SCOPES
from jobs.service import JobService
from jobs.settings import QueueSettings, StorageSettings
from jobs.store.job import JobStatus
from jobs.store.job_store import JobEvent
from jobs.store.workers import WorkerInfo
from tests.clock import patience
from tests.conftest import SeaweedFSServer, ValkeyServer
from tests.integration.running import RunningApi

CPU = parse_spec({"resources": {"gpus": 0}, "optimizer": {"name": "adamw_torch"}})
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


@pytest.fixture
def api(storage_settings: StorageSettings, queue_settings: QueueSettings) -> Iterator[RunningApi]:
    api = RunningApi(JobService(storage_settings, queue_settings))
    with api.run():
        yield api


@pytest.fixture
def client(api: RunningApi) -> Iterator[GrpoClient]:
    key, _ = api.service.keys.create("ann", SCOPES)
    with GrpoClient(api.url, key) as client:
        yield client


def scrape(client: GrpoClient) -> Samples:
    families = text_string_to_metric_families(client.service_metrics())
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples[name, tuple(sorted(labels.items()))]


def test_counts_follow_jobs_through_their_states(api: RunningApi, client: GrpoClient) -> None:
    job_store, queue = api.service.job_store, f"{api.service.job_store.prefix}.cpu"
    jobs = [api.service.submit(CPU, "ann").id for _ in range(4)]
    api.service.workers.announce(WorkerInfo(name="w1", queues=[queue], device="cpu", job=jobs[0]))
    api.service.workers.announce(WorkerInfo(name="w2", queues=[queue, "spare"], device="cpu"))
    assert job_store.claim(jobs[0], epoch=1, worker="w1", lease_seconds=60)
    times = [0.4, 3.0, 3.0, 700.0]
    events = [JobEvent(type="metric", step=step, data={"seconds": {"total": t}}) for step, t in enumerate(times, 1)]
    job_store.change(jobs[0], epoch=1, events=events, first_ordinal=1)
    job_store.change(jobs[0], epoch=1, events=events, first_ordinal=1)  # sent again: counted once
    job_store.change(jobs[0], epoch=1, events=[JobEvent(type="metric", step=5, data={"seconds": "odd"})])
    for made_up in (-5, 1e9, 10**400, [1]):  # what spoils the sum of all
        events = [JobEvent(type="metric", step=6, data={"seconds": {"total": made_up}})]
        assert job_store.change(jobs[0], epoch=1, events=events).done
    api.service.cancel(jobs[1], "ann")
    samples = scrape(client)
    by_status = {status.value: value(samples, "grpo_jobs", status=status.value) for status in JobStatus}
    assert {status: count for status, count in by_status.items() if count} == {
        "queued": 2,
        "running": 1,
        "cancelled": 1,
    }
    assert value(samples, "grpo_queue_depth", queue=queue) == 2
    assert 0 < value(samples, "grpo_queue_oldest_seconds", queue=queue) < 60
    assert value(samples, "grpo_queue_workers", queue=queue) == 2
    assert value(samples, "grpo_queue_workers", queue="spare") == 1
    assert (value(samples, "grpo_workers", state="busy"), value(samples, "grpo_workers", state="idle")) == (1, 1)
    assert value(samples, "grpo_leases") == 1
    assert 0 <= value(samples, "grpo_lease_age_seconds") < 30
    steps = {
        bound: value(samples, "grpo_step_seconds_bucket", queue=queue, le=bound) for bound in ("0.5", "5.0", "600.0")
    }
    assert steps == {"0.5": 1, "5.0": 3, "600.0": 3}
    assert value(samples, "grpo_step_seconds_count", queue=queue) == 4
    assert value(samples, "grpo_step_seconds_sum", queue=queue) == pytest.approx(sum(times))

    assert job_store.change(jobs[0], epoch=1, to=JobStatus.QUEUED).done
    samples = scrape(client)
    assert (value(samples, "grpo_leases"), value(samples, "grpo_lease_age_seconds")) == (0, 0)
    assert value(samples, "grpo_queue_depth", queue=queue) == 3


def test_workers_are_found_by_name_and_forgotten_when_they_are_silent(
    storage_settings: StorageSettings, queue_settings: QueueSettings
) -> None:
    service = JobService(storage_settings, queue_settings)
    client, prefix, workers = service.job_store.client, service.job_store.prefix, service.workers
    for name in ("w1", "w2", "w3"):
        workers.announce(WorkerInfo(name=name, queues=[f"{prefix}.cpu"], device="cpu"))
    scans = client.info("commandstats").get("cmdstat_scan")
    assert {worker.name for worker in workers.all()} == {"w1", "w2", "w3"}
    assert client.info("commandstats").get("cmdstat_scan") == scans, "the keys of all jobs were looked through"

    workers.withdraw("w1")
    client.delete(f"{prefix}:worker:w2")  # as its time runs out
    client.zadd(f"{prefix}:workers", {"w2": 0})
    workers.announce(WorkerInfo(name="w3", queues=["other"], device="cpu"))
    assert [(worker.name, worker.queues) for worker in workers.all()] == [("w3", ["other"])]
    assert client.zrange(f"{prefix}:workers", 0, -1) == ["w3"]


def test_a_silent_worker_shows_as_the_age_of_its_lease(
    storage_settings: StorageSettings, queue_settings: QueueSettings
) -> None:
    service = JobService(storage_settings, queue_settings)
    job = service.submit(CPU, "ann").id
    assert service.job_store.claim(job, epoch=1, worker="w", lease_seconds=60)
    before = service.telemetry().lease_age_seconds
    service.job_store.client.zincrby(f"{queue_settings.prefix}:leases", -45_000, job)  # as 45 s without a beat leave it
    assert service.telemetry().lease_age_seconds == pytest.approx(before + 45, abs=2)


def test_while_valkey_is_away_it_says_so_to_who_may_know(api: RunningApi, valkey: ValkeyServer) -> None:
    """The alarm for it, and the graphs of the outage, are made of this answer."""
    watcher, record = api.service.keys.create("prometheus", ["metrics:read"])
    newcomer, _ = api.service.keys.create("prometheus", ["metrics:read"])
    owner, _ = api.service.keys.create("ann", OWNER_SCOPES)
    with GrpoClient(api.url, watcher) as client, GrpoClient(api.url, newcomer) as never_asked:
        assert value(scrape(client), "grpo_valkey_up") == 1
        with paused(valkey):
            for asking in (client, never_asked):
                began = time.monotonic()
                samples = scrape(asking)
                assert time.monotonic() - began < 10, "Prometheus gives up after 10 s"
                assert value(samples, "grpo_valkey_up") == 0
                assert value(samples, "grpo_event_streams") == 0
                assert "process_resident_memory_bytes" in {name for name, _ in samples}
                told = {name for name, _ in samples if name.startswith("grpo_")}
                assert not told & {"grpo_jobs", "grpo_queue_depth", "grpo_workers", "grpo_leases"}, "no old numbers"
            for key in (owner, "grpo_nonsense"):
                bearer = {"Authorization": f"Bearer {key}"}
                assert httpx.get(f"{api.url}/metrics", headers=bearer, timeout=20).status_code == 503, "not decided"
        assert value(scrape(client), "grpo_valkey_up") == 1
        api.service.keys.revoke(record.id)
        with pytest.raises(ProblemError):
            client.service_metrics()
        with paused(valkey):
            bearer = {"Authorization": f"Bearer {watcher}"}
            assert httpx.get(f"{api.url}/metrics", headers=bearer, timeout=20).status_code == 503, "it is forgotten"


def test_with_storage_away_too_a_watcher_that_was_seen_is_told(
    api: RunningApi, client: GrpoClient, valkey: ValkeyServer, seaweedfs: SeaweedFSServer
) -> None:
    client.service_metrics()
    with paused(valkey), paused(seaweedfs):
        began = time.monotonic()
        assert value(scrape(client), "grpo_valkey_up") == 0
        assert time.monotonic() - began < patience(8)


@contextlib.contextmanager
def paused(server: ValkeyServer | SeaweedFSServer) -> Iterator[None]:
    """As a host that hangs: it accepts and does not answer, which is slower to notice than one that refuses."""
    os.kill(server.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(server.pid, signal.SIGCONT)


def test_a_valkey_that_is_down_is_told_at_once(api: RunningApi, client: GrpoClient, valkey: ValkeyServer) -> None:
    client.service_metrics()
    valkey.stop()
    try:
        assert value(scrape(client), "grpo_valkey_up") == 0
    finally:
        valkey.start()


def test_requests_are_counted_by_route_and_never_by_id(api: RunningApi, client: GrpoClient) -> None:
    for number in range(5):
        with pytest.raises(ProblemError):
            client.get(f"job-{number:026d}")
    for path in ("nowhere", "etc/passwd", "jobs/x/y/z"):
        httpx.get(f"{api.url}/{path}")
    httpx.request("BREW", f"{api.url}/jobs")
    samples = scrape(client)
    label = {"method": "GET", "route": "/jobs/{job_id}", "status": "404"}
    assert value(samples, "grpo_http_request_seconds_count", **label) == 5
    assert value(samples, "grpo_http_request_seconds_count", method="GET", route="unmatched", status="404") == 3
    routes = {dict(labels).get("route", "") for _, labels in samples}
    assert not [route for route in routes if re.search(r"job-|passwd|:str", route)]
    assert {dict(labels).get("method") for _, labels in samples} <= {None, "GET", "other"}


def test_a_key_needs_the_scope(api: RunningApi) -> None:
    key, _ = api.service.keys.create("ann", ["jobs:read"])
    with GrpoClient(api.url, key) as client, pytest.raises(ProblemError) as raised:
        client.service_metrics()
    assert (raised.value.status, raised.value.code) == (403, "forbidden")
    key, _ = api.service.keys.create("prometheus", ["metrics:read"])
    with GrpoClient(api.url, key) as client:
        assert "grpo_valkey_up 1.0" in client.service_metrics()
        with pytest.raises(ProblemError):
            client.list()


def test_each_expression_of_the_dashboard_and_the_alarms_names_what_is_exposed(
    api: RunningApi, client: GrpoClient
) -> None:
    queue = f"{api.service.job_store.prefix}.cpu"
    job = api.service.submit(CPU, "ann").id
    api.service.job_store.claim(job, epoch=1, worker="w", lease_seconds=60)
    client.get(job)
    exposed: dict[str, set[str]] = {}
    for name, labels in scrape(client):
        exposed.setdefault(name, set()).update(dict(labels))
    folder = Path("deploy/grafana")
    dashboard = json.loads((folder / "dashboards" / "grpo.json").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    expressions += re.findall(r"^\s*expr: (.+)$", (folder / "prometheus" / "alerts.yaml").read_text(), re.MULTILINE)
    assert len(expressions) > 12
    named: set[str] = set()
    for expression in expressions:
        metrics = re.findall(r"\b((?:grpo|process)_[a-z_]+)(?:\{([^}]*)\})?", expression)
        assert metrics or "up{" in expression, expression  # Prometheus' own
        for name, matchers in metrics:
            assert name in exposed, f"{name} in {expression}"
            used = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers))
            used |= {label for group in re.findall(r"\bby \(([^)]*)\)", expression) for label in group.split(", ")}
            known = exposed[name] | {"job", "instance"} | (set.union(*exposed.values()) if len(metrics) > 1 else set())
            assert used <= known, expression
            named.add(name)
    assert {"grpo_queue_depth", "grpo_lease_age_seconds", "grpo_jobs", "grpo_step_seconds_bucket"} <= named
    assert queue in {dict(labels).get("queue") for _, labels in scrape(client)}
