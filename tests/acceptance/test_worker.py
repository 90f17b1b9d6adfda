"""Jobs through a real worker process: every end a job can come to, and what it leaves behind."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import signal
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from jobs.read.fleet import WorkerState
from jobs.service import JobService
from jobs.store import commits, object_keys
from jobs.store.job import JobRecord, JobStatus
from tests.acceptance.conftest import OWNER, WorkerProcess, wait_for
from tests.clock import patience
from tests.conftest import SeaweedFSServer

Start = Callable[..., WorkerProcess]
Submit = Callable[..., JobRecord]


@pytest.mark.core
def test_a_job_succeeds_and_all_it_made_can_be_read(service: JobService, start_worker: Start, submit: Submit) -> None:
    start_worker()
    job = submit(steps=5, checkpoint_every=2)
    done = wait_for(service, job.id)
    assert done.status is JobStatus.SUCCEEDED, done.error
    assert (done.step, done.reward, done.epoch, done.attempts, done.phase) == (5, 4.0, 1, 0, None)

    artifacts = {artifact.path: artifact for artifact in service.artifacts(job.id, OWNER)}
    whole = {"adapter/adapter_model.safetensors", "metrics.jsonl", "report.html", "report.json", "spec.json"}
    assert whole <= artifacts.keys()
    for artifact in artifacts.values():
        with urllib.request.urlopen(artifact.url) as answer:
            body = answer.read()
        assert (len(body), hashlib.sha256(body).hexdigest()) == (artifact.size, artifact.sha256), artifact.path

    steps: list[int] = []
    for path in sorted(path for path in artifacts if path.startswith("rollouts/")):
        body = service.store.get(artifacts[path].key)
        steps += pq.read_table(io.BytesIO(body or b""))["step"].to_pylist()
    assert steps == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5], "every step once, and the files of single steps are gone"
    listed = {item.key for item in service.store.list(object_keys.run(job.id, 1))}
    ours = {item for item in listed if "/commits/" in item or item.endswith("/base.json")}
    assert listed - ours == {artifact.key for artifact in artifacts.values()}, (
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

    service.job_store.client.delete(f"{service.job_store.prefix}:events:{job.id}")
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
    left = {artifact.path: artifact.key for artifact in service.artifacts(job.id, OWNER)}
    assert "stderr.log" in left
    assert f"It failed ({failure})" in (service.store.get(left["report.html"]) or b"").decode()
    outcome = service.write_once.outcome(job.id)
    assert outcome is not None
    assert outcome.error == done.error


def test_a_child_that_is_killed_every_time_fails_after_three_runs(
    service: JobService, start_worker: Start, submit: Submit
) -> None:
    start_worker()
    job = submit(fail="kill", fail_step="3", steps=10, checkpoint_every=10)
    done = wait_for(service, job.id)
    assert done.status is JobStatus.FAILED
    assert done.error is not None
    assert (done.error["class"], done.epoch, done.attempts) == ("infra", 3, 3 - 1)
    assert done.error["code"] == "attempts_used_up"
    left = {entry.path for entry in service.artifacts(job.id, OWNER)}
    assert left >= {"stderr-e1.log", "stderr-e2.log", "stderr.log"}, "what each run said"
    assert [metric["step"] for metric in service.metrics(job.id, OWNER)] == [1, 2, 3], "what the last run did is kept"
    assert any(path.startswith("rollouts/") for path in left)
    page = artifact(service, done, "report.html").decode()
    assert "lost 3 times in a row" in page
    assert page.count("run_lost") >= 1


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
    assert time.monotonic() - began < patience(5)
    assert not training_processes(tmp_path), "the training process is gone"
    # The end is not held up for what storage takes longer for.
    wait_until(lambda: "metrics.jsonl" in [artifact.path for artifact in service.artifacts(job.id, OWNER)])


def test_a_cancel_while_the_job_loads_or_is_prepared(service: JobService, start_worker: Start, submit: Submit) -> None:
    start_worker()
    job = submit(load_seconds="60")
    wait_for(service, job.id, JobStatus.RUNNING)
    began = time.monotonic()
    service.cancel(job.id, OWNER)
    assert wait_for(service, job.id).status is JobStatus.CANCELLED
    assert time.monotonic() - began < patience(5)


def test_a_cancel_while_storage_hangs_ends_what_runs_and_shows_no_end_before_the_bucket_has_it(
    service: JobService, start_worker: Start, submit: Submit, seaweedfs: SeaweedFSServer, tmp_path: Path
) -> None:
    start_worker()
    job = submit(steps=30, step_seconds="0.1")
    wait_for_step(service, job, 25)
    os.kill(seaweedfs.pid, signal.SIGSTOP)
    try:
        wait_until(lambda: service.get(job.id, OWNER).phase == "uploading")
        # The order is written down before it is carried out; here only the latter is looked at.
        service.job_store.change(job.id, to=JobStatus.CANCELLING)
        # The worker lets go of the job once it has tried for some seconds, and shows no end.
        wait_until(lambda: service.job_store.expired_leases() == [job.id])
        assert service.get(job.id, OWNER).status is JobStatus.CANCELLING
    finally:
        os.kill(seaweedfs.pid, signal.SIGCONT)
    assert wait_for(service, job.id, seconds=60).status is JobStatus.CANCELLED
    outcome = service.write_once.outcome(job.id)
    assert outcome is not None
    assert outcome.status == "cancelled"


def test_a_worker_that_is_stopped_hands_its_job_to_another(
    service: JobService, start_worker: Start, submit: Submit
) -> None:
    first = start_worker()
    job = submit(steps=40, checkpoint_every=1000, step_seconds="0.1")
    wait_for_step(service, job, 5)
    assert first.stop() == 0
    record = service.get(job.id, OWNER)
    assert (record.status, record.attempts) == (JobStatus.QUEUED, 0), "being asked to stop is no failure"
    assert record.checkpoint_step == record.step >= 5, "what it saved on the way out is in the bucket"
    start_worker()
    done = wait_for(service, job.id)
    assert (done.status, done.epoch, done.attempts) == (JobStatus.SUCCEEDED, 2, 0)
    assert resumed_at(service, job) == [record.step]
    assert_whole(service, done)


def test_a_child_that_does_not_save_in_time_is_killed_and_costs_no_attempt(
    service: JobService, start_worker: Start, submit: Submit
) -> None:
    first = start_worker(GRPO_STOP_GRACE_SECONDS="1")
    job = submit(steps=40, step_seconds="0.05", fail="hang", fail_step="5", fail_epochs="1")
    wait_for_step(service, job, 5)
    began = time.monotonic()
    assert first.stop() == 0
    assert time.monotonic() - began < patience(8)
    record = service.get(job.id, OWNER)
    assert (record.status, record.attempts) == (JobStatus.QUEUED, 0)
    start_worker()
    assert_whole(service, wait_for(service, job.id))


def test_a_killed_worker_loses_its_job_to_another_which_goes_on(
    service: JobService, start_worker: Start, submit: Submit, tmp_path: Path
) -> None:
    first = start_worker()
    job = submit(steps=44, checkpoint_every=4, step_seconds="0.1")
    wait_until(lambda: service.get(job.id, OWNER).checkpoint_step >= 8)
    os.kill(first.process.pid, signal.SIGKILL)
    first.process.wait()
    wait_until(lambda: not training_processes(tmp_path))  # the training process dies with its worker
    start_worker()
    done = wait_for(service, job.id)
    assert (done.status, done.epoch, done.attempts) == (JobStatus.SUCCEEDED, 2, 0), "it had made a new checkpoint"
    (step,) = resumed_at(service, job)
    assert step >= 8
    assert_whole(service, done)
    straight = wait_for(service, submit(steps=44, checkpoint_every=4).id)
    assert adapter(service, done) == adapter(service, straight)


def test_a_pause_frees_the_worker_and_a_resumed_job_goes_on(
    service: JobService, start_worker: Start, submit: Submit, tmp_path: Path
) -> None:
    start_worker()
    job = submit(steps=40, checkpoint_every=1000, step_seconds="0.1")
    wait_for_step(service, job, 3)
    service.pause(job.id, OWNER)
    paused = wait_for(service, job.id, JobStatus.PAUSED)
    assert (paused.worker, paused.phase, paused.attempts) == (None, None, 0)
    assert paused.checkpoint_step == paused.step >= 3
    wait_until(lambda: not training_processes(tmp_path))
    other = submit(steps=2)
    assert wait_for(service, other.id).status is JobStatus.SUCCEEDED, "the worker is free"
    assert service.get(job.id, OWNER).status is JobStatus.PAUSED
    service.resume(job.id, OWNER)
    done = wait_for(service, job.id)
    assert (done.status, done.epoch, done.attempts) == (JobStatus.SUCCEEDED, 2, 0)
    assert resumed_at(service, job) == [paused.step]
    assert_whole(service, done)


def test_a_drained_worker_hands_its_job_to_another_and_takes_none(
    service: JobService, start_worker: Start, submit: Submit
) -> None:
    start_worker()
    job = submit(steps=60, checkpoint_every=1000, step_seconds="0.1")
    wait_for_step(service, job, 3)
    start_worker()
    wait_until(lambda: len(service.list_workers(limit=10).items) == 2)
    assert service.get_worker("w0").state is WorkerState.BUSY
    service.drain_worker("w0", "checkpoint", by="chief")
    wait_until(lambda: service.get_worker("w0").empty)
    wait_until(lambda: service.get(job.id, OWNER).worker == "w1")
    more = [submit(steps=2) for _ in range(3)]
    done = wait_for(service, job.id)
    assert (done.status, done.epoch, done.attempts) == (JobStatus.SUCCEEDED, 2, 0)
    assert resumed_at(service, job)[0] >= 3, "it saved before it left"
    for each in more:
        assert wait_for(service, each.id).status is JobStatus.SUCCEEDED
    (by_first,) = [e for e in service.events(job.id, OWNER) if e["data"].get("code") == "worker_stopped"]
    assert by_first["epoch"] == 1
    assert service.get_worker("w0").state is WorkerState.DRAINED
    service.drain_worker("w1", "finish", by="chief")
    wait_until(lambda: service.get_worker("w1").empty)
    last = submit(steps=2)
    service.drain_worker("w0", None, by="chief")
    assert wait_for(service, last.id).status is JobStatus.SUCCEEDED, "the first takes jobs again"


def test_a_drain_lets_the_job_at_hand_finish(service: JobService, start_worker: Start, submit: Submit) -> None:
    worker = start_worker()
    job = submit(steps=30, step_seconds="0.1")
    wait_for_step(service, job, 2)
    service.drain_worker("w0", "finish", by="chief")
    waiting = submit(steps=2)
    done = wait_for(service, job.id)
    assert (done.status, done.epoch) == (JobStatus.SUCCEEDED, 1)
    wait_until(lambda: service.get_worker("w0").empty)
    assert service.get(waiting.id, OWNER).status is JobStatus.QUEUED
    assert worker.stop() == 0, "TERM ends a drained worker"
    assert service.get_worker("w0").state is WorkerState.STOPPED
    start_worker(GRPO_WORKER_NAME="w0")
    wait_until(lambda: service.get_worker("w0").state is WorkerState.DRAINED)
    service.drain_worker("w0", None, by="chief")
    assert wait_for(service, waiting.id).status is JobStatus.SUCCEEDED


def test_a_pause_before_training_stops_at_once(service: JobService, start_worker: Start, submit: Submit) -> None:
    start_worker()
    job = submit(steps=3, load_seconds="5")
    wait_for(service, job.id, JobStatus.RUNNING)
    service.pause(job.id, OWNER)
    paused = wait_for(service, job.id, JobStatus.PAUSED, seconds=15)
    assert (paused.checkpoint_step, paused.attempts) == (0, 0)
    service.cancel(job.id, OWNER)
    assert wait_for(service, job.id).status is JobStatus.CANCELLED


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    service: JobService, start_worker: Start, submit: Submit
) -> None:
    first = start_worker()
    job = submit(steps=44, checkpoint_every=4, step_seconds="0.1")
    wait_until(lambda: len(commits.list_commits(service.store, job.id, 1)) >= 2)
    os.kill(first.process.pid, signal.SIGKILL)
    newest, before = commits.commits_up_to(service.store, job.id, 1)[:2]
    commit = commits.read_commit(service.store, job.id, newest)
    assert commit is not None
    service.store.put(f"{commit.checkpoint}adapter_model.safetensors", b"half of it")
    start_worker()
    done = wait_for(service, job.id)
    assert done.status is JobStatus.SUCCEEDED
    assert resumed_at(service, job) == [before.step]
    (told,) = warnings(service, job, "checkpoint_skipped")
    assert (told["step"], told["epoch"]) == (newest.step, 1)
    assert_whole(service, done)


def test_a_checkpoint_the_child_cannot_read_is_passed_over_too(
    service: JobService, start_worker: Start, submit: Submit
) -> None:
    first = start_worker()
    job = submit(steps=44, checkpoint_every=4, step_seconds="0.1")
    wait_until(lambda: len(commits.list_commits(service.store, job.id, 1)) >= 2)
    os.kill(first.process.pid, signal.SIGKILL)
    newest, before = commits.commits_up_to(service.store, job.id, 1)[:2]
    # The bytes are as recorded, so the worker finds nothing wrong; only who reads them can tell.
    commit = commits.read_commit(service.store, job.id, newest)
    assert commit is not None
    state = f"{commit.checkpoint}state.json"
    service.store.put(state, b"{}")
    digest = hashlib.sha256(b"{}").hexdigest()
    key = object_keys.commit(job.id, newest.epoch, newest.step)
    body = json.loads(service.store.get(key) or b"")
    for entry in body["objects"]:
        if entry["key"] == state:
            entry["sha256"] = digest
    service.store.put_json(key, body)
    start_worker()
    done = wait_for(service, job.id)
    assert (done.status, done.epoch, done.attempts) == (JobStatus.SUCCEEDED, 3, 0)
    assert resumed_at(service, job) == [before.step]
    assert warnings(service, job, "checkpoint_skipped")[0]["step"] == newest.step
    assert_whole(service, done)


@pytest.mark.parametrize("how", ["hang", "stop"])
def test_a_child_that_gets_nowhere_is_killed_and_the_job_goes_on(
    service: JobService, start_worker: Start, submit: Submit, tmp_path: Path, how: str
) -> None:
    start_worker(GRPO_STALL_FACTOR="5", GRPO_STALL_FLOOR_SECONDS="2")
    job = submit(steps=20, checkpoint_every=4, step_seconds="0.05", fail=how, fail_step="10", fail_epochs="1")
    done = wait_for(service, job.id)
    assert (done.status, done.epoch, done.attempts) == (JobStatus.SUCCEEDED, 2, 0)
    (told,) = warnings(service, job, "run_lost")
    assert (told["class"], told["cause"]) == ("stalled", "no_progress")
    assert resumed_at(service, job) == [8]
    assert not training_processes(tmp_path)
    log = artifact(service, done, "stderr-e1.log")
    assert how == "stop" or b"most recent call first" in log, "where it hung"
    assert_whole(service, done)


def test_out_of_memory_splits_the_step_further_until_it_fits(
    service: JobService, start_worker: Start, submit: Submit
) -> None:
    start_worker()
    job = submit(steps=4, oom_until="3")
    done = wait_for(service, job.id)
    assert (done.status, done.epoch, done.attempts, done.accumulation) == (JobStatus.SUCCEEDED, 3, 0, 3)
    told = [(data["before"], data["after"]) for data in warnings(service, job, "micro_batch_lowered")]
    assert told == [(1, 2), (2, 3)]
    assert json.loads(artifact(service, done, "report.json"))["gradient_accumulation"] == 3
    assert [event["type"] for event in service.events(job.id, OWNER)].count("error") == 0
    spec = service.get(job.id, OWNER).spec
    assert spec["sampling"]["gradient_accumulation"] == 1, "what was asked for stays"


def test_a_zombie_lists_nothing_and_serves_on(
    service: JobService, start_worker: Start, submit: Submit, tmp_path: Path
) -> None:
    first = start_worker()
    job = submit(steps=60, checkpoint_every=4, step_seconds="0.1")
    wait_until(lambda: service.get(job.id, OWNER).checkpoint_step >= 4)
    os.kill(first.process.pid, signal.SIGSTOP)
    second = start_worker()
    wait_until(lambda: service.get(job.id, OWNER).epoch == 2)
    os.kill(first.process.pid, signal.SIGCONT)
    done = wait_for(service, job.id)
    assert (done.status, done.epoch) == (JobStatus.SUCCEEDED, 2)
    assert_whole(service, done)
    assert second.stop() == 0
    last = submit(steps=2)
    assert wait_for(service, last.id).worker in (None, "w0")
    wait_until(lambda: not list(tmp_path.glob("work*/job-*")))


def test_jobs_wait_their_turn_and_repeated_wake_ups_do_nothing(
    service: JobService, start_worker: Start, submit: Submit
) -> None:
    jobs = [submit(steps=2) for _ in range(3)]
    for job in jobs:
        for _ in range(3):
            service._wakeups.add(job.id, job.queue)
    start_worker()
    start_worker()
    assert {wait_for(service, job.id).status for job in jobs} == {JobStatus.SUCCEEDED}
    assert [service.write_once.latest_epoch(job.id) for job in jobs] == [1, 1, 1]


@pytest.mark.core
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


def wait_until(is_so: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + patience(seconds)
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def wait_for_step(service: JobService, job: JobRecord, step: int) -> None:
    wait_until(lambda: service.get(job.id, OWNER).step >= step)


def warnings(service: JobService, job: JobRecord, code: str) -> list[dict[str, Any]]:
    """The data of the warnings with this code."""
    events = service.events(job.id, OWNER, types={"warning"})
    return [event["data"] for event in events if event["data"]["code"] == code]


def resumed_at(service: JobService, job: JobRecord) -> list[int]:
    """The steps that the job's runs went on from."""
    events = service.events(job.id, OWNER, types={"log"})
    return [event["data"]["step"] for event in events if event["data"].get("code") == "resumed"]


