"""What is deleted is gone for good, also where the deletion was cut off, and nothing goes that is still needed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import jobs.lifecycle.recovery
from grpo_core.spec import JobSpec, Problem, parse_spec
from jobs.errors import Conflict, InUse, NotFound, Rejected, Unavailable
from jobs.lifecycle.admission import RequestKey
from jobs.lifecycle.celery_app import WakeupSender
from jobs.lifecycle.deletion import Deletion
from jobs.lifecycle.recovery import Recovery
from jobs.lifecycle.reference_checks import ReferenceChecks
from jobs.lifecycle.wakeups import WakeupPublisher
from jobs.service import JobService
from jobs.settings import QueueSettings
from jobs.store import object_keys
from jobs.store.datasets import DatasetRecord
from jobs.store.job import JobStatus
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
def recovery(service: JobService, queue_settings: QueueSettings) -> Recovery:
    """What the sweeper does."""
    return Recovery(
        service.job_store,
        service.write_once,
        WakeupPublisher(WakeupSender(queue_settings), service.job_store),
        by="sweeper",
    )


def test_a_deleted_job_leaves_nothing_but_that_it_was_deleted(service: JobService) -> None:
    job, other = submit(service), submit(service)
    with pytest.raises(Conflict, match="is queued, so it cannot be deleted"):
        service.delete(job.id, "ann")
    end(service, job.id)
    service.store.put(f"{object_keys.run(job.id, 1)}rollouts/step-000001.parquet", b"x")
    with pytest.raises(NotFound):
        service.delete(job.id, "bob")
    cancelled = service.job_store.client.hget(f"{service.job_store.prefix}:statuses", "cancelled")
    service.delete(job.id, "ann")
    assert list(service.store.list(object_keys.folder(job.id))) == []
    assert service.job_store.client.keys(f"{service.job_store.prefix}:*{job.id}*") == []
    assert [found.id for found in service.list_jobs("ann", limit=10).items] == [other.id]
    assert service.list_jobs("ann", limit=10, status=JobStatus.CANCELLED).items == []
    left = service.job_store.client.hget(f"{service.job_store.prefix}:statuses", "cancelled")
    assert int(left or 0) == int(cancelled or 0) - 1
    mark = service.store.get_json(object_keys.erased(job.id))
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
    with cut_off_at(service, object_keys.outcome(job.id), monkeypatch), pytest.raises(Unavailable):
        service.delete(job.id, "ann")
    assert service.get(job.id, "ann").status is JobStatus.CANCELLED
    service.delete(job.id, "ann")
    assert list(service.store.list(object_keys.folder(job.id))) == []


def test_a_deletion_is_looked_after_until_no_worker_can_have_the_job(
    service: JobService, recovery: Recovery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One was cut off and its owner does not ask again; into another a worker of the past still writes."""
    torn, late, kept = submit(service), submit(service), submit(service)
    for job in (torn, late, kept):
        end(service, job.id)
    with monkeypatch.context() as broken:
        broken.setattr(service.job_store, "forget", lambda _: broken_off())
        with pytest.raises(Unavailable):
            service.delete(torn.id, "ann")
    service.delete(late.id, "ann")
    service.store.put(f"{object_keys.run(late.id, 1)}adapter/adapter_model.safetensors", b"x")
    service.job_store.begin("erasing", kept.id)  # and then nothing was written down
    recovery.finish()
    assert service.get(torn.id, "ann").id == torn.id, "not yet"
    monkeypatch.setattr(jobs.lifecycle.recovery, "ERASING_SECONDS", 0)
    recovery.finish()
    for job in (torn, late):
        assert list(service.store.list(object_keys.folder(job.id))) == []
        with pytest.raises(NotFound):
            service.get(job.id, "ann")
    assert service.get(kept.id, "ann").id == kept.id
    assert service.job_store.begun("erasing", 0) == []


def broken_off() -> None:
    raise Unavailable("Valkey", "a test")


def test_a_job_goes_when_no_unfinished_job_starts_from_it(service: JobService, monkeypatch: pytest.MonkeyPatch) -> None:
    first, other = submit(service), submit(service)
    monkeypatch.setattr(service._reference_checks, "check", lambda *_: None)
    after = submit(service, from_checkpoint={"job": first.id, "step": 5})
    end(service, first.id)
    end(service, other.id)
    with pytest.raises(InUse, match=rf"Job {first.id} is in use by job {after.id}, which is queued"):
        service.delete(first.id, "ann")
    service.delete(other.id, "ann")
    end(service, after.id)
    service.delete(first.id, "ann")


