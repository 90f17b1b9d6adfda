"""The compare-and-set scripts on a real Valkey."""

from __future__ import annotations

import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from deploy.local.ports import pick_port
from deploy.local.process import Child
from deploy.local.valkey import Valkey
from jobs.errors import Unavailable, UnreadableRecord
from jobs.settings import QueueSettings
from jobs.store.job import HELD, JobRecord, JobStatus, new_job_id
from jobs.store.job_store import JobEvent, JobStore
from jobs.store.workers import WorkerRegistry


@pytest.fixture
def job_store(queue_settings: QueueSettings) -> JobStore:
    return JobStore(queue_settings)


@pytest.fixture
def job_id(job_store: JobStore) -> str:
    now = datetime.now(UTC)
    record = JobRecord(
        id=new_job_id(),
        owner="ann",
        status=JobStatus.QUEUED,
        spec={"schema_version": 1, "name": "算术"},
        spec_sha256="0",
        created_at=now,
        updated_at=now,
        queue="grpo.cpu",
    )
    assert job_store.create(record)
    assert not job_store.create(record), "a record is created once"
    return record.id


def status(job_store: JobStore, job_id: str) -> JobStatus:
    record = job_store.get(job_id)
    assert record is not None
    return record.status


def test_only_one_claim_wins_and_epochs_only_rise(job_store: JobStore, job_id: str) -> None:
    assert job_store.claim(job_id, epoch=2, worker="a", lease_seconds=60)
    assert not job_store.claim(job_id, epoch=3, worker="b", lease_seconds=60), "it is held"
    assert job_store.change(job_id, to=JobStatus.QUEUED, epoch=2).done
    assert not job_store.claim(job_id, epoch=2, worker="b", lease_seconds=60), "the epoch is used up"
    assert job_store.claim(job_id, epoch=3, worker="b", lease_seconds=60)


def test_a_fenced_worker_can_change_nothing(job_store: JobStore, job_id: str) -> None:
    job_store.claim(job_id, epoch=1, worker="a", lease_seconds=60)
    job_store.change(job_id, to=JobStatus.QUEUED, epoch=1)
    job_store.claim(job_id, epoch=2, worker="b", lease_seconds=60)
    before = job_store.get(job_id)
    late = job_store.change(
        job_id, epoch=1, from_statuses=HELD, fields={"step": 9}, events=[JobEvent(type="log", data={})], first_ordinal=1
    )
    assert late.refusal == "epoch"
    assert job_store.beat(job_id, epoch=1, lease_seconds=60).refusal == "epoch"
    assert job_store.get(job_id) == before
    assert all(event["type"] == "status" for event in job_store.events(job_id, after=0, limit=99))


def test_events_sent_twice_are_taken_once_and_numbered_without_gaps(job_store: JobStore, job_id: str) -> None:
    job_store.claim(job_id, epoch=1, worker="a", lease_seconds=60)
    events = [JobEvent(type="metric", data={"n": n}, step=n) for n in (1, 2, 3)]
    assert job_store.change(job_id, epoch=1, events=events[:2], first_ordinal=1).shipped == 2
    assert job_store.change(job_id, epoch=1, events=events, first_ordinal=1).shipped == 3
    read = job_store.events(job_id, after=0, limit=99)
    assert [event["data"]["n"] for event in read if event["type"] == "metric"] == [1, 2, 3]
    assert [event["seq"] for event in read] == list(range(1, len(read) + 1))
    assert job_store.events(job_id, after=read[-2]["seq"], limit=99) == read[-1:]


def test_a_live_lease_is_not_expired(job_store: JobStore, job_id: str) -> None:
    job_store.claim(job_id, epoch=1, worker="a", lease_seconds=60)
    assert job_store.expired_leases() == []
    assert job_store.change(job_id, expired=True, to=JobStatus.QUEUED).refusal == "lease"
    job_store.beat(job_id, epoch=1, lease_seconds=0)
    assert job_store.expired_leases() == [job_id]
    assert job_store.change(job_id, expired=True, to=JobStatus.QUEUED).done
    assert job_store.expired_leases() == []


def test_looking_does_not_keep_the_lease(job_store: JobStore, job_id: str) -> None:
    job_store.claim(job_id, epoch=1, worker="a", lease_seconds=0)
    assert job_store.beat(job_id, epoch=1, lease_seconds=None).done
    assert job_store.expired_leases() == [job_id]


