"""A job that has had its time saves and ends as failed, and what it made is kept, also where no worker sees to it."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta

from grpo_core.spec import parse_spec
from jobs.lifecycle.time_limit import GRACE_SECONDS, Overdue, TimeLimitSettings
from jobs.service import JobService
from jobs.store import commits
from jobs.store.job import JobRecord, JobStatus
from jobs.store.write_once import ManifestEntry
from tests.acceptance.conftest import OWNER, WorkerProcess, wait_for
from tests.acceptance.test_worker import wait_for_step

Start = Callable[..., WorkerProcess]
Submit = Callable[..., JobRecord]

LIMIT_MS = 15_000
"""Longer than a busy machine takes for the first of the two runs."""
HOUR = TimeLimitSettings.model_validate({"hours": 1})


def test_a_job_ends_when_its_runs_took_too_long_together_and_has_saved(
    service: JobService, start_worker: Start, submit: Submit
) -> None:
    worker = start_worker(GRPO_MAX_JOB_HOURS=str(LIMIT_MS / 3_600_000))
    job = submit(steps=10_000, checkpoint_every=10_000, step_seconds="0.1")
    wait_for_step(service, job, 5)
    assert worker.stop() == 0
    first = service.get(job.id, OWNER)
    assert (first.status, first.run_at) == (JobStatus.QUEUED, None)
    assert 500 < first.run_ms < LIMIT_MS
    start_worker(GRPO_MAX_JOB_HOURS=str(LIMIT_MS / 3_600_000))
    done = wait_for(service, job.id, seconds=60)
    assert done.status is JobStatus.FAILED
    assert done.error is not None
    assert (done.error["class"], done.error["code"], done.error["retryable"]) == ("user_config", "time_limit", False)
    assert LIMIT_MS <= done.run_ms < LIMIT_MS + 15_000, "over both runs"
    assert done.epoch == 2
    assert done.checkpoint_step == done.step > first.step, "what it had is saved"
    (newest, *_) = commits.commits_up_to(service.store, job.id, 2)
    assert (newest.step, newest.epoch) == (done.step, 2)
    assert [found.step for found in service.checkpoints(job.id, OWNER)][-1] == done.step
    assert [event["type"] for event in service.events(job.id, OWNER)][-2:] == ["error", "status"]
    assert service.write_once.outcome(job.id).error == done.error  # type: ignore[union-attr]


def test_a_worker_does_not_train_a_job_that_has_had_its_time(
    service: JobService, start_worker: Start, submit: Submit
) -> None:
    job = submit(steps=3)
    service.job_store.change(job.id, fields={"run_ms": 7200_000})
    start_worker(GRPO_MAX_JOB_HOURS="1")
    done = wait_for(service, job.id)
    assert (done.status, done.step) == (JobStatus.FAILED, 0)
    assert done.error is not None
    assert done.error["code"] == "time_limit"


def hold(service: JobService, began: timedelta, *, earlier: timedelta = timedelta()) -> JobRecord:
    """A job that a worker has had for so long."""
    spec = parse_spec({"resources": {"gpus": 0}, "optimizer": {"name": "adamw_torch"}})
    job = service.submit(spec, OWNER)
    assert service.write_once.allocate_epoch(job.id, "w", "2026-01-02T03:04:05Z") == 1
    assert service.job_store.claim(job.id, epoch=1, worker="w", lease_seconds=60)
    run_at = int((datetime.now(UTC) - began).timestamp() * 1000)
    service.job_store.change(job.id, fields={"run_at": run_at, "run_ms": int(earlier.total_seconds() * 1000)})
    return job


def test_the_sweeper_ends_what_a_worker_does_not(service: JobService) -> None:
    """As one of an older release, which knows no limit."""
    late, saving, young = (
        hold(service, timedelta(minutes=70), earlier=timedelta(minutes=30)),
        hold(service, timedelta(minutes=61)),
        hold(service, timedelta(minutes=20), earlier=timedelta(minutes=20)),
    )
    prefix = f"jobs/{late.id}/e1/"
    service.store.put(f"{prefix}checkpoints/step-000007/manifest.json", b"{}")
    kept = ManifestEntry(path="adapter/x", key=f"{prefix}checkpoints/step-000007/x", sha256="0" * 64, size=1)
    commits.put_commit(
        service.store,
        commits.Commit(job=late.id, epoch=1, step=7, checkpoint=f"{prefix}checkpoints/step-000007/", objects=[kept]),
    )
    overdue = Overdue(service.job_store, service.write_once, HOUR)
    assert set(overdue.jobs()) == {late.id, saving.id}
    assert overdue.jobs(grace_seconds=GRACE_SECONDS) == [late.id]
    overdue.end()
    ended = service.get(late.id, OWNER)
    assert ended.status is JobStatus.FAILED
    assert ended.error is not None
    assert ended.error["code"] == "time_limit"
    assert service.job_store.beat(late.id, epoch=1, lease_seconds=60).refusal == "status", "its worker is fenced"
    assert [artifact.key for artifact in service.artifacts(late.id, OWNER)][-1:] != [], "its last commit is kept"
    assert [service.get(job.id, OWNER).status for job in (saving, young)] == [JobStatus.RUNNING] * 2


def test_without_a_limit_nothing_ends_and_a_pause_stops_the_clock(service: JobService) -> None:
    old = hold(service, timedelta(days=900))
    assert Overdue(service.job_store, service.write_once, TimeLimitSettings.model_validate({"hours": 0})).jobs() == []
    service.job_store.change(old.id, to=JobStatus.PAUSING)
    service.job_store.change(old.id, to=JobStatus.PAUSED)
    assert Overdue(service.job_store, service.write_once, HOUR).jobs() == []
    paused = service.get(old.id, OWNER)
    assert paused.run_at is None
    assert paused.ran_seconds(datetime.now(UTC) + timedelta(days=9)) == paused.run_ms / 1000 >= 900 * 86_400
