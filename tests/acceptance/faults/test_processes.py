"""Training processes, workers and the API are killed, frozen and told to go, at every moment that matters."""

from __future__ import annotations

import contextlib
import os
import signal
import time

import pytest

from tests.acceptance.faults.conftest import Tell, core, extend
from tests.acceptance.faults.oracle import Oracle
from tests.acceptance.faults.stage import Follower, Stage

GROUP = "Processes"


def kill_training(stage: Stage, job_id: str, number: int = signal.SIGKILL) -> None:
    processes = stage.holder(job_id).training(job_id)
    assert processes, "it had ended"
    for pid in processes:
        os.kill(pid, number)


@core
@pytest.mark.parametrize("what", ["worker", extend("host"), extend("child"), extend("segfault")])
def test_killed_at_a_step(stage: Stage, oracle: Oracle, tell: Tell, what: str) -> None:
    job = stage.submit(steps=60)
    follower = Follower(stage, job)
    stage.until_committed(job, 10)
    stage.until_step(job, 13)
    worker = stage.holder(job)
    began = time.monotonic()
    if what in ("worker", "host"):
        children = worker.training(job)
        worker.kill()
        for pid in children if what == "host" else ():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        stage.until(lambda: not worker.training(job), 2, "the training process outlived its worker")
        worker.start(wait=False)  # as a supervisor would
    else:
        kill_training(stage, job, signal.SIGKILL if what == "child" else signal.SIGSEGV)
    stage.until_run(job, 2)
    seconds = time.monotonic() - began
    done = oracle.check(job, epochs=2, attempts=0, follower=follower)
    names = {
        "worker": "worker killed (SIGKILL) in the middle of training",
        "host": "host lost: worker and training process killed together",
        "child": "training process killed once (SIGKILL, stands in for the kernel's OOM killer)",
        "segfault": "training process dies of a segmentation fault once",
    }
    lost = f"resumed from step {resumed(stage, job)[-1]} of {done.total_steps}; no attempt counted"
    tell(names[what], f"training process dead at once; run 2 {lost}" if what == "worker" else f"run 2 {lost}", seconds)


@pytest.mark.parametrize(("how", "step"), [("kill", 0), ("hang", 4)])
def test_a_child_that_is_lost_every_time(stage: Stage, oracle: Oracle, tell: Tell, how: str, step: int) -> None:
    job = stage.submit(steps=10, checkpoint_every=5, fail=how, fail_step=str(step), step_seconds="0.3")
    began = time.monotonic()
    done = oracle.check(job, "failed", epochs=3)
    assert done.error is not None
    assert done.error["code"] == "attempts_used_up"
    assert done.error["class"] == ("infra" if how == "kill" else "stalled")
    after = stage.submit(steps=2)
    oracle.check(after, epochs=1)
    said = f"`failed` after 3 runs, class `{done.error['class']}`; the queue moved on"
    names = {
        "kill": "training process dies before its first checkpoint, in every run",
        "hang": "training process hangs at the same step in every run, deaf to TERM",
    }
    tell(names[how], said, time.monotonic() - began)


@pytest.mark.parametrize("how", ["hang", "stop"])
def test_a_child_that_hangs_once(stage: Stage, oracle: Oracle, tell: Tell, how: str) -> None:
    job = stage.submit(steps=20, fail=how, fail_step="12", fail_epochs="1", step_seconds="0.05")
    follower = Follower(stage, job)
    stage.until_step(job, 12)
    began = time.monotonic()
    stage.until_run(job, 2)
    seconds = time.monotonic() - began
    oracle.check(job, epochs=2, attempts=0, follower=follower)
    name = "hangs (sleeps, deaf to TERM)" if how == "hang" else "is stopped (SIGSTOP) and never woken"
    told = "stacks dumped to `stderr-e1.log`, group killed" if how == "hang" else "group killed"
    limit = "3 s instead of 10 min without a step"
    tell(
        f"training process {name}", f"{told} after {limit}; run 2 resumed from step {resumed(stage, job)[-1]}", seconds
    )


def test_a_short_freeze_of_the_child_is_no_fault(stage: Stage, oracle: Oracle, tell: Tell) -> None:
    job = stage.submit(steps=25)
    stage.until_step(job, 5)
    kill_training(stage, job, signal.SIGSTOP)
    time.sleep(1.5)
    kill_training(stage, job, signal.SIGCONT)
    oracle.check(job, epochs=1, attempts=0)
    tell("training process frozen for 1.5 s (SIGSTOP, SIGCONT)", "nothing: one run", None)


def test_out_of_memory(stage: Stage, oracle: Oracle, tell: Tell) -> None:
    job = stage.submit(steps=6, oom_until="3", step_seconds="0.02")
    began = time.monotonic()
    done = oracle.check(job, epochs=3, attempts=0)
    assert done.accumulation == 3
    tell(
        "training process out of GPU memory (exit 13) until a step is split into 3",
        "runs 1 and 2 handed back, run 3 split each step into 3 parts; same steps, no attempt counted",
        time.monotonic() - began,
    )
    hopeless = stage.submit(steps=6, oom_until="1000", step_seconds="0.02")
    done = oracle.check(hopeless, "failed")
    assert done.error is not None
    assert done.error["class"] == "oom"
    tell(
        "the same, and nothing is left to split",
        f"`failed` after {done.epoch} runs, class `oom`, with the settings to lower in its hint",
    )


