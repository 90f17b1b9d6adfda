"""What the API answers, field by field. A record gains a field here or it stays inside.

msgspec structs, because these are built and encoded for every request; what is asked for is `grpo_core.spec`.
Invariant: times are aware UTC, so they are written as RFC 3339 with a Z.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, UnsetType, field
from msgspec.structs import asdict

from grpo_core.estimates import Estimate, SpecWarning
from grpo_core.rewards import RewardInfo
from jobs.datasets import DatasetRecord
from jobs.record import TERMINAL, JobRecord, JobStatus, Phase
from jobs.rollout_store import Rollout as FoundRollout
from jobs.rollout_store import StepRollouts
from jobs.service import Artifact, LinkedCheckpoint
from jobs.waiting import Waiting as Place

Sha256 = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]


class FieldProblem(Struct, frozen=True, kw_only=True):
    """One thing wrong with a request, and what to do about it."""

    pointer: Annotated[str, Meta(description="RFC 6901 pointer into the body; empty for the whole of it")]
    code: str
    detail: str
    remedy: str
    parameter: Annotated[str | UnsetType, Meta(description="Name of the query parameter, where one is wrong")] = UNSET


class ProblemDocument(Struct, frozen=True, kw_only=True):
    """RFC 9457 problem details."""

    type: str
    title: str
    status: int
    detail: Annotated[str, Meta(description="What happened this time, and what to do")]
    code: Annotated[str, Meta(description="Stable name of the problem; `type` holds it too")]
    instance: str
    request_id: str
    errors: list[FieldProblem] = []


class JobLinks(Struct, frozen=True, kw_only=True):
    """Where the rest of a job is."""

    self: str
    events: str
    metrics: str
    rollouts: str
    checkpoints: str
    artifacts: str


class JobError(Struct, frozen=True, kw_only=True):
    """Why a job failed."""

    code: str
    kind: Annotated[str, Meta(description="What kind of failure it is, such as oom or dataset")] = field(name="class")
    message: str
    hint: Annotated[str, Meta(description="What to change")]
    retryable: Annotated[bool, Meta(description="The same job may succeed when submitted again")]


class Job(Struct, frozen=True, kw_only=True):
    """A job as its owner sees it."""

    id: str
    object: Literal["job"] = "job"
    owner: str
    status: JobStatus
    phase: Phase | None
    name: str | None
    metadata: dict[str, str]
    spec: Annotated[dict[str, Any], Meta(description="The resolved spec, every value explicit")]
    spec_sha256: Sha256
    epoch: Annotated[int, Meta(ge=0, description="The run that holds or last held the job; 0 before the first")]
    attempts: Annotated[int, Meta(ge=0, description="Runs lost without a new checkpoint")]
    step: Annotated[int, Meta(ge=0)]
    total_steps: Annotated[int, Meta(ge=0)]
    progress: Annotated[float, Meta(ge=0, le=1)]
    checkpoint_step: Annotated[
        int, Meta(ge=0, description="The last step that is safe in storage: a next run would go on from it; 0 for none")
    ]
    reward: Annotated[float | None, Meta(description="Mean total reward of the last step")]
    created_at: datetime
    updated_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    error: JobError | None
    links: JobLinks


class Waiting(Struct, frozen=True, kw_only=True):
    """What a queued job waits for."""

    queue: Annotated[str, Meta(description="The queue of its resources")]
    ahead: Annotated[int, Meta(ge=0, description="Jobs queued before it that wait too, whoever's they are")]
    workers: Annotated[
        int, Meta(ge=0, description="Workers connected that can run it, busy or not; with 0 it waits for one to start")
    ]


class JobDetail(Job, frozen=True, kw_only=True):
    """A job looked at by itself."""

    waiting: Annotated[Waiting | None, Meta(description="What it waits for while it is queued")]


class JobList(Struct, frozen=True, kw_only=True):
    """Some of your jobs, newest first."""

    object: Literal["list"] = "list"
    data: list[Job]
    has_more: bool
    next_cursor: Annotated[str | None, Meta(description="Give it as `cursor` for the next page")]


class Warning(Struct, frozen=True, kw_only=True):  # noqa: A001 - the name in the OpenAPI document
    """Something that will be accepted and may surprise."""

    pointer: str
    code: str
    message: str


class SubmittedJob(Job, frozen=True, kw_only=True):
    """A job that was accepted just now."""

    warnings: Annotated[list[Warning], Meta(description="What may surprise, as a dry run tells it")]


class DryRun(Struct, frozen=True, kw_only=True):
    """What a spec would become; nothing was stored."""

    object: Literal["dry_run"] = "dry_run"
    spec: Annotated[dict[str, Any], Meta(description="The resolved spec, every value explicit")]
    spec_sha256: Sha256
    estimate: Annotated[Estimate, Meta(description="Its size by arithmetic; tokens are upper bounds")]
    warnings: list[Warning]


class Event(Struct, frozen=True, kw_only=True):
    """Something that happened to a job."""

    v: int
    seq: Annotated[int, Meta(ge=1, description="Number within the job; never reused")]
    epoch: int
    type: str
    time: str
    step: int
    data: dict[str, Any]


class EventList(Struct, frozen=True, kw_only=True):
    """Events in order."""

    object: Literal["list"] = "list"
    data: list[Event]
    next_after: Annotated[int, Meta(description="Give it as `after` for what comes next")]


class MetricList(Struct, frozen=True, kw_only=True):
    """One entry a logged step, in order."""

    object: Literal["list"] = "list"
    data: list[dict[str, Any]]


class Rollout(Struct, frozen=True, kw_only=True):
    """One completion, with everything that was decided about it."""

    step: Annotated[int, Meta(ge=1)]
    epoch: Annotated[int, Meta(ge=1, description="The run that drew it")]
    prompt_id: Annotated[str, Meta(description="The same wherever the prompt was drawn: give it as `prompt`")]
    row: Annotated[int, Meta(description="Of the data set")]
    sample: Annotated[int, Meta(ge=0, description="Place in the group of its prompt")]
    seed: int
    prompt: Annotated[str, Meta(description="The question, without system prompt and chat template")]
    answer: str
    completion: str
    rewards: Annotated[dict[str, float | None], Meta(description="Raw, before weights; null: no finite number")]
    reward_total: Annotated[float | None, Meta(description="Weighted sum")]
    advantage: float | None
    prompt_tokens: int
    completion_tokens: int
    finish_reason: Annotated[str, Meta(description="stop, or length where it was cut")]
    adapter_version: Annotated[int, Meta(description="Optimizer steps the adapter had seen when it drew this")]


class RolloutList(Struct, frozen=True, kw_only=True):
    """Some of a job's completions, in the order asked for."""

    object: Literal["list"] = "list"
    data: list[Rollout]
    has_more: bool
    next_cursor: Annotated[str | None, Meta(description="Give it as `cursor`, with the same filters")]


