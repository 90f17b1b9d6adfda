"""The compare-and-set scripts on a real Valkey."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from pathlib import Path

import pytest

from deploy.local.ports import pick_port
from deploy.local.process import Child
from deploy.local.valkey import Valkey
from jobs.errors import Unavailable
from jobs.ledger import JobEvent, Ledger
from jobs.record import HELD, JobRecord, JobStatus, new_job_id
from jobs.registry import WorkerRegistry
from jobs.settings import QueueSettings


@pytest.fixture
def ledger(queue_settings: QueueSettings) -> Ledger:
    return Ledger(queue_settings)


@pytest.fixture
def job_id(ledger: Ledger) -> str:
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
    assert ledger.create(record)
    assert not ledger.create(record), "a record is created once"
    return record.id


def status(ledger: Ledger, job_id: str) -> JobStatus:
    record = ledger.get(job_id)
    assert record is not None
    return record.status


def test_only_one_claim_wins_and_epochs_only_rise(ledger: Ledger, job_id: str) -> None:
    assert ledger.claim(job_id, epoch=2, worker="a", lease_seconds=60)
    assert not ledger.claim(job_id, epoch=3, worker="b", lease_seconds=60), "it is held"
    assert ledger.change(job_id, to=JobStatus.QUEUED, epoch=2).done
    assert not ledger.claim(job_id, epoch=2, worker="b", lease_seconds=60), "the epoch is used up"
    assert ledger.claim(job_id, epoch=3, worker="b", lease_seconds=60)


def test_a_fenced_worker_can_change_nothing(ledger: Ledger, job_id: str) -> None:
    ledger.claim(job_id, epoch=1, worker="a", lease_seconds=60)
    ledger.change(job_id, to=JobStatus.QUEUED, epoch=1)
    ledger.claim(job_id, epoch=2, worker="b", lease_seconds=60)
    before = ledger.get(job_id)
    late = ledger.change(
        job_id, epoch=1, from_statuses=HELD, fields={"step": 9}, events=[JobEvent(type="log", data={})], first_ordinal=1
    )
    assert late.refusal == "epoch"
    assert ledger.beat(job_id, epoch=1, lease_seconds=60).refusal == "epoch"
    assert ledger.get(job_id) == before
    assert all(event["type"] == "status" for event in ledger.events(job_id, after=0, limit=99))


def test_events_sent_twice_are_taken_once_and_numbered_without_gaps(ledger: Ledger, job_id: str) -> None:
    ledger.claim(job_id, epoch=1, worker="a", lease_seconds=60)
    events = [JobEvent(type="metric", data={"n": n}, step=n) for n in (1, 2, 3)]
    assert ledger.change(job_id, epoch=1, events=events[:2], first_ordinal=1).shipped == 2
    assert ledger.change(job_id, epoch=1, events=events, first_ordinal=1).shipped == 3
    read = ledger.events(job_id, after=0, limit=99)
    assert [event["data"]["n"] for event in read if event["type"] == "metric"] == [1, 2, 3]
    assert [event["seq"] for event in read] == list(range(1, len(read) + 1))
    assert ledger.events(job_id, after=read[-2]["seq"], limit=99) == read[-1:]


def test_a_live_lease_is_not_expired(ledger: Ledger, job_id: str) -> None:
    ledger.claim(job_id, epoch=1, worker="a", lease_seconds=60)
    assert ledger.expired_leases() == []
    assert ledger.change(job_id, expired=True, to=JobStatus.QUEUED).refusal == "lease"
    ledger.beat(job_id, epoch=1, lease_seconds=0)
    assert ledger.expired_leases() == [job_id]
    assert ledger.change(job_id, expired=True, to=JobStatus.QUEUED).done
    assert ledger.expired_leases() == []


def test_looking_does_not_keep_the_lease(ledger: Ledger, job_id: str) -> None:
    ledger.claim(job_id, epoch=1, worker="a", lease_seconds=0)
    assert ledger.beat(job_id, epoch=1, lease_seconds=None).done
    assert ledger.expired_leases() == [job_id]


def test_times_are_the_servers_and_survive_a_round_trip(ledger: Ledger, job_id: str) -> None:
    ledger.claim(job_id, epoch=1, worker="a", lease_seconds=60)
    ledger.change(job_id, to=JobStatus.FAILED, fields={"error": {"code": "x", "class": "infra"}})
    record = ledger.get(job_id)
    assert record is not None
    assert record.started_at is not None
    assert record.finished_at is not None
    assert record.created_at <= record.started_at <= record.finished_at
    assert record.error == {"code": "x", "class": "infra"}
    assert record.spec["name"] == "算术"


def test_a_server_that_is_away_is_unavailable() -> None:
    away = Ledger(QueueSettings.model_validate({"redis_url": "redis://127.0.0.1:1/0"}))
    with pytest.raises(Unavailable, match="Valkey"):
        away.get("job-x")


def test_a_server_that_cannot_write_to_its_disk_is_away_and_no_fault_of_a_run(tmp_path: Path) -> None:
    config = Valkey(data=tmp_path / "data", port=pick_port(), password="x" * 20, log=tmp_path / "valkey.log")
    server = Child(config.service())
    try:
        server.wait_ready()
        ledger = Ledger(QueueSettings.model_validate({"redis_url": config.url, "prefix": "full"}))
        ledger.begin("ordering", "before")
        # A folder where the snapshot is to be: like a full disk, it stops the server from taking changes.
        (config.data / "dump.rdb" / "in the way").mkdir(parents=True)
        ledger.client.config_set("save", "3600 1")
        ledger.client.bgsave()
        until = time.monotonic() + 10
        while ledger.client.info("persistence")["rdb_last_bgsave_status"] == "ok" and time.monotonic() < until:
            time.sleep(0.05)
        with pytest.raises(Unavailable, match="MISCONF"):
            ledger.begin("ordering", "after")
        with pytest.raises(Unavailable, match="MISCONF"):
            ledger.run_script("take", "key", "1", "1")
        with pytest.raises(Unavailable, match="MISCONF"):  # of a pipeline
            WorkerRegistry(ledger).withdraw("worker")
    finally:
        server.kill()
