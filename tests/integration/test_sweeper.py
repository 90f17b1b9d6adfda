"""What the sweeper does when something is wrong with one of the jobs it looks after, on real servers."""

from __future__ import annotations

import threading
import time

import pytest

from grpo_core.spec import parse_spec
from jobs.errors import Unavailable
from jobs.lifecycle import housekeeping, time_limit
from jobs.lifecycle.celery_app import WakeupSender
from jobs.lifecycle.sweeper import TAKEOVERS_AT_ONCE, Sweeper
from jobs.lifecycle.time_limit import Overdue, TimeLimitSettings
from jobs.lifecycle.wakeups import WakeupPublisher
from jobs.service import JobService
from jobs.settings import QueueSettings, StorageSettings
from jobs.store import object_keys
from jobs.store.job import JobStatus
from jobs.store.write_once import Outcome
from tests.clock import patience

SPEC = parse_spec({"resources": {"gpus": 0}, "optimizer": {"name": "adamw_torch"}})


@pytest.fixture
def service(storage_settings: StorageSettings, queue_settings: QueueSettings) -> JobService:
    service = JobService(storage_settings, queue_settings)
    service.check_storage()
    return service


@pytest.fixture
def sweeper(service: JobService, queue_settings: QueueSettings) -> Sweeper:
    return Sweeper(
        service.job_store,
        service.write_once,
        WakeupPublisher(WakeupSender(queue_settings), service.job_store),
        queue_settings,
    )


def lost_job(service: JobService, *, attempts: int = 0) -> str:
    """A job whose worker is dead and whose lease has run out."""
    job = service.submit(SPEC, "ann")
    epoch = service.write_once.allocate_epoch(job.id, "w", "2026-01-02T03:04:05Z")
    assert epoch == 1
    assert service.job_store.claim(job.id, epoch=epoch, worker="w", lease_seconds=0)
    service.job_store.change(job.id, fields={"attempts": attempts})
    return job.id


def test_a_record_that_cannot_be_read_keeps_no_sweep_from_the_jobs_after_it(
    service: JobService, sweeper: Sweeper
) -> None:
    unreadable, lost = lost_job(service), lost_job(service)
    service.job_store.change(unreadable, fields={"status": "of a later release"})
    sweeper.take_over_expired()
    assert service.get(lost, "ann").status is JobStatus.QUEUED