class RolloutStep(Struct, frozen=True, kw_only=True):
    """What there is of one step."""

    step: Annotated[int, Meta(ge=1)]
    epoch: Annotated[int, Meta(ge=1)]
    completions: int
    prompts: Annotated[list[str], Meta(description="Their prompt_id, in the order of the step")]
    reward_mean: float | None
    reward_min: float | None
    reward_max: float | None


class RolloutStepList(Struct, frozen=True, kw_only=True):
    """The steps whose completions can be read."""

    object: Literal["list"] = "list"
    data: list[RolloutStep]


class ArtifactFile(Struct, frozen=True, kw_only=True):
    """One stored file and a short-lived link to it."""

    path: Annotated[str, Meta(description="Relative path, as `grpo download` writes it")]
    key: Annotated[str, Meta(description="Key in the bucket")]
    size: Annotated[int, Meta(ge=0)]
    sha256: Sha256
    url: Annotated[str, Meta(description="Presigned; works without a key until `expires_at`")]
    expires_at: datetime


class ArtifactList(Struct, frozen=True, kw_only=True):
    """What a job has left in storage."""

    object: Literal["list"] = "list"
    data: list[ArtifactFile]
    complete: Annotated[bool, Meta(description="The job has ended and nothing will be added")]


class Checkpoint(Struct, frozen=True, kw_only=True):
    """What a job could be started from, and loaded as an adapter."""

    step: int
    epoch: Annotated[int, Meta(ge=1, description="The run that wrote it")]
    created_at: datetime
    files: list[ArtifactFile]


class CheckpointList(Struct, frozen=True, kw_only=True):
    """A job's checkpoints in order of steps."""

    object: Literal["list"] = "list"
    data: list[Checkpoint]


class Dataset(Struct, frozen=True, kw_only=True):
    """An uploaded data set."""

    id: str
    object: Literal["dataset"] = "dataset"
    owner: str
    name: str | None
    rows: Annotated[int, Meta(ge=0)]
    bytes: Annotated[int, Meta(ge=0)]
    sha256: Sha256
    columns: list[str]
    created_at: datetime


class DatasetList(Struct, frozen=True, kw_only=True):
    """Some of your data sets, newest first."""

    object: Literal["list"] = "list"
    data: list[Dataset]
    has_more: bool
    next_cursor: Annotated[str | None, Meta(description="Give it as `cursor` for the next page")]


class Reward(Struct, frozen=True, kw_only=True):
    """A reward function that a spec can weigh."""

    name: str
    mode: Literal["fixed", "published"]
    most: float
    least: Annotated[float | None, Meta(description="null: unbounded below")]
    description: str
    columns: Annotated[list[str], Meta(description="Data set columns it needs")]


