"""Jobs through a real worker process: every end a job can come to, and what it leaves behind."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import signal
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from jobs import layout
from jobs.record import JobRecord, JobStatus
from jobs.service import JobService
from tests.acceptance.conftest import OWNER, WorkerProcess, wait_for

Start = Callable[..., WorkerProcess]
Submit = Callable[..., JobRecord]


def test_a_job_succeeds_and_all_it_made_can_be_read(service: JobService, start_worker: Start, submit: Submit) -> None:
    start_worker()
    job = submit(steps=5, checkpoint_every=2)
    done = wait_for(service, job.id)
    assert done.status is JobStatus.SUCCEEDED, done.error
    assert (done.step, done.reward, done.epoch, done.attempts, done.phase) == (5, 4.0, 1, 0, None)

    artifacts = {artifact.path: artifact for artifact in service.artifacts(job.id, OWNER)}
    assert {"adapter/adapter_model.safetensors", "metrics.jsonl", "report.json", "spec.json"} <= artifacts.keys()
    for artifact in artifacts.values():
        with urllib.request.urlopen(artifact.url) as answer:
            body = answer.read()
        assert (len(body), hashlib.sha256(body).hexdigest()) == (artifact.size, artifact.sha256), artifact.path

    steps: list[int] = []
    for path in sorted(path for path in artifacts if path.startswith("rollouts/")):
        body = service.store.get(artifacts[path].key)
        steps += pq.read_table(io.BytesIO(body or b""))["step"].to_pylist()
    assert steps == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5], "every step once, and the files of single steps are gone"
    listed = {item.key for item in service.store.list(layout.run(job.id, 1))}
    assert listed == {artifact.key for artifact in artifacts.values()}, (
        "nothing is stored that the manifest does not list"
    )


def test_events_and_metrics_tell_the_whole_story(service: JobService, start_worker: Start, submit: Submit) -> None:
    start_worker()
    job = submit(steps=3)
    wait_for(service, job.id)
    events = service.events(job.id, OWNER)
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    told = [event["data"].get("status") or event["data"].get("phase") for event in events if event["type"] == "status"]
    assert told == ["queued", "running", "loading", "training", "succeeded"]
    assert [metric["step"] for metric in service.metrics(job.id, OWNER)] == [1, 2, 3]
    assert [metric["step"] for metric in service.metrics(job.id, OWNER, after_step=2)] == [3]

    service.ledger.client.delete(f"{service.ledger.prefix}:events:{job.id}")
    stored = service.events(job.id, OWNER)
    assert [(e["seq"], e["type"], e["data"]) for e in stored] == [(e["seq"], e["type"], e["data"]) for e in events]
    assert [event["seq"] for event in service.events(job.id, OWNER, after=2, limit=2)] == [3, 4]


def test_an_upload_reaches_the_training_process(
    service: JobService, start_worker: Start, submit: Submit, tmp_path: Path
) -> None:
    from tests.integration.test_service import upload

    dataset = upload(service, tmp_path, OWNER)
    start_worker()
    job = submit(data={"source": "upload", "dataset": dataset.id})
    assert wait_for(service, job.id).status is JobStatus.SUCCEEDED


@pytest.mark.parametrize(("code", "failure"), [("10", "user_config"), ("13", "oom"), ("15", "diverged")])
def test_a_failed_job_says_why(
    service: JobService, start_worker: Start, submit: Submit, code: str, failure: str
) -> None:
    start_worker()
    job = submit(fail=code)
    done = wait_for(service, job.id)
    assert done.status is JobStatus.FAILED
    assert done.error is not None
    assert (done.error["class"], done.error["message"]) == (failure, "As asked.")
    assert [event["type"] for event in service.events(job.id, OWNER)].count("error") == 1
    assert "stderr.log" in [artifact.path for artifact in service.artifacts(job.id, OWNER)]
    outcome = service.archive.outcome(job.id)
    assert outcome is not None
    assert outcome.error == done.error


def test_a_child_that_is_killed_every_time_fails_after_three_runs(
    service: JobService, start_worker: Start, submit: Submit
) -> None:
    start_worker()
    job = submit(fail="kill")
    done = wait_for(service, job.id)
    assert done.status is JobStatus.FAILED
    assert done.error is not None
    assert (done.error["class"], done.epoch, done.attempts) == ("infra", 3, 3 - 1)


def test_a_running_job_is_cancelled_within_five_seconds(
    service: JobService, start_worker: Start, submit: Submit, tmp_path: Path
) -> None:
    start_worker()
    job = submit(steps=10_000, step_seconds="0.05")
    wait_for(service, job.id, JobStatus.RUNNING)
    while service.get(job.id, OWNER).step < 2:
        time.sleep(0.05)
    assert training_processes(tmp_path)
    began = time.monotonic()
    service.cancel(job.id, OWNER)
    done = wait_for(service, job.id)
    assert done.status is JobStatus.CANCELLED
    assert time.monotonic() - began < 5
    assert not training_processes(tmp_path), "the training process is gone"
    assert "metrics.jsonl" in [artifact.path for artifact in service.artifacts(job.id, OWNER)]


def test_a_worker_that_is_stopped_hands_its_job_to_another(
    service: JobService, start_worker: Start, submit: Submit
) -> None:
    first = start_worker()
    job = submit(steps=40, step_seconds="0.1")
    wait_for(service, job.id, JobStatus.RUNNING)
    while service.get(job.id, OWNER).step < 2:
        time.sleep(0.05)
    assert first.stop() == 0
    record = service.get(job.id, OWNER)
    assert (record.status, record.attempts) == (JobStatus.QUEUED, 0), "being asked to stop is no failure"
    start_worker()
    done = wait_for(service, job.id)
    assert (done.status, done.epoch) == (JobStatus.SUCCEEDED, 2)


def test_a_killed_worker_loses_its_job_to_another(
    service: JobService, start_worker: Start, submit: Submit, tmp_path: Path
) -> None:
    first = start_worker()
    job = submit(steps=30, step_seconds="0.1")
    wait_for(service, job.id, JobStatus.RUNNING)
    while service.get(job.id, OWNER).step < 2:
        time.sleep(0.05)
    os.kill(first.process.pid, signal.SIGKILL)
    first.process.wait()
    time.sleep(0.5)
    assert not training_processes(tmp_path), "the training process dies with its worker"
    start_worker()
    done = wait_for(service, job.id)
    assert (done.status, done.epoch, done.attempts) == (JobStatus.SUCCEEDED, 2, 1)


def test_jobs_wait_their_turn_and_repeated_wake_ups_do_nothing(
    service: JobService, start_worker: Start, submit: Submit
) -> None:
    jobs = [submit(steps=2) for _ in range(3)]
    for job in jobs:
        for _ in range(3):
            service._outbox.add(job.id, job.queue)
    start_worker()
    start_worker()
    assert {wait_for(service, job.id).status for job in jobs} == {JobStatus.SUCCEEDED}
    assert [service.archive.latest_epoch(job.id) for job in jobs] == [1, 1, 1]


def test_no_secret_reaches_the_training_process(
    service: JobService, start_worker: Start, submit: Submit, tmp_path: Path
) -> None:
    spy = tmp_path / "spy.py"
    spy.write_text("import os, sys; print(sorted(os.environ), file=sys.stderr); sys.exit(16)")
    start_worker(launcher=[sys.executable, str(spy)])
    job = submit()
    wait_for(service, job.id)
    (log,) = [artifact for artifact in service.artifacts(job.id, OWNER) if artifact.path == "stderr.log"]
    names = (service.store.get(log.key) or b"").decode()
    assert "PATH" in names
    assert not [name for name in ("AWS_", "REDIS_URL", "S3_", "GRPO_API_KEY") if name in names]


def training_processes(tmp_path: Path) -> list[str]:
    """Processes that work in this test's folders, whatever else runs on the machine."""
    found: list[str] = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (process / "cwd").readlink().is_relative_to(tmp_path):
                found.append((process / "cmdline").read_text())
    return found
