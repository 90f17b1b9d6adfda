"""A job that this release cannot read: it keeps its attempts and waits for a newer worker."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from grpo_core.spec import SPEC_FORMAT, parse_spec
from jobs.read.queue_position import WaitReason
from jobs.service import JobService
from jobs.settings import QueueSettings, StorageSettings
from jobs.store.job import JobRecord, JobStatus, new_job_id, record_of
from jobs.store.workers import WorkerInfo
from jobs.worker.worker import Worker, WorkerSettings

CPU: dict[str, Any] = {"resources": {"gpus": 0}, "optimizer": {"name": "adamw_torch"}}


@pytest.fixture
def service(storage_settings: StorageSettings, queue_settings: QueueSettings) -> JobService:
    return JobService(storage_settings, queue_settings)


@pytest.fixture
def worker(storage_settings: StorageSettings, queue_settings: QueueSettings, tmp_path: Path) -> Worker:
    settings = WorkerSettings.model_validate({"work_dir": tmp_path, "name": "here", "min_free_mb": 0})
    return Worker(settings, storage_settings, queue_settings)


def accepted(service: JobService, queue: str, spec_format: int, **fields: Any) -> JobRecord:
    """A job that a newer service accepted, with fields that this one does not know."""
    spec = {**parse_spec(CPU).as_dict(), **fields}
    asked: dict[str, Any] = {"id": new_job_id(), "owner": "ann", "queue": queue}
    asked |= {"created_at": "2026-01-02T03:04:05.678000+00:00"}
    asked |= {"spec": spec, "spec_sha256": "0" * 64, "spec_format": spec_format, "requested_spec": {**CPU, **fields}}
    assert service.write_once.put_job(asked["id"], asked)
    record = record_of(asked)
    assert service.job_store.create(record)
    return record


@pytest.mark.parametrize("spec_format", [1, SPEC_FORMAT + 1], ids=["undeclared", "declared"])
def test_a_job_that_cannot_be_read_is_left_to_a_newer_worker(
    service: JobService, worker: Worker, queue_settings: QueueSettings, spec_format: int
) -> None:
    queue = f"{queue_settings.prefix}.cpu"
    job = accepted(service, queue, spec_format, tomorrow={"is": "another day"})
    service.workers.announce(WorkerInfo(name="here", queues=worker.queues, device="cpu"))

    for _ in range(4):
        worker.run_job(job.id)

    found = service.get(job.id, "ann")
    assert (found.status, found.epoch, found.attempts, found.error) == (JobStatus.QUEUED, 0, 0, None)
    assert service.write_once.latest_epoch(job.id) == 0
    waiting = service.waiting(found)
    assert waiting is not None
    assert (waiting.reason, waiting.workers, waiting.spec_format, waiting.workers_spec_format) == (
        *(WaitReason.NEWER_WORKER, 0),
        *(SPEC_FORMAT + 1, SPEC_FORMAT),
    )
    newer = WorkerInfo(name="there", queues=[queue], device="cpu", spec_format=SPEC_FORMAT + 1, version="99.0")
    service.workers.announce(newer)
    waiting = service.waiting(found)
    assert waiting is not None
    assert (waiting.reason, waiting.workers, waiting.workers_spec_format) == (WaitReason.TURN, 1, SPEC_FORMAT + 1)
    assert service.cancel(job.id, "ann").status is JobStatus.CANCELLED


def test_a_job_of_a_format_that_no_worker_here_reads_waits_for_a_newer_one(
    service: JobService, worker: Worker, queue_settings: QueueSettings
) -> None:
    prefix = queue_settings.prefix
    job = accepted(service, f"{prefix}.cpu.f{SPEC_FORMAT + 1}", SPEC_FORMAT + 1, tomorrow=1)
    waiting = service.waiting(job)
    assert waiting is not None
    assert (waiting.reason, waiting.workers_spec_format) == (WaitReason.NO_WORKER, None)
    service.workers.announce(WorkerInfo(name="here", queues=worker.queues, device="cpu"))
    waiting = service.waiting(job)
    assert waiting is not None
    assert (waiting.reason, waiting.workers_spec_format) == (WaitReason.NEWER_WORKER, SPEC_FORMAT)


def test_a_worker_of_the_first_release_gets_only_what_it_reads(
    service: JobService, queue_settings: QueueSettings
) -> None:
    prefix, client = queue_settings.prefix, service.job_store.client
    service.workers.announce(WorkerInfo(name="old", queues=[f"{prefix}.cpu"], device="cpu"))
    client.delete(f"{prefix}:worker-release:old")  # it says nothing of releases
    assert [(found.spec_format, found.version) for found in service.workers.all()] == [(1, "")]

    native = parse_spec({**CPU, "engine": "native"})
    assert [warning.code for warning in service.preview(native, "ann").warnings if "worker" in warning.code] == [
        "newer_worker"
    ]
    job = service.submit(native, "ann")
    waiting = service.waiting(job)
    assert job.queue == f"{prefix}.cpu.f2"
    assert waiting is not None
    assert (waiting.reason, waiting.spec_format, waiting.workers_spec_format) == (WaitReason.NEWER_WORKER, 2, 1)
    assert service.job_store.get(job.id) == replace(job, updated_at=service.get(job.id, "ann").updated_at)


def test_an_entry_of_a_later_release_is_read(service: JobService, queue_settings: QueueSettings) -> None:
    """And one of the first release is written as that release reads it: whole, and with nothing else in it."""
    service.workers.announce(WorkerInfo(name="w", queues=["q"], device="cpu"))
    body: Any = service.job_store.client.get(f"{queue_settings.prefix}:worker:w")
    assert body == '{"name":"w","queues":["q"],"device":"cpu","job":null}'
    service.job_store.client.set(f"{queue_settings.prefix}:worker:w", body[:-1] + ',"tomorrow":1}', ex=60)
    assert [found.name for found in service.workers.all()] == ["w"]


def test_what_was_requested_is_kept_beside_what_it_became(service: JobService) -> None:
    job = service.submit(parse_spec(CPU), "ann")
    assert (job.requested_spec, job.spec_format) == (CPU, 1)
    asked = service.write_once.job(job.id)
    assert asked is not None
    assert asked["requested_spec"] == CPU
    assert asked["spec"]["training"]["steps"] == 250