class RewardList(Struct, frozen=True, kw_only=True):
    """Every reward function."""

    object: Literal["list"] = "list"
    data: list[Reward]


class Health(Struct, frozen=True, kw_only=True):
    """The process answers."""

    status: Literal["ok"] = "ok"


class Readiness(Struct, frozen=True, kw_only=True):
    """Whether jobs can be accepted now."""

    status: Literal["ready", "not_ready"]
    checks: Annotated[dict[str, str], Meta(description="By server: ok, or what is wrong")]


def job_of(record: JobRecord) -> Job:
    """The public form of a job."""
    here = f"/jobs/{record.id}"
    return Job(
        id=record.id,
        owner=record.owner,
        status=record.status,
        phase=record.phase,
        name=record.name,
        metadata=record.metadata,
        spec=record.spec,
        spec_sha256=record.spec_sha256,
        epoch=record.epoch,
        attempts=record.attempts,
        step=record.step,
        total_steps=record.total_steps,
        progress=_progress(record),
        checkpoint_step=record.checkpoint_step,
        reward=record.reward,
        created_at=record.created_at,
        updated_at=record.updated_at,
        started_at=record.started_at,
        finished_at=record.finished_at,
        error=_error_of(record.error),
        links=JobLinks(self=here, **{name: f"{here}/{name}" for name in JobLinks.__struct_fields__ if name != "self"}),
    )


def submitted_job(record: JobRecord, warnings: list[SpecWarning]) -> SubmittedJob:
    """The public form of a job that was just accepted."""
    return SubmittedJob(**asdict(job_of(record)), warnings=[warning_of(warning) for warning in warnings])


def job_detail(record: JobRecord, place: Place | None) -> JobDetail:
    """The public form of a job that is looked at."""
    waiting = Waiting(queue=place.queue, ahead=place.ahead, workers=place.workers) if place else None
    return JobDetail(**asdict(job_of(record)), waiting=waiting)


def warning_of(warning: SpecWarning) -> Warning:
    """The public form of a warning."""
    return Warning(pointer=warning.pointer, code=warning.code, message=warning.message)


def event_of(event: dict[str, Any]) -> Event:
    """The public form of an event, as `docs/run-folder.md` has it."""
    return Event(
        v=event["v"],
        seq=event["seq"],
        epoch=event["epoch"],
        type=event["type"],
        time=event["time"],
        step=event["step"] or 0,
        data=event["data"],
    )


def rollout_of(rollout: FoundRollout) -> Rollout:
    """The public form of a completion."""
    return Rollout(**{name: getattr(rollout, name) for name in Rollout.__struct_fields__})


def rollout_step_of(step: StepRollouts) -> RolloutStep:
    """The public form of what there is of a step."""
    return RolloutStep(**{name: getattr(step, name) for name in RolloutStep.__struct_fields__})


def artifacts_of(artifacts: list[Artifact], record: JobRecord) -> ArtifactList:
    """The public form of what a job has left."""
    return ArtifactList(data=[_file_of(artifact) for artifact in artifacts], complete=record.status in TERMINAL)


def checkpoint_of(checkpoint: LinkedCheckpoint) -> Checkpoint:
    """The public form of a checkpoint."""
    return Checkpoint(
        step=checkpoint.step,
        epoch=checkpoint.epoch,
        created_at=checkpoint.created_at,
        files=[_file_of(file) for file in checkpoint.files],
    )


def dataset_of(record: DatasetRecord) -> Dataset:
    """The public form of an uploaded data set."""
    return Dataset(
        id=record.id,
        owner=record.owner,
        name=record.name,
        rows=record.rows,
        bytes=record.bytes,
        sha256=record.sha256,
        columns=record.columns,
        created_at=record.created_at,
    )


def reward_of(info: RewardInfo) -> Reward:
    """The public form of a reward function."""
    return Reward(
        name=info.name,
        mode=info.mode,
        most=info.most,
        least=info.least,
        description=info.description,
        columns=list(info.columns),
    )


def _file_of(file: Artifact) -> ArtifactFile:
    return ArtifactFile(
        path=file.path, key=file.key, size=file.size, sha256=file.sha256, url=file.url, expires_at=file.expires_at
    )


def _progress(record: JobRecord) -> float:
    if record.status is JobStatus.SUCCEEDED:
        return 1.0
    return round(min(1.0, record.step / record.total_steps), 4) if record.total_steps else 0.0


def _error_of(error: dict[str, Any] | None) -> JobError | None:
    if error is None:
        return None
    return JobError(
        code=error.get("code", ""),
        kind=error.get("class", "internal"),
        message=error.get("message", ""),
        hint=error.get("hint", ""),
        retryable=error.get("retryable", False),
    )
