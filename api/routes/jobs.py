"""The routes below /jobs: submit, list, read, cancel, pause and resume jobs, and read their events, metrics and files.

Handlers only translate between HTTP and `jobs.service`, each in a thread, because that is synchronous. Event streams
are in `api.streams`. Invariant: an id that cannot be a job's never reaches the service.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import nullcontext
from typing import Annotated, Any, Literal, cast

from litestar import Request, Response, Router, delete, get, patch, post
from litestar.concurrency import sync_to_thread
from litestar.connection import ASGIConnection
from litestar.di import NamedDependency, Provide
from litestar.handlers import BaseRouteHandler
from litestar.openapi import ResponseSpec
from litestar.params import FromQuery, PathParameter, QueryParameter, SkipValidation
from litestar.response import Stream

from api import metric_table
from api.audit import audited
from api.auth import scope
from api.bodies import JSON_ERRORS, read_fields, read_spec
from api.dependencies import IsOperator, Owner, Searches, Service, searches_of
from api.fields import Fields, narrowed, wanted
from api.idempotency import REPLAYED, SUBMISSION_ERRORS, Once, created_headers, submission_key
from api.lists import Cursor, Limit, answer, encoded, next_link, page_of
from api.problems import ApiError, bad_parameter, describe, invalid_body, responses
from api.queries import Metadata, bad_query, metadata_filter
from api.representations import SECRET
from api.schemas import (
    GROUP_ID,
    ActionList,
    ActionResult,
    ArtifactFile,
    ArtifactList,
    Checkpoint,
    CheckpointList,
    DryRun,
    Event,
    EventList,
    EventWord,
    Job,
    JobDetail,
    JobList,
    MetricList,
    SubmittedJob,
    artifacts_of,
    checkpoint_of,
    costs_of,
    event_of,
    job_detail,
    job_of,
    submitted_job,
    warning_of,
)
from api.streams import HEADERS, MEDIA_TYPE, EventStreams
from grpo_core.spec import JOB_ID, JobSpec
from jobs.errors import BadCursor, JobsError, NotFound
from jobs.read.cursors import decode, encode
from jobs.read.job_order import JobOrder, OrderName
from jobs.service import JobFilter, JobService, Preview
from jobs.store.job import JobRecord, JobStatus, Priority
from jobs.usage.prices import Prices

JobId = Annotated[str, PathParameter(description="One of your jobs", schema_extra={"pattern": JOB_ID})]
Spec = NamedDependency[SkipValidation[JobSpec]]

Given = NamedDependency[str]
BulkOrder = NamedDependency[SkipValidation[tuple[str, list[str]]]]
ACTIONS = ("cancel", "pause", "resume", "delete")
MAX_ACTIONS = 100

MAX_SEQ = 2**53
"""Larger numbers are not exact in JavaScript, and we issue none."""

READ = scope("jobs:read")
WRITE = scope("jobs:write")


async def check_id(connection: ASGIConnection[Any, Any, Any, Any], _handler: BaseRouteHandler) -> None:
    """Guard: answer 404 for anything that cannot be the id of a job."""
    job_id = connection.path_params.get("job_id")
    if job_id is not None and not re.fullmatch(JOB_ID, job_id):
        raise NotFound("job", job_id[:80])


async def read_priority(request: Request[Any, Any, Any]) -> str:
    """Dependency: the priority in the body."""
    body = await read_fields(request, {"priority"})
    if body.get("priority") not in list(Priority):
        raise invalid_body("/priority", "is no priority", f"Use one of {', '.join(Priority)}.")
    return body["priority"]


async def read_order(request: Request[Any, Any, Any]) -> tuple[str, list[str]]:
    """Dependency: what to do with which jobs, each once."""
    body = await read_fields(request, {"action", "jobs"})
    action, names = body.get("action"), body.get("jobs")
    if action not in ACTIONS:
        raise invalid_body("/action", "is no action", f"Use one of {', '.join(ACTIONS)}.")
    if not isinstance(names, list) or not 1 <= len(cast("list[Any]", names)) <= MAX_ACTIONS:
        raise invalid_body("/jobs", f"is not a list of 1 to {MAX_ACTIONS} ids", "Send ids of your jobs.")
    found = cast("list[Any]", names)
    for place, name in enumerate(found):
        if not isinstance(name, str) or not re.fullmatch(JOB_ID, name):
            raise invalid_body(f"/jobs/{place}", "is not the id of a job", "Send ids of your jobs.")
    return action, list(dict.fromkeys(found))


@post(
    "/",
    operation_id="submitJob",
    summary="Submit a job",
    opt=WRITE,
    dependencies={"spec": Provide(read_spec), "once": Provide(submission_key)},
    response_headers=created_headers("job", "created the job; this is the same answer"),
    response_description="The job is accepted and will be run",
    responses={
        200: ResponseSpec(DryRun, generate_examples=False, description="With dry_run: nothing was stored"),
        **responses(
            "bad_query",
            *JSON_ERRORS,
            *SUBMISSION_ERRORS,
        ),
    },
    sync_to_thread=True,
)
def submit(
    spec: Spec,
    once: Once,
    owner: Owner,
    service: Service,
    dry_run: Annotated[
        bool, QueryParameter(description="Only check the spec, and show every value, the size and all warnings")
    ] = False,
    priority: Annotated[Priority, QueryParameter(description=Priority.described())] = Priority.NORMAL,
) -> Response[SubmittedJob]:
    """Store a job and queue it, or with `dry_run` check it and store nothing."""
    if dry_run:
        return _dry_run(spec, service.preview(spec, owner), service.prices)
    warnings = service.warnings(spec)  # first, so that an accepted job always gets an answer
    if once:
        record, replayed = service.submit_once(spec, owner, once, priority=priority)
    else:
        record, replayed = service.submit(spec, owner, priority=priority), False
    job = submitted_job(record, warnings)
    headers = {"Location": job.links.self, **(REPLAYED if replayed else {})}
    return Response(job, status_code=201, headers=headers)


@get(
    "/",
    operation_id="listJobs",
    summary="List your jobs, newest first or sorted",
    opt=READ,
    dependencies={
        "metadata": Provide(metadata_filter, sync_to_thread=False),
        "searches": Provide(searches_of, sync_to_thread=False),
    },
    responses=responses("bad_query", "unknown_field", "too_many_searches"),
    sync_to_thread=True,
)
def list_jobs(
    request: Request[Any, Any, Any],
    owner: Owner,
    service: Service,
    metadata: Metadata,
    searches: Searches,
    operator: IsOperator,
    limit: Annotated[int, QueryParameter(ge=1, le=100, description="Jobs per page")] = 20,
    cursor: Cursor = None,
    sort: Annotated[
        OrderName,
        QueryParameter(description="Descending with a minus; jobs with equal values come newest first"),
    ] = "-created",
    status: FromQuery[JobStatus | None] = None,
    group: Annotated[
        str | None, QueryParameter(description="Only the jobs of this group", schema_extra={"pattern": GROUP_ID})
    ] = None,
    search: Annotated[
        str | None,
        QueryParameter(min_length=1, max_length=100, description="A text in id, name, model or metadata, in any case"),
    ] = None,
    kind: Annotated[
        Literal["training", "try", "serving", "export"] | None, QueryParameter(description="Only jobs of this kind")
    ] = None,
    priority: Annotated[Priority | None, QueryParameter(description="Only jobs with this priority")] = None,
    of: Annotated[
        str | None,
        QueryParameter(
            name="owner", max_length=100, description="For operators: this owner's jobs; `*`: those of all owners"
        ),
    ] = None,
    fields: Fields = None,
) -> Response[JobList]:
    """One page of the caller's jobs."""
    if of not in (None, owner) and not operator:
        raise ApiError("forbidden", "Only a key with the scope operator lists jobs of other owners. Leave out `owner`.")
    whose = None if of == "*" else of or owner
    find = JobFilter(words=search, kind=kind, priority=priority)
    order = JobOrder.of(sort)
    if order is None and cursor is not None and not re.fullmatch(JOB_ID, cursor):
        raise bad_query(bad_parameter("cursor", "is not a cursor", "Send the next_cursor of the previous page."))
    if group is not None and not re.fullmatch(GROUP_ID, group):
        raise bad_query(bad_parameter("group", "is not the id of a group", "Send the group of one of your jobs."))
    wanted(fields, Job)  # refused before the jobs are read
    with searches.take(owner) if (metadata or find or order) and not group else nullcontext():
        page = service.list_jobs(
            whose,
            limit=limit,
            cursor=cursor,
            status=status,
            metadata=metadata,
            group=group,
            find=find or None,
            order=order,
        )
    jobs = JobList(
        data=[job_of(record) for record in page.items],
        has_more=page.next_cursor is not None,
        next_cursor=page.next_cursor,
    )
    return answer(request, jobs, fields, Job)


