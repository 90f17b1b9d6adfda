"""The routes below /datasets: upload a file, preview its rows as prompts; list, read and delete data sets.

Uploads are streamed and never held in memory as a whole.
"""

from __future__ import annotations

import re
from typing import Annotated, Any

from litestar import Request, Response, Router, delete, get, post
from litestar.concurrency import sync_to_thread
from litestar.connection import ASGIConnection
from litestar.di import NamedDependency, Provide
from litestar.handlers import BaseRouteHandler
from litestar.params import PathParameter, QueryParameter, SkipValidation

from api.auth import scope
from api.bodies import JSON_ERRORS, Upload, read_spec, receive_dataset
from api.dependencies import IsOperator, Owner, Searches, Service, searches_of
from api.fields import Fields
from api.idempotency import REPLAYED, Once, created_headers, upload_key
from api.lists import answer, encoded
from api.problems import ApiError, bad_parameter, responses
from api.queries import bad_query
from api.schemas import (
    Dataset,
    DatasetList,
    DatasetPreview,
    DatasetRow,
    Job,
    JobList,
    RowList,
    dataset_of,
    job_of,
    preview_of,
)
from grpo_core.spec import DATASET_ID, JOB_ID, JobSpec
from jobs.errors import BadCursor, NotFound
from jobs.store.row_files import Place

DatasetId = Annotated[str, PathParameter(description="One of your data sets", schema_extra={"pattern": DATASET_ID})]
Spec = NamedDependency[SkipValidation[JobSpec]]
Received = NamedDependency[SkipValidation[Upload]]


async def check_id(connection: ASGIConnection[Any, Any, Any, Any], _handler: BaseRouteHandler) -> None:
    """Guard: answer 404 for anything that cannot be the id of a data set."""
    dataset_id = connection.path_params.get("dataset_id")
    if dataset_id is not None and not re.fullmatch(DATASET_ID, dataset_id):
        raise NotFound("data set", dataset_id[:80])


@post(
    "/",
    operation_id="uploadDataset",
    summary="Upload a data set",
    opt=scope("datasets:write"),
    dependencies={"upload": Provide(receive_dataset), "once": Provide(upload_key, sync_to_thread=False)},
    response_headers=created_headers("data set", "stored it; this is the same answer"),
    response_description="Every line was read and the file is stored",
    responses=responses(
        "bad_query",
        "bad_request",
        "body_too_large",
        "too_many_uploads",
        "no_room",
        "unsupported_media_type",
        "invalid_dataset",
        "idempotency_in_progress",
        "idempotency_key_reused",
    ),
)
async def upload_dataset(
    upload: Received,
    once: Once,
    owner: Owner,
    service: Service,
    name: Annotated[
        str | None, QueryParameter(min_length=1, max_length=100, pattern=r"^[^\x00-\x1f\x7f]+$", description="A label")
    ] = None,
) -> Response[Dataset]:
    """Store a JSONL file: one object per line, with a column for questions and one for answers."""
    # Not a handler run in a thread: the upload's file is cleaned up by an asynchronous generator around this call.
    record, replayed = await sync_to_thread(service.store_dataset, upload.path, upload.summary, owner, name, once)
    headers = {"Location": f"/datasets/{record.id}", **(REPLAYED if replayed else {})}
    return Response(dataset_of(record, upload.summary.chats), status_code=201, headers=headers)


@get(
    "/",
    operation_id="listDatasets",
    summary="List your data sets, newest first",
    opt=scope("jobs:read"),
    responses=responses("bad_query", "unknown_field"),
    sync_to_thread=True,
)
def list_datasets(
    request: Request[Any, Any, Any],
    owner: Owner,
    operator: IsOperator,
    service: Service,
    limit: Annotated[int, QueryParameter(ge=1, le=100, description="Data sets per page")] = 20,
    cursor: Annotated[
        str | None,
        QueryParameter(description="`next_cursor` of the previous page", schema_extra={"pattern": DATASET_ID}),
    ] = None,
    of: Annotated[
        str | None,
        QueryParameter(
            name="owner", max_length=100, description="For operators: this owner's data sets; `*`: those of all owners"
        ),
    ] = None,
    fields: Fields = None,
) -> Response[DatasetList]:
    """One page of the caller's uploads."""
    if of not in (None, owner) and not operator:
        raise ApiError("forbidden", "Only a key with the scope operator lists data of other owners. Leave out `owner`.")
    if cursor is not None and not re.fullmatch(DATASET_ID, cursor):
        raise bad_query(bad_parameter("cursor", "is not a cursor", "Send the next_cursor of the previous page."))
    found = service.list_datasets(None if of == "*" else of or owner, limit=limit, cursor=cursor)
    page = DatasetList(
        data=[dataset_of(record) for record in found.items],
        has_more=found.next_cursor is not None,
        next_cursor=found.next_cursor,
    )
    return answer(request, page, fields, Dataset)


