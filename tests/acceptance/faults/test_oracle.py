"""The oracle can say no: a job that is right is spoilt in one way at a time."""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Callable

import pytest

from jobs.store import object_keys
from jobs.store.job import JobStatus
from jobs.store.write_once import ManifestEntry
from tests.acceptance.faults.oracle import Oracle
from tests.acceptance.faults.stage import PREFIX, Stage


def entry(stage: Stage, job: str, part: str, *, exactly: bool = False) -> ManifestEntry:
    manifest = stage.write_once.manifest(object_keys.manifest(job, 1))
    assert manifest is not None
    return next(entry for entry in manifest.objects if part == entry.path or (part in entry.path and not exactly))


def turn_a_bit(stage: Stage, job: str) -> None:
    key = entry(stage, job, "adapter_model").key
    body = stage.store.get(key) or b""
    stage.store.put(key, bytes([body[0] ^ 1]) + body[1:])


def delete_rollouts(stage: Stage, job: str) -> None:
    stage.store.delete(entry(stage, job, "rollouts/").key)


def change_listed(stage: Stage, job: str, change: Callable[[list[dict[str, object]]], object]) -> None:
    key = object_keys.manifest(job, 1)
    body = json.loads(stage.store.get(key) or b"")
    change(body["objects"])
    stage.store.put_json(key, body)


def leave_rollouts_out(stage: Stage, job: str) -> None:
    change_listed(stage, job, lambda objects: objects.remove(next(o for o in objects if "rollouts/" in str(o["path"]))))


def list_rollouts_twice(stage: Stage, job: str) -> None:
    def twice(objects: list[dict[str, object]]) -> None:
        one = next(o for o in objects if "rollouts/" in str(o["path"]))
        objects.append({**one, "path": "rollouts/part-000900-000901.parquet"})

    change_listed(stage, job, twice)


def shorten_metrics(stage: Stage, job: str) -> None:
    metrics = entry(stage, job, "metrics.jsonl", exactly=True)
    short = b"".join((stage.store.get(metrics.key) or b"").splitlines(keepends=True)[:-1])
    stage.store.put(metrics.key, short)

    def relist(objects: list[dict[str, object]]) -> None:
        one = next(o for o in objects if o["path"] == "metrics.jsonl")
        one |= {"sha256": hashlib.sha256(short).hexdigest(), "size": len(short)}

    change_listed(stage, job, relist)


def other_outcome(stage: Stage, job: str) -> None:
    key = object_keys.outcome(job)
    stage.store.put_json(key, {**json.loads(stage.store.get(key) or b""), "status": "cancelled"})


def lose_an_event(stage: Stage, job: str) -> None:
    stage.job_store.client.xdel(f"{PREFIX}:events:{job}", "3-0")


def end_twice(stage: Stage, job: str) -> None:
    last = stage.job_store.client.xrevrange(f"{PREFIX}:events:{job}", count=1)[0]
    number = int(last[0].split("-")[0])
    stage.job_store.client.xadd(f"{PREFIX}:events:{job}", last[1], id=f"{number + 1}-0")


def keep_the_lease(stage: Stage, job: str) -> None:
    stage.job_store.client.zadd(f"{PREFIX}:leases", {job: 2e15})


def leave_in_a_list(stage: Stage, job: str) -> None:
    stage.job_store.client.zadd(f"{PREFIX}:owner:ann:{JobStatus.RUNNING.value}", {job: 0})


def run_on(stage: Stage, job: str) -> None:
    folder = stage.folder / "orphan" / job
    folder.mkdir(parents=True)
    # Its parent is gone at once, as an orphan's is. It outlives the oracle's patience.
    subprocess.run(["sh", "-c", "sleep 60 & exit 0"], cwd=folder, check=True)


SPOILS = {
    turn_a_bit: "is not what was recorded",
    delete_rollouts: "listed and not there",
    leave_rollouts_out: "where 1/0 was due",
    list_rollouts_twice: "rollout",
    shorten_metrics: "steps of metrics",
    other_outcome: "the outcome says",
    lose_an_event: "a number is missing",
    end_twice: "it ended 2 times",
    keep_the_lease: "still in leases",
    leave_in_a_list: "the list of running jobs",
    run_on: "a process of it is alive",
}


@pytest.mark.parametrize("spoil", SPOILS, ids=lambda spoil: spoil.__name__)
def test_it_finds_what_is_wrong(stage: Stage, oracle: Oracle, spoil: Callable[[Stage, str], None]) -> None:
    job = stage.submit(steps=6, checkpoint_every=3, step_seconds="0")
    oracle.check(job, epochs=1)
    spoil(stage, job)
    with pytest.raises(AssertionError, match=SPOILS[spoil]):
        oracle.check(job, epochs=1)
    keep = stage.job_store.client
    keep.zrem(f"{PREFIX}:leases", job)
    keep.zrem(f"{PREFIX}:owner:ann:running", job)
