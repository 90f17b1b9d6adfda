"""The routes below /groups: submit a sweep, read its jobs as one table, cancel them together.

Handlers only translate between HTTP and `jobs.service`. There is no separate object for a group: its jobs name it.
Invariant: an id that cannot be a group's never reaches the service.
"""

from __future__ import annotations

import re
from typing import Annotated, Any

from litestar import Response, Router, get, post
from litestar.connection import ASGIConnection
from litestar.di import NamedDependency, Provide
from litestar.handlers import BaseRouteHandler
from litestar.params import PathParameter, QueryParameter, SkipValidation

from api.auth import scope
from api.bodies import JSON_ERRORS, read_sweep
from api.dependencies import Owner, Service
from api.idempotency import REPLAYED, SUBMISSION_ERRORS, Once, created_headers, group_key
from api.problems import bad_parameter, responses
from api.queries import bad_query
from api.schemas import GROUP_ID, Comparison, Group, SubmittedGroup, comparison_of, group_of, job_of, warning_of
from grpo_core.spec import JOB_ID, JobSpec
from grpo_core.spec.sweep import MAX_JOBS
from jobs.errors import NotFound
from jobs.store.job import Priority

GroupId = Annotated[str, PathParameter(description="One of your groups", schema_extra={"pattern": GROUP_ID})]
Sweep = NamedDependency[SkipValidation[list[JobSpec]]]

READ = scope("jobs:read")
WRITE = scope("jobs:write")


async def check_id(connection: ASGIConnection[Any, Any, Any, Any], _handler: BaseRouteHandler) -> None:
    """Guard: answer 404 for anything that cannot be the id of a group."""
    group = connection.path_params.get("group")
    if group is not None and not re.fullmatch(GROUP_ID, group):
        raise NotFound("group", group[:80])


@post(
    "/",
    operation_id="submitGroup",
    summary="Submit a sweep: several jobs as one group",
    opt=WRITE,
    dependencies={"sweep": Provide(read_sweep), "once": Provide(group_key)},
    response_headers=created_headers("group", "created the group"),
    response_description="All jobs are accepted and will be run",
    responses=responses(
        "bad_query",
        *JSON_ERRORS,
        *SUBMISSION_ERRORS,
    ),
    sync_to_thread=True,
)
def submit_group(
    sweep: Sweep,
    once: Once,
    owner: Owner,
    service: Service,
    priority: Annotated[Priority, QueryParameter(description=Priority.described())] = Priority.NORMAL,
) -> Response[SubmittedGroup]:
    """Store and queue a job for each combination of the values of `grid`, each `repeat` times; all of them or none."""
    warnings = service.warnings(sweep[0])
    group, records, replayed = service.submit_group(sweep, owner, once, priority=priority)
    body = SubmittedGroup(
        id=group, data=[job_of(record) for record in records], warnings=[warning_of(warning) for warning in warnings]
    )
    headers = {"Location": f"/groups/{group}", **(REPLAYED if replayed else {})}
    return Response(body, status_code=201, headers=headers)


@get(
    "/{group:str}",
    operation_id="getGroup",
    summary="Read a group: its settings, with mean and spread over repeats",
    opt=READ,
    responses=responses("bad_query", "not_found"),
    sync_to_thread=True,
)
def get_group(group: GroupId, owner: Owner, service: Service) -> Group:
    """The jobs of a group as a table. Jobs that were deleted, or have left the service's memory, are not in it."""
    return group_of(group, service.summarise(service.group(group, owner)))


@post(
    "/{group:str}/cancel",
    operation_id="cancelGroup",
    summary="Cancel every job of a group that has not ended",
    opt=WRITE,
    status_code=200,
    response_description="Its jobs are cancelled, or will be within seconds",
    responses=responses("bad_query", "not_found"),
    sync_to_thread=True,
)
def cancel_group(group: GroupId, owner: Owner, service: Service) -> SubmittedGroup:
    """Cancel the jobs of a group. Those that have ended stay as they are."""
    return SubmittedGroup(id=group, data=[job_of(record) for record in service.cancel_group(group, owner)], warnings=[])


@get(
    "/comparison",
    operation_id="compareJobs",
    summary="Compare jobs: their settings, with mean and spread over repeats",
    opt=READ,
    responses=responses("bad_query", "not_found"),
    tags=["groups"],
    sync_to_thread=True,
)
def compare_jobs(
    owner: Owner,
    service: Service,
    job: Annotated[
        list[str],
        QueryParameter(min_items=1, max_items=MAX_JOBS, description="One of your jobs; repeat it for each"),
    ],
) -> Comparison:
    """Any jobs of yours as a table. Jobs that differ by the seed only are repeats, and one row."""
    if bad := next((name for name in job if not re.fullmatch(JOB_ID, name)), None):
        raise bad_query(bad_parameter("job", f"{bad[:80]!r} is not the id of a job", "Send ids of your jobs."))
    return comparison_of(service.summarise([service.get(name, owner) for name in dict.fromkeys(job)]))


ROUTER = Router("/groups", route_handlers=[submit_group, get_group, cancel_group], guards=[check_id], tags=["groups"])
