"""A process is killed right after one object was written, and before it could do what comes next.

The proxy sees the request, waits for storage's answer, kills, and lets no answer through: the worst moment each time.
"""

from __future__ import annotations

import contextlib
import json
import signal
import threading
import time
import uuid

import pytest

from grpo_client import ClientError
from jobs.store.job import JobStatus
from tests.acceptance.faults.conftest import Tell, core
from tests.acceptance.faults.oracle import Oracle
from tests.acceptance.faults.proxy import Trap
from tests.acceptance.faults.stage import Follower, Stage, Worker, job_spec
from tests.acceptance.faults.test_processes import resumed
from tests.clock import patience

GROUP = "Killed between two writes"

PUTS = {
    "epoch ticket": (rb"PUT /[^ ]*/epochs/1\.json", 1),
    "base of the run": (rb"PUT /[^ ]*/e1/base\.json", 1),
    "first file of a checkpoint": (rb"PUT /[^ ]*/checkpoints/step-000010/adapter_model", 5),
    "manifest of a checkpoint": (rb"PUT /[^ ]*/checkpoints/step-000010/manifest\.json", 5),
    "rollouts of a commit": (rb"PUT /[^ ]*/rollouts/part-000006-000010", 5),
    "commit": (rb"PUT /[^ ]*/e1/commits/step-000010\.json", 10),
    "adapter": (rb"PUT /[^ ]*/adapter/adapter_model", 10),
    "manifest of the job": (rb"PUT /[^ ]*/manifest-e1\.json", 10),
    "outcome": (rb"PUT /[^ ]*/outcome\.json", 15),
}
"""What is put, and the committed step that the job must have gone on from at least."""


def kill_at(workers: list[Worker], pattern: bytes) -> list[Trap]:
    return [worker.storage.trap(pattern, lambda w=worker: w.signal(signal.SIGKILL)) for worker in workers]


@pytest.mark.parametrize("what", [pytest.param(what, marks=[core] if what == "commit" else []) for what in PUTS])
def test_a_worker_is_killed_right_after(stage: Stage, oracle: Oracle, tell: Tell, what: str) -> None:
    pattern, least = PUTS[what]
    traps = kill_at(stage.workers, pattern)
    # A second from one checkpoint to the next: faster, and the first may be pruned before the uploader's next round.
    job = stage.submit(steps=15, step_seconds="0.2")
    follower = Follower(stage, job)
    stage.until(lambda: any(trap.sprung.is_set() for trap in traps), 30, "nobody wrote it")
    began = time.monotonic()
    for worker in stage.workers:
        worker.storage._traps.clear()
    stage.until_ended(job)
    seconds = time.monotonic() - began
    ended_before = what == "outcome"
    done = oracle.check(job, epochs=1 if ended_before else 2, follower=follower)
    if ended_before:
        tell(f"worker killed right after: {what}", "the sweeper brought the record to it; one run", seconds)
        return
    steps = resumed(stage, job)
    if least > 1:
        assert steps
        assert least <= steps[-1] < 15 or what in ("adapter", "manifest of the job"), steps
    from_where = f"from step {steps[-1]}" if steps else "from the start"
    tell(f"worker killed right after: {what}", f"run 2 went on {from_where} of {done.total_steps}", seconds)


def test_a_zombies_outcome_is_under_way(stage: Stage, oracle: Oracle, tell: Tell) -> None:
    """The request is on the wire when the lease runs out; it arrives after another run has ended the job."""
    traps = {
        worker.name: worker.storage.trap(
            rb"PUT /[^ ]*/outcome\.json", lambda w=worker: w.signal(signal.SIGSTOP), when="before"
        )
        for worker in stage.workers
    }
    job = stage.submit(steps=8, step_seconds="0.05")
    stage.until(lambda: any(trap.sprung.is_set() for trap in traps.values()), 30)
    first = next(worker for worker in stage.workers if traps[worker.name].sprung.is_set())
    other = stage.other(first)
    other.storage._traps.clear()
    ended = stage.until_ended(job)
    outcome = stage.store.get(f"jobs/{job}/outcome.json")
    first.storage.release(traps[first.name])
    first.signal(signal.SIGCONT)
    last = stage.submit(steps=2)
    with other.frozen():
        stage.until_ended(last)
    assert stage.store.get(f"jobs/{job}/outcome.json") == outcome
    assert stage.record(job) == ended
    oracle.check(job, epochs=2)
    tell(
        "worker frozen while its outcome is on the wire; it arrives after another run has ended the job",
        "storage refused it (put once); outcome, manifest and record stayed the other's",
        None,
    )