def test_a_hundred_records_that_cannot_be_read_keep_nothing_from_the_jobs_after_them(
    service: JobService, sweeper: Sweeper, queue_settings: QueueSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, prefix = service.job_store.client, service.job_store.prefix
    lost, waiting = lost_job(service), service.submit(SPEC, "ann")
    for n in range(120):
        client.hset(f"{prefix}:job:bad-{n}", mapping={"status": "running", "epoch": "x"})
        client.zadd(f"{prefix}:leases", {f"bad-{n}": 1})
        client.zadd(f"{prefix}:queued", {f"bad-{n}": 1})
        client.zadd(f"{prefix}:ordering", {f"bad-{n} 00": 1})
    sweeper.take_over_expired()
    assert service.get(lost, "ann").status is JobStatus.QUEUED
    rung: list[str] = []
    monkeypatch.setattr(sweeper._wakeups, "add", lambda job_id, _queue: rung.append(job_id))
    client.delete(f"{queue_settings.broker_prefix}{waiting.queue}")
    sweeper.ring_again(0)
    sweeper.ring_again(0)
    assert waiting.id in rung
    service.write_once.put_command(waiting.id, "cancel", "api", "2026-01-02T03:04:05Z")
    client.zadd(f"{prefix}:ordering", {f"{waiting.id} 00": 2})
    sweeper._recovery.finish()
    assert service.get(waiting.id, "ann").status is JobStatus.CANCELLED


def test_a_job_without_a_readable_record_keeps_no_overdue_job_running(
    service: JobService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time_limit, "GRACE_SECONDS", 0.0)
    jobs = [lost_job(service) for _ in range(3)]
    for job_id in jobs:
        service.job_store.change(job_id, fields={"run_ms": 7200_000}, lease_seconds=60)
    service.job_store.change(jobs[0], fields={"orders": "x"})
    service.job_store.change(jobs[2], fields={"orders": "x"})
    overdue = Overdue(service.job_store, service.write_once, TimeLimitSettings.model_validate({"hours": 1}))
    overdue.end()
    assert service.get(jobs[1], "ann").status is JobStatus.FAILED


def test_a_job_ends_though_its_commit_cannot_be_read(service: JobService, sweeper: Sweeper) -> None:
    lost = lost_job(service, attempts=2)
    # Of a step that an earlier run had reached too, so that this run was an attempt.
    service.write_once.allocate_epoch(lost, "w", "2026-01-02T03:04:05Z")
    service.job_store.change(lost, fields={"epoch": 2})
    for epoch in (1, 2):
        service.store.put(object_keys.commit(lost, epoch, 5), b"{half of")
    sweeper.take_over_expired()
    ended = service.get(lost, "ann")
    assert ended.status is JobStatus.FAILED
    assert ended.error is not None
    assert ended.error["code"] == "attempts_used_up"


def test_wake_ups_do_not_pile_up_while_every_worker_is_busy(
    service: JobService, sweeper: Sweeper, queue_settings: QueueSettings
) -> None:
    jobs = [service.submit(SPEC, "ann") for _ in range(3)]
    broker, wakeups = service.job_store.client, f"{queue_settings.broker_prefix}{jobs[0].queue}"

    def sweep() -> int:
        sweeper.ring_again(0)
        sweeper._wakeups.start()
        sweeper._wakeups.close()
        sweeper._wakeups = WakeupPublisher(WakeupSender(queue_settings), service.job_store)
        return broker.llen(wakeups)

    broker.delete(wakeups)
    assert [sweep() for _ in range(4)] == [3, 3, 3, 3]
    broker.lpop(wakeups)
    assert sweep() == 3, "one that was taken in vain is rung for again"


def test_events_of_a_job_that_was_ended_for_its_worker_leave_valkey(service: JobService, sweeper: Sweeper) -> None:
    lost, waiting = lost_job(service, attempts=2), service.submit(SPEC, "ann")
    sweeper.take_over_expired()
    service.cancel(waiting.id, "ann")
    client, prefix = service.job_store.client, service.job_store.prefix
    expires: set[bool] = set()
    for job_id in (lost, waiting.id):
        outcome = service.write_once.outcome(job_id)
        assert outcome is not None
        kept_for = client.pttl(f"{prefix}:events:{job_id}")
        assert (kept_for > 0) is (outcome.manifest is not None)
        expires.add(kept_for > 0)
    assert True in expires


def test_jobs_are_taken_over_at_once_and_each_once(
    service: JobService, sweeper: Sweeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = [lost_job(service) for _ in range(TAKEOVERS_AT_ONCE + 2)]
    together = threading.Barrier(TAKEOVERS_AT_ONCE)
    outcome, asked = service.write_once.outcome, []

    def first_wait_for_the_others(job_id: str) -> Outcome | None:
        asked.append(job_id)
        if len(asked) <= TAKEOVERS_AT_ONCE:
            together.wait(patience(10))  # breaks unless all are here at the same time
        return outcome(job_id)

    monkeypatch.setattr(sweeper._write_once, "outcome", first_wait_for_the_others)
    sweeper.take_over_expired()
    assert {service.get(job_id, "ann").status for job_id in lost} == {JobStatus.QUEUED}
    for job_id in lost:
        told = [event["data"] for event in service.events(job_id, "ann", types={"status"})]
        assert [one["status"] for one in told].count("queued") == 2, "at the submission, and when it was lost"
    assert service.job_store.expired_leases() == []


def test_storage_that_is_away_ends_a_sweep_and_the_next_takes_over(
    service: JobService, sweeper: Sweeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = [lost_job(service) for _ in range(3)]
    with monkeypatch.context() as patch:
        patch.setattr(sweeper, "_take_over", lambda _job_id: (_ for _ in ()).throw(Unavailable("storage", "away")))
        with pytest.raises(Unavailable):
            sweeper.take_over_expired()
    sweeper.take_over_expired()
    assert {service.get(job_id, "ann").status for job_id in lost} == {JobStatus.QUEUED}


def test_a_take_over_does_not_wait_for_housekeeping_that_hangs(
    service: JobService, queue_settings: QueueSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(housekeeping, "INTERVAL_SECONDS", 0.05)
    settings = queue_settings.model_copy(update={"lease_seconds": 1.0})
    sweeper = Sweeper(
        service.job_store, service.write_once, WakeupPublisher(WakeupSender(settings), service.job_store), settings
    )
    hangs, over = threading.Event(), threading.Event()
    sweeper._housekeeper._work = (lambda: (hangs.set(), over.wait(60)),)
    lost = lost_job(service)
    sweeper.start()
    try:
        assert hangs.wait(20), "housekeeping did not begin"
        deadline = time.monotonic() + patience(30)
        while service.get(lost, "ann").status is not JobStatus.QUEUED:
            assert time.monotonic() < deadline, "nobody took the job over"
            time.sleep(0.05)
    finally:
        over.set()
        sweeper.close()
