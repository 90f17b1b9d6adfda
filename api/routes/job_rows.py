"""GET /jobs/{id}/rows: the rows of a job's data set as the prompts that the job makes from them.

Handlers only translate between HTTP and `jobs.service`. Invariant: rows that cannot be shown are no error of the
request: the answer says why, and is empty.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Annotated, Any

from litestar import Request, Response, get
from litestar.di import Provide
from litestar.params import QueryParameter

from api.dependencies import Owner, Searches, Service, searches_of
from api.fields import Fields
from api.lists import answer, encoded
from api.problems import responses
from api.routes.datasets import cursor_of, place_of
from api.routes.jobs import READ, JobId, check_id
from api.schemas import JobRow, JobRowList, job_rows_of
from grpo_core.datasets import MAX_ROWS
from jobs.read.job_rows import Part, RowQuery


@get(
    "/jobs/{job_id:str}/rows",
    operation_id="listJobRows",
    summary="The rows of a job's data set, as its prompts",
    opt=READ,
    dependencies={"searches": Provide(searches_of, sync_to_thread=False)},
    guards=[check_id],
    tags=["jobs"],
    responses=responses("bad_query", "unknown_field", "not_found", "too_many_searches"),
    sync_to_thread=True,
)
def list_job_rows(
    request: Request[Any, Any, Any],
    job_id: JobId,
    owner: Owner,
    service: Service,
    searches: Searches,
    part: Annotated[
        Part, QueryParameter(description="The rows that the job trains on, or those that it holds out")
    ] = "train",
    first: Annotated[
        int, QueryParameter(ge=0, le=MAX_ROWS, description="Begin with the row of this number, counted from 0")
    ] = 0,
    search: Annotated[
        str | None,
        QueryParameter(
            min_length=1, max_length=200, description="Only rows with this text in the question or the answer"
        ),
    ] = None,
    limit: Annotated[int, QueryParameter(ge=1, le=100, description="Rows per page; fewer if they are long")] = 20,
    cursor: Annotated[
        str | None, QueryParameter(max_length=40, description="`next_cursor` of the previous page")
    ] = None,
    fields: Fields = None,
) -> Response[JobRowList]:
    """Some rows of the job's data set in their order, each as the prompt that training builds, with every column.

    A search looks through about 16 MB at once: a page may be empty and still have a `next_cursor`. Only the first rows
    of a hub's data set are read, as `POST /datasets/preview` does. Rows that repeat a held-out question are listed
    under `train`, although the job leaves them out.
    """
    service.get(job_id, owner)  # a job of another owner is not found, whatever the cursor is
    place = None if cursor is None else place_of(cursor)
    query = RowQuery(part=part, first=first, search=search or "", limit=limit, place=place)
    with searches.take(owner) if search else nullcontext():
        found = service.job_rows(job_id, owner, query)
    page = job_rows_of(found, part, cursor_of(found.next))
    return encoded(answer(request, page, fields, JobRow))