def test_diverged(stage: Stage, oracle: Oracle, tell: Tell) -> None:
    job = stage.submit(steps=20, fail="15", fail_step="12", step_seconds="0.02")
    done = oracle.check(job, "failed", epochs=1)
    assert done.error is not None
    assert done.error["class"] == "diverged"
    kept = [checkpoint["step"] for checkpoint in stage.client.checkpoints(job)]
    assert max(kept) == 10
    tell("loss is NaN (exit 15)", "`failed`, class `diverged`, one run; the checkpoint of step 10 is kept", None)


@core
@pytest.mark.parametrize("wakes", ["while the other trains", extend("after the other has ended")])
def test_a_zombie(stage: Stage, oracle: Oracle, tell: Tell, wakes: str) -> None:
    job = stage.submit(steps=40 if wakes == "while the other trains" else 20)
    follower = Follower(stage, job)
    stage.until_committed(job, 5)
    zombie = stage.holder(job)
    began = time.monotonic()
    with zombie.frozen():
        stage.until_run(job, 2)
        seconds = time.monotonic() - began
        assert stage.holder(job) is not zombie
        if wakes == "after the other has ended":
            ended = stage.until_ended(job)
    oracle.check(job, epochs=2, attempts=0, follower=follower)
    if wakes == "after the other has ended":
        assert stage.record(job) == ended
    last = stage.submit(steps=2)
    with stage.other(zombie).frozen():
        stage.until_ended(last)
    oracle.check(last)
    tell(
        f"worker frozen past its lease, woken {wakes}",
        "the other worker resumed from the last checkpoint; the woken one stopped its child, changed nothing and took "
        "the next job",
        seconds,
    )


def test_frozen_for_less_than_a_lease(stage: Stage, oracle: Oracle, tell: Tell) -> None:
    job = stage.submit(steps=40)
    stage.until_step(job, 5)
    with stage.holder(job).frozen():
        time.sleep(1.5)
    oracle.check(job, epochs=1, attempts=0)
    tell("worker frozen for half a lease", "nothing: one run", None)


def test_preempted_in_time(stage: Stage, oracle: Oracle, tell: Tell) -> None:
    job = stage.submit(steps=40, checkpoint_every=1000)
    follower = Follower(stage, job)
    stage.until_step(job, 8)
    worker = stage.holder(job)
    began = time.monotonic()
    worker.stop()
    gone = time.monotonic() - began
    stage.until_run(job, 2)
    seconds = time.monotonic() - began
    oracle.check(job, epochs=2, attempts=0, follower=follower)
    step = resumed(stage, job)[-1]
    assert step >= 8
    tell(
        "worker asked to stop (TERM: spot preemption, `docker stop`)",
        f"step {step} was saved, the worker gone after {gone:.1f} s; another resumed from there; no attempt counted",
        seconds,
    )


def test_preempted_with_too_little_grace(stage: Stage, oracle: Oracle, tell: Tell) -> None:
    job = stage.submit(steps=30, save_seconds="1.5", checkpoint_every=6)
    stage.until_committed(job, 6)
    stage.until_step(job, 9)
    worker = stage.holder(job)
    began = time.monotonic()
    worker.signal(signal.SIGTERM)
    time.sleep(0.7)
    worker.kill()
    stage.until_run(job, 2)
    seconds = time.monotonic() - began
    oracle.check(job, epochs=2, attempts=0)
    tell(
        "TERM, then KILL after 0.7 s while saving takes 1.5 s",
        f"run 2 resumed from the last whole checkpoint (step {resumed(stage, job)[-1]}); no attempt counted",
        seconds,
    )


def test_preempted_before_any_checkpoint_costs_no_attempt(stage: Stage, oracle: Oracle, tell: Tell) -> None:
    job = stage.submit(steps=12, save_seconds="30", checkpoint_every=1000)
    for number in range(3):
        stage.until_run(job, number + 1)
        worker = stage.holder(job)
        worker.signal(signal.SIGTERM)
        time.sleep(0.4)
        worker.kill()
        worker.start(wait=False)
    oracle.check(job, epochs=4, attempts=0)
    tell(
        "three preemptions in a row, each killed before it could save anything",
        "run 4 trained from the start to the end; no attempt counted, though 3 lost runs would have ended the job",
        None,
    )


@core
@pytest.mark.parametrize("away", [extend(2.0), 2.5])
def test_the_api_is_killed(stage: Stage, oracle: Oracle, tell: Tell, away: float) -> None:
    leases = away / 2
    job = stage.submit(steps=40)
    follower = Follower(stage, job)
    stage.until_step(job, 5)
    with stage.api.down():
        time.sleep(away * 2)
    began = time.monotonic()
    stage.until(lambda: stage.client.get(job)["status"])
    seconds = time.monotonic() - began
    oracle.check(job, epochs=1, attempts=0, follower=follower)
    tell(
        f"API killed and away for {away * 2:.0f} s ({leases:.1f} leases)",
        "one run, undisturbed; a reader of the event stream missed nothing",
        seconds,
    )


def test_the_api_is_frozen(stage: Stage, oracle: Oracle, tell: Tell) -> None:
    with stage.api.frozen():
        time.sleep(0.1)
        job = stage.record
        time.sleep(4)
    job = stage.submit(steps=5)
    oracle.check(job, epochs=1)
    tell("API frozen past its turn as sweeper", "another process swept meanwhile; it served on", None)


def resumed(stage: Stage, job_id: str) -> list[int]:
    """The steps that the job's runs resumed from."""
    events = stage.client.events(job_id, limit=1000, types=["log"])
    return [event["data"]["step"] for event in events if event["data"].get("code") == "resumed"]
