"""What is deleted is gone for good, also where the deletion was cut off, and nothing goes that is still needed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import jobs.unfinished
from grpo_core.spec import parse_spec
from jobs import layout
from jobs.admission import RequestKey
from jobs.errors import Conflict, InUse, NotFound, Rejected, Unavailable
from jobs.outbox import Outbox
from jobs.queue import Doorbell
from jobs.record import JobStatus
from jobs.service import JobService
from jobs.settings import QueueSettings
from jobs.unfinished import Unfinished
from tests.integration.test_service import CPU, end, submit, upload


@contextmanager
def cut_off_at(service: JobService, last: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Object storage goes away as this object is to be deleted."""
    delete = service.store.delete

    def fails(key: str) -> None:
        if key == last:
            raise Unavailable("Object storage", "a test")
        delete(key)

    with monkeypatch.context() as broken:
        broken.setattr(service.store, "delete", fails)
        yield


@pytest.fixture
def unfinished(service: JobService, queue_settings: QueueSettings) -> Unfinished:
    """What the sweeper does."""
    return Unfinished(service.ledger, service.archive, Outbox(Doorbell(queue_settings), service.ledger), by="sweeper")


def test_a_deleted_job_leaves_nothing_but_that_it_was_deleted(service: JobService) -> None:
    job, other = submit(service), submit(service)
    with pytest.raises(Conflict, match="is queued, so it cannot be deleted"):
        service.delete(job.id, "ann")
    end(service, job.id)
    service.store.put(f"{layout.run(job.id, 1)}rollouts/step-000001.parquet", b"x")
    with pytest.raises(NotFound):
        service.delete(job.id, "bob")
    cancelled = service.ledger.client.hget(f"{service.ledger.prefix}:statuses", "cancelled")
    service.delete(job.id, "ann")
    assert list(service.store.list(layout.folder(job.id))) == []
    assert service.ledger.client.keys(f"{service.ledger.prefix}:*{job.id}*") == []
    assert [found.id for found in service.list_jobs("ann", limit=10).items] == [other.id]
    assert service.list_jobs("ann", limit=10, status=JobStatus.CANCELLED).items == []
    left = service.ledger.client.hget(f"{service.ledger.prefix}:statuses", "cancelled")
    assert int(left or 0) == int(cancelled or 0) - 1
    mark = service.store.get_json(layout.erased(job.id))
    assert mark is not None
    assert set(mark) == {"v", "id", "owner", "time"}
    for look in (service.get, service.delete, service.events, service.artifacts):
        with pytest.raises(NotFound):
            look(job.id, "ann")
    assert service.read_on(job.id, after=0).ended


