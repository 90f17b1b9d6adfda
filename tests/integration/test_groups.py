"""A sweep on real servers: one group, whatever breaks on the way, listed, cancelled and restored as one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from grpo_core.spec.sweep import parse_sweep
from jobs.errors import NotFound, Rejected, Unavailable
from jobs.lifecycle.admission import RequestKey, TooManyJobs
from jobs.lifecycle.rebuild import Rebuild
from jobs.service import JobService, ServiceSettings
from jobs.settings import QueueSettings, StorageSettings
from jobs.store.job import JobStatus, member_ids

SPEC = {"resources": {"gpus": 0}, "optimizer": {"name": "adamw_torch"}}
SWEEP = parse_sweep({"spec": SPEC, "grid": {"lr": [1e-5, 3e-5]}, "repeat": 2})


def key(body: str = "{}") -> RequestKey:
    return RequestKey.of("submitGroup", "k", body)


@pytest.fixture
def service(own_bucket: StorageSettings, queue_settings: QueueSettings) -> Iterator[JobService]:
    settings = ServiceSettings.model_validate({"max_owner_jobs": 6})
    service = JobService(own_bucket, queue_settings, settings)
    service.start()
    service.check_storage()
    yield service
    service.close()


def all_ids(service: JobService, owner: str = "ann", **how: Any) -> list[str]:
    return [record.id for record in service.list_jobs(owner, limit=100, **how).items]


def test_a_sweep_is_one_group_and_sent_again_it_stays_one(service: JobService) -> None:
    alone = service.submit(SWEEP[0], "ann")
    group, records, was_known = service.submit_group(SWEEP, "ann", key())
    assert not was_known
    first = records[0].spec["training"]["seed"]
    assert [record.spec["training"]["seed"] - first for record in records] == [0, 1, 0, 1]
    assert {record.group for record in records} == {group}
    assert alone.group is None
    ids = [record.id for record in records]
    assert ids == member_ids(group, 4)
    assert service.submit_group(SWEEP, "ann", key()) == (group, records, True)
    assert all_ids(service) == [*ids[::-1], alone.id]
    assert all_ids(service, group=group) == ids[::-1]
    assert all_ids(service, group=group, cursor=ids[2]) == ids[1::-1]
    assert all_ids(service, group=group, status=JobStatus.PAUSED) == []
    assert [record.id for record in service.group(group, "ann")] == ids
    with pytest.raises(NotFound):
        service.group(group, "bob")
    assert service.get(ids[0], "ann") == service.group(group, "ann")[0]
    asked = service.write_once.job(ids[0])
    assert asked is not None
    assert asked["group"] == group


def test_the_limit_holds_for_the_whole_before_any_is_accepted(service: JobService) -> None:
    first, _, _ = service.submit_group(SWEEP, "ann", key())
    with pytest.raises(TooManyJobs, match="than 6 unfinished"):
        service.submit_group(SWEEP, "ann")
    assert len(all_ids(service)) == 4
    service.submit_group(SWEEP[:2], "ann")
    assert len(all_ids(service)) == 6
    service.cancel_group(first, "ann")
    service.submit_group(SWEEP, "ann")


def test_a_sweep_with_one_bad_job_makes_none(service: JobService) -> None:
    gone = "ds-01ARZ3NDEKTSV4RRFFQ69G5FAV"
    bad = parse_sweep({"spec": {**SPEC, "data": {"source": "upload", "dataset": gone}}})
    with pytest.raises(Rejected):
        service.submit_group([*SWEEP, *bad], "ann", key())
    assert all_ids(service) == []
    assert service.job_store.begun("submitting", -1) == []
    assert service.job_store.references("ann") == {}
    _, records, was_known = service.submit_group(SWEEP, "ann", key())
    assert (len(records), was_known) == (4, False)


@pytest.mark.parametrize("written", range(4))
def test_an_attempt_that_broke_off_is_completed_by_the_next(
    service: JobService, monkeypatch: pytest.MonkeyPatch, written: int
) -> None:
    create, made = service.job_store.create, 0

    def break_off(*args: Any, **more: Any) -> bool:
        nonlocal made
        if made == written:
            raise Unavailable("Valkey", "gone")
        made += 1
        return create(*args, **more)

    monkeypatch.setattr(service.job_store, "create", break_off)
    with pytest.raises(Unavailable):
        service.submit_group(SWEEP, "ann", key())
    monkeypatch.undo()
    assert len(all_ids(service)) == written
    group, records, was_known = service.submit_group(SWEEP, "ann", key())
    assert not was_known
    assert all_ids(service) == all_ids(service, group=group) == [record.id for record in records][::-1]
    assert len(records) == 4


def test_a_group_is_cancelled_as_one(service: JobService) -> None:
    group, records, _ = service.submit_group(SWEEP, "ann")
    service.write_once.allocate_epoch(records[0].id, "w", "2026-01-01T00:00:00Z")
    assert service.job_store.claim(records[0].id, epoch=1, worker="w", lease_seconds=60)
    service.cancel(records[1].id, "ann")
    cancelled = service.cancel_group(group, "ann")
    assert [job.status for job in cancelled] == ["cancelling", "cancelled", "cancelled", "cancelled"]
    assert [job.id for job in cancelled] == [job.id for job in records]
    assert service.cancel_group(group, "ann") == service.group(group, "ann")
    with pytest.raises(NotFound):
        service.cancel_group(group, "bob")


def test_a_deleted_job_leaves_its_group_and_does_not_come_back(service: JobService) -> None:
    group, records, _ = service.submit_group(SWEEP, "ann", key())
    service.cancel_group(group, "ann")
    service.delete(records[1].id, "ann")
    left = [record.id for record in records if record is not records[1]]
    assert [record.id for record in service.group(group, "ann")] == left
    _, again, was_known = service.submit_group(SWEEP, "ann", key())
    assert (was_known, [record.id for record in again]) == (True, left)


def test_storage_restores_a_group_and_its_key(
    service: JobService, own_bucket: StorageSettings, queue_settings: QueueSettings
) -> None:
    group, records, _ = service.submit_group(SWEEP, "ann", key())
    client = service.job_store.client
    client.delete(*client.keys(f"{service.job_store.prefix}:*"))
    Rebuild.of(own_bucket, queue_settings).run()
    assert [record.id for record in service.group(group, "ann")] == [record.id for record in records]
    assert all_ids(service, group=group) == [record.id for record in records][::-1]
    again, found, _ = service.submit_group(SWEEP, "ann", key())
    assert (again, [record.id for record in found]) == (group, [record.id for record in records])
    assert len(all_ids(service)) == 4
    assert service.submit_group(SWEEP, "ann", key())[2], "the key is done again"


def test_a_job_of_an_earlier_release_belongs_to_no_group(service: JobService) -> None:
    record = service.submit(SWEEP[0], "ann")
    service.job_store.client.hdel(f"{service.job_store.prefix}:job:{record.id}", "group")
    assert service.get(record.id, "ann").group is None
    service.cancel(record.id, "ann")
    service.delete(record.id, "ann")
    assert all_ids(service) == []
