"""The lines of single processes fail: cut, closed, silent, slow, torn, garbled, or answered with 503."""

from __future__ import annotations

import threading
import time

import pytest

from grpo_client import ProblemError
from tests.acceptance.faults.conftest import Tell, core, extend
from tests.acceptance.faults.oracle import Oracle
from tests.acceptance.faults.proxy import Mode
from tests.acceptance.faults.stage import Follower, Stage, job_spec
from tests.clock import patience

GROUP = "Network"


@core
@pytest.mark.parametrize("mode", [extend("refused"), "hole"])
def test_a_worker_is_cut_off_from_valkey(stage: Stage, oracle: Oracle, tell: Tell, mode: Mode) -> None:
    """For longer than its lease, while the others are not: the sweeper takes the job from it."""
    job = stage.submit(steps=120)
    follower = Follower(stage, job)
    stage.until_committed(job, 5)
    lonely = stage.holder(job)
    began = time.monotonic()
    with lonely.valkey.fault(mode):
        stage.until_run(job, 2)
        seconds = time.monotonic() - began
        assert stage.holder(job) is not lonely
        assert lonely.training(job), "it cannot know, and trains on"
    stage.until(lambda: not lonely.training(job), 10, "the lonely worker goes on")
    steps = [row["step"] for row in stage.client.metrics(job)]
    assert steps == list(range(1, len(steps) + 1)), "no event told of what it trained alone; the metrics know"
    oracle.check(job, epochs=2, attempts=0, follower=follower, untold=True)
    how = "connections refused" if mode == "refused" else "every packet lost, connections stand"
    tell(
        f"one worker cut off from Valkey past its lease: {how}",
        "another worker resumed from the last commit; the first found itself fenced when the line was back",
        seconds,
    )


def test_a_worker_is_cut_off_briefly(stage: Stage, oracle: Oracle, tell: Tell) -> None:
    job = stage.submit(steps=30)
    stage.until_step(job, 5)
    with stage.holder(job).valkey.fault("hole"):
        time.sleep(1.2)
    oracle.check(job, epochs=1, attempts=0)
    tell("the same for less than half a lease", "nothing: one run", None)


@pytest.mark.parametrize("line", ["valkey", "storage"])
def test_connections_are_reset_all_the_time(stage: Stage, oracle: Oracle, tell: Tell, line: str) -> None:
    job = stage.submit(steps=40)
    stage.until_step(job, 2)
    over = threading.Event()

    def cut() -> None:
        while not over.wait(0.25):
            for worker in stage.workers:
                (worker.valkey if line == "valkey" else worker.storage).cut()

    thread = threading.Thread(target=cut)
    thread.start()
    try:
        stage.until_ended(job)
    finally:
        over.set()
        thread.join()
    oracle.check(job, epochs=range(1, 3), attempts=0)
    runs = stage.record(job).epoch
    name = "Valkey" if line == "valkey" else "object storage"
    tell(f"connections of both workers to {name} reset four times a second", f"{runs} run, nothing missing", None)


@pytest.mark.parametrize(("mode", "said"), [("busy", "503 Slow Down to everything"), ("torn", "answers break off")])
def test_storage_answers_badly(stage: Stage, oracle: Oracle, tell: Tell, mode: Mode, said: str) -> None:
    job = stage.submit(steps=60)
    stage.until_committed(job, 5)
    line = stage.holder(job).storage
    with line.fault(mode):
        time.sleep(5)
    committed = stage.record(job).checkpoint_step
    began = time.monotonic()
    stage.until_committed(job, committed + 5)
    seconds = time.monotonic() - began
    oracle.check(job, epochs=1, attempts=0)
    tell(f"object storage for 5 s: {said}", "one run; uploads were tried again", seconds)


def test_storage_is_slow(stage: Stage, oracle: Oracle, tell: Tell) -> None:
    job = stage.submit(steps=30)
    stage.until_step(job, 2)
    began = time.monotonic()
    with stage.holder(job).storage.fault("slow", delay=0.2):
        stage.until_ended(job)
    seconds = time.monotonic() - began
    oracle.check(job, epochs=1, attempts=0)
    tell("object storage slow: 0.2 s more for each piece of a request", f"one run, ended after {seconds:.1f} s", None)


def test_uploads_are_garbled(stage: Stage, oracle: Oracle, tell: Tell) -> None:
    """A bit turns on the way: the store must refuse it, for nobody reads back what was sent."""
    job = stage.submit(steps=40)
    stage.until_committed(job, 5)
    line = stage.holder(job).storage
    with line.fault("garbled"):
        time.sleep(4)
        committed = stage.record(job).checkpoint_step
    began = time.monotonic()
    stage.until_committed(job, committed + 5)
    seconds = time.monotonic() - began
    oracle.check(job, epochs=1, attempts=0)
    tell(
        "one bit turned in every upload for 4 s",
        "storage refused each by its SHA-256 and nothing was committed; sent again afterwards: one run",
        seconds,
    )


def test_the_api_is_cut_off_from_valkey(stage: Stage, oracle: Oracle, tell: Tell) -> None:
    job = stage.submit(steps=40)
    follower = Follower(stage, job)
    stage.until_step(job, 5)
    slowest = 0.0
    with stage.api.valkey.fault("hole"):
        for _ in range(2):
            began = time.monotonic()
            with pytest.raises(ProblemError) as refused:
                stage.client.get(job)
            assert refused.value.status == 503
            slowest = max(slowest, time.monotonic() - began)
    assert slowest < patience(9)
    began = time.monotonic()
    stage.until(lambda: stage.client.get(job))
    seconds = time.monotonic() - began
    oracle.check(job, epochs=1, attempts=0, follower=follower)
    tell(
        "API cut off from Valkey (packets lost)",
        f"503 after at most {slowest:.1f} s; the job and its event stream continued",
        seconds,
    )


def test_the_api_is_cut_off_from_storage(stage: Stage, oracle: Oracle, tell: Tell) -> None:
    with stage.api.storage.fault("busy"):
        began = time.monotonic()
        with pytest.raises(ProblemError) as refused:
            stage.client._connection.json("POST", "/jobs", json=job_spec(3, 5))
        seconds = time.monotonic() - began
    assert refused.value.status == 503
    job = stage.client.submit(job_spec(3, 5))["id"]
    oracle.check(job, epochs=1)
    tell("API: object storage answers 503 to a submission", f"503 after {seconds:.1f} s; nothing was accepted", None)


def test_an_answer_of_valkey_is_lost(stage: Stage, oracle: Oracle, tell: Tell) -> None:
    """The claim was made, and the worker never heard of it."""
    claims = [rb"EVALSHA.*job-\w{26}\r\n\$1\r\n1\r\n\$2\r\n" + worker.name.encode() for worker in stage.workers]
    traps = [worker.valkey.trap(claim, _nothing) for worker, claim in zip(stage.workers, claims, strict=True)]
    job = stage.submit(steps=5)
    stage.until(lambda: any(trap.sprung.is_set() for trap in traps), 20)
    oracle.check(job, epochs=1, attempts=0)
    tell("the answer to a worker's claim is lost on its way", "it asked again and had the job: one run", None)


def _nothing() -> None:
    """The proxy drops the answer and resets the connection."""
