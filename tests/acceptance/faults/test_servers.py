"""Valkey and object storage are killed, frozen, emptied and filled up, for everyone at once."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time

import pytest

from grpo_client import ProblemError
from jobs.store.job import JobStatus
from tests.acceptance.faults.conftest import Tell, core, extend
from tests.acceptance.faults.oracle import Oracle
from tests.acceptance.faults.stage import ROOT, Follower, Stage, job_spec
from tests.clock import patience

GROUP = "Servers"


def rebuild(stage: Stage) -> dict[str, int]:
    """`grpo admin rebuild`, as an operator runs it."""
    command = [sys.executable, "-m", "api", "admin", "rebuild", "--json"]
    done = subprocess.run(command, cwd=ROOT, env=stage.admin_environment, capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(done.stdout)


@core
@pytest.mark.parametrize(("how", "seconds"), [("killed", 4.0), extend("frozen", 6.0)])
def test_valkey_is_away(stage: Stage, oracle: Oracle, tell: Tell, how: str, seconds: float) -> None:
    job = stage.submit(steps=80)
    waiting = [stage.submit(steps=2) for _ in range(2)]
    follower = Follower(stage, job)
    stage.until_step(job, 8)
    with stage.valkey.down() if how == "killed" else stage.valkey.frozen():
        time.sleep(seconds)
    began = time.monotonic()
    step = stage.record(job).step
    stage.until_step(job, step + 1)
    recovered = time.monotonic() - began
    oracle.check(job, epochs=1, attempts=0, follower=follower)
    for one in waiting:
        # A worker that was about to claim it has taken an epoch in the bucket, and the next claim takes another.
        oracle.check(one, epochs=range(1, 3), attempts=0)
    data = ", started again with its append-only file" if how == "killed" else " (SIGSTOP)"
    tell(
        f"Valkey {how} for {seconds:.0f} s ({seconds / 3:.1f} leases){data}",
        "training continued: one run; events came later, none missing; what was queued ran",
        recovered,
    )


def test_valkey_dies_again_and_again(stage: Stage, oracle: Oracle, tell: Tell) -> None:
    jobs = [stage.submit(steps=40), stage.submit(steps=40)]
    for job in jobs:
        stage.until_step(job, 3)
    for _ in range(6):
        with stage.valkey.down():
            time.sleep(0.3)
        time.sleep(0.5)
    for job in jobs:
        oracle.check(job, epochs=1, attempts=0)
    tell("Valkey killed six times in five seconds", "two running jobs: one run each", None)


def test_valkey_is_lost_whole(stage: Stage, oracle: Oracle, tell: Tell) -> None:
    ended = stage.submit(steps=3)
    stage.until_ended(ended)
    paused = stage.submit(steps=30, checkpoint_every=1000)
    stage.until_step(paused, 4)
    stage.client.pause(paused)
    stage.until_status(paused, JobStatus.PAUSED)
    # Long enough that the first still runs when a busy machine has started the second.
    running = [stage.submit(steps=200), stage.submit(steps=200)]
    for job in running:
        stage.until_step(job, 12)
    queued = stage.submit(steps=3)
    before = stage.client.get(ended)
    began = time.monotonic()
    stage.lose_valkey()
    stage.until(lambda: not stage.job_store.missing([ended, paused, *running, queued]), 60, "nobody put them back")
    step = max(stage.record(job).step for job in running)
    for job in running:
        stage.until_step(job, step + 1)
    seconds = time.monotonic() - began
    after = stage.client.get(ended)
    times = ("updated_at", "started_at", "finished_at")  # by the clocks of the workers now: within the second
    assert {name: after[name] for name in after.keys() - times} == {name: before[name] for name in after.keys() - times}
    assert stage.record(paused).status is JobStatus.PAUSED
    for job in running:
        oracle.check(job, epochs=1, attempts=0, gaps=True)
    oracle.check(queued, epochs=1, gaps=True)
    stage.client.resume(paused)
    oracle.check(paused, epochs=2, attempts=0, gaps=True)
    oracle.check(ended, epochs=1)
    tell(
        "Valkey lost with all its data",
        "two running jobs continued in the same run, a queued one ran, a paused one stayed paused and was resumed, an "
        "ended one stayed ended; the API key opened as before. Event numbers have a gap",
        seconds,
    )


def test_valkey_is_lost_with_a_worker(stage: Stage, oracle: Oracle, tell: Tell) -> None:
    job = stage.submit(steps=40)
    stage.until_committed(job, 10)
    holder = stage.holder(job)
    began = time.monotonic()
    holder.kill()
    stage.lose_valkey()
    rebuild(stage)
    stage.until_run(job, 2)
    seconds = time.monotonic() - began
    oracle.check(job, epochs=2, attempts=0, gaps=True)
    tell(
        "Valkey lost with all its data, and the job's worker killed at the same time",
        "restored as held by the lost run; the other worker resumed from its last checkpoint",
        seconds,
    )


def test_a_job_ends_while_valkey_is_away(stage: Stage, oracle: Oracle, tell: Tell) -> None:
    job = stage.submit(steps=20)
    stage.until_step(job, 5)
    with stage.valkey.down():
        time.sleep(6)
    began = time.monotonic()
    stage.until_ended(job)
    seconds = time.monotonic() - began
    oracle.check(job, epochs=1, attempts=0)
    tell("training ends while Valkey is away (6 s)", "`succeeded` once it was back; one run", seconds)


@pytest.mark.parametrize("how", ["down", "frozen"])
def test_submit_while_valkey_is_away(stage: Stage, oracle: Oracle, tell: Tell, how: str) -> None:
    spec = job_spec(3, 5)
    with stage.valkey.down() if how == "down" else stage.valkey.frozen():
        began = time.monotonic()
        answers: list[int] = []
        try:
            stage.client._connection.json("POST", "/jobs", json=spec)
        except ProblemError as problem:
            answers.append(problem.status)
        took = time.monotonic() - began
        assert answers == [503]
        assert took < patience(10)
    job = stage.client.submit(spec)["id"]
    oracle.check(job, epochs=1)
    tell(
        f"submission while Valkey is {how}",
        f"503 after {took:.1f} s, naming the server; nothing accepted, nothing lost; the next one ran",
        None,
    )


def test_valkey_is_full(stage: Stage, oracle: Oracle, tell: Tell) -> None:
    job = stage.submit(steps=50)
    stage.until_step(job, 5)
    stage.job_store.client.config_set("maxmemory", 1)
    accepted: list[str] = []
    try:
        with contextlib.suppress(ProblemError):
            accepted.append(stage.client._connection.json("POST", "/jobs", json=job_spec(3, 5))["id"])
        time.sleep(4)
    finally:
        stage.job_store.client.config_set("maxmemory", 0)
    began = time.monotonic()
    stage.until_step(job, stage.record(job).step + 1)
    seconds = time.monotonic() - began
    for one in (job, *accepted):
        oracle.check(one, epochs=1, attempts=0)
    said = "was accepted and ran afterwards" if accepted else "was answered with 503"
    tell(
        "Valkey's memory full (`noeviction`) for 4 s", f"a new job {said}; the running one continued: one run", seconds
    )


@core
@pytest.mark.parametrize(("how", "seconds"), [extend("killed", 6.0), ("frozen", 8.0)])
def test_storage_is_away(stage: Stage, oracle: Oracle, tell: Tell, how: str, seconds: float) -> None:
    job = stage.submit(steps=80)
    follower = Follower(stage, job)
    stage.until_committed(job, 5)
    with stage.seaweedfs.down() if how == "killed" else stage.seaweedfs.frozen():
        time.sleep(seconds)
    committed = stage.record(job).checkpoint_step
    began = time.monotonic()
    stage.until_committed(job, committed + 5)
    recovered = time.monotonic() - began
    oracle.check(job, epochs=1, attempts=0, follower=follower)
    tell(
        f"object storage {how} for {seconds:.0f} s", "training continued: one run; checkpoints went up later", recovered
    )


def test_storage_is_away_at_the_end(stage: Stage, oracle: Oracle, tell: Tell) -> None:
    job = stage.submit(steps=15)
    stage.until_step(job, 12)
    with stage.seaweedfs.frozen():
        stage.until(lambda: stage.record(job).phase == "uploading", 20)
        time.sleep(5)
        assert stage.record(job).status is JobStatus.RUNNING, "the lease is kept meanwhile"
    began = time.monotonic()
    stage.until_ended(job)
    seconds = time.monotonic() - began
    oracle.check(job, epochs=1, attempts=0)
    tell("object storage frozen when a job uploads its result (5 s)", "uploaded afterwards: one run", seconds)


def test_storage_and_valkey_are_away_together(stage: Stage, oracle: Oracle, tell: Tell) -> None:
    job = stage.submit(steps=70)
    stage.until_committed(job, 5)
    with stage.seaweedfs.down(), stage.valkey.down():
        time.sleep(5)
    began = time.monotonic()
    committed = stage.record(job).checkpoint_step
    stage.until_committed(job, committed + 5)
    seconds = time.monotonic() - began
    oracle.check(job, epochs=1, attempts=0)
    tell("both killed together for 5 s", "training continued: one run", seconds)


def test_everything_is_killed(stage: Stage, oracle: Oracle, tell: Tell) -> None:
    jobs = [stage.submit(steps=40) for _ in range(3)]
    stage.until_committed(jobs[0], 10)
    began = time.monotonic()
    for process in (*stage.workers, stage.api, stage.valkey, stage.seaweedfs):
        process.kill()
    stage.start()
    stage.until_run(jobs[0], 2)
    seconds = time.monotonic() - began
    for job in jobs:
        oracle.check(job, epochs=range(1, 3), attempts=0)
    tell(
        "power cut: workers, API, Valkey and object storage killed at once, all started again",
        "two running jobs resumed from their last checkpoints, a queued one ran",
        seconds,
    )
