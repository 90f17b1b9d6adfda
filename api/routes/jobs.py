"""The routes below /jobs: submit, list, look, cancel, and read what a job has said and left.

Handlers only translate between HTTP and `jobs.service`, in a thread each, since that is synchronous. Invariant: an
id that cannot be a job's never reaches the service.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from litestar import Response, Router, get, post
from litestar.connection import ASGIConnection
from litestar.datastructures import ResponseHeader
from litestar.di import NamedDependency, Provide
from litestar.handlers import BaseRouteHandler
from litestar.openapi import ResponseSpec
from litestar.params import FromQuery, PathParameter, QueryParameter, SkipValidation

from api.auth import scope
from api.bodies import read_spec
from api.dependencies import Owner, Service
from api.problems import bad_parameter, responses
from api.queries import Metadata, bad_query, metadata_filter
from api.schemas import (
    ArtifactList,
    DryRun,
    EventList,
    Job,
    JobList,
    MetricList,
    artifacts_of,
    event_of,
    job_of,
    warning_of,
)
from grpo_core.spec import JOB_ID, JobSpec
from jobs.errors import NotFound
from jobs.record import JobStatus

EventType = Literal["status", "metric", "sample", "checkpoint", "evaluation", "warning", "log", "error"]

JobId = Annotated[str, PathParameter(description="One of your jobs", schema_extra={"pattern": JOB_ID})]
Spec = NamedDependency[SkipValidation[JobSpec]]

READ = scope("jobs:read")
WRITE = scope("jobs:write")


async def check_id(connection: ASGIConnection[Any, Any, Any, Any], _handler: BaseRouteHandler) -> None:
    """Guard: whatever could not be the id of a job is not the id of a job."""
    job_id = connection.path_params.get("job_id")
    if job_id is not None and not re.fullmatch(JOB_ID, job_id):
        raise NotFound("job", job_id[:80])


@post(
    "/",
    operation_id="submitJob",
    summary="Submit a job",
    opt=WRITE,
    dependencies={"spec": Provide(read_spec)},
    response_headers=[ResponseHeader(name="Location", value="", description="The new job", documentation_only=True)],
    response_description="The job is accepted and will be run",
    responses={
        200: ResponseSpec(DryRun, generate_examples=False, description="With dry_run: nothing was stored"),
        **responses(
            "bad_query",
            "invalid_json",
            "empty_body",
            "body_too_large",
            "unsupported_media_type",
            "invalid_spec",
            "rejected",
        ),
    },
    sync_to_thread=True,
)
def submit(
    spec: Spec,
    owner: Owner,
    service: Service,
    dry_run: Annotated[bool, QueryParameter(description="Only check the spec and say what it would become")] = False,
) -> Response[Job]:
    """Store a job and queue it, or with `dry_run` check it and store nothing."""
    if dry_run:
        return _dry_run(spec, service.warnings(spec, owner))
    job = job_of(service.submit(spec, owner))
    return Response(job, status_code=201, headers={"Location": job.links.self})


@get(
    "/",
    operation_id="listJobs",
    summary="List your jobs, newest first",
    opt=READ,
    dependencies={"metadata": Provide(metadata_filter, sync_to_thread=False)},
    responses=responses("bad_query"),
    sync_to_thread=True,
)
def list_jobs(
    owner: Owner,
    service: Service,
    metadata: Metadata,
    limit: Annotated[int, QueryParameter(ge=1, le=100, description="Jobs on a page")] = 20,
    cursor: Annotated[
        str | None, QueryParameter(description="`next_cursor` of the page before", schema_extra={"pattern": JOB_ID})
    ] = None,
    status: FromQuery[JobStatus | None] = None,
) -> JobList:
    """One page of the caller's jobs."""
    if cursor is not None and not re.fullmatch(JOB_ID, cursor):
        raise bad_query(bad_parameter("cursor", "is not a cursor", "Give the next_cursor of the page before."))
    page = service.list_jobs(owner, limit=limit, cursor=cursor, status=status, metadata=metadata)
    return JobList(
        data=[job_of(record) for record in page.items],
        has_more=page.next_cursor is not None,
        next_cursor=page.next_cursor,
    )


@get(
    "/{job_id:str}",
    operation_id="getJob",
    summary="Look at a job",
    opt=READ,
    responses=responses("bad_query", "not_found"),
    sync_to_thread=True,
)
def get_job(job_id: JobId, owner: Owner, service: Service) -> Job:
    """One job as it is now."""
    return job_of(service.get(job_id, owner))


@post(
    "/{job_id:str}/cancel",
    operation_id="cancelJob",
    summary="Cancel a job",
    opt=WRITE,
    status_code=200,
    response_description="The job is cancelled",
    responses={
        202: ResponseSpec(Job, generate_examples=False, description="Its worker was told and will stop within seconds"),
        **responses("bad_query", "not_found", "conflict"),
    },
    sync_to_thread=True,
)
def cancel(job_id: JobId, owner: Owner, service: Service) -> Response[Job]:
    """End a job: at once where no worker has it."""
    job = job_of(service.cancel(job_id, owner))
    return Response(job, status_code=202 if job.status is JobStatus.CANCELLING else 200)


@get(
    "/{job_id:str}/events",
    operation_id="listEvents",
    summary="What has happened to a job",
    opt=READ,
    responses=responses("bad_query", "not_found"),
    sync_to_thread=True,
)
def list_events(
    job_id: JobId,
    owner: Owner,
    service: Service,
    after: Annotated[int, QueryParameter(ge=0, le=2**53, description="Only events numbered above this")] = 0,
    limit: Annotated[int, QueryParameter(ge=1, le=1000)] = 100,
    type: Annotated[  # noqa: A002 - the parameter's name
        list[EventType] | None, QueryParameter(description="Only these types; may be repeated")
    ] = None,
) -> EventList:
    """A job's events in order."""
    events = [event_of(event) for event in service.events(job_id, owner, after=after, limit=limit, types=type or ())]
    return EventList(data=events, next_after=events[-1].seq if events else after)


@get(
    "/{job_id:str}/metrics",
    operation_id="listMetrics",
    summary="The metrics of every logged step",
    opt=READ,
    responses=responses("bad_query", "not_found"),
    sync_to_thread=True,
)
def list_metrics(
    job_id: JobId,
    owner: Owner,
    service: Service,
    after_step: Annotated[int, QueryParameter(ge=0, le=2**53, description="Only later steps")] = 0,
) -> MetricList:
    """A job's metrics in order of steps."""
    return MetricList(data=service.metrics(job_id, owner, after_step=after_step))


@get(
    "/{job_id:str}/artifacts",
    operation_id="listArtifacts",
    summary="What a job has left, with links to download it",
    opt=READ,
    responses=responses("bad_query", "not_found"),
    sync_to_thread=True,
)
def list_artifacts(job_id: JobId, owner: Owner, service: Service) -> ArtifactList:
    """A job's stored files; none before it has ended."""
    # The record first: a job that ends between the two calls is then reported as incomplete, never the reverse.
    record = service.get(job_id, owner)
    return artifacts_of(service.artifacts(job_id, owner), record)


def _dry_run(spec: JobSpec, warnings: list[Any]) -> Response[Any]:
    body = DryRun(
        spec=spec.as_dict(), spec_sha256=spec.digest(), warnings=[warning_of(warning) for warning in warnings]
    )
    return Response(body, status_code=200)


ROUTER = Router(
    "/jobs",
    route_handlers=[submit, list_jobs, get_job, cancel, list_events, list_metrics, list_artifacts],
    guards=[check_id],
    tags=["jobs"],
)