def test_looking_writes_nothing_and_is_refused_as_a_change_would_be(job_store: JobStore, job_id: str) -> None:
    """Each worker looks once a second: 10,000 of them must not fill the append-only file."""

    def written() -> int:
        return job_store.client.info("persistence")["rdb_changes_since_last_save"]

    def looks_like_a_change(epoch: int) -> str | None:
        look = job_store.beat(job_id, epoch=epoch, lease_seconds=None)
        assert look == job_store.change(job_id, from_statuses=HELD, epoch=epoch)
        return look.refusal

    assert job_store.beat("job-nobody", epoch=1, lease_seconds=None).refusal == "missing"
    assert looks_like_a_change(0) == "status", "queued"
    job_store.claim(job_id, epoch=1, worker="a", lease_seconds=60)
    job_store.change(job_id, epoch=1, events=[JobEvent(type="log", data={})], first_ordinal=1)
    before = written()
    assert all(job_store.beat(job_id, epoch=1, lease_seconds=None).done for _ in range(100))
    assert written() - before < 100, "nothing but what others wrote"
    assert looks_like_a_change(1) is None
    assert looks_like_a_change(2) == "epoch"
    job_store.change(job_id, epoch=1, to=JobStatus.FAILED)
    assert looks_like_a_change(1) == "status"


def test_times_are_the_servers_and_survive_a_round_trip(job_store: JobStore, job_id: str) -> None:
    job_store.claim(job_id, epoch=1, worker="a", lease_seconds=60)
    job_store.change(job_id, to=JobStatus.FAILED, fields={"error": {"code": "x", "class": "infra"}})
    record = job_store.get(job_id)
    assert record is not None
    assert record.started_at is not None
    assert record.finished_at is not None
    assert record.created_at <= record.started_at <= record.finished_at
    assert record.error == {"code": "x", "class": "infra"}
    assert record.spec["name"] == "算术"


def test_what_a_training_process_made_up_keeps_its_record_readable(job_store: JobStore, job_id: str) -> None:
    """A worker of an earlier release passes it on."""
    for step, reward in (("x", "abc"), ("9" * 5000, "inf"), ("-1", "True")):
        job_store.change(job_id, fields={"step": step, "reward": reward})
        record = job_store.get(job_id)
        assert record is not None
        assert (record.step, record.reward) == (0, None)
    job_store.change(job_id, fields={"step": 7, "reward": 0.5})
    record = job_store.get(job_id)
    assert record is not None
    assert (record.step, record.reward) == (7, 0.5)


@pytest.mark.parametrize("damage", [{"epoch": "x"}, {"spec": "{half"}, {"status": "later"}, {"run_at": "9" * 30}])
def test_one_record_that_cannot_be_read_hides_no_other(job_store: JobStore, job_id: str, damage: Any) -> None:
    record = job_store.get(job_id)
    assert record is not None
    other = replace(record, id=new_job_id())
    assert job_store.create(other)
    job_store.client.hset(f"{job_store.prefix}:job:{job_id}", mapping=damage)
    assert [found.id for found in job_store.get_many([job_id, "job-none", other.id])] == [other.id]
    with pytest.raises(UnreadableRecord, match=job_id):
        job_store.get(job_id)


def test_a_server_that_is_away_is_unavailable() -> None:
    away = JobStore(QueueSettings.model_validate({"redis_url": "redis://127.0.0.1:1/0"}))
    with pytest.raises(Unavailable, match="Valkey"):
        away.get("job-x")


def test_a_server_that_cannot_write_to_its_disk_is_away_and_no_fault_of_a_run(tmp_path: Path) -> None:
    config = Valkey(data=tmp_path / "data", port=pick_port(), password="x" * 20, log=tmp_path / "valkey.log")
    server = Child(config.service())
    try:
        server.wait_ready()
        job_store = JobStore(QueueSettings.model_validate({"redis_url": config.url, "prefix": "full"}))
        job_store.begin("ordering", "before")
        # A folder where the snapshot is to be: like a full disk, it stops the server from taking changes.
        (config.data / "dump.rdb" / "in the way").mkdir(parents=True)
        job_store.client.config_set("save", "3600 1")
        job_store.client.bgsave()
        until = time.monotonic() + 10
        while job_store.client.info("persistence")["rdb_last_bgsave_status"] == "ok" and time.monotonic() < until:
            time.sleep(0.05)
        with pytest.raises(Unavailable, match="MISCONF"):
            job_store.begin("ordering", "after")
        with pytest.raises(Unavailable, match="MISCONF"):
            job_store.run_script("take", "key", "1", "1")
        with pytest.raises(Unavailable, match="MISCONF"):  # of a pipeline
            WorkerRegistry(job_store).withdraw("worker")
    finally:
        server.kill()
