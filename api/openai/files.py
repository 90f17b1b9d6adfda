"""OpenAI's routes of files, /v1/files: data sets, and the metrics of ended jobs as files of results.

Owns the form of these answers; a file is a data set (`ds-...`), and a job's metrics are the file `file-` with the rest
of the job's id. Invariant: an id that can be neither never reaches the service.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Iterator
from typing import Annotated, Any, BinaryIO, Final, Literal

from litestar import Request, Response, Router, delete, get, post
from litestar.concurrency import sync_to_thread
from litestar.di import NamedDependency, Provide
from litestar.openapi import ResponseSpec
from litestar.params import PathParameter, QueryParameter, SkipValidation
from litestar.response import Stream

from api import metric_table
from api.audit import audited
from api.auth import scope
from api.dependencies import KeyId, Owner, Service
from api.idempotency import REPLAYED
from api.openai.errors import missing, refusal, responses
from api.openai.multipart import PURPOSES, ReceivedFile, body_limit, receive_file
from api.openai.objects import (
    METRIC_NAMES,
    OpenAIDeletedFile,
    OpenAIFile,
    OpenAIFileList,
    first_id,
    last_id,
    seconds,
)
from api.openai.repeats import request_key
from grpo_core.spec.sections import DATASET_ID, ULID
from jobs.errors import NotFound
from jobs.store.datasets import DatasetRecord
from jobs.store.job import TERMINAL, JobRecord

FILE_ID: Final = rf"^(ds|file)-{ULID}$"
RESULTS: Final = "fine-tune-results"
CONTENT: Final = "application/octet-stream"
_CHUNK: Final = 1024**2

FileId = Annotated[str, PathParameter(description="One of your files", schema_extra={"pattern": FILE_ID})]
Received = NamedDependency[SkipValidation[ReceivedFile]]


@post(
    "/",
    operation_id="createOpenAIFile",
    summary="Upload a data set, as with OpenAI's SDK",
    opt=scope("datasets:write"),
    status_code=200,
    dependencies={"received": Provide(receive_file)},
    response_description="Every line was read and the file is stored",
    responses=responses(
        *("bad_request", "bad_query", "rejected", "body_too_large", "too_many_uploads", "no_room"),
        *("unsupported_media_type", "idempotency_in_progress", "storage_quota"),
    ),
)
async def create_file(
    request: Request[Any, Any, Any], received: Received, owner: Owner, key_id: KeyId, service: Service
) -> Response[OpenAIFile]:
    """Store a JSONL file of rows: the fields `file` and `purpose` (`fine-tune`, `evals` or `user_data`) as a form."""
    summary = received.summary
    body = f"{summary.sha256}\n{received.purpose}\n{received.filename}"

    def store() -> tuple[DatasetRecord, bool]:
        return request_key(request, service, owner, key_id, body).run(
            lambda once: service.store_dataset(
                received.path, summary, owner, received.filename, once, purpose=received.purpose
            )
        )

    record, replayed = await sync_to_thread(store)
    headers = {"Location": f"/datasets/{record.id}", **(REPLAYED if replayed else {})}
    return Response(file_of(record, received.purpose), status_code=200, headers=headers)


@get(
    "/",
    operation_id="listOpenAIFiles",
    summary="List your data sets, as with OpenAI's SDK",
    opt=scope("jobs:read"),
    responses=responses("bad_query"),
    sync_to_thread=True,
)
def list_files(
    owner: Owner,
    service: Service,
    limit: Annotated[int, QueryParameter(ge=1, le=10_000, description="Files per page; a page has at most 100")] = 100,
    after: Annotated[
        str | None, QueryParameter(description="The last id of the previous page", schema_extra={"pattern": FILE_ID})
    ] = None,
    order: Annotated[Literal["asc", "desc"], QueryParameter(description="By the time of the upload")] = "desc",
    purpose: Annotated[
        str | None, QueryParameter(min_length=1, max_length=64, description="Only files with this purpose")
    ] = None,
) -> OpenAIFileList:
    """One page of the caller's uploads."""
    if after is not None and not re.fullmatch(DATASET_ID, after):
        raise refusal("after", "invalid_value", "is not the id of a file of this list", "Send the last id you read.")
    page = service.list_files(owner, limit=min(limit, 100), after=after, oldest_first=order == "asc", purpose=purpose)
    data = [file_of(record, known) for record, known in page.items]
    return OpenAIFileList(
        data=data, has_more=page.next_cursor is not None, first_id=first_id(data), last_id=last_id(data)
    )


@get(
    "/{file_id:str}",
    operation_id="getOpenAIFile",
    summary="Look at a file, as with OpenAI's SDK",
    opt=scope("jobs:read"),
    responses=responses("bad_query", "not_found"),
    sync_to_thread=True,
)
def get_file(file_id: FileId, owner: Owner, service: Service) -> OpenAIFile:
    """An upload, or a job's file of results."""
    job = _job_of(file_id, owner, service)
    if job is not None:
        return _results_file(job, len(_table(job, service)))
    record = _dataset(file_id, owner, service)
    return file_of(record, service.purpose_of(record))