@get(
    "/{job_id:str}",
    operation_id="getJob",
    summary="Read a job",
    opt=READ,
    responses=responses("bad_query", "unknown_field", "not_found"),
    sync_to_thread=True,
)
def get_job(job_id: JobId, owner: Owner, service: Service, fields: Fields = None) -> Response[JobDetail]:
    """One job in its current state and, while it is queued, what it waits for."""
    tree = wanted(fields, JobDetail)
    record = service.get(job_id, owner)
    waiting = service.waiting(record) if tree is None or "waiting" in tree else None
    result = service.trial_result(record) if tree is None or "result" in tree else None
    return Response(narrowed(job_detail(record, waiting, result, service.prices), tree))


@delete(
    "/{job_id:str}",
    operation_id="deleteJob",
    summary="Delete a job that has ended, with all its files",
    opt=WRITE,
    status_code=204,
    response_description="It is gone",
    responses=responses("bad_query", "not_found", "conflict"),
    sync_to_thread=True,
)
def delete_job(job_id: JobId, owner: Owner, service: Service) -> None:
    """Delete a job's record, spec, completions, checkpoints and adapter. This cannot be undone."""
    service.delete(job_id, owner)


@patch(
    "/{job_id:str}",
    operation_id="changeJob",
    summary="Change the priority of a queued or paused job",
    opt=WRITE,
    dependencies={"given": Provide(read_priority)},
    responses=responses("bad_query", "not_found", "conflict", *JSON_ERRORS, "invalid_body"),
    sync_to_thread=True,
)
def change_job(job_id: JobId, given: Given, owner: Owner, service: Service) -> Job:
    """Change a job's priority; it has an effect until a worker takes the job."""
    return job_of(service.prioritise(job_id, owner, Priority(given)))