def test_a_deletion_that_was_cut_off_is_finished_by_asking_again(
    service: JobService, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = submit(service)
    end(service, job.id)
    with cut_off_at(service, layout.outcome(job.id), monkeypatch), pytest.raises(Unavailable):
        service.delete(job.id, "ann")
    assert service.get(job.id, "ann").status is JobStatus.CANCELLED
    service.delete(job.id, "ann")
    assert list(service.store.list(layout.folder(job.id))) == []


def test_a_deletion_is_looked_after_until_no_worker_can_have_the_job(
    service: JobService, unfinished: Unfinished, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One was cut off and its owner does not ask again; into another a worker of the past still writes."""
    torn, late, kept = submit(service), submit(service), submit(service)
    for job in (torn, late, kept):
        end(service, job.id)
    with monkeypatch.context() as broken:
        broken.setattr(service.ledger, "forget", lambda _: broken_off())
        with pytest.raises(Unavailable):
            service.delete(torn.id, "ann")
    service.delete(late.id, "ann")
    service.store.put(f"{layout.run(late.id, 1)}adapter/adapter_model.safetensors", b"x")
    service.ledger.begin("erasing", kept.id)  # and then nothing was written down
    unfinished.finish()
    assert service.get(torn.id, "ann").id == torn.id, "not yet"
    monkeypatch.setattr(jobs.unfinished, "ERASING_SECONDS", 0)
    unfinished.finish()
    for job in (torn, late):
        assert list(service.store.list(layout.folder(job.id))) == []
        with pytest.raises(NotFound):
            service.get(job.id, "ann")
    assert service.get(kept.id, "ann").id == kept.id
    assert service.ledger.begun("erasing", 0) == []


def broken_off() -> None:
    raise Unavailable("Valkey", "a test")


def test_a_job_goes_when_no_unfinished_job_starts_from_it(service: JobService, monkeypatch: pytest.MonkeyPatch) -> None:
    first, other = submit(service), submit(service)
    monkeypatch.setattr(service._references, "check", lambda *_: None)
    after = submit(service, from_checkpoint={"job": first.id, "step": 5})
    end(service, first.id)
    end(service, other.id)
    with pytest.raises(InUse, match=rf"Job {first.id} is in use by job {after.id}, which is queued"):
        service.delete(first.id, "ann")
    service.delete(other.id, "ann")
    end(service, after.id)
    service.delete(first.id, "ann")


def test_a_request_that_is_sent_again_does_not_bring_back_what_was_deleted(
    service: JobService, unfinished: Unfinished, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first attempt wrote the job down, and it was the sweeper that made the record: the key is not done."""
    key = RequestKey.of("submitJob", "k", "{}")
    spec = parse_spec(CPU)
    with monkeypatch.context() as broken:
        broken.setattr(service.ledger, "create", lambda *_, **__: broken_off())
        with pytest.raises(Unavailable):
            service.submit_once(spec, "ann", key)
    monkeypatch.setattr(jobs.unfinished, "SUBMITTING_SECONDS", 0)
    unfinished.finish()
    (job,) = service.list_jobs("ann", limit=10).items
    end(service, job.id)
    service.delete(job.id, "ann")
    with pytest.raises(NotFound):
        service.submit_once(spec, "ann", key)
    assert list(service.store.list(layout.folder(job.id))) == []
    assert service.list_jobs("ann", limit=10).items == []


def test_a_data_set_whose_deletion_was_cut_off_is_found_no_more_and_goes_later(
    service: JobService, unfinished: Unfinished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = f"deleter-{tmp_path.name}"
    dataset = upload(service, tmp_path, owner)
    with cut_off_at(service, layout.dataset_rows(dataset.id), monkeypatch), pytest.raises(Unavailable):
        service.delete_dataset(dataset.id, owner)
    assert service.list_datasets(owner, limit=10).items == []
    with pytest.raises(NotFound):
        service.get_dataset(dataset.id, owner)
    assert service.store.get(layout.dataset_rows(dataset.id)) is not None
    monkeypatch.setattr(jobs.unfinished, "ERASING_SECONDS", 0)
    unfinished.finish()
    assert service.store.get(layout.dataset_rows(dataset.id)) is None
    assert list(service.store.list(layout.datasets_of(owner))) == []


def test_a_data_set_goes_when_no_unfinished_job_names_it(service: JobService, tmp_path: Path) -> None:
    dataset = upload(service, tmp_path)
    job = submit(service, data={"source": "upload", "dataset": dataset.id})
    with pytest.raises(NotFound):
        service.delete_dataset(dataset.id, "bob")
    with pytest.raises(InUse, match=rf"in use by job {job.id}, which is queued"):
        service.delete_dataset(dataset.id, "ann")
    service.pause(job.id, "ann")
    with pytest.raises(InUse, match="which is paused"):
        service.delete_dataset(dataset.id, "ann")
    end(service, job.id)
    service.delete_dataset(dataset.id, "ann")
    assert list(service.store.list(f"{layout.DATASETS}{dataset.id}/")) == []
    with pytest.raises(NotFound):
        service.get_dataset(dataset.id, "ann")
    with pytest.raises(Rejected):
        submit(service, data={"source": "upload", "dataset": dataset.id})
