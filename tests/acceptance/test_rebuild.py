"""Valkey is lost while a worker trains: without an operator the very run goes on and ends."""

from __future__ import annotations

import secrets
from collections.abc import Callable

import pytest

from jobs.service import JobService
from jobs.settings import StorageSettings
from jobs.store.event_log import now_iso
from jobs.store.job import JobRecord, JobStatus
from tests.acceptance.conftest import OWNER, WorkerProcess, wait_for

Start = Callable[..., WorkerProcess]
Submit = Callable[..., JobRecord]


@pytest.fixture
def storage_settings(storage_settings: StorageSettings) -> StorageSettings:
    """A bucket of the test's own: an emptied Valkey is filled with every job there is."""
    return storage_settings.model_copy(update={"bucket": f"rebuild-{secrets.token_hex(6)}"})


def lose_valkey(service: JobService) -> None:
    """All of it that is this service's: records, leases, events, keys, wake-ups."""
    client = service.job_store.client
    client.delete(*client.keys(f"{service.job_store.prefix}:*"))


def test_a_run_outlives_the_loss_of_valkey_and_waiting_jobs_are_run_too(
    service: JobService, start_worker: Start, submit: Submit
) -> None:
    start_worker()
    running = submit(steps=60, step_seconds="0.1")
    wait_for(service, running.id, JobStatus.RUNNING)
    waiting = [submit() for _ in range(2)]
    lose_valkey(service)
    ended = wait_for(service, running.id)
    assert (ended.status, ended.epoch, ended.attempts) == (JobStatus.SUCCEEDED, 1, 0), "the same run, to its end"
    assert ended.step == 60
    assert "metrics.jsonl" in [artifact.path for artifact in service.artifacts(running.id, OWNER)]
    for job in waiting:
        assert wait_for(service, job.id).status is JobStatus.SUCCEEDED


def test_a_worker_that_took_a_number_too_late_fences_nobody(
    service: JobService, start_worker: Start, submit: Submit
) -> None:
    start_worker()
    job = submit(steps=20, step_seconds="0.1")
    wait_for(service, job.id, JobStatus.RUNNING)
    assert service.write_once.allocate_epoch(job.id, "too late", now_iso()) == 2
    assert not service.job_store.claim(job.id, epoch=2, worker="too late", lease_seconds=60)
    ended = wait_for(service, job.id)
    assert (ended.status, ended.epoch) == (JobStatus.SUCCEEDED, 1)