@post(
    "/actions",
    operation_id="actOnJobs",
    summary="Cancel, pause, resume or delete several jobs",
    opt=WRITE,
    status_code=200,
    dependencies={"order": Provide(read_order)},
    response_description="What became of each job, in the order of the request",
    responses=responses("bad_query", *JSON_ERRORS, "invalid_body"),
    sync_to_thread=True,
)
def act_on_jobs(
    request: Request[Any, Any, Any], order: BulkOrder, owner: Owner, operator: IsOperator, service: Service
) -> ActionList:
    """Do the same with up to 100 jobs. Each has its own result: one that is refused does not stop the others."""
    action, names = order
    return ActionList(data=[_act(request, service, action, name, owner, operator=operator) for name in names])


def _act(
    request: Request[Any, Any, Any], service: JobService, action: str, name: str, owner: str, *, operator: bool
) -> ActionResult:
    calls: dict[str, Callable[[str, str], JobRecord | None]] = {
        "cancel": service.cancel,
        "pause": service.pause,
        "resume": service.resume,
        "delete": service.delete,
    }
    try:
        record = calls[action](name, (service.owner_of(name) if operator else None) or owner)
    except JobsError as error:
        problem = describe(error, request)
        return ActionResult(id=name, done=False, status=None, code=problem.code, detail=problem.detail)
    return ActionResult(id=name, done=True, status=record and record.status, code=None, detail=None)


@post(
    "/{job_id:str}/cancel",
    operation_id="cancelJob",
    summary="Cancel a job",
    opt=WRITE,
    status_code=200,
    response_description="The job is cancelled",
    responses={
        202: ResponseSpec(Job, generate_examples=False, description="Its worker will stop within seconds"),
        **responses("bad_query", "not_found", "conflict"),
    },
    sync_to_thread=True,
)
def cancel(job_id: JobId, owner: Owner, service: Service) -> Response[Job]:
    """Cancel a job; at once if no worker has it."""
    job = job_of(service.cancel(job_id, owner))
    return Response(job, status_code=202 if job.status is JobStatus.CANCELLING else 200)


@post(
    "/{job_id:str}/pause",
    operation_id="pauseJob",
    summary="Pause a job",
    opt=WRITE,
    status_code=200,
    response_description="The job is paused",
    responses={
        202: ResponseSpec(
            Job, generate_examples=False, description="Its worker will save a checkpoint and release the job"
        ),
        **responses("bad_query", "not_found", "conflict"),
    },
    sync_to_thread=True,
)
def pause(job_id: JobId, owner: Owner, service: Service) -> Response[Job]:
    """Pause a job: at once if no worker has it, otherwise after its next checkpoint."""
    job = job_of(service.pause(job_id, owner))
    return Response(job, status_code=202 if job.status is JobStatus.PAUSING else 200)


