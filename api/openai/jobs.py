"""OpenAI's routes of fine-tuning jobs, /v1/fine_tuning/jobs: create, list, read, order, events and checkpoints.

Owns the form of these answers. A job is the same one as at /jobs; `requests` turns a create request into its spec.
Invariant: only trainings are jobs here, and another owner's are 404.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any, Final, Literal, cast

from litestar import Request, Response, Router, get, post
from litestar.di import NamedDependency, Provide
from litestar.params import PathParameter, QueryParameter, SkipValidation
from msgspec import UNSET

from api.auth import scope
from api.bodies import JSON_ERRORS, read_json
from api.dependencies import KeyId, Owner, Searches, Service, searches_of
from api.idempotency import REPLAYED
from api.openai.errors import missing, refusal, refusals, responses
from api.openai.files import results_of
from api.openai.objects import (
    METRIC_NAMES,
    OpenAICheckpoint,
    OpenAICheckpointList,
    OpenAIEvent,
    OpenAIEventList,
    OpenAIJob,
    OpenAIJobError,
    OpenAIJobList,
    OpenAIJobWarning,
    first_id,
    last_id,
    seconds,
)
from api.openai.repeats import request_key
from api.openai.requests import Translated, translate
from api.queries import Metadata, metadata_filter
from api.schemas import FieldProblem
from grpo_client import openai_jobs
from grpo_core import strict_json
from grpo_core.reasons import EventType, Phase, WarningCode
from grpo_core.spec import JOB_ID
from jobs.errors import NotFound, Rejected
from jobs.store.job import JobRecord, JobStatus

MAX_BYTES: Final = 2 * 1024**2
"""Of a create request: graders hold source code."""
EVENT_ID: Final = r"^ftevent-([1-9][0-9]{0,15})$"
CHECKPOINT_ID: Final = r"^job-[0-9A-HJKMNP-TV-Z]{26}:step-([0-9]{1,6})$"
_SHOWN_EVENTS: Final = frozenset(EventType) - {EventType.SAMPLE}
_LEVELS: Final[Mapping[str, Literal["warn", "error"]]] = {EventType.WARNING: "warn", EventType.ERROR: "error"}

JobId = Annotated[str, PathParameter(description="One of your jobs", schema_extra={"pattern": JOB_ID})]
Body = NamedDependency[SkipValidation[dict[str, Any]]]
Limit = Annotated[int, QueryParameter(ge=1, le=100, description="Items per page")]


async def read_job(request: Request[Any, Any, Any]) -> dict[str, Any]:
    """Dependency: the body of a create request, not yet checked."""
    expected = "A fine-tuning job is expected in the body: model, training_file and method."
    return await read_json(request, _object, expected=expected)


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        problem = FieldProblem(pointer="", code="invalid_type", detail="The body is not an object", remedy="Send one.")
        raise refusals([problem])
    return cast("dict[str, Any]", value)


@post(
    "/",
    operation_id="createFineTuningJob",
    summary="Submit a job, as with OpenAI's SDK",
    opt=scope("jobs:write"),
    status_code=200,
    dependencies={"asked": Provide(read_job)},
    response_description="The job is accepted and will be run",
    responses=responses(
        *("bad_query", *JSON_ERRORS, "rejected", "idempotency_in_progress", "idempotency_key_reused"),
        *("too_many_jobs", "gpu_quota", "storage_quota", "not_found"),
    ),
    sync_to_thread=True,
)
def create_job(
    request: Request[Any, Any, Any], asked: Body, owner: Owner, key_id: KeyId, service: Service
) -> Response[OpenAIJob]:
    """Store a reinforcement job and queue it. docs/how-to/openai-sdk.md says what becomes of each field."""
    translated = translate(asked, owner, service)
    warnings = translated.warnings(service.warnings(translated.spec))
    key = request_key(request, service, owner, key_id, strict_json.canonical(asked))
    try:
        record, replayed = key.run(lambda once: service.submit_once(translated.spec, owner, once))
    except Rejected as error:
        raise translated.refusal(error.problems) from error
    if not replayed:
        service.note(record.id, _notes(translated))
    job = job_of(record, service, warnings)
    headers = {"Location": f"/jobs/{record.id}", **(REPLAYED if replayed else {})}
    return Response(job, status_code=200, headers=headers)


@get(
    "/",
    operation_id="listFineTuningJobs",
    summary="List your jobs, as with OpenAI's SDK",
    opt=scope("jobs:read"),
    dependencies={
        "metadata": Provide(metadata_filter, sync_to_thread=False),
        "searches": Provide(searches_of, sync_to_thread=False),
    },
    responses=responses("bad_query", "too_many_searches"),
    sync_to_thread=True,
)
def list_jobs(
    owner: Owner,
    service: Service,
    metadata: Metadata,
    searches: Searches,
    limit: Limit = 20,
    after: Annotated[
        str | None, QueryParameter(description="The last id of the previous page", schema_extra={"pattern": JOB_ID})
    ] = None,
) -> OpenAIJobList:
    """One page of the caller's trainings, newest first."""
    if after is not None and not re.fullmatch(JOB_ID, after):
        raise refusal("after", "invalid_value", "is not the id of a job", "Send the last id you read.")
    with searches.take(owner):
        found = _trainings(owner, service, metadata, after, limit + 1)
    data = [job_of(record, service) for record in found[:limit]]
    return OpenAIJobList(data=data, has_more=len(found) > limit, first_id=first_id(data), last_id=last_id(data))