def artifact(service: JobService, job: JobRecord, path: str) -> bytes:
    (key,) = [artifact.key for artifact in service.artifacts(job.id, OWNER) if artifact.path == path]
    return service.store.get(key) or b""


def adapter(service: JobService, job: JobRecord) -> bytes:
    return artifact(service, job, "adapter/adapter_model.safetensors")


def assert_whole(service: JobService, job: JobRecord) -> None:
    """The job is done, and what its manifest lists is there, as recorded, with every step once."""
    assert job.status is JobStatus.SUCCEEDED, job.error
    manifest = service.write_once.manifest(job.manifest or "")
    assert manifest is not None
    rollouts: list[tuple[int, int]] = []
    for entry in manifest.objects:
        body = service.store.get(entry.key)
        assert body is not None, entry.path
        assert (len(body), hashlib.sha256(body).hexdigest()) == (entry.size, entry.sha256), entry.path
        if entry.path.startswith("rollouts/"):
            table = pq.read_table(io.BytesIO(body), columns=["step", "sample"])
            rollouts += zip(table["step"].to_pylist(), table["sample"].to_pylist(), strict=True)
    assert sorted(rollouts) == [(step, sample) for step in range(1, job.total_steps + 1) for sample in (0, 1)]
    metrics = [json.loads(line)["step"] for line in artifact(service, job, "metrics.jsonl").splitlines()]
    assert metrics == list(range(1, job.total_steps + 1))
    events = service.events(job.id, OWNER, limit=100_000)
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    service.job_store.client.delete(f"{service.job_store.prefix}:events:{job.id}")
    stored = service.events(job.id, OWNER, limit=100_000)
    assert [(e["seq"], e["type"], e["data"]) for e in stored] == [(e["seq"], e["type"], e["data"]) for e in events]