def test_a_ticket_is_taken_in_vain(stage: Stage, oracle: Oracle, tell: Tell) -> None:
    """Two workers hear of a job; the slower one looks at it only after the faster has claimed, and takes no epoch."""
    looks = rb"GET /[^ ]*/outcome\.json"
    traps = {worker.name: worker.storage.trap(looks, lambda: None, when="before") for worker in stage.workers}
    job = stage.submit(steps=30)
    stage.until(lambda: all(trap.sprung.is_set() for trap in traps.values()), 20, "only one worker heard of it")
    fast, slow = stage.workers
    fast.storage.release(traps[fast.name])
    stage.until_step(job, 2)
    slow.storage.release(traps[slow.name])
    oracle.check(job, epochs=1, attempts=0)
    assert stage.write_once.latest_epoch(job) == 1
    tell("two workers hear of one job, and the slower looks at it after the faster has claimed", "one run", None)


@core
def test_the_api_is_killed_between_job_and_record(stage: Stage, oracle: Oracle, tell: Tell) -> None:
    trap = stage.api.storage.trap(rb"PUT /[^ ]*/job\.json", lambda: stage.api.signal(signal.SIGKILL))
    spec = job_spec(3, 5)
    began = time.monotonic()

    key = str(uuid.uuid4())
    answers: list[str] = []

    def ask() -> None:
        """Again after the client has given up: the API may take longer to start than it asks."""
        deadline = time.monotonic() + patience(30)
        while not answers and time.monotonic() < deadline:
            with contextlib.suppress(ClientError):
                answers.append(stage.client.submit(spec, idempotency_key=key)["id"])

    asking = threading.Thread(target=ask)
    asking.start()
    stage.until(trap.sprung.is_set, 10)
    stage.api.kill()  # waits until it is dead
    stage.api.start()
    asking.join(patience(60))
    assert answers, "the client gave up"
    seconds = time.monotonic() - began
    (job,) = answers
    oracle.check(job, epochs=1)
    assert stage.client.submit(spec, idempotency_key=key)["id"] == job
    twins = [item.key for item in stage.store.list("jobs/") if item.key.endswith("job.json")]
    names = [json.loads(stage.store.get(key) or b"")["id"] for key in twins]
    assert names.count(job) == 1
    assert all(stage.job_store.get(name) is not None for name in names), "a job.json without a record"
    tell(
        "API killed between `job.json` and the record; its client asks again with the same Idempotency-Key",
        "one job, under the id of the first attempt",
        seconds,
    )


def test_the_api_is_killed_between_job_and_record_and_nobody_asks_again(
    stage: Stage, oracle: Oracle, tell: Tell
) -> None:
    trap = stage.api.storage.trap(rb"PUT /[^ ]*/job\.json", lambda: stage.api.signal(signal.SIGKILL))
    with pytest.raises(Exception, match="cannot be reached"):
        stage.client._connection.json("POST", "/jobs", json=job_spec(3, 5))
    assert trap.sprung.is_set()
    stage.api.kill()
    stage.api.start()
    client, notes = stage.job_store.client, f"{stage.job_store.prefix}:submitting"
    (job,) = client.zrange(notes, 0, -1)
    assert stage.job_store.get(job) is None
    # A sweeper waits five minutes for the submission's own process; the note of when it began is made so much older.
    began = time.monotonic()
    client.zincrby(notes, -300_000, job)
    stage.until(lambda: stage.job_store.get(job), 15)
    seconds = time.monotonic() - began
    oracle.check(job, epochs=1)
    tell(
        "the same, and the client never asks again",
        "a sweeper made the record and the job ran (it waits 5 minutes first: here the note of it was made older)",
        seconds,
    )


@pytest.mark.parametrize("order", ["cancel", "pause"])
def test_the_api_is_killed_between_order_and_record(stage: Stage, oracle: Oracle, tell: Tell, order: str) -> None:
    job = stage.submit(steps=400)
    stage.until_step(job, 3)
    trap = stage.api.storage.trap(rb"PUT /[^ ]*/control/000001\.json", lambda: stage.api.signal(signal.SIGKILL))
    began = time.monotonic()
    with pytest.raises(Exception, match="cannot be reached"):
        stage.client._connection.json("POST", f"/jobs/{job}/{order}")
    assert trap.sprung.is_set()
    stage.until_status(job, *((JobStatus.CANCELLED,) if order == "cancel" else (JobStatus.PAUSED,)), seconds=40)
    seconds = time.monotonic() - began
    stage.api.start()
    if order == "pause":
        stage.client.cancel(job)
    oracle.check(job, "cancelled")
    tell(
        f"API killed between the order to {order} and the record",
        "carried out by a sweeper; the order was in the bucket",
        seconds,
    )