def _trainings(owner: str, service: Any, metadata: dict[str, str], after: str | None, limit: int) -> list[JobRecord]:
    found: list[JobRecord] = []
    while len(found) < limit:
        page = service.list_jobs(owner, limit=limit, cursor=after, status=None, metadata=metadata)
        found += [record for record in page.items if _is_training(record)]
        after = page.next_cursor
        if after is None:
            break
    return found[:limit]


def _is_training(record: JobRecord) -> bool:
    return record.spec.get("kind", "training") == "training"


@get(
    "/{job_id:str}",
    operation_id="getFineTuningJob",
    summary="Read a job, as with OpenAI's SDK",
    opt=scope("jobs:read"),
    responses=responses("bad_query", "not_found"),
    sync_to_thread=True,
)
def get_job(job_id: JobId, owner: Owner, service: Service) -> OpenAIJob:
    """One job in its current state."""
    return job_of(_training(job_id, owner, service), service)


@post(
    "/{job_id:str}/cancel",
    operation_id="cancelFineTuningJob",
    summary="Cancel a job, as with OpenAI's SDK",
    opt=scope("jobs:write"),
    status_code=200,
    responses=responses("bad_query", "not_found", "conflict"),
    sync_to_thread=True,
)
def cancel_job(job_id: JobId, owner: Owner, service: Service) -> OpenAIJob:
    """Cancel a job; its status is `cancelling` until its worker has stopped."""
    _training(job_id, owner, service)
    return job_of(service.cancel(job_id, owner), service)


@post(
    "/{job_id:str}/pause",
    operation_id="pauseFineTuningJob",
    summary="Pause a job, as with OpenAI's SDK",
    opt=scope("jobs:write"),
    status_code=200,
    responses=responses("bad_query", "not_found", "conflict"),
    sync_to_thread=True,
)
def pause_job(job_id: JobId, owner: Owner, service: Service) -> OpenAIJob:
    """Pause a job; its status is `pausing` until its worker has saved a checkpoint."""
    _training(job_id, owner, service)
    return job_of(service.pause(job_id, owner), service)


@post(
    "/{job_id:str}/resume",
    operation_id="resumeFineTuningJob",
    summary="Resume a paused job, as with OpenAI's SDK",
    opt=scope("jobs:write"),
    status_code=200,
    responses=responses("bad_query", "not_found", "conflict"),
    sync_to_thread=True,
)
def resume_job(job_id: JobId, owner: Owner, service: Service) -> OpenAIJob:
    """Queue a paused job again; it resumes from its last checkpoint."""
    _training(job_id, owner, service)
    return job_of(service.resume(job_id, owner), service)


@get(
    "/{job_id:str}/events",
    operation_id="listFineTuningEvents",
    summary="The events of a job, as with OpenAI's SDK",
    opt=scope("jobs:read"),
    responses=responses("bad_query", "not_found"),
    sync_to_thread=True,
)
def list_events(
    job_id: JobId,
    owner: Owner,
    service: Service,
    limit: Limit = 20,
    after: Annotated[
        str | None, QueryParameter(description="The last id of the previous page", schema_extra={"pattern": EVENT_ID})
    ] = None,
) -> OpenAIEventList:
    """One page of a job's events, newest first; completions are at /jobs/ID/rollouts."""
    record = _training(job_id, owner, service)
    before = _number(after, EVENT_ID)
    found, more = service.latest_events(job_id, owner, before=before, limit=limit, types=_SHOWN_EVENTS)
    data = [event_of(event, record) for event in found]
    return OpenAIEventList(data=data, has_more=more, first_id=first_id(data), last_id=last_id(data))


