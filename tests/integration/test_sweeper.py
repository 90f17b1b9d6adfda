"""What the sweeper does when something is wrong with one of the jobs it looks after, on real servers."""

from __future__ import annotations

import pytest

from grpo_core.spec import parse_spec
from jobs import layout
from jobs.outbox import Outbox
from jobs.queue import Doorbell
from jobs.record import JobStatus
from jobs.service import JobService
from jobs.settings import QueueSettings, StorageSettings
from jobs.sweeper import Sweeper

SPEC = parse_spec({"resources": {"gpus": 0}, "optimizer": {"name": "adamw_torch"}})


@pytest.fixture
def service(storage_settings: StorageSettings, queue_settings: QueueSettings) -> JobService:
    service = JobService(storage_settings, queue_settings)
    service.check_storage()
    return service


@pytest.fixture
def sweeper(service: JobService, queue_settings: QueueSettings) -> Sweeper:
    return Sweeper(service.ledger, service.archive, Outbox(Doorbell(queue_settings), service.ledger), queue_settings)


def lost_job(service: JobService, *, attempts: int = 0) -> str:
    """A job whose worker is dead and whose lease has run out."""
    job = service.submit(SPEC, "ann")
    epoch = service.archive.allocate_epoch(job.id, "w", "2026-01-02T03:04:05Z")
    assert epoch == 1
    assert service.ledger.claim(job.id, epoch=epoch, worker="w", lease_seconds=0)
    service.ledger.change(job.id, fields={"attempts": attempts})
    return job.id


def test_a_record_that_cannot_be_read_keeps_no_sweep_from_the_jobs_after_it(
    service: JobService, sweeper: Sweeper
) -> None:
    unreadable, lost = lost_job(service), lost_job(service)
    service.ledger.change(unreadable, fields={"status": "of a later release"})
    sweeper.take_over_expired()
    assert service.get(lost, "ann").status is JobStatus.QUEUED


def test_a_job_ends_though_its_commit_cannot_be_read(service: JobService, sweeper: Sweeper) -> None:
    lost = lost_job(service, attempts=2)
    # Of a step that an earlier run had reached too, so that this run was an attempt.
    service.archive.allocate_epoch(lost, "w", "2026-01-02T03:04:05Z")
    service.ledger.change(lost, fields={"epoch": 2})
    for epoch in (1, 2):
        service.store.put(layout.commit(lost, epoch, 5), b"{half of")
    sweeper.take_over_expired()
    ended = service.get(lost, "ann")
    assert ended.status is JobStatus.FAILED
    assert ended.error is not None
    assert ended.error["code"] == "attempts_used_up"


def test_wake_ups_do_not_pile_up_while_every_worker_is_busy(
    service: JobService, sweeper: Sweeper, queue_settings: QueueSettings
) -> None:
    jobs = [service.submit(SPEC, "ann") for _ in range(3)]
    broker, wakeups = service.ledger.client, f"{queue_settings.broker_prefix}{jobs[0].queue}"

    def sweep() -> int:
        sweeper.ring_again(0)
        sweeper._outbox.start()
        sweeper._outbox.close()
        sweeper._outbox = Outbox(Doorbell(queue_settings), service.ledger)
        return broker.llen(wakeups)

    broker.delete(wakeups)
    assert [sweep() for _ in range(4)] == [3, 3, 3, 3]
    broker.lpop(wakeups)
    assert sweep() == 3, "one that was taken in vain is rung for again"


def test_events_of_a_job_that_was_ended_for_its_worker_leave_valkey(service: JobService, sweeper: Sweeper) -> None:
    lost, waiting = lost_job(service, attempts=2), service.submit(SPEC, "ann")
    sweeper.take_over_expired()
    service.cancel(waiting.id, "ann")
    client, prefix = service.ledger.client, service.ledger.prefix
    expires: set[bool] = set()
    for job_id in (lost, waiting.id):
        outcome = service.archive.outcome(job_id)
        assert outcome is not None
        kept_for = client.pttl(f"{prefix}:events:{job_id}")
        assert (kept_for > 0) is (outcome.manifest is not None)
        expires.add(kept_for > 0)
    assert True in expires
