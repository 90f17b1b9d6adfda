"""Data sets by `s3://` on a real object store: what an operator allowed can be used, and nothing of the service's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError

import jobs.store.bucket
import jobs.store.s3_datasets
from grpo_core.datasets import DatasetError, DatasetTooLargeError
from grpo_core.spec import SpecError, parse_spec
from jobs.errors import Denied, Rejected, Unavailable
from jobs.service import JobService
from jobs.settings import QueueSettings, StorageSettings
from jobs.store import object_keys
from jobs.store.bucket import ObjectStore
from jobs.store.job import JobRecord
from jobs.store.s3_datasets import S3Datasets, SourceSettings

CPU = {"resources": {"gpus": 0}, "optimizer": {"name": "adamw_torch"}}
ROWS = b'{"question": "1+1", "answer": "2"}\n{"question": "1+2", "answer": 3}\n'
OTHER = "team-data"


@pytest.fixture
def sources(storage_settings: StorageSettings) -> S3Datasets:
    return S3Datasets(
        storage_settings, SourceSettings.model_validate({"buckets": f"{OTHER}, {storage_settings.bucket}"})
    )


@pytest.fixture
def service(storage_settings: StorageSettings, queue_settings: QueueSettings, prefix: str) -> tuple[JobService, str]:
    """A service, and a place in its own bucket that jobs may read."""
    settings = SourceSettings.model_validate({"buckets": f"{OTHER},{storage_settings.bucket}"})
    service = JobService(storage_settings, queue_settings, sources=settings)
    service.store.ensure_ready()
    return service, f"s3://{service.store.bucket}/data/{prefix}"


@pytest.fixture
def other(storage_settings: StorageSettings) -> ObjectStore:
    bucket = ObjectStore(storage_settings.model_copy(update={"bucket": OTHER}))
    bucket.ensure_ready()
    return bucket


def submit(service: JobService, url: str) -> JobRecord:
    return service.submit(parse_spec({**CPU, "data": {"source": "s3", "dataset": url}}), "ann")


def key_of(url: str) -> str:
    return url.removeprefix("s3://").partition("/")[2]


def test_what_the_operator_put_there_is_accepted_and_fetched(
    service: tuple[JobService, str], other: ObjectStore, tmp_path: Path
) -> None:
    jobs_service, place = service
    jobs_service.store.put(key_of(f"{place}/rows.jsonl"), ROWS)
    other.put("gsm8k/rows.jsonl", ROWS)
    for url in (f"{place}/rows.jsonl", f"s3://{OTHER}/gsm8k/rows.jsonl"):
        job = submit(jobs_service, url)
        data = parse_spec(job.spec).data
        assert (data.dataset, data.question_column, data.answer_column) == (url, "question", "answer")
        target = tmp_path / "dataset.jsonl"
        jobs_service.datasets.fetch(data, "ann", target)
        assert target.read_bytes() == ROWS


def test_what_is_not_there_or_too_large_is_refused_at_once(
    service: tuple[JobService, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs_service, place = service
    with pytest.raises(Rejected, match="does not exist"):
        submit(jobs_service, f"{place}/absent.jsonl")
    jobs_service.store.put(key_of(f"{place}/rows.jsonl"), ROWS)
    monkeypatch.setattr(jobs.store.s3_datasets, "MAX_BYTES", len(ROWS) - 1)
    with pytest.raises(Rejected, match="at most"):
        submit(jobs_service, f"{place}/rows.jsonl")


@pytest.mark.parametrize(
    "key",
    [
        "jobs/{job}/job.json",
        "datasets/ds-01ARZ3NDEKTSV4RRFFQ69G5FAV/data.jsonl",
        "keys/key-01ARZ3NDEKTSV4RRFFQ69G5FAV.json",
        "probe/x",
        "rows.jsonl",
        "database/rows.jsonl",
    ],
)
def test_the_services_own_objects_are_out_of_reach(
    service: tuple[JobService, str], sources: S3Datasets, tmp_path: Path, key: str
) -> None:
    jobs_service, _ = service
    job = jobs_service.submit(parse_spec(CPU), "bob")
    url = f"s3://{jobs_service.store.bucket}/{key.format(job=job.id)}"
    with pytest.raises(Rejected, match="is not below"):
        submit(jobs_service, url)
    with pytest.raises(DatasetError, match="is not below"):  # a worker does not trust the API's check
        sources.fetch(url, tmp_path / "x")
    with pytest.raises(Rejected, match="is not below"):
        submit(jobs_service, "s3://somebody-elses/rows.jsonl")


@pytest.mark.parametrize(
    "name",
    [
        "s3://bucket/data/../jobs/x",
        "s3://bucket/data/./x",
        "s3://bucket/data//x",
        "s3://bucket/../x",
        "s3://bucket/data/..",
        "s3://bucket/data/",
        "s3://bucket",
        "s3://bucket/",
        "s3://b/x",
        "s3://BUCKET/x",
        "s3://user:secret@bucket/x",
        "s3://bucket/a%2e%2e/x",
        "s3://bucket/a\\x",
        "s3://bucket/a b",
        "s3://bucket/a\nb",
        "s3://bucket/x\n",
        "S3://bucket/x",
        "http://bucket/x",
        "s3:///x",
        "s3://bucket/x?versionId=1",
        "s3://arn:aws:s3:eu-west-1:1:accesspoint/x/y",
    ],
)
def test_what_is_no_plain_address_is_refused_by_the_spec(name: str, sources: S3Datasets, tmp_path: Path) -> None:
    with pytest.raises(SpecError) as caught:
        parse_spec({**CPU, "data": {"source": "s3", "dataset": name}})
    assert [(problem.pointer, problem.code) for problem in caught.value.problems] == [("/data/dataset", "bad_name")]
    with pytest.raises(DatasetError):
        sources.fetch(name, tmp_path / "x")


@pytest.mark.parametrize(
    ("rows", "code"),
    [
        (b"{}\n{", "bad_json"),
        (b"", "empty"),
        (b'{"question": null}\n', "no_columns"),
        (b"x" * 300_000, "line_too_long"),
    ],
)
def test_a_fetched_object_is_checked_as_an_upload_is(
    service: tuple[JobService, str], tmp_path: Path, rows: bytes, code: str
) -> None:
    jobs_service, place = service
    jobs_service.store.put(key_of(f"{place}/rows.jsonl"), rows)
    with pytest.raises(DatasetError) as caught:
        jobs_service.datasets.sources.fetch(f"{place}/rows.jsonl", tmp_path / "rows.jsonl")
    assert caught.value.code == code


def test_an_object_that_grew_after_the_job_was_accepted(
    service: tuple[JobService, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs_service, place = service
    jobs_service.store.put(key_of(f"{place}/rows.jsonl"), ROWS)
    monkeypatch.setattr(jobs.store.s3_datasets, "MAX_BYTES", len(ROWS) - 1)
    with pytest.raises(DatasetTooLargeError):
        jobs_service.datasets.sources.fetch(f"{place}/rows.jsonl", tmp_path / "rows.jsonl")
    assert not (tmp_path / "rows.jsonl").exists()


def test_what_we_may_not_read_is_left_to_the_worker_and_said_there(
    service: tuple[JobService, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs_service, place = service

    def denied(*_: Any) -> Any:
        raise Denied(403)

    monkeypatch.setattr(ObjectStore, "head", denied)
    submit(jobs_service, f"{place}/rows.jsonl")
    with pytest.raises(DatasetError, match="s3:GetObject"):
        jobs_service.datasets.sources.fetch(f"{place}/rows.jsonl", tmp_path / "x")


@pytest.mark.parametrize(("status", "meaning"), [(403, Denied), (301, Denied), (500, Unavailable), (503, Unavailable)])
def test_a_refusal_is_for_good_and_a_fault_is_not(status: int, meaning: type[Exception]) -> None:
    error = ClientError({"ResponseMetadata": {"HTTPStatusCode": status}}, "GetObject")  # type: ignore[typeddict-item]
    assert isinstance(jobs.store.bucket._meaning(error), meaning)


def test_no_setting_allows_nothing_but_the_own_folder(storage_settings: StorageSettings) -> None:
    sources = S3Datasets(storage_settings, SourceSettings.model_validate({}))
    assert "is not below s3://" in sources.check(f"s3://{OTHER}/x")[0].detail
    assert sources.check(f"s3://{storage_settings.bucket}/{object_keys.JOBS}x")[0].code == "not_allowed"