@post(
    "/preview",
    operation_id="previewDataset",
    summary="The first rows, as the prompts they become",
    opt=scope("jobs:read"),
    status_code=200,
    dependencies={"spec": Provide(read_spec)},
    response_description="Columns and rows; nothing was stored",
    responses=responses(
        "bad_query",
        *JSON_ERRORS,
        "invalid_spec",
        "rejected",
    ),
    sync_to_thread=True,
)
def preview_dataset(
    spec: Spec,
    owner: Owner,
    service: Service,
    limit: Annotated[int, QueryParameter(ge=1, le=50, description="Rows to show")] = 10,
) -> DatasetPreview:
    """The columns of the data set that a job spec names, and its first rows as the job would send them to the model.

    Only `data` and `rewards.tags` of the spec matter. A data set of the hub is read where this service reaches the hub,
    at most 64 MiB of it in 20 seconds; otherwise `rejected` says why.
    """
    return preview_of(spec, service.records(spec, owner), limit)


@delete(
    "/{dataset_id:str}",
    operation_id="deleteDataset",
    summary="Delete a data set that no unfinished job names",
    opt=scope("datasets:write"),
    status_code=204,
    response_description="It is gone",
    responses=responses("bad_query", "not_found", "conflict"),
    sync_to_thread=True,
)
def delete_dataset(dataset_id: DatasetId, owner: Owner, service: Service) -> None:
    """Delete an upload. This cannot be undone. Questions that jobs used stay with those jobs."""
    service.delete_dataset(dataset_id, owner)


@get(
    "/{dataset_id:str}",
    operation_id="getDataset",
    summary="Look at a data set",
    opt=scope("jobs:read"),
    responses=responses("bad_query", "not_found"),
    sync_to_thread=True,
)
def get_dataset(dataset_id: DatasetId, owner: Owner, service: Service) -> Dataset:
    """Rows, columns and SHA-256 of an upload."""
    return dataset_of(service.get_dataset(dataset_id, owner))


@get(
    "/{dataset_id:str}/rows",
    operation_id="listRows",
    summary="The rows of a data set as they are stored",
    opt=scope("jobs:read"),
    responses=responses("bad_query", "unknown_field", "not_found"),
    sync_to_thread=True,
)
def list_rows(
    request: Request[Any, Any, Any],
    dataset_id: DatasetId,
    owner: Owner,
    service: Service,
    limit: Annotated[int, QueryParameter(ge=1, le=100, description="Rows per page; fewer if they are long")] = 20,
    cursor: Annotated[
        str | None, QueryParameter(max_length=40, description="`next_cursor` of the previous page")
    ] = None,
    fields: Fields = None,
) -> Response[RowList]:
    """Some rows of an upload in their order, with every column."""
    place = None if cursor is None else place_of(cursor)
    found = service.dataset_rows(dataset_id, owner, limit=limit, place=place)
    page = RowList(
        data=[DatasetRow(row=one.row, values=one.values) for one in found.rows],
        has_more=found.next is not None,
        next_cursor=cursor_of(found.next),
    )
    return encoded(answer(request, page, fields, DatasetRow))


def cursor_of(place: Place | None) -> str | None:
    """The cursor of a list of rows that leads to this place."""
    return None if place is None else f"{place.row}-{place.byte}"


def place_of(cursor: str) -> Place:
    """Where a cursor of a list of rows leads. Raises `BadCursor`."""
    parts = re.fullmatch(r"(\d{1,12})-(\d{1,15})", cursor, re.ASCII)
    if parts is None:
        raise BadCursor("is not of a list of rows")
    return Place(row=int(parts[1]), byte=int(parts[2]))


@get(
    "/{dataset_id:str}/jobs",
    operation_id="listDatasetJobs",
    summary="The jobs that use a data set",
    opt=scope("jobs:read"),
    dependencies={"searches": Provide(searches_of, sync_to_thread=False)},
    responses=responses("bad_query", "unknown_field", "not_found", "too_many_searches"),
    sync_to_thread=True,
)
def list_dataset_jobs(
    request: Request[Any, Any, Any],
    dataset_id: DatasetId,
    owner: Owner,
    service: Service,
    searches: Searches,
    limit: Annotated[int, QueryParameter(ge=1, le=100, description="Jobs per page")] = 20,
    cursor: Annotated[
        str | None, QueryParameter(description="`next_cursor` of the previous page", schema_extra={"pattern": JOB_ID})
    ] = None,
    fields: Fields = None,
) -> Response[JobList]:
    """One page of the jobs that train or evaluate on an upload, newest first. While one is unfinished, the data set
    cannot be deleted."""
    if cursor is not None and not re.fullmatch(JOB_ID, cursor):
        raise bad_query(bad_parameter("cursor", "is not a cursor", "Send the next_cursor of the previous page."))
    with searches.take(owner):
        found = service.dataset_jobs(dataset_id, owner, limit=limit, cursor=cursor)
    page = JobList(
        data=[job_of(record) for record in found.items],
        has_more=found.next_cursor is not None,
        next_cursor=found.next_cursor,
    )
    return answer(request, page, fields, Job)


def router(max_bytes: int) -> Router:
    """The routes, with this limit of bytes for an upload."""
    return Router(
        "/datasets",
        route_handlers=[
            upload_dataset,
            preview_dataset,
            list_datasets,
            get_dataset,
            list_rows,
            list_dataset_jobs,
            delete_dataset,
        ],
        guards=[check_id],
        request_max_body_size=max_bytes,
        tags=["datasets"],
    )