def test_a_request_that_is_sent_again_does_not_bring_back_what_was_deleted(
    service: JobService, recovery: Recovery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first attempt wrote the job down, and it was the sweeper that made the record: the key is not done."""
    key = RequestKey.of("submitJob", "k", "{}")
    spec = parse_spec(CPU)
    with monkeypatch.context() as broken:
        broken.setattr(service.job_store, "create", lambda *_, **__: broken_off())
        with pytest.raises(Unavailable):
            service.submit_once(spec, "ann", key)
    monkeypatch.setattr(jobs.lifecycle.recovery, "SUBMITTING_SECONDS", 0)
    recovery.finish()
    (job,) = service.list_jobs("ann", limit=10).items
    end(service, job.id)
    service.delete(job.id, "ann")
    with pytest.raises(NotFound):
        service.submit_once(spec, "ann", key)
    assert list(service.store.list(object_keys.folder(job.id))) == []
    assert service.list_jobs("ann", limit=10).items == []


def test_a_data_set_whose_deletion_was_cut_off_is_found_no_more_and_goes_later(
    service: JobService, recovery: Recovery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = f"deleter-{tmp_path.name}"
    dataset = upload(service, tmp_path, owner)
    with cut_off_at(service, object_keys.dataset_rows(dataset.id), monkeypatch), pytest.raises(Unavailable):
        service.delete_dataset(dataset.id, owner)
    assert service.list_datasets(owner, limit=10).items == []
    with pytest.raises(NotFound):
        service.get_dataset(dataset.id, owner)
    assert service.store.get(object_keys.dataset_rows(dataset.id)) is not None
    monkeypatch.setattr(jobs.lifecycle.recovery, "ERASING_SECONDS", 0)
    recovery.finish()
    assert service.store.get(object_keys.dataset_rows(dataset.id)) is None
    assert list(service.store.list(object_keys.datasets_of(owner))) == []


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
    assert list(service.store.list(f"{object_keys.DATASETS}{dataset.id}/")) == []
    with pytest.raises(NotFound):
        service.get_dataset(dataset.id, "ann")
    with pytest.raises(Rejected):
        submit(service, data={"source": "upload", "dataset": dataset.id})


def test_what_a_submission_uses_is_not_deleted_before_its_record_exists(
    service: JobService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = upload(service, tmp_path)
    check = ReferenceChecks.check
    refused: list[str] = []

    def delete_meanwhile(self: ReferenceChecks, spec: JobSpec, owner: str) -> DatasetRecord | None:
        found = check(self, spec, owner)
        with pytest.raises(InUse, match="being submitted") as error:
            service.delete_dataset(dataset.id, "ann")
        refused.append(str(error.value))
        return found

    with monkeypatch.context() as racing:
        racing.setattr(ReferenceChecks, "check", delete_meanwhile)
        job = submit(service, data={"source": "upload", "dataset": dataset.id})
    assert refused
    assert service.job_store.references("ann") == {}
    service.cancel(job.id, "ann")
    service.delete_dataset(dataset.id, "ann")


def test_a_submission_cannot_use_what_is_being_deleted(
    service: JobService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = upload(service, tmp_path)
    refused: list[Problem] = []

    def submit_meanwhile(*_: object) -> None:
        with pytest.raises(Rejected) as error:
            submit(service, data={"source": "upload", "dataset": dataset.id})
        refused.extend(error.value.problems)

    monkeypatch.setattr(Deletion, "_write_down", submit_meanwhile)
    service.delete_dataset(dataset.id, "ann")
    assert [(problem.pointer, problem.code) for problem in refused] == [("/data/dataset", "being_deleted")]
    assert service.job_store.references("ann") == {}


def test_questions_that_a_submission_evaluates_on_are_not_deleted_either(
    service: JobService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, questions = upload(service, tmp_path), upload(service, tmp_path, text=b'{"question": "2+2", "answer": "4"}\n')
    noted: list[dict[str, list[str]]] = []
    check = ReferenceChecks.check

    def look(self: ReferenceChecks, spec: JobSpec, owner: str) -> DatasetRecord | None:
        noted.append(service.job_store.references(owner))
        return check(self, spec, owner)

    monkeypatch.setattr(ReferenceChecks, "check", look)
    job = submit(
        service,
        data={"source": "upload", "dataset": rows.id},
        evaluation={"questions": 1, "dataset": questions.id},
    )
    assert noted == [{job.id: [rows.id, questions.id]}]
    with pytest.raises(InUse):
        service.delete_dataset(questions.id, "ann")
