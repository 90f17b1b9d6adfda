"""Idempotency-Key and limits on real servers: whatever breaks on the way, one request makes one job."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import jobs.lifecycle.admission
from grpo_core.datasets import JsonlChecker
from grpo_core.spec import parse_spec
from jobs.auth.rate_limit import RateLimited
from jobs.errors import Rejected, Unavailable
from jobs.lifecycle.admission import InProgress, KeyReused, RequestKey, TooManyJobs
from jobs.service import JobService, ServiceSettings
from jobs.settings import QueueSettings, StorageSettings
from jobs.store import object_keys
from jobs.store.job import JobRecord, JobStatus
from tests.clock import patience

SPEC = parse_spec({"resources": {"gpus": 0}, "optimizer": {"name": "adamw_torch"}})
Make = Callable[..., JobService]


class CrashError(BaseException):
    """The process is gone: no handler runs."""


@pytest.fixture
def make(storage_settings: StorageSettings, queue_settings: QueueSettings) -> Make:
    """Each call is another API process, as after a restart; none is started, so nothing rings or sweeps."""

    def make(**settings: Any) -> JobService:
        return JobService(storage_settings, queue_settings, ServiceSettings.model_validate(settings))

    return make


@pytest.fixture
def service(make: Make) -> Iterator[JobService]:
    service = make()
    service.start()
    service.check_storage()
    yield service
    service.close()


def key(name: str = "k", body: str = "{}") -> RequestKey:
    return RequestKey.of("submitJob", name, body)


def job_ids(service: JobService) -> list[str]:
    return [record.id for record in service.list_jobs("ann", limit=100).items]


def test_the_same_request_gets_the_same_answer_also_from_another_process(service: JobService, make: Make) -> None:
    first, replayed = service.submit_once(SPEC, "ann", key())
    assert not replayed
    service.job_store.claim(first.id, epoch=1, worker="w", lease_seconds=60)
    again, replayed = make().submit_once(SPEC, "ann", key())
    assert replayed
    assert again == first, "the first answer, although a worker has the job by now"
    assert job_ids(service) == [first.id]
    memory = service.job_store.client.keys(f"{service.job_store.prefix}:idempotency:*")
    assert service.job_store.client.ttl(memory[0]) >= 24 * 3600


def test_another_body_is_refused_and_another_owner_is_another_matter(service: JobService) -> None:
    first, _ = service.submit_once(SPEC, "ann", key())
    with pytest.raises(KeyReused):
        service.submit_once(SPEC, "ann", key(body='{"name":"x"}'))
    other, replayed = service.submit_once(SPEC, "bob", key(body='{"name":"x"}'))
    assert (replayed, other.id != first.id) == (False, True)
    assert job_ids(service) == [first.id]


def test_forty_at_once_make_one_job(service: JobService) -> None:
    start = threading.Barrier(40)

    def submit(_: int) -> str:
        start.wait()
        while True:
            try:
                return service.submit_once(SPEC, "ann", key())[0].id
            except InProgress:
                time.sleep(0.05)

    with ThreadPoolExecutor(40) as pool:
        ids = set(pool.map(submit, range(40)))
    assert ids == set(job_ids(service))
    assert len(ids) == 1
    assert len([o for o in service.store.list(object_keys.JOBS) if o.key == object_keys.job(next(iter(ids)))]) == 1


def test_while_one_is_served_a_second_is_told_to_wait(service: JobService, monkeypatch: pytest.MonkeyPatch) -> None:
    put, seen = service.write_once.put_job, []

    def meanwhile(job_id: str, body: dict[str, Any]) -> bool:
        with pytest.raises(InProgress):
            service.submit_once(SPEC, "ann", key())
        with pytest.raises(KeyReused):
            service.submit_once(SPEC, "ann", key(body="[]"))
        seen.append(job_id)
        return put(job_id, body)

    monkeypatch.setattr(service.write_once, "put_job", meanwhile)
    assert service.submit_once(SPEC, "ann", key())[0].id == seen[0]


def submit_when_free(service: JobService) -> tuple[JobRecord, bool]:
    """Submit once the key is no longer held for an attempt that died."""
    deadline = time.monotonic() + patience(10)
    while True:
        try:
            return service.submit_once(SPEC, "ann", key())
        except InProgress:
            assert time.monotonic() < deadline
            time.sleep(0.05)


@pytest.mark.parametrize("where", ["before job.json", "after job.json", "after the record"])
def test_a_crash_anywhere_is_completed_by_the_retry(
    service: JobService, make: Make, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    second = make()
    monkeypatch.setattr(jobs.lifecycle.admission, "HOLD_SECONDS", 3.0)
    put, create, tried = service.write_once.put_job, service.job_store.create, []

    def put_job(job_id: str, body: dict[str, Any]) -> bool:
        tried.append(job_id)
        if where == "before job.json":
            raise CrashError
        return put(job_id, body)

    def create_record(*arguments: Any, **more: Any) -> bool:
        if where == "after the record":
            create(*arguments, **more)
        raise CrashError

    monkeypatch.setattr(service.write_once, "put_job", put_job)
    monkeypatch.setattr(service.job_store, "create", create_record)
    with pytest.raises(CrashError):
        service.submit_once(SPEC, "ann", key())

    if where != "after the record":
        with pytest.raises(InProgress):
            second.submit_once(SPEC, "ann", key())
    record, replayed = submit_when_free(second)
    assert record.id == tried[0], "the very job that was begun"
    assert replayed is (where == "after the record")
    assert job_ids(second) == [record.id]
    asked = second.store.get_json(object_keys.job(record.id))
    assert asked is not None
    assert asked["created_at"] == record.created_at.isoformat()
    assert [event["data"] for event in second.events(record.id, "ann")] == [{"status": "queued"}]


@pytest.mark.parametrize("taken", [False, True])
def test_a_server_that_was_away_leaves_the_key_to_the_next_try(
    service: JobService, monkeypatch: pytest.MonkeyPatch, taken: bool
) -> None:
    create = service.job_store.create

    def lost(*arguments: Any, **more: Any) -> bool:
        if taken:  # it was done, and only the answer was lost
            create(*arguments, **more)
        raise Unavailable("Valkey", "TimeoutError")

    monkeypatch.setattr(service.job_store, "create", lost)
    with pytest.raises(Unavailable):
        service.submit_once(SPEC, "ann", key())
    monkeypatch.undo()
    record, replayed = service.submit_once(SPEC, "ann", key())
    assert replayed is taken
    assert job_ids(service) == [record.id]
    assert service.store.get_json(object_keys.job(record.id)) is not None


def test_a_refused_request_leaves_its_key_unused(service: JobService) -> None:
    absent = parse_spec({"data": {"source": "upload", "dataset": "ds-01ARZ3NDEKTSV4RRFFQ69G5FAV"}})
    with pytest.raises(Rejected):
        service.submit_once(absent, "ann", key())
    assert not service.submit_once(SPEC, "ann", key(body='{"mended":1}'))[1]


def test_an_upload_sent_twice_is_stored_once(service: JobService, tmp_path: Path) -> None:
    text = b'{"question": "1+1", "answer": "2"}\n'
    (tmp_path / "rows.jsonl").write_bytes(text)
    checker = JsonlChecker()
    checker.feed(text)
    request = RequestKey.of("uploadDataset", "k", "hash")
    store = service.datasets.put
    summary = checker.finish()

    def cut_off(*arguments: Any, **options: Any) -> Any:
        store(*arguments, **options)
        raise Unavailable("Valkey", "TimeoutError")

    service.datasets.put = cut_off  # type: ignore[method-assign]
    with pytest.raises(Unavailable):
        service.store_dataset(tmp_path / "rows.jsonl", summary, "ann", None, request)
    service.datasets.put = store  # type: ignore[method-assign]
    first, replayed = service.store_dataset(tmp_path / "rows.jsonl", summary, "ann", None, request)
    again, replayed_then = service.store_dataset(tmp_path / "rows.jsonl", summary, "ann", None, request)
    assert (replayed, replayed_then, again) == (False, True, first)
    with pytest.raises(KeyReused):
        service.store_dataset(
            tmp_path / "rows.jsonl", summary, "ann", None, RequestKey.of("uploadDataset", "k", "other")
        )


def test_an_owner_has_so_many_unfinished_jobs_and_no_more(make: Make) -> None:
    service = make(max_owner_jobs=3)
    service.store.ensure_ready()
    ids = [service.submit(SPEC, "ann").id for _ in range(3)]
    service.job_store.claim(ids[0], epoch=1, worker="w", lease_seconds=60)
    with pytest.raises(TooManyJobs, match="3 unfinished jobs"):
        service.submit(SPEC, "ann")
    service.submit(SPEC, "bob")
    repeated = make(max_owner_jobs=4)
    first, _ = repeated.submit_once(SPEC, "ann", key())
    assert repeated.submit_once(SPEC, "ann", key()) == (first, True), "a repeated request takes no place"
    service.cancel(ids[1], "ann")
    service.cancel(ids[2], "ann")
    assert service.submit(SPEC, "ann").status is JobStatus.QUEUED


def test_the_last_places_in_the_queue_are_given_once(make: Make) -> None:
    service = make(max_queued_jobs=5)
    service.store.ensure_ready()
    start = threading.Barrier(20)

    def submit(number: int) -> str:
        start.wait()
        try:
            service.submit(SPEC, f"owner{number % 3}")
        except TooManyJobs:
            return "full"
        return "accepted"

    with ThreadPoolExecutor(20) as pool:
        assert Counter(pool.map(submit, range(20))) == {"accepted": 5, "full": 15}
    assert service.job_store.client.zcard(f"{service.job_store.prefix}:queued") == 5


def test_a_key_may_send_so_many_requests_a_second(make: Make) -> None:
    service = make(requests_per_second=5, requests_burst=4)
    service.store.ensure_ready()
    ann, _ = service.keys.create("ann")
    other, _ = service.keys.create("ann")

    def empty(key: str) -> tuple[int, float, float]:
        """How many are let in until one is not, how long that took, and how long to wait then."""
        began, count = time.monotonic(), 0
        while True:
            try:
                service.authenticate(key)
            except RateLimited as limited:
                return count, time.monotonic() - began, limited.seconds
            count += 1

    for key_of_one in (ann, other):  # each has its own
        count, seconds, wait = empty(key_of_one)
        assert 4 <= count <= 4 + seconds * 5 + 1
        assert 0 < wait <= 0.2
    time.sleep(1)
    assert empty(ann)[0] >= 4, "it has filled up again"