@post(
    "/{job_id:str}/resume",
    operation_id="resumeJob",
    summary="Resume a paused job",
    opt=WRITE,
    status_code=200,
    response_description="The job is queued again, or was not paused",
    responses=responses("bad_query", "not_found", "conflict"),
    sync_to_thread=True,
)
def resume(job_id: JobId, owner: Owner, service: Service) -> Job:
    """Queue a paused job again; it resumes from its last checkpoint."""
    return job_of(service.resume(job_id, owner))


@get(
    "/{job_id:str}/events",
    operation_id="listEvents",
    summary="The events of a job",
    opt=READ,
    responses={
        204: ResponseSpec(
            None,
            generate_examples=False,
            description="With text/event-stream: the job has ended and all events were read",
        ),
        **responses("bad_query", "unknown_field", "bad_request", "not_found", "too_many_streams"),
    },
)
async def list_events(
    request: Request[Any, Any, Any],
    job_id: JobId,
    owner: Owner,
    service: Service,
    after: Annotated[int, QueryParameter(ge=0, le=MAX_SEQ, description="Only events numbered above this")] = 0,
    limit: Annotated[int, QueryParameter(ge=1, le=1000, description="Not with text/event-stream")] = 100,
    type: Annotated[  # noqa: A002 - the parameter's name
        list[EventWord] | None, QueryParameter(description="Only these types; may be repeated")
    ] = None,
    cursor: Cursor = None,
    fields: Fields = None,
) -> Response[EventList]:
    """A job's events in order: past events as JSON, or with `Accept: text/event-stream` past and future events."""
    if request.accept.best_match(["application/json", MEDIA_TYPE], "application/json") == MEDIA_TYPE:
        await sync_to_thread(service.get, job_id, owner)
        return await _stream_events(request, owner, job_id, after, type or ())

    wanted(fields, Event)
    start = after if cursor is None else seq_in(cursor)

    def read() -> Response[Any]:
        found = service.events(job_id, owner, after=start, limit=limit + 1, types=type or ())
        events = [event_of(event) for event in found[:limit]]
        last = events[-1].seq if events else start
        has_more = len(found) > limit
        page = EventList(
            data=events, next_after=last, has_more=has_more, next_cursor=encode(last) if has_more else None
        )
        return encoded(answer(request, page, fields, Event))

    return await sync_to_thread(read)


def seq_in(cursor: str) -> int:
    """The number of the event that a page ended with. Raises `BadCursor`."""
    seq = decode(cursor)
    if not isinstance(seq, int) or not 0 <= seq <= MAX_SEQ:
        raise BadCursor("is the cursor of another list")
    return seq


async def _stream_events(
    request: Request[Any, Any, Any], owner: str, job_id: str, after: int, types: Collection[str]
) -> Any:
    for name in ("limit", "cursor", "fields"):
        if name in request.query_params:
            raise bad_query(bad_parameter(name, "has no meaning for a stream", "Remove it."))
    streams: EventStreams = request.app.state.streams
    seq = _last_event_id(request, after)
    place = streams.places.take(owner)
    try:
        page = await streams.page(job_id, seq, types)
    except BaseException:
        place.release()
        raise
    if page.ended and not page.frames:
        place.release()
        # Browsers reconnect after every end of a stream; 204 tells them to stop.
        return Response(None, status_code=204)
    return Stream(streams.follow(job_id, page, types, place, request.auth), media_type=MEDIA_TYPE, headers=HEADERS)


def _last_event_id(request: Request[Any, Any, Any], after: int) -> int:
    """Where a reconnecting reader continues; its address still has the original start."""
    given = request.headers.get("last-event-id")
    if not given:
        return after
    if not re.fullmatch(r"[0-9]{1,16}", given) or int(given) > MAX_SEQ:
        raise ApiError("bad_request", "The header Last-Event-ID is not the id of an event. Send the last one you read.")
    return int(given)