@delete(
    "/{file_id:str}",
    operation_id="deleteOpenAIFile",
    summary="Delete a file, as with OpenAI's SDK",
    opt=scope("datasets:write"),
    status_code=200,
    response_description="It is gone",
    responses=responses("bad_query", "not_found", "conflict"),
    sync_to_thread=True,
)
def delete_file(file_id: FileId, owner: Owner, service: Service) -> OpenAIDeletedFile:
    """Delete an upload that no unfinished job names. This cannot be undone."""
    if _job_of(file_id, owner, service) is not None:
        remedy = "Delete the job, with DELETE /jobs/ID or `grpo delete`."
        raise refusal("file_id", "conflict", "belongs to its job", remedy)
    _dataset(file_id, owner, service)
    service.delete_dataset(file_id, owner)
    return OpenAIDeletedFile(id=file_id)


@get(
    "/{file_id:str}/content",
    operation_id="getOpenAIFileContent",
    summary="Download a file, as with OpenAI's SDK",
    opt={**scope("jobs:read"), **audited("getOpenAIFileContent")},
    responses={
        200: ResponseSpec(bytes, generate_examples=False, description="The file's bytes", media_type=CONTENT),
        **responses("bad_query", "not_found"),
    },
)
async def get_content(file_id: FileId, owner: Owner, service: Service) -> Response[Any]:
    """The rows of an upload as JSON lines, or a job's metrics as CSV."""
    job = await sync_to_thread(_job_of, file_id, owner, service)
    if job is not None:
        body: Any = await sync_to_thread(_table, job, service)
        return Response(body, media_type=CONTENT)

    def open_rows() -> tuple[DatasetRecord, BinaryIO]:
        _dataset(file_id, owner, service)
        return service.open_dataset(file_id, owner)

    record, rows = await sync_to_thread(open_rows)
    return Stream(_chunks(rows), media_type=CONTENT, headers={"Content-Length": str(record.bytes)})


async def _chunks(rows: BinaryIO) -> AsyncIterator[bytes]:
    with rows:
        while chunk := await sync_to_thread(rows.read, _CHUNK):
            yield chunk


def file_of(record: DatasetRecord, purpose: str) -> OpenAIFile:
    """A data set as OpenAI's file."""
    return OpenAIFile(
        id=record.id,
        bytes=record.bytes,
        created_at=seconds(record.created_at),
        filename=record.name or f"{record.id}.jsonl",
        purpose=purpose if purpose in PURPOSES else "fine-tune",
    )


def results_of(job: JobRecord) -> list[str]:
    """The ids of a job's files of results."""
    return [f"file-{job.id.removeprefix('job-')}"] if job.status in TERMINAL and job.step else []


def _job_of(file_id: str, owner: str, service: Any) -> JobRecord | None:
    """The job whose results these are; None for a data set."""
    if not re.fullmatch(FILE_ID, file_id):
        raise _no_such_file(file_id)
    if not file_id.startswith("file-"):
        return None
    try:
        job = service.get(f"job-{file_id.removeprefix('file-')}", owner)
    except NotFound as error:
        raise _no_such_file(file_id) from error
    if not results_of(job):
        raise _no_such_file(file_id)
    return job


def _dataset(file_id: str, owner: str, service: Any) -> DatasetRecord:
    try:
        return service.get_dataset(file_id, owner)
    except NotFound as error:
        raise _no_such_file(file_id) from error


def _no_such_file(file_id: str) -> Exception:
    return missing("id", f"No such File object: {file_id[:80]}")


def _results_file(job: JobRecord, size: int) -> OpenAIFile:
    return OpenAIFile(
        id=results_of(job)[0],
        bytes=size,
        created_at=seconds(job.finished_at or job.updated_at),
        filename="step_metrics.csv",
        purpose=RESULTS,
    )


def _table(job: JobRecord, service: Any) -> bytes:
    rewards = job.spec["rewards"]
    names = dict.fromkeys([*rewards["weights"], *rewards.get("graders", {})])
    lines = metric_table.to_csv(service.metrics(job.id, job.owner), names)
    return "".join(_with_openais_names(lines)).encode()


def _with_openais_names(parts: Iterator[str]) -> Iterator[str]:
    for number, part in enumerate(parts):
        if number:
            yield part
            continue
        header, end, rest = part.partition("\r\n")
        yield ",".join(METRIC_NAMES.get(name, name) for name in header.split(",")) + end + rest


def router(max_dataset_bytes: int) -> Router:
    """The routes, with this limit of bytes for a file."""
    return Router(
        "/v1/files",
        route_handlers=[create_file, list_files, get_file, delete_file, get_content],
        request_max_body_size=body_limit(max_dataset_bytes),
        tags=["OpenAI"],
    )
