"""A fault in the worker itself: the job is back in the queue at once, and its owner is told what it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from grpo_core.spec import parse_spec
from jobs.service import JobService
from jobs.settings import QueueSettings, StorageSettings
from jobs.store.job import JobStatus
from jobs.worker import worker
from jobs.worker.worker import Worker, WorkerSettings


class BrokenRun:
    def __init__(self, *_: Any) -> None:
        pass

    def execute(self) -> None:
        raise TypeError("a fault of ours")


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "JobRun", BrokenRun)


@pytest.mark.usefixtures("broken")
def test_a_job_does_not_wait_for_its_lease_when_the_worker_fails(
    storage_settings: StorageSettings, queue_settings: QueueSettings, tmp_path: Path
) -> None:
    service = JobService(storage_settings, queue_settings)
    settings = WorkerSettings.model_validate({"work_dir": tmp_path, "name": "broken", "min_free_mb": 0})
    worker = Worker(settings, storage_settings, queue_settings)
    job = service.submit(parse_spec({"resources": {"gpus": 0}, "optimizer": {"name": "adamw_torch"}}), "ann")

    worker.run_job(job.id)
    assert service.get(job.id, "ann").status is JobStatus.QUEUED
    warning = service.events(job.id, "ann")[-2]["data"]
    assert (warning["code"], warning["attempts"], warning["class"]) == ("run_lost", 1, "infra")
    assert "TypeError" in warning["message"]

    for _ in range(2):
        worker.run_job(job.id)
    ended = service.get(job.id, "ann")
    assert ended.status is JobStatus.FAILED, "and it does not go round for ever"
    assert ended.error is not None
    assert "TypeError" in ended.error["message"]
    assert list(tmp_path.iterdir()) == []
