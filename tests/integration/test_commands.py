"""Cancel, pause and resume on real servers: the order is in storage first, and is carried out whatever dies between."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

import jobs.lifecycle.recovery
from grpo_core.schedule import with_evaluation
from grpo_core.spec import parse_spec
from jobs.errors import Conflict, NotFound, Unavailable
from jobs.lifecycle.celery_app import WakeupSender
from jobs.lifecycle.recovery import Recovery
from jobs.lifecycle.wakeups import WakeupPublisher
from jobs.service import JobService
from jobs.settings import QueueSettings, StorageSettings
from jobs.store import commits, object_keys
from jobs.store.job import JobRecord, JobStatus
from jobs.store.write_once import ManifestEntry, Outcome

SPEC = parse_spec({"resources": {"gpus": 0}, "optimizer": {"name": "adamw_torch"}})


class CrashError(BaseException):
    """The process is gone: no handler runs."""


@pytest.fixture
def service(storage_settings: StorageSettings, queue_settings: QueueSettings) -> JobService:
    service = JobService(storage_settings, queue_settings)
    service.check_storage()
    return service


@pytest.fixture
def recovery(service: JobService, queue_settings: QueueSettings, monkeypatch: pytest.MonkeyPatch) -> Iterator[Recovery]:
    """What the sweeper does, at once."""
    monkeypatch.setattr(jobs.lifecycle.recovery, "ORDERING_SECONDS", 0)
    monkeypatch.setattr(jobs.lifecycle.recovery, "SUBMITTING_SECONDS", 0)
    wakeups = WakeupPublisher(WakeupSender(queue_settings), service.job_store)
    return Recovery(service.job_store, service.write_once, wakeups, by="sweeper")


def claim(service: JobService, job: JobRecord) -> int:
    epoch = service.write_once.allocate_epoch(job.id, "w", "2026-01-02T03:04:05Z")
    assert epoch is not None
    assert service.job_store.claim(job.id, epoch=epoch, worker="w", lease_seconds=60)
    return epoch


def status(service: JobService, job: JobRecord) -> JobStatus:
    return service.get(job.id, "ann").status


def orders(service: JobService, job: JobRecord) -> list[str]:
    return [order for _, order in service.write_once.commands(job.id)]


def test_a_queued_job_is_paused_at_once_and_resumed(service: JobService) -> None:
    job = service.submit(SPEC, "ann")
    assert service.pause(job.id, "ann").status is JobStatus.PAUSED
    assert not service.job_store.claim(job.id, epoch=1, worker="w", lease_seconds=60)
    assert service.pause(job.id, "ann").status is JobStatus.PAUSED, "asking twice is asking once"
    assert service.resume(job.id, "ann").status is JobStatus.QUEUED
    assert service.resume(job.id, "ann").status is JobStatus.QUEUED
    assert orders(service, job) == ["pause", "resume"]
    claim(service, job)
    assert service.resume(job.id, "ann").status is JobStatus.RUNNING
    told = [event["data"]["status"] for event in service.events(job.id, "ann", types={"status"})]
    assert told == ["queued", "paused", "queued", "running"]


def test_a_running_job_is_asked_to_pause_and_cannot_be_resumed_until_it_is_paused(service: JobService) -> None:
    job = service.submit(SPEC, "ann")
    epoch = claim(service, job)
    assert service.pause(job.id, "ann").status is JobStatus.PAUSING
    assert service.pause(job.id, "ann").status is JobStatus.PAUSING
    assert service.job_store.beat(job.id, epoch=epoch, lease_seconds=60).status is JobStatus.PAUSING
    with pytest.raises(Conflict, match="wait until it is paused"):
        service.resume(job.id, "ann")
    assert service.job_store.change(job.id, epoch=epoch, to=JobStatus.PAUSED).done
    assert service.resume(job.id, "ann").status is JobStatus.QUEUED
    assert orders(service, job) == ["pause", "resume"]


@pytest.mark.parametrize("before", ["queued", "paused", "running", "pausing"])
def test_cancel_works_in_every_state(service: JobService, before: str) -> None:
    job = service.submit(SPEC, "ann")
    if before in ("running", "pausing"):
        claim(service, job)
    if before in ("paused", "pausing"):
        service.pause(job.id, "ann")
    assert status(service, job).value == before
    expected = JobStatus.CANCELLED if before in ("queued", "paused") else JobStatus.CANCELLING
    assert service.cancel(job.id, "ann").status is expected
    outcome = service.write_once.outcome(job.id)
    assert (outcome is not None) is (expected is JobStatus.CANCELLED), "the worker writes its own"
    for order in (service.pause, service.resume):
        with pytest.raises(Conflict):
            order(job.id, "ann")


def test_what_has_ended_takes_no_order(service: JobService) -> None:
    job = service.submit(SPEC, "ann")
    service.cancel(job.id, "ann")
    for order in (service.cancel, service.pause, service.resume):
        with pytest.raises(Conflict, match="cancelled") as raised:
            order(job.id, "ann")
        assert "submit a new job" in str(raised.value)
    assert orders(service, job) == ["cancel"]
    for order in (service.cancel, service.pause, service.resume):
        with pytest.raises(NotFound):
            order(job.id, "bob")


def test_the_outcome_wins_over_a_cancel_that_comes_later(service: JobService) -> None:
    job = service.submit(SPEC, "ann")
    epoch = claim(service, job)
    # The worker wrote how the job ended and died before the record; the sweeper saw no outcome yet and requeued it.
    succeeded = Outcome(job=job.id, status="succeeded", epoch=epoch, time="2026-01-02T03:04:05Z", by="w")
    service.job_store.change(job.id, to=JobStatus.QUEUED)
    service.write_once.put_outcome(succeeded)
    with pytest.raises(Conflict, match="succeeded"):
        service.cancel(job.id, "ann")
    assert status(service, job) is JobStatus.SUCCEEDED
    assert service.write_once.outcome(job.id) == succeeded


def test_a_cancelled_job_keeps_what_its_newest_commit_names(service: JobService) -> None:
    job = service.submit(SPEC, "ann")
    epoch = claim(service, job)
    key = f"{object_keys.run(job.id, epoch)}rollouts/part-000001-000005.parquet"
    sha256, size = "0" * 64, 7
    entry = ManifestEntry(path="rollouts/part-000001-000005.parquet", key=key, sha256=sha256, size=size)
    commit = commits.Commit(job=job.id, epoch=epoch, step=5, checkpoint="c/", objects=[entry])
    commits.put_commit(service.store, commit)
    service.pause(job.id, "ann")
    service.job_store.change(job.id, epoch=epoch, to=JobStatus.PAUSED)
    service.cancel(job.id, "ann")
    assert key in [artifact.key for artifact in service.artifacts(job.id, "ann")]
    assert service.write_once.latest_epoch(job.id) > epoch, "a run that wakes up is fenced"


@pytest.mark.parametrize(
    ("order", "before", "after"),
    [("pause", "queued", "paused"), ("pause", "running", "pausing"), ("cancel", "queued", "cancelled")],
)
def test_an_order_whose_process_died_is_carried_out(
    service: JobService, recovery: Recovery, monkeypatch: pytest.MonkeyPatch, order: str, before: str, after: str
) -> None:
    job = service.submit(SPEC, "ann")
    if before == "running":
        claim(service, job)
    put = service.write_once.put_command

    def put_and_die(*arguments: Any, **more: Any) -> int:
        put(*arguments, **more)
        raise CrashError

    monkeypatch.setattr(service.write_once, "put_command", put_and_die)
    with pytest.raises(CrashError):
        getattr(service, order)(job.id, "ann")
    assert status(service, job).value == before
    recovery.finish()
    assert status(service, job).value == after
    assert service.job_store.begun("ordering", 0) == []
    recovery.finish()
    assert status(service, job).value == after


def test_an_order_that_waits_is_carried_out_before_a_later_one(
    service: JobService, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = service.submit(SPEC, "ann")
    service.pause(job.id, "ann")
    apply_command = service.job_store.apply_command
    monkeypatch.setattr(
        service.job_store, "apply_command", lambda *_: (_ for _ in ()).throw(Unavailable("Valkey", "gone"))
    )
    with pytest.raises(Unavailable):
        service.resume(job.id, "ann")
    monkeypatch.setattr(service.job_store, "apply_command", apply_command)
    assert status(service, job) is JobStatus.PAUSED
    assert service.pause(job.id, "ann").status is JobStatus.PAUSED
    assert orders(service, job) == ["pause", "resume", "pause"], "it was queued again in between"
    told = [event["data"]["status"] for event in service.events(job.id, "ann", types={"status"})]
    assert told == ["queued", "paused", "queued", "paused"]


@pytest.mark.parametrize("crash", [CrashError, Unavailable])
def test_a_submission_that_was_written_down_is_run_whatever_its_client_heard(
    service: JobService, recovery: Recovery, monkeypatch: pytest.MonkeyPatch, crash: type[BaseException]
) -> None:
    error = crash() if crash is CrashError else Unavailable("Valkey", "gone")
    create = service.job_store.create

    def die(*_: Any, **__: Any) -> bool:
        raise error

    service.job_store.create = die  # type: ignore[method-assign]
    with pytest.raises(crash):
        service.submit(SPEC, "ann")
    service.job_store.create = create  # type: ignore[method-assign]
    assert service.list_jobs("ann", limit=9).items == []
    recovery.finish()
    (job,) = service.list_jobs("ann", limit=9).items
    assert (job.status, job.spec) == (JobStatus.QUEUED, with_evaluation(SPEC, None).as_dict())
    assert service.job_store.begun("submitting", 0) == []
    recovery.finish()
    assert len(service.list_jobs("ann", limit=9).items) == 1


def test_a_submission_that_wrote_nothing_is_forgotten(service: JobService, recovery: Recovery) -> None:
    def die(*_: Any) -> bool:
        raise CrashError

    service.write_once.put_job = die  # type: ignore[method-assign]
    with pytest.raises(CrashError):
        service.submit(SPEC, "ann")
    assert len(service.job_store.begun("submitting", 0)) == 1
    recovery.finish()
    assert service.job_store.begun("submitting", 0) == []
    assert service.list_jobs("ann", limit=9).items == []


def test_an_accepted_submission_leaves_no_note(service: JobService) -> None:
    service.submit(SPEC, "ann")
    assert service.job_store.begun("submitting", 0) == []
