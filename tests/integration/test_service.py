"""The facade on real servers: what is accepted is written down, and states change only as they may."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from grpo_core.datasets import JsonlChecker
from grpo_core.spec import SPEC_FORMAT, parse_spec
from jobs.errors import Conflict, NotFound, Rejected
from jobs.read.queue_position import QueuePosition, WaitReason
from jobs.service import JobService
from jobs.store import object_keys
from jobs.store.datasets import DatasetRecord
from jobs.store.job import JobStatus
from jobs.store.workers import WorkerInfo

CPU = {"resources": {"gpus": 0}, "optimizer": {"name": "adamw_torch"}}


def submit(service: JobService, owner: str = "ann", **fields: object):
    return service.submit(parse_spec({**CPU, **fields}), owner)


ROWS = b'{"question": "1+1", "answer": "2"}\n' * 3


def upload(service: JobService, tmp_path: Path, owner: str = "ann", text: bytes = ROWS):
    checker = JsonlChecker()
    checker.feed(text)
    (tmp_path / "rows.jsonl").write_bytes(text)
    return service.store_dataset(tmp_path / "rows.jsonl", checker.finish(), owner, "sums")[0]


def test_a_submitted_job_is_in_the_bucket_and_in_the_job_store(service: JobService) -> None:
    job = submit(service, name="first", metadata={"team": "a"})
    asked = service.store.get_json(object_keys.job(job.id))
    assert asked is not None
    assert asked["spec"] == job.spec
    read = service.get(job.id, "ann")
    assert (read.status, read.name, read.metadata, read.total_steps) == (JobStatus.QUEUED, "first", {"team": "a"}, 250)
    assert read.spec == job.spec
    assert [event["data"] for event in service.events(job.id, "ann")] == [{"status": "queued"}]


def test_another_owner_sees_nothing(service: JobService, tmp_path: Path) -> None:
    job = submit(service)
    dataset = upload(service, tmp_path)
    for look in (service.get, service.cancel, service.events, service.metrics, service.artifacts):
        with pytest.raises(NotFound):
            look(job.id, "bob")
    with pytest.raises(NotFound):
        service.get_dataset(dataset.id, "bob")
    assert service.list_jobs("bob", limit=10).items == []


def test_a_service_knows_whether_any_worker_has_a_gpu(service: JobService) -> None:
    prefix = service._queue_settings.prefix
    assert not service.has_only_cpu_workers(), "there is none"
    cpu = WorkerInfo(name="a", queues=[f"{prefix}.cpu", f"{prefix}.cpu.f2"], device="CPU")
    service.workers.announce(cpu)
    assert service.has_only_cpu_workers()
    service.workers.announce(WorkerInfo(name="b", queues=[f"{prefix}.gpu1"], device="NVIDIA H200"))
    assert not service.has_only_cpu_workers()


def test_a_page_that_finds_too_few_leads_on(service: JobService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.service.MAX_SCANS", 2)
    monkeypatch.setattr("jobs.service.LIST_SCAN", 2)
    ids = [submit(service, metadata={"first": str(number == 0)}).id for number in range(9)]
    seen, cursor = [], None
    for _ in range(3):
        page = service.list_jobs("ann", limit=3, cursor=cursor, metadata={"first": "True"})
        seen.append([job.id for job in page.items])
        cursor = page.next_cursor
    assert (seen, cursor) == ([[], [], [ids[0]]], None)


@pytest.mark.parametrize(
    ("changes", "pointer"),
    [
        ({"sampling": {"prompts_per_step": 4}}, "/sampling/prompts_per_step"),
        ({"evaluation": {"questions": 2}}, "/evaluation/questions"),
        ({"evaluation": {"questions": 1}, "sampling": {"prompts_per_step": 3}}, "/sampling/prompts_per_step"),
        ({"data": {"max_rows": 50}, "sampling": {"prompts_per_step": 4}}, "/sampling/prompts_per_step"),
        ({"data": {"max_rows": 3}, "sampling": {"prompts_per_step": 3}}, None),
        ({"evaluation": {"questions": 1}, "sampling": {"prompts_per_step": 2}}, None),
    ],
)
def test_an_upload_must_fill_a_step(
    service: JobService, tmp_path: Path, changes: dict[str, Any], pointer: str | None
) -> None:
    data = {"source": "upload", "dataset": upload(service, tmp_path).id, **changes.get("data", {})}
    if pointer is None:
        assert submit(service, **{**changes, "data": data}).status is JobStatus.QUEUED
        return
    with pytest.raises(Rejected) as refused:
        submit(service, **{**changes, "data": data})
    assert [problem.pointer for problem in refused.value.problems] == [pointer]


def test_lists_page_newest_first_and_filter(service: JobService) -> None:
    ids = [submit(service, metadata={"parity": str(number % 2)}).id for number in range(7)]
    seen, cursor = [], None
    while True:
        page = service.list_jobs("ann", limit=3, cursor=cursor)
        seen += [job.id for job in page.items]
        cursor = page.next_cursor
        if cursor is None:
            break
    assert seen == sorted(ids, reverse=True)
    odd = service.list_jobs("ann", limit=2, metadata={"parity": "1"})
    assert [job.metadata["parity"] for job in odd.items] == ["1", "1"]
    assert odd.next_cursor is not None
    service.cancel(ids[0], "ann")
    assert [job.id for job in service.list_jobs("ann", limit=9, status=JobStatus.CANCELLED).items] == [ids[0]]
    assert ids[0] not in [job.id for job in service.list_jobs("ann", limit=9, status=JobStatus.QUEUED).items]


def test_cancelling_a_queued_job_ends_it_for_good(service: JobService) -> None:
    job = submit(service)
    assert service.cancel(job.id, "ann").status is JobStatus.CANCELLED
    outcome = service.write_once.outcome(job.id)
    assert outcome is not None
    assert outcome.status == "cancelled"
    assert service.store.get_json(object_keys.control(job.id, 1)) is not None
    with pytest.raises(Conflict, match="cancelled"):
        service.cancel(job.id, "ann")
    assert not service.job_store.claim(job.id, epoch=1, worker="w", lease_seconds=60)


def test_cancelling_a_running_job_asks_its_worker(service: JobService) -> None:
    job = submit(service)
    assert service.job_store.claim(job.id, epoch=1, worker="w", lease_seconds=60)
    assert service.cancel(job.id, "ann").status is JobStatus.CANCELLING
    assert service.cancel(job.id, "ann").status is JobStatus.CANCELLING, "asking twice is asking once"


def test_an_upload_must_exist_and_have_the_columns(service: JobService, tmp_path: Path) -> None:
    dataset = upload(service, tmp_path)
    submit(service, data={"source": "upload", "dataset": dataset.id})
    with pytest.raises(Rejected) as raised:
        submit(service, data={"source": "upload", "dataset": dataset.id, "question_column": "frage"})
    (problem,) = raised.value.problems
    assert problem.pointer == "/data/question_column"
    assert "question, answer" in problem.remedy
    with pytest.raises(Rejected) as raised:
        submit(service, "bob", data={"source": "upload", "dataset": dataset.id})
    assert raised.value.problems[0].pointer == "/data/dataset"
    with pytest.raises(Rejected, match="POST /datasets"):
        submit(service, data={"source": "file", "dataset": "/etc/passwd"})


def test_a_dry_run_knows_the_size_of_the_data_set(service: JobService, tmp_path: Path) -> None:
    dataset = upload(service, tmp_path)
    spec = parse_spec({**CPU, "training": {"steps": 6}, "data": {"source": "upload", "dataset": dataset.id}})
    assert service.preview(spec, "ann").estimate.epoch_share == 6 / dataset.rows
    assert service.preview(parse_spec(CPU), "ann").estimate.epoch_share is None, "nobody counts the hub's rows"


def test_a_dry_run_looks_at_the_rows(service: JobService, tmp_path: Path) -> None:
    path = tmp_path / "gsm8k.jsonl"
    path.write_text('{"question": "How many apples are there?", "answer": "3+4=7\\n#### 7"}\n' * 5)
    checker = JsonlChecker()
    checker.feed(path.read_bytes())
    dataset = service.datasets.put(path, checker.finish(), "ann", None)
    spec = parse_spec({**CPU, "data": {"source": "upload", "dataset": dataset.id}})
    codes = [warning.code for warning in service.preview(spec, "ann").warnings]
    assert codes[-2:] == ["prompt_in_other_language", "answers_hold_solutions"]


def test_a_dry_run_reads_the_description_of_an_upload_once(
    service: JobService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = upload(service, tmp_path)
    read: list[str] = []
    get = service.datasets.get

    def noted(dataset_id: str, owner: str) -> DatasetRecord:
        read.append(dataset_id)
        return get(dataset_id, owner)

    monkeypatch.setattr(service.datasets, "get", noted)
    service.preview(parse_spec({**CPU, "data": {"source": "upload", "dataset": dataset.id}}), "ann")
    assert read == [dataset.id]


def test_a_queued_job_has_a_place_among_those_that_wait(service: JobService) -> None:
    jobs = [submit(service, owner) for owner in ("ann", "bob", "ann")]
    queue = jobs[0].queue

    def place(ahead: int, workers: int) -> QueuePosition:
        reason = WaitReason.TURN if workers else WaitReason.NO_WORKER
        newest = SPEC_FORMAT if workers else None
        hosts: dict[str, Any] = {"hosts": 1, "gpus": 0, "hosts_found": None}
        formats: dict[str, Any] = {"spec_format": 1, "workers_spec_format": newest}
        return QueuePosition(queue=queue, ahead=ahead, workers=workers, reason=reason, **formats, **hosts)

    assert [service.waiting(job) for job in jobs] == [place(n, workers=0) for n in range(3)]
    service.workers.announce(WorkerInfo(name="w1", queues=[queue], device="cpu", job=jobs[0].id))
    service.workers.announce(WorkerInfo(name="w2", queues=["another"], device="cpu"))
    assert service.job_store.claim(jobs[0].id, epoch=1, worker="w1", lease_seconds=60)
    assert service.waiting(jobs[0]) is None, "read before it was claimed"
    assert service.waiting(service.get(jobs[0].id, "ann")) is None
    assert service.waiting(jobs[2]) == place(1, workers=1)
    service.cancel(jobs[1].id, "bob")
    assert service.waiting(jobs[2]) == place(0, workers=1)
    # Who waits again, waits behind the others.
    service.pause(jobs[2].id, "ann")
    other = submit(service)
    resumed = service.resume(jobs[2].id, "ann")
    assert service.waiting(resumed) == place(1, workers=1)
    assert service.waiting(other) == place(0, workers=1)


def test_a_dry_run_says_that_no_worker_would_take_it(service: JobService) -> None:
    assert "no_worker" in [warning.code for warning in service.preview(parse_spec(CPU), "ann").warnings]


def test_keys_open_until_they_are_revoked_and_survive_the_loss_of_valkey(service: JobService) -> None:
    key, record = service.keys.create("ann", ["jobs:read"])
    found = service.authenticate(key)
    assert found is not None
    assert (found.owner, found.scopes) == ("ann", ["jobs:read"])
    service.job_store.client.delete(f"{service.job_store.prefix}:keys")
    assert service.authenticate(key) is not None
    service.keys.revoke(record.id)
    assert service.authenticate(key) is None
    service.job_store.client.delete(f"{service.job_store.prefix}:keys")
    assert service.authenticate(key) is None
    assert service.authenticate("grpo_nonsense") is None
    assert key not in str(service.store.get(object_keys.api_key(record.id)))


def end(service: JobService, job_id: str, owner: str = "ann") -> None:
    assert service.cancel(job_id, owner).status is JobStatus.CANCELLED


def test_data_sets_are_listed_newest_first_and_only_the_owner_s(service: JobService, tmp_path: Path) -> None:
    owner = f"lister-{tmp_path.name}"
    mine = [upload(service, tmp_path, owner).id for _ in range(3)]
    upload(service, tmp_path, "bob")
    first = service.list_datasets(owner, limit=2)
    assert [found.id for found in first.items] == mine[:0:-1]
    second = service.list_datasets(owner, limit=2, cursor=first.next_cursor)
    assert ([found.id for found in second.items], second.next_cursor) == (mine[:1], None)


def test_a_job_starts_only_from_a_checkpoint_that_is_there_and_fits(service: JobService) -> None:
    first = submit(service, lora={"rank": 16, "alpha": 16})
    assert service.write_once.allocate_epoch(first.id, "w", "2026-01-01T00:00:00+00:00") == 1
    prefix = f"{object_keys.run(first.id, 1)}checkpoints/step-000025/"

    def remedies(step: int, **fields: object) -> dict[str, str]:
        with pytest.raises(Rejected) as caught:
            submit(service, from_checkpoint={"job": first.id, "step": step}, **fields)
        return {problem.pointer: problem.remedy for problem in caught.value.problems}

    fits = {"lora": {"rank": 16, "alpha": 16}}
    assert remedies(25, **fits) == {
        "/from_checkpoint/step": "That job has no checkpoint yet; wait for its first.",
    }
    service.store.put_json(f"{prefix}manifest.json", {"v": 1, "step": 25, "files": []})
    assert remedies(24, **fits) == {"/from_checkpoint/step": "Use one of 25."}
    assert remedies(25, lora={"rank": 8, "alpha": 16}, model={"name": "a/b"}) == {
        "/lora/rank": "Use 16, as that job did.",
        "/model/name": 'Use "Qwen/Qwen2.5-7B-Instruct", as that job did.',
    }
    modules = [*reversed(first.spec["lora"]["target_modules"])]
    again = submit(
        service,
        from_checkpoint={"job": first.id, "step": 25},
        lora={"rank": 16, "alpha": 16, "target_modules": modules},
    )
    assert again.status is JobStatus.QUEUED


@pytest.mark.parametrize("owner", ["", "bob smith", "bob/x", "bob:queued", "b" * 101])
def test_a_key_needs_an_owner(service: JobService, owner: str) -> None:
    with pytest.raises(ValueError, match="not a valid name"):
        service.keys.create(owner)