@get(
    "/{job_id:str}/checkpoints",
    operation_id="listFineTuningCheckpoints",
    summary="The checkpoints of a job, as with OpenAI's SDK",
    opt=scope("jobs:read"),
    responses=responses("bad_query", "not_found"),
    sync_to_thread=True,
)
def list_checkpoints(
    job_id: JobId,
    owner: Owner,
    service: Service,
    limit: Limit = 10,
    after: Annotated[
        str | None,
        QueryParameter(description="The last id of the previous page", schema_extra={"pattern": CHECKPOINT_ID}),
    ] = None,
) -> OpenAICheckpointList:
    """One page of a job's checkpoints, newest first; their files are at /jobs/ID/checkpoints."""
    _training(job_id, owner, service)
    before = _number(after, CHECKPOINT_ID)
    found = sorted(service.checkpoints(job_id, owner), key=lambda one: one.step, reverse=True)
    left = [one for one in found if before is None or one.step < before]
    metrics = {row["step"]: row for row in service.metrics(job_id, owner)} if left else {}
    data = [_checkpoint(job_id, one.step, one.created_at, metrics.get(one.step, {})) for one in left[:limit]]
    return OpenAICheckpointList(data=data, has_more=len(left) > limit, first_id=first_id(data), last_id=last_id(data))


def _training(job_id: str, owner: str, service: Any) -> JobRecord:
    unknown = missing("fine_tuning_job_id", f"Could not find fine tune: {job_id[:80]}")
    if not re.fullmatch(JOB_ID, job_id):
        raise unknown
    try:
        record: JobRecord = service.get(job_id, owner)
    except NotFound as error:
        raise unknown from error
    if not _is_training(record):
        raise unknown
    return record


def _number(after: str | None, pattern: str) -> int | None:
    if after is None:
        return None
    found = re.fullmatch(pattern, after)
    if found is None:
        raise refusal("after", "invalid_value", "is not an id of this list", "Send the last id you read.")
    return int(found[1])


def job_of(record: JobRecord, service: Any, warnings: list[OpenAIJobWarning] | None = None) -> OpenAIJob:
    """A job as OpenAI's: the request, and what became of it."""
    asked = record.requested_spec if record.requested_spec is not None else record.spec
    spec = record.spec
    files = (spec["data"]["dataset"], spec["evaluation"].get("dataset")) if spec["data"]["source"] == "upload" else ()
    rows, validation_rows = (_rows_of(name, record.owner, service) for name in files or (None, None))
    body = openai_jobs.from_spec(asked, rows=rows, validation_rows=validation_rows)
    reinforcement: dict[str, Any] = body["method"]["reinforcement"]
    open_values = dict.fromkeys(_HYPERPARAMETERS, "auto")
    reinforcement["hyperparameters"] = {**open_values, **reinforcement.get("hyperparameters", {})}
    reinforcement.setdefault("grader", None)
    return OpenAIJob(
        id=record.id,
        created_at=seconds(record.created_at),
        error=_error(record),
        fine_tuned_model=record.id if record.status is JobStatus.SUCCEEDED else None,
        finished_at=seconds(record.finished_at) if record.finished_at else None,
        model=body.get("model") or spec["model"]["name"],
        organization_id=record.owner,
        result_files=results_of(record),
        status=_status(record),
        training_file=spec["data"]["dataset"],
        validation_file=body.get("validation_file"),
        seed=spec["training"]["seed"],
        integrations=body.get("integrations", []),
        metadata=record.metadata,
        method=body["method"],
        user_provided_suffix=record.name,
        grpo=body.get("grpo", {}),
        warnings=UNSET if warnings is None else warnings,
    )


_HYPERPARAMETERS: Final = tuple(
    row.param.rpartition(".")[2]
    for row in openai_jobs.TABLE
    if row.param.startswith(openai_jobs.HYPERPARAMETERS) and row.how != "ignored"
)