@get(
    "/{job_id:str}/metrics",
    operation_id="listMetrics",
    summary="The metrics of every logged step",
    opt=READ,
    responses=responses("bad_query", "unknown_field", "not_found"),
    sync_to_thread=True,
)
def list_metrics(
    request: Request[Any, Any, Any],
    job_id: JobId,
    owner: Owner,
    service: Service,
    after_step: Annotated[int, QueryParameter(ge=0, le=2**53, description="Only later steps")] = 0,
    format: Annotated[  # noqa: A002 - the parameter's name
        Literal["json", "csv"] | None, QueryParameter(description="Takes precedence over the Accept header")
    ] = None,
    limit: Limit = None,
    cursor: Cursor = None,
    fields: Fields = None,
) -> Response[MetricList]:
    """A job's metrics in order of steps, as JSON or as CSV."""
    preferred = request.accept.best_match(["application/json", metric_table.MEDIA_TYPE], "application/json")
    every = service.metrics(job_id, owner, after_step=after_step)
    found, following = page_of(every, step_of, limit=limit, cursor=cursor)
    vary = {"Vary": "Accept", **next_link(request, following)}
    if format == "json" or (format is None and preferred == "application/json"):
        page = MetricList(data=found, has_more=following is not None, next_cursor=following)
        return encoded(answer(request, page, fields, dict[str, Any]), vary)
    rewards = service.get(job_id, owner).spec["rewards"]
    names = dict.fromkeys([*rewards["weights"], *rewards.get("graders", {})])
    return _csv(metric_table.to_csv(found, names), f"{job_id}-metrics.csv", vary)


def step_of(metrics: Mapping[str, Any]) -> int:
    """The step of a step's metrics."""
    return metrics["step"]


def _csv(lines: Iterator[str], name: str, headers: Mapping[str, str]) -> Any:
    disposition = {"Content-Disposition": f'attachment; filename="{name}"'}
    return Stream(lines, media_type=metric_table.MEDIA_TYPE, headers={**headers, **disposition})


@get(
    "/{job_id:str}/checkpoints",
    operation_id="listCheckpoints",
    summary="The checkpoints of a job, with download links",
    opt={**READ, **SECRET, **audited("linkCheckpoints")},
    responses=responses("bad_query", "unknown_field", "not_found"),
    sync_to_thread=True,
)
def list_checkpoints(
    request: Request[Any, Any, Any],
    job_id: JobId,
    owner: Owner,
    service: Service,
    limit: Limit = None,
    cursor: Cursor = None,
    fields: Fields = None,
) -> Response[CheckpointList]:
    """A job's complete checkpoints so far, also while it runs; older ones are pruned."""
    every = sorted(service.checkpoints(job_id, owner), key=lambda found: found.step)
    found, following = page_of(every, lambda each: each.step, limit=limit, cursor=cursor)
    page = CheckpointList(
        data=[checkpoint_of(each) for each in found], has_more=following is not None, next_cursor=following
    )
    return answer(request, page, fields, Checkpoint)


@get(
    "/{job_id:str}/artifacts",
    operation_id="listArtifacts",
    summary="The files of a job, with download links",
    opt={**READ, **SECRET, **audited("linkArtifacts")},
    responses=responses("bad_query", "unknown_field", "not_found"),
    sync_to_thread=True,
)
def list_artifacts(
    request: Request[Any, Any, Any],
    job_id: JobId,
    owner: Owner,
    service: Service,
    limit: Limit = None,
    cursor: Cursor = None,
    fields: Fields = None,
) -> Response[ArtifactList]:
    """A job's stored files; none before it has ended."""
    # The record first, so that a job that ends between the two calls is reported as incomplete, never the reverse.
    record = service.get(job_id, owner)
    every = sorted(service.artifacts(job_id, owner), key=lambda found: found.path)
    found, following = page_of(every, lambda each: each.path, limit=limit, cursor=cursor)
    return answer(request, artifacts_of(found, record, following), fields, ArtifactFile)


def _dry_run(asked: JobSpec, preview: Preview, prices: Prices) -> Response[Any]:
    spec = preview.spec or asked
    body = DryRun(
        spec=spec.as_dict(),
        spec_sha256=spec.digest(),
        estimate=preview.estimate,
        warnings=[warning_of(warning) for warning in preview.warnings],
        currency=prices.currency,
        costs=costs_of(preview.estimate, spec, prices),
    )
    return Response(body, status_code=200)


ROUTER = Router(
    "/jobs",
    route_handlers=[
        submit,
        list_jobs,
        act_on_jobs,
        get_job,
        change_job,
        delete_job,
        cancel,
        pause,
        resume,
        list_events,
        list_metrics,
        list_checkpoints,
        list_artifacts,
    ],
    guards=[check_id],
    tags=["jobs"],
)
