"""Checkpoints are damaged, disks run full, and messages are lost, repeated and forged."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import pickle
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from jobs.lifecycle.celery_app import WakeupSender
from jobs.store import commits, object_keys
from tests.acceptance.faults.conftest import Tell, core, extend
from tests.acceptance.faults.oracle import Oracle
from tests.acceptance.faults.stage import PREFIX, Stage, job_spec
from tests.acceptance.faults.test_processes import resumed

GROUP = "Data, disks, messages"

DAMAGES = {
    "one bit of the adapter turned": ("adapter_model.safetensors", lambda body: bytes([body[0] ^ 1]) + body[1:]),
    "the optimizer's state cut in half": ("state.json", lambda body: body[: len(body) // 2]),
    "its manifest deleted": ("manifest.json", None),
}


@core
@pytest.mark.parametrize("damage", [damage if "bit" in damage else extend(damage) for damage in DAMAGES])
def test_the_newest_checkpoint_is_damaged(stage: Stage, oracle: Oracle, tell: Tell, damage: str) -> None:
    name, change = DAMAGES[damage]
    job = stage.submit(steps=30)
    stage.until_committed(job, 10)
    worker = stage.holder(job)
    worker.kill()
    newest, before = commits.commits_up_to(stage.store, job, 1)[:2]
    commit = commits.read_commit(stage.store, job, newest)
    assert commit is not None
    key = f"{commit.checkpoint}{name}"
    if change is None:
        stage.store.delete(key)
    else:
        stage.store.put(key, change(stage.store.get(key) or b""))
    began = time.monotonic()
    stage.until_run(job, 2)
    seconds = time.monotonic() - began
    oracle.check(job, epochs=2, attempts=0)
    assert resumed(stage, job) == [before.step]
    tell(
        f"worker killed, and the newest checkpoint (step {newest.step}): {damage}",
        f"passed over with a warning; run 2 resumed from step {before.step}",
        seconds,
    )


def test_every_checkpoint_is_damaged(stage: Stage, oracle: Oracle, tell: Tell) -> None:
    job = stage.submit(steps=25)
    stage.until_committed(job, 10)
    stage.holder(job).kill()
    for ref in commits.commits_up_to(stage.store, job, 1):
        commit = commits.read_commit(stage.store, job, ref)
        assert commit is not None
        stage.store.put(f"{commit.checkpoint}state.json", b"")
    oracle.check(job, epochs=2, attempts=0)
    assert resumed(stage, job) == []
    tell("worker killed, and every checkpoint damaged", "run 2 trained from the start", None)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"a tmpfs cannot be mounted, which takes root: {mounted.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk(stage: Stage, oracle: Oracle, tell: Tell, small_disk: Path) -> None:
    worker = stage.make_worker("small", work_dir=small_disk, GRPO_QUEUES=f"{PREFIX}.gpu1")
    worker.start()
    stage.workers.append(worker)
    try:
        job = stage.submit(steps=10, gpus=1, fill="yes", fail_step="3", step_seconds="0.02")
        began = time.monotonic()
        done = oracle.check(job, "failed", epochs=3)
        seconds = time.monotonic() - began
        assert done.error is not None
        assert "scratch disk is full" in done.error["message"]
        assert done.error["class"] == "infra"
        after = stage.submit(steps=5, gpus=1)
        oracle.check(after, epochs=1)
        tell(
            "scratch is a tmpfs of 4 MB; a job fills it, in every run",
            "`failed` after 3 runs, naming the folder and the remedy; its scratch was freed and the next job there ran",
            seconds,
        )
        filler = small_disk / "someone-else"
        filler.write_bytes(b"x" * int(3.4e6))
        waiting = stage.submit(steps=2, gpus=1)
        time.sleep(3)
        assert stage.record(waiting).epoch == 0
        filler.unlink()
        began = time.monotonic()
        oracle.check(waiting, epochs=1)
        tell(
            "scratch is full because of somebody else",
            "the worker claims nothing; the job waits, and ran once there was room",
            time.monotonic() - began,
        )
    finally:
        worker.kill()
        stage.workers.remove(worker)


def test_messages_are_repeated(stage: Stage, oracle: Oracle, tell: Tell) -> None:
    job = stage.submit(steps=20)
    wakeup_sender = WakeupSender(stage.queue)
    for _ in range(10):
        wakeup_sender.send(job, stage.record(job).queue)
        time.sleep(0.1)
    oracle.check(job, epochs=1, attempts=0)
    for _ in range(5):
        wakeup_sender.send(job, stage.record(job).queue)
    after = stage.submit(steps=2)
    oracle.check(after, epochs=1)
    assert stage.store.get(object_keys.base(job, 2)) is None, "a second run began"
    tell("ten wake-ups for a job while it runs, five after", "one run", None)


def test_messages_are_lost(stage: Stage, oracle: Oracle, tell: Tell) -> None:
    """The queue is emptied; and a worker dies between taking a message from Valkey and claiming the job."""
    busy = [stage.submit(steps=25), stage.submit(steps=25)]
    for job in busy:
        stage.until_step(job, 1)
    waiting = [stage.submit(steps=2) for _ in range(3)]
    queue = f"{PREFIX}:celery:{PREFIX}.cpu"
    stage.until(lambda: stage.job_store.client.llen(queue) >= 3, 5)
    stage.job_store.client.delete(queue)
    began = time.monotonic()
    for job in (*busy, *waiting):
        oracle.check(job, epochs=1, attempts=0)
    tell("every message in the queue deleted, three jobs waiting", "a sweeper sent new wake-ups: each ran once", None)
    for worker in stage.workers:
        worker.signal(signal.SIGSTOP)
    job = stage.submit(steps=2)
    time.sleep(0.5)  # Valkey hands the message to a worker that waits for one
    for worker in stage.workers:
        worker.kill()
        worker.start(wait=False)
    began = time.monotonic()
    stage.until(lambda: stage.record(job).epoch == 1)
    seconds = time.monotonic() - began
    oracle.check(job, epochs=1)
    tell("worker killed after it took a message, before it claimed the job", "a new wake-up was sent: one run", seconds)


def test_messages_are_forged(stage: Stage, oracle: Oracle, tell: Tell, tmp_path: Path) -> None:
    proof = tmp_path / "proof"

    class Payload:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch {proof}",)

    client = stage.job_store.client
    queue = f"{PREFIX}:celery:{PREFIX}.cpu"
    pickled = base64.b64encode(pickle.dumps(Payload())).decode()
    properties = {"delivery_tag": "x", "body_encoding": "base64", "delivery_info": {"exchange": "", "routing_key": "x"}}
    header = {"task": "jobs.run", "id": "x", "lang": "py"}
    forged = {"body": pickled, "content-type": "application/x-python-serialize", "content-encoding": "binary"}
    unknown = {**header, "task": "os.system"}
    body = base64.b64encode(json.dumps([["job-nobody"], {}, {}]).encode()).decode()
    plain = {"body": body, "content-type": "application/json", "content-encoding": "utf-8", "properties": properties}
    client.lpush(queue, json.dumps({**forged, "headers": header, "properties": properties}))
    client.lpush(queue, json.dumps({**plain, "headers": unknown}))
    client.lpush(queue, json.dumps({**plain, "headers": header}))
    client.lpush(queue, "not json at all")
    time.sleep(2)
    ended = sum(not worker.alive for worker in stage.workers)
    for worker in stage.workers:
        worker.start()
    job = stage.submit(steps=3)
    oracle.check(job, epochs=1)
    assert not proof.exists(), "it ran what a message told it to"
    tell(
        "forged messages: pickle, an unknown task, an unknown job, no JSON at all",
        f"no code ran; {ended} of 2 workers ended; jobs ran on",
        None,
    )


def test_two_jobs_of_one_digest(stage: Stage, oracle: Oracle, tell: Tell) -> None:
    """Many submissions at once under one Idempotency-Key make one job."""
    spec = job_spec(3, 5)
    key = hashlib.sha256(str(time.time()).encode()).hexdigest()
    with ThreadPoolExecutor(20) as pool:
        ids = set(pool.map(lambda _: stage.client.submit(spec, idempotency_key=key)["id"], range(20)))
    assert len(ids) == 1
    oracle.check(ids.pop(), epochs=1)
    tell("the same submission 20 times at once with one Idempotency-Key", "one job", None)