def _rows_of(name: str | None, owner: str, service: Any) -> int | None:
    """The rows of an upload, from which a job's epochs follow; None where it is gone."""
    if name is None:
        return None
    if name not in _ROWS:
        if len(_ROWS) >= _MOST_ROWS:
            _ROWS.clear()
        try:
            _ROWS[name] = service.get_dataset(name, owner).rows
        except NotFound:
            return None
    return _ROWS[name]


_ROWS: Final[dict[str, int]] = {}
"""Rows of data sets, which never change, so that a page of jobs does not read a description for each."""
_MOST_ROWS: Final = 10_000


def _status(record: JobRecord) -> str:
    is_preparing = record.status is JobStatus.RUNNING and record.phase == Phase.PREPARING
    return "validating_files" if is_preparing else str(record.status)


def _error(record: JobRecord) -> OpenAIJobError | None:
    error = record.error
    if error is None or record.status is not JobStatus.FAILED:
        return None
    message = " ".join(filter(None, (error.get("message", ""), error.get("hint", ""))))
    param = "training_file" if error.get("class") == "dataset" else None
    return OpenAIJobError(code=error.get("code", ""), message=message, param=param)


def _notes(translated: Translated) -> list[dict[str, Any]]:
    return [
        {"code": WarningCode.OPENAI_FIELD.value, "message": f"{note.param}: {note.message}"}
        for note in translated.mapped.notes
    ]


def event_of(event: dict[str, Any], record: JobRecord) -> OpenAIEvent:
    """One of our events as OpenAI's."""
    data: dict[str, Any] = event["data"]
    point = data.get("curve") if event["type"] == EventType.EVALUATION else None
    step, measured = event.get("step"), None
    if event["type"] == EventType.METRIC:
        measured = metrics_of({**data, "step": step})
    elif isinstance(point, dict):
        measured = _evaluated(cast("dict[str, Any]", point))
    moment = datetime.fromisoformat(event["time"])
    return OpenAIEvent(
        id=f"ftevent-{event['seq']}",
        created_at=seconds(moment),
        level=_LEVELS.get(event["type"], "info"),
        message=_message(event["type"], step, data, measured, record),
        type="message" if measured is None else "metrics",
        data=data if measured is None else measured,
    )


def metrics_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """A step's metrics under OpenAI's names, those with one; the others keep theirs."""
    return {METRIC_NAMES.get(name, name): value for name, value in row.items() if value is not None}


def _evaluated(point: dict[str, Any]) -> dict[str, Any]:
    is_accuracy = point.get("metric") == "strict_accuracy"
    name = "valid_mean_accuracy" if is_accuracy else "valid_reward_mean"
    return {"step": point.get("step"), name: point.get("value"), "questions": point.get("questions")}


def _message(
    kind: str, step: Any, data: Mapping[str, Any], measured: Mapping[str, Any] | None, record: JobRecord
) -> str:
    if measured is not None:
        value = next((f"{name}={measured[name]:.4g}" for name in _TOLD if _is_number(measured.get(name))), "")
        return f"Step {measured.get('step')}/{record.total_steps}: {value}".rstrip(": ")
    match kind:
        case EventType.STATUS:
            return f"The job is {data['status']}" if "status" in data else f"Phase: {data.get('phase')}"
        case EventType.CHECKPOINT:
            return f"Checkpoint at step {step}: {record.id}:step-{step}"
        case EventType.EVALUATION:
            return f"Evaluation: {data.get('stage')}"
        case _:
            return " ".join(str(data[name]) for name in ("message", "hint") if data.get(name))


_TOLD: Final = ("train_reward_mean", "valid_reward_mean", "valid_mean_accuracy")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _checkpoint(job_id: str, step: int, created_at: datetime, metrics: Mapping[str, Any]) -> OpenAICheckpoint:
    name = f"{job_id}:step-{step}"
    return OpenAICheckpoint(
        id=name,
        created_at=seconds(created_at),
        fine_tuned_model_checkpoint=name,
        fine_tuning_job_id=job_id,
        metrics={**metrics_of(metrics), "step": step},
        step_number=step,
    )


ROUTER = Router(
    "/v1/fine_tuning/jobs",
    route_handlers=[
        create_job,
        list_jobs,
        get_job,
        cancel_job,
        pause_job,
        resume_job,
        list_events,
        list_checkpoints,
    ],
    request_max_body_size=MAX_BYTES,
    tags=["OpenAI"],
)
