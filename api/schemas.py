"""The fields of every answer of the API. A field of a record is public only if it is listed here.

msgspec structs, because these are built and encoded for every request; the request's spec is `grpo_core.spec`.
Invariant: times are aware UTC, so they are written as RFC 3339 with a Z.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import TYPE_CHECKING, Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, UnsetType, ValidationError, convert, field

from grpo_core.datasets.preview import Holds, PreviewedRow, preview_columns, preview_rows
from grpo_core.estimates import Estimate, SpecWarning
from grpo_core.reasons import EventType, FailureClass, FinishReason, Phase
from grpo_core.rewards import RewardInfo
from grpo_core.run_dir.records import Rollout
from grpo_core.shown import Shown, shown_fields
from grpo_core.spec import JobSpec
from jobs.auth.api_keys import KEY_ID, ListedKey
from jobs.read.fleet import FleetWorker, WorkerState
from jobs.read.groups import GroupSummary
from jobs.read.job_rows import JobRow as FoundRow
from jobs.read.job_rows import JobRowPage, Part
from jobs.read.queue_position import QueuePosition as Place
from jobs.read.queue_position import WaitReason
from jobs.read.rollouts import RolloutStep
from jobs.service import Artifact, LinkedCheckpoint
from jobs.store.datasets import DatasetRecord
from jobs.store.job import TERMINAL, JobRecord, JobRequest, JobState, JobStatus, JobView
from jobs.store.job_store import HeldJob
from jobs.usage.prices import Prices, PriceSettings
from jobs.usage.quotas import Usage
from jobs.usage.report import UsageRow
from jobs.webhooks.deliveries import Delivery, State
from jobs.webhooks.events import TEST, WebhookEvent
from jobs.webhooks.registry import WEBHOOK_ID
from jobs.webhooks.registry import Webhook as WebhookRecord

if TYPE_CHECKING:
    EventWord = EventType
    FinishWord = FinishReason
    WebhookWord = WebhookEvent
    WorkerStateWord = WorkerState
else:
    # Their words as a list: an enum would be a component of the OpenAPI document, unlike in earlier releases.
    EventWord = Literal[tuple(map(str, EventType))]
    FinishWord = Literal[tuple(map(str, FinishReason))]
    WebhookWord = Literal[tuple(map(str, WebhookEvent))]
    WorkerStateWord = Literal[tuple(map(str, WorkerState))]

GROUP_ID = "^group-[0-9A-HJKMNP-TV-Z]{26}$"
NextCursor = Annotated[str | None, Meta(description="Send it as `cursor` for the next page")]
Sha256 = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]


class FieldProblem(Struct, frozen=True, kw_only=True):
    """One error of a request, and its remedy."""

    pointer: Annotated[str, Meta(description="RFC 6901 pointer into the body; empty for the whole body")]
    code: str
    detail: str
    remedy: str
    parameter: Annotated[str | UnsetType, Meta(description="Name of the query parameter, if one is invalid")] = UNSET


class ProblemDocument(Struct, frozen=True, kw_only=True):
    """RFC 9457 problem details."""

    type: str
    title: str
    status: int
    detail: Annotated[str, Meta(description="What happened, and what to do")]
    code: Annotated[str, Meta(description="Stable name of the problem; `type` holds it too")]
    instance: str
    request_id: str
    errors: list[FieldProblem] = []


class JobLinks(Struct, frozen=True, kw_only=True):
    """Links to the rest of a job."""

    self: str
    events: str
    metrics: str
    rollouts: str
    checkpoints: str
    artifacts: str


class JobError(Struct, frozen=True, kw_only=True):
    """Why a job failed."""

    code: str
    kind: Annotated[str, Meta(description=FailureClass.described())] = field(name="class")
    message: str
    hint: Annotated[str, Meta(description="What to change")]
    retryable: Annotated[bool, Meta(description="The same job may succeed when submitted again")]


@dataclass(frozen=True, kw_only=True)
class _Head:
    id: Annotated[str, Shown()]
    object: Annotated[Literal["job"], Shown()] = "job"


@dataclass(frozen=True, kw_only=True)
class _Progress(JobState):
    progress: Annotated[float, Shown(least=0, most=1)]


# The fields of the last base come first: so every key is where it was in earlier releases.
@dataclass(frozen=True, kw_only=True)
class Job(JobView, _Progress, _Head):
    """A job as its owner sees it."""

    error: Annotated[JobError | None, Shown()]
    links: Annotated[JobLinks, Shown()]


class Waiting(Struct, frozen=True, kw_only=True):
    """What a queued job waits for."""

    queue: Annotated[str, Meta(description="The queue that it waits in")]
    ahead: Annotated[
        int, Meta(ge=0, description="Jobs of all owners whose turn comes before, by priority and fair shares")
    ]
    workers: Annotated[
        int, Meta(ge=0, description="Connected workers that can run it, busy or not; with 0 it waits until one starts")
    ]
    reason: Annotated[WaitReason, Meta(description=WaitReason.described())]
    spec_format: Annotated[int, Meta(ge=1, description="The spec format that a worker must read to run it")]
    workers_spec_format: Annotated[
        int | None, Meta(description="The newest that a connected worker with its resources reads; null: there is none")
    ]
    hosts: Annotated[int, Meta(ge=1, description="Hosts that it needs at the same time")]
    gpus: Annotated[int, Meta(ge=0, description="GPUs that it needs on each of them")]
    hosts_found: Annotated[
        int | None,
        Meta(description="Hosts with enough GPUs when they were last not free at once; null: not looked at"),
    ]


class Trial(Struct, frozen=True, kw_only=True):
    """What a trial found: a job of kind `try`."""

    sentence: Annotated[str, Meta(description="Whether training would learn anything, and what to change")]
    will_learn: Annotated[
        Literal["yes", "slowly", "no"], Meta(description="`yes`: at least a fifth of the groups have a signal")
    ]
    prompts: Annotated[int, Meta(ge=1)]
    completions: Annotated[int, Meta(ge=1)]
    signal_share: Annotated[
        float, Meta(description="Share of groups whose completions got different rewards; others teach nothing")
    ]
    reward_mean: float
    reward_std: Annotated[float, Meta(description="Within a group, on average")]
    rewards: Annotated[dict[str, float], Meta(description="Mean of each raw reward")]
    format_share: Annotated[
        float | None, Meta(description="Completions in the recipe's format; null: no reward of it counts")
    ]
    completion_tokens_mean: float
    completion_tokens_max: int
    truncated_share: Annotated[float, Meta(description="Completions that were cut off")]
    duplicate_share: Annotated[float | None, Meta(description="Completions that repeat another of their group")]
    unscored_share: Annotated[float | None, Meta(description="Completions that a grader failed to score")]
    step_seconds: Annotated[float, Meta(description="Time of a step with these settings on that worker")]


@dataclass(frozen=True, kw_only=True)
class JobDetail(JobRequest, Job):
    """One job, as GET /jobs/{id} returns it."""

    waiting: Annotated[Waiting | None, Shown("What it waits for while it is queued")]
    result: Annotated[Trial | None, Shown("What a trial (`kind` `try`) found, once it has succeeded")]
    use: Annotated[JobUse | None, Shown("GPU-hours of its runs and their cost; null: it uses no GPU")]


class JobList(Struct, frozen=True, kw_only=True):
    """Some of your jobs, newest first."""

    object: Literal["list"] = "list"
    data: list[Job]
    has_more: bool
    next_cursor: NextCursor


class Spread(Struct, frozen=True, kw_only=True):
    """A figure over the repeats of one setting."""

    n: Annotated[int, Meta(ge=1, description="Number of jobs that have it")]
    mean: float
    sd: Annotated[float | None, Meta(description="Standard deviation of the sample; null: of one job")]
    least: float
    most: float


class GroupRow(Struct, frozen=True, kw_only=True):
    """The repeats of one setting."""

    settings: Annotated[dict[str, Any], Meta(description="The fields that differ within the group, with their values")]
    jobs: list[Job]
    figures: Annotated[
        dict[str, Spread],
        Meta(
            description="`reward` of the last step; after training `strict_accuracy`, `strict_change` from the base, "
            "`lenient_accuracy`; `metric`, with rewards of your own"
        ),
    ]


class Comparison(Struct, frozen=True, kw_only=True):
    """Jobs as a table."""

    object: Literal["comparison"] = "comparison"
    fields: Annotated[list[str], Meta(description="The fields of the spec that differ, besides the seed")]
    rows: list[GroupRow]
    cautions: Annotated[list[str], Meta(description="What to know before comparing the figures")]


class Group(Struct, frozen=True, kw_only=True):
    """Jobs that were submitted together, as a table."""

    id: str
    object: Literal["group"] = "group"
    fields: Annotated[list[str], Meta(description="The fields of the spec that differ, besides the seed")]
    rows: list[GroupRow]
    cautions: Annotated[list[str], Meta(description="What to know before comparing the figures")]


class Warning(Struct, frozen=True, kw_only=True):  # noqa: A001 - the name in the OpenAPI document
    """A warning about a spec that will be accepted."""

    pointer: str
    code: str
    message: str


@dataclass(frozen=True, kw_only=True)
class SubmittedJob(Job):
    """A job that was just accepted."""

    warnings: Annotated[list[Warning], Shown("Warnings, as in a dry run")]


class SubmittedGroup(Struct, frozen=True, kw_only=True):
    """The jobs of a group, in the order of their submission."""

    id: str
    object: Literal["group"] = "group"
    data: list[Job]
    warnings: Annotated[list[Warning], Meta(description="Warnings about the first job, as in a dry run")]


class GpuCost(Struct, frozen=True, kw_only=True):
    """Hours on one kind of GPU, and what they cost."""

    gpu: Annotated[str | None, Meta(description="Name of the GPUs; null: not known", examples=["NVIDIA H200"])]
    gpu_hours: Annotated[float, Meta(ge=0, description="Hours times GPUs, on all hosts", examples=[1.5])]
    cost: Annotated[
        float | None, Meta(description="In `currency`; null: the operator has set no price", examples=[5.25])
    ]


class JobUse(Struct, frozen=True, kw_only=True):
    """What the runs of a job have used so far."""

    gpu_hours: Annotated[float, Meta(ge=0, description="Of all runs, up to now", examples=[1.5])]
    cost: Annotated[
        float | None, Meta(description="In `currency`; null: one of its GPUs has no price", examples=[5.25])
    ]
    currency: Annotated[str | None, Meta(description="null: the operator has set no price", examples=["EUR"])]
    by_gpu: Annotated[list[GpuCost], Meta(description="The same for each kind of GPU")]


class DryRun(Struct, frozen=True, kw_only=True):
    """The result of a dry run; nothing was stored."""

    object: Literal["dry_run"] = "dry_run"
    spec: Annotated[dict[str, Any], Meta(description="The resolved spec, every value explicit")]
    spec_sha256: Sha256
    estimate: Annotated[Estimate, Meta(description="Its computed size; tokens are upper bounds")]
    warnings: list[Warning]
    currency: Annotated[
        str | None, Meta(description="Of `costs`; null: the operator has set no price", examples=["EUR"])
    ]
    costs: Annotated[
        list[GpuCost],
        Meta(description="What training costs, about, on each of `estimate.gpus` that it fits and that has a price"),
    ]


class Event(Struct, frozen=True, kw_only=True):
    """An event of a job."""

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
    next_after: Annotated[int, Meta(description="Send it as `after` for later events")]
    has_more: bool = False
    next_cursor: Annotated[
        str | None,
        Meta(description="Send it as `cursor` for the next page; null at the end: use `next_after`"),
    ] = None


class MetricList(Struct, frozen=True, kw_only=True):
    """One entry per logged step, in order."""

    object: Literal["list"] = "list"
    data: list[dict[str, Any]]
    has_more: bool = False
    next_cursor: NextCursor = None


class RolloutList(Struct, frozen=True, kw_only=True):
    """A page of a job's completions, in the requested order."""

    object: Literal["list"] = "list"
    data: list[Rollout]
    has_more: bool
    next_cursor: Annotated[str | None, Meta(description="Send it as `cursor`, with the same filters")]


class RolloutStepList(Struct, frozen=True, kw_only=True):
    """The steps that have completions."""

    object: Literal["list"] = "list"
    data: list[RolloutStep]
    has_more: bool = False
    next_cursor: NextCursor = None


class ArtifactFile(Struct, frozen=True, kw_only=True):
    """One stored file and a short-lived link to it."""

    path: Annotated[str, Meta(description="Relative path, as `grpo download` writes it")]
    key: Annotated[str, Meta(description="Key in the bucket")]
    size: Annotated[int, Meta(ge=0)]
    sha256: Sha256
    url: Annotated[str, Meta(description="Presigned; works without a key until `expires_at`")]
    expires_at: datetime


class ArtifactList(Struct, frozen=True, kw_only=True):
    """The files of a job in storage."""

    object: Literal["list"] = "list"
    data: list[ArtifactFile]
    complete: Annotated[bool, Meta(description="The job has ended and no file will be added")]
    has_more: bool = False
    next_cursor: NextCursor = None


class Checkpoint(Struct, frozen=True, kw_only=True):
    """A checkpoint of a job: it can be loaded as an adapter, and a job can start from it."""

    step: int
    epoch: Annotated[int, Meta(ge=1, description="The run that wrote it")]
    created_at: datetime
    files: list[ArtifactFile]


class CheckpointList(Struct, frozen=True, kw_only=True):
    """A job's checkpoints in order of steps."""

    object: Literal["list"] = "list"
    data: list[Checkpoint]
    has_more: bool = False
    next_cursor: NextCursor = None


class GpuUsage(Struct, frozen=True, kw_only=True):
    """GPU-hours: hours a worker held your jobs, times their GPUs."""

    used: Annotated[float, Meta(ge=0, description="Of runs that started in the window, including running ones")]
    limit: Annotated[float | None, Meta(description="null: any number")]
    window_days: Annotated[int, Meta(ge=1, description="Days (UTC) that count, today included")]
    frees_at: Annotated[datetime | None, Meta(description="If they are used up: when you may submit again")]
    left: Annotated[float | None, Meta(description="What is left of `limit`; null: any number", examples=[87.5])]


class StorageUsage(Struct, frozen=True, kw_only=True):
    """Bytes of your data sets and jobs."""

    used: Annotated[int, Meta(ge=0)]
    limit: Annotated[int | None, Meta(description="null: any number")]
    measured_at: Annotated[
        datetime | None, Meta(description="Time of the last full count; later uploads and deletions are included")
    ]
    left: Annotated[int | None, Meta(description="What is left of `limit`; null: any number", examples=[10**9])]


class JobUsage(Struct, frozen=True, kw_only=True):
    """Jobs that are queued, running or paused."""

    used: Annotated[int, Meta(ge=0)]
    limit: Annotated[int | None, Meta(description="null: any number")]
    left: Annotated[int | None, Meta(description="What is left of `limit`; null: any number", examples=[9999])]


class UsageReport(Struct, frozen=True, kw_only=True):
    """What you have used, and your limits."""

    object: Literal["usage"] = "usage"
    owner: str
    gpu_hours: GpuUsage
    stored_bytes: StorageUsage
    unfinished_jobs: JobUsage


class OwnerUsageList(Struct, frozen=True, kw_only=True):
    """What each owner has used, with the limits, by name."""

    object: Literal["list"] = "list"
    data: list[UsageReport]
    has_more: bool
    next_cursor: NextCursor


class GpuHours(Struct, frozen=True, kw_only=True):
    """What one owner used of one kind of GPU in one period."""

    start: Annotated[
        date,
        Meta(
            description="First day of the period (UTC): of a week its Monday, of the whole report its first day",
            examples=["2026-11-30"],
        ),
    ]
    owner: Annotated[str, Meta(description="Whose jobs", examples=["ann"])]
    gpu: Annotated[str | None, Meta(description="Name of the GPUs; null: not known", examples=["NVIDIA H200"])]
    gpu_hours: Annotated[
        float,
        Meta(ge=0, description="Hours for which workers held the jobs, times their GPUs", examples=[12.5]),
    ]
    jobs: Annotated[int, Meta(ge=0, description="Jobs with a run in the period", examples=[3])]
    cost: Annotated[
        float | None, Meta(description="In `currency`; null: the operator has set no price", examples=[43.75])
    ]


class GpuHoursList(Struct, frozen=True, kw_only=True):
    """Who used which GPUs for how long, by period, owner and GPU."""

    object: Literal["list"] = "list"
    since: Annotated[date, Meta(description="The first day (UTC)", examples=["2026-11-01"])]
    until: Annotated[date, Meta(description="The last day (UTC), included", examples=["2026-11-30"])]
    by: Annotated[Literal["day", "week", "total"], Meta(description="Length of the periods")]
    currency: Annotated[
        str | None, Meta(description="Of all costs; null: the operator has set no price", examples=["EUR"])
    ]
    data: Annotated[list[GpuHours], Meta(description="In order of period, owner and GPU")]
    has_more: Annotated[bool, Meta(description="Whether there are further rows")]
    next_cursor: Annotated[
        str | None, Meta(description="Send it as `cursor` for the next page", examples=["2026-11-30~ann~NVIDIA H200"])
    ]


class Dataset(Struct, frozen=True, kw_only=True):
    """An uploaded data set."""

    id: str
    object: Literal["dataset"] = "dataset"
    owner: str
    name: str | None
    rows: Annotated[int, Meta(ge=0)]
    bytes: Annotated[int, Meta(ge=0)]
    sha256: Sha256
    columns: Annotated[list[str], Meta(description="Columns with text or a number in every row")]
    chats: Annotated[
        list[str] | UnsetType,
        Meta(description="Columns with a chat in every row; only in the answer to an upload"),
    ] = UNSET
    created_at: datetime


class PreviewColumn(Struct, frozen=True, kw_only=True):
    """A column, judged by the first 200 rows."""

    name: str
    holds: Annotated[Holds, Meta(description="In every row: text or a number, a chat that the model continues, or not")]


class PreviewTurn(Struct, frozen=True, kw_only=True):
    """One turn of a prompt."""

    role: str
    content: str


class PreviewRow(Struct, frozen=True, kw_only=True):
    """One row as a job would ask it."""

    row: Annotated[int, Meta(ge=0)]
    values: Annotated[dict[str, Any], Meta(description="Every column as it is stored")]
    messages: Annotated[list[PreviewTurn], Meta(description="The prompt, before the model's chat template")]
    answer: Annotated[str, Meta(description="The answer that rewards compare with; empty: the row has none")]
    problem: Annotated[FieldProblem | None, Meta(description="Why a job cannot use the row")]


class DatasetPreview(Struct, frozen=True, kw_only=True):
    """The start of a data set; nothing was stored."""

    object: Literal["dataset_preview"] = "dataset_preview"
    columns: list[PreviewColumn]
    data: list[PreviewRow]


class DatasetRow(Struct, frozen=True, kw_only=True):
    """A row of a data set."""

    row: Annotated[int, Meta(ge=0, description="Its number, from 0", examples=[0])]
    values: Annotated[
        dict[str, Any],
        Meta(description="Every column as it is stored", examples=[{"question": "6+6=?", "answer": "12"}]),
    ]


class RowList(Struct, frozen=True, kw_only=True):
    """Some rows of a data set, in their order."""

    object: Literal["list"] = "list"
    data: list[DatasetRow]
    has_more: bool
    next_cursor: Annotated[str | None, Meta(description="Send it as `cursor` for the next page", examples=["20-2480"])]


class JobRow(Struct, frozen=True, kw_only=True):
    """A row of a job's data set as the job asks it."""

    row: Annotated[
        int, Meta(ge=0, description="Its number in its data set, from 0; `prompt_id` of its completions", examples=[0])
    ]
    sha256: Annotated[
        str,
        Meta(
            description="Of all its columns: while it is the same, so is the row",
            examples=["9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"],
        ),
    ]
    values: Annotated[
        dict[str, Any],
        Meta(description="Every column as it is stored", examples=[{"question": "6+6=?", "answer": "12"}]),
    ]
    messages: Annotated[
        list[PreviewTurn],
        Meta(description="The prompt as training builds it, before the model's chat template; empty: see `problem`"),
    ]
    answer: Annotated[
        str, Meta(description="The answer that rewards compare with; empty: the row has none", examples=["12"])
    ]
    problem: Annotated[FieldProblem | None, Meta(description="Why the job cannot use the row")]


class JobRowList(Struct, frozen=True, kw_only=True):
    """Some rows of a job's data set, in their order; or why they cannot be shown."""

    object: Literal["list"] = "list"
    data: list[JobRow]
    has_more: bool
    next_cursor: Annotated[str | None, Meta(description="Send it as `cursor` for the next page", examples=["20-2480"])]
    part: Annotated[Literal["train", "held_out"], Meta(description="Which rows these are")]
    first_row: Annotated[int, Meta(ge=0, description="Number of the part's first row", examples=[0])]
    rows: Annotated[
        int | None,
        Meta(description="How many rows the part has; null: not known here, as of a hub data set", examples=[7473]),
    ]
    unavailable: Annotated[
        FieldProblem | None,
        Meta(description="Why no row can be shown: the data set was deleted, or only workers read it; null: not so"),
    ]


class DatasetList(Struct, frozen=True, kw_only=True):
    """Some of your data sets, newest first."""

    object: Literal["list"] = "list"
    data: list[Dataset]
    has_more: bool
    next_cursor: NextCursor


class ApiKey(Struct, frozen=True, kw_only=True):
    """An API key, without its secret."""

    id: Annotated[str, Meta(pattern=KEY_ID, description="Its id", examples=["key-01JDZ5T1E4Q8Y7M2N3P4R5S6T7"])]
    object: Literal["key"] = "key"
    owner: Annotated[str, Meta(description="Whose jobs and data it sees", examples=["ann"])]
    name: Annotated[str | None, Meta(description="Its label; null without one", examples=["laptop"])]
    hint: Annotated[
        str | None,
        Meta(
            description="Its first characters, to recognise it; null: an earlier release created it",
            examples=["grpo_Ab3x"],
        ),
    ]
    scopes: Annotated[list[str], Meta(description="What it may do", examples=[["jobs:read", "jobs:write"]])]
    status: Annotated[Literal["valid", "expired", "revoked"], Meta(description="Whether requests with it are accepted")]
    created_at: datetime
    created_by: Annotated[
        str | None,
        Meta(
            description="The key that created it; null: the command line of the service",
            examples=["key-01JDZ5T1E4Q8Y7M2N3P4R5S6T6"],
        ),
    ]
    last_used_at: Annotated[
        datetime | None,
        Meta(
            description="Its last use, to the minute; null: none, or Valkey was lost since",
            examples=["2026-11-29T09:30:00Z"],
        ),
    ]
    expires_at: Annotated[
        datetime | None, Meta(description="When it expires; null: never", examples=["2027-01-01T00:00:00Z"])
    ]
    revoked_at: Annotated[
        datetime | None, Meta(description="When it was revoked; null: it was not", examples=["2026-11-30T12:00:00Z"])
    ]
    key: Annotated[
        str | UnsetType,
        Meta(description="The secret; only in the answer that creates the key", examples=["grpo_Ab3x..."]),
    ] = UNSET


class ApiKeyList(Struct, frozen=True, kw_only=True):
    """Some API keys, newest first."""

    object: Literal["list"] = "list"
    data: list[ApiKey]
    has_more: bool
    next_cursor: NextCursor


class Webhook(Struct, frozen=True, kw_only=True):
    """A URL that events of your jobs are posted to."""

    id: Annotated[str, Meta(pattern=WEBHOOK_ID)]
    object: Literal["webhook"] = "webhook"
    url: str
    events: list[WebhookWord]
    status: Annotated[
        Literal["enabled", "disabled"],
        Meta(description="`disabled`: it failed for a day, and gets nothing until a test succeeds"),
    ]
    disabled_at: datetime | None
    disabled_reason: Annotated[str | None, Meta(description="Why it was disabled")]
    created_at: datetime
    secret: Annotated[
        str | UnsetType, Meta(description="Checks signatures; only in the answer that registers the webhook")
    ] = UNSET


class WebhookList(Struct, frozen=True, kw_only=True):
    """Your webhooks, oldest first."""

    object: Literal["list"] = "list"
    data: list[Webhook]
    has_more: bool = False
    next_cursor: NextCursor = None


class WebhookDelivery(Struct, frozen=True, kw_only=True):
    """One event for one webhook."""

    event_id: Annotated[str, Meta(description="The `webhook-id` that the receiver gets, the same at each attempt")]
    object: Literal["webhook_delivery"] = "webhook_delivery"
    type: Annotated[str, Meta(description=f"The event, or `{TEST}`")]
    job: Annotated[str | None, Meta(description="The job that it is about")]
    state: Annotated[State, Meta(description="`failed`: given up after the last attempt")]
    attempts: Annotated[int, Meta(ge=0)]
    last_status: Annotated[int | None, Meta(description="HTTP status of the last attempt; null without an answer")]
    last_error: Annotated[str | None, Meta(description="What went wrong, where no status says it")]
    last_attempt_at: datetime | None
    next_attempt_at: Annotated[datetime | None, Meta(description="null once it has ended")]
    created_at: datetime


class WebhookDeliveryList(Struct, frozen=True, kw_only=True):
    """A webhook's last deliveries, newest first."""

    object: Literal["list"] = "list"
    data: list[WebhookDelivery]
    has_more: bool = False
    next_cursor: NextCursor = None


class Reward(Struct, frozen=True, kw_only=True):
    """A reward function."""

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
    has_more: bool = False
    next_cursor: NextCursor = None


class GraderErrorFlags(Struct, frozen=True, kw_only=True):
    """What went wrong with a grader, in OpenAI's flags."""

    formula_parse_error: bool = False
    sample_parse_error: bool = False
    truncated_observation_error: bool = False
    unresponsive_reward_error: bool = False
    invalid_variable_error: bool = False
    other_error: bool = False
    python_grader_server_error: bool = False
    python_grader_server_error_type: str | None = None
    python_grader_runtime_error: bool = False
    python_grader_runtime_error_details: str | None = None
    model_grader_server_error: bool = False
    model_grader_refusal_error: bool = False
    model_grader_parse_error: bool = False
    model_grader_server_error_details: str | None = None


class GraderRunMetadata(Struct, frozen=True, kw_only=True):
    """How a grader ran, in OpenAI's fields, and `messages`."""

    name: str
    type: str
    errors: GraderErrorFlags
    execution_time: Annotated[float, Meta(description="Seconds, without starting the process")]
    scores: Annotated[dict[str, Any], Meta(description="With `multi`: the score of each member")]
    token_usage: Annotated[int | None, Meta(description="Tokens that judges used; null without one")] = None
    sampled_model_name: Annotated[str | None, Meta(description="The model that judged; null without a judge")] = None
    messages: Annotated[list[str], Meta(description="Each error in words; not a field of OpenAI's")]
    printed: Annotated[str, Meta(description="What a `python` grader printed, cut off; not a field of OpenAI's")]


class GraderRun(Struct, frozen=True, kw_only=True):
    """The result of one grader for one completion, in OpenAI's fields."""

    reward: Annotated[float, Meta(description="0 if an error flag is set")]
    metadata: GraderRunMetadata
    sub_rewards: Annotated[dict[str, Any], Meta(description="With `multi`: the score of each member")]
    model_grader_token_usage_per_model: dict[str, Any] = {}


class ValidatedGrader(Struct, frozen=True, kw_only=True):
    """A grader that can be used."""

    grader: Annotated[dict[str, Any], Meta(description="As it was sent")]


class ScoreError(Struct, frozen=True, kw_only=True):
    """Why a grader could not score a row."""

    kind: Annotated[str, Meta(description="OpenAI's name of the error")]
    message: str
    of_completion: Annotated[
        bool, Meta(description="The completion is at fault, so that it scores 0; otherwise its score is unknown")
    ]


class RowScore(Struct, frozen=True, kw_only=True):
    """The scores of one completion."""

    rewards: Annotated[dict[str, float | None], Meta(description="Raw, before weights; null: unknown")]
    reward_total: Annotated[
        float | None,
        Meta(description="By the weights or the formula; null: a reward that counts is unknown"),
    ]
    errors: Annotated[dict[str, ScoreError], Meta(description="By grader; a member of a `multi` is name.member")]
    details: Annotated[dict[str, dict[str, Any]], Meta(description="By grader, such as the members of a `multi`")]
    missing_columns: Annotated[
        dict[str, list[str]],
        Meta(
            description="Columns that a grader names and `item` lacks, by grader: its score says nothing of a row that "
            "has them",
            examples=[{"near": ["tolerance"]}],
        ),
    ]


class UnavailableGrader(Struct, frozen=True, kw_only=True):
    """A grader that could not run on the service's machine."""

    grader: str
    code: Annotated[str, Meta(description="Such as runs_on_workers, graders_not_confined or grader_not_loaded")]
    message: str
    remedy: str


class RowScores(Struct, frozen=True, kw_only=True):
    """The scores of some rows by all rewards of a spec."""

    object: Literal["scores"] = "scores"
    data: Annotated[list[RowScore], Meta(description="In the order of the rows")]
    unavailable: Annotated[
        list[UnavailableGrader], Meta(description="Graders that could not run; their scores are null")
    ]
    seconds: Annotated[dict[str, float], Meta(description="How long each grader took for all rows")]
    load_seconds: Annotated[float, Meta(description="How long starting the graders took")]
    execution_time: Annotated[float, Meta(description="Seconds that scoring took")]
    printed: Annotated[dict[str, str], Meta(description="What `python` graders printed, cut off")]


class ActionResult(Struct, frozen=True, kw_only=True):
    """What became of one job of several."""

    id: Annotated[str, Meta(description="The job")]
    done: Annotated[bool, Meta(description="Whether it was accepted")]
    status: Annotated[JobStatus | None, Meta(description="The job's status now; null: refused, or deleted")]
    code: Annotated[str | None, Meta(description="Why it was refused, as `code` of a problem; null: it was not")]
    detail: Annotated[str | None, Meta(description="The same in words")]


class ActionList(Struct, frozen=True, kw_only=True):
    """What became of each job."""

    object: Literal["list"] = "list"
    data: list[ActionResult]


class WorkerJob(Struct, frozen=True, kw_only=True):
    """The job that a worker has."""

    id: Annotated[str | None, Meta(description="null: another owner's, and your key has no scope `operator`")]
    owner: Annotated[str | None, Meta(description="null as `id`")]
    name: Annotated[str | None, Meta(description="Its name; null without one, or as `id`")]
    phase: Annotated[str | None, Meta(description=Phase.described())]
    step: Annotated[int, Meta(ge=0, description="The last trained step")]
    total_steps: Annotated[int, Meta(ge=0, description="The number of its steps")]


class WorkerDrain(Struct, frozen=True, kw_only=True):
    """The order to a worker to take no new job."""

    mode: Annotated[
        Literal["finish", "checkpoint"],
        Meta(description="`finish`: its job runs to its end; `checkpoint`: it saves and is queued again"),
    ]
    by: Annotated[str, Meta(description="The operator who gave it, by the owner of the key")]
    at: Annotated[datetime, Meta(description="When it was given")]
    empty: Annotated[bool, Meta(description="The worker obeys and has no job: it can be stopped")]


class Worker(Struct, frozen=True, kw_only=True):
    """A worker of the fleet."""

    name: Annotated[str, Meta(description="Its `GRPO_WORKER_NAME`, or its host's name and a random part")]
    object: Literal["worker"] = "worker"
    state: Annotated[WorkerStateWord, Meta(description=WorkerState.described())]
    host: Annotated[str | None, Meta(description="The host's name; null: it does not say, or is silent")]
    device: Annotated[str | None, Meta(description="Its GPUs or CPU, in words")]
    gpus: Annotated[list[str], Meta(description="The name of each GPU")]
    gpu_memory_gb: Annotated[float | None, Meta(description="Memory of the smallest GPU, in 10^9 bytes")]
    memory_gb: Annotated[float | None, Meta(description="Memory of the machine or container, in 10^9 bytes")]
    engines: Annotated[list[str], Meta(description="What it can train and serve with")]
    grader_isolation: Annotated[
        str | None, Meta(description="How it confines the code of graders; `none`: it runs no such jobs")
    ]
    version: Annotated[str | None, Meta(description="The service's release that it runs")]
    spec_format: Annotated[int | None, Meta(description="The newest spec format that it reads")]
    queues: Annotated[list[str], Meta(description="The queues whose jobs it takes")]
    job: Annotated[WorkerJob | None, Meta(description="Its job; null: none")]
    drain: Annotated[WorkerDrain | None, Meta(description="null: it takes jobs")]
    last_seen_at: Annotated[datetime | None, Meta(description="null: it was stopped")]


class WorkerList(Struct, frozen=True, kw_only=True):
    """The workers of the fleet, by name."""

    object: Literal["list"] = "list"
    data: list[Worker]
    has_more: bool
    next_cursor: NextCursor


class Health(Struct, frozen=True, kw_only=True):
    """The process answers."""

    status: Literal["ok"] = "ok"


class Readiness(Struct, frozen=True, kw_only=True):
    """Whether jobs can be accepted now."""

    status: Literal["ready", "not_ready"]
    checks: Annotated[dict[str, str], Meta(description="Per server: ok, or what is wrong")]
    warnings: Annotated[list[str], Meta(description="Codes of faults that stop nothing yet, such as valkey_evicts")]


class ServedModel(Struct, frozen=True, kw_only=True):
    """A model that a session serves."""

    id: Annotated[str, Meta(description="What `model` of a chat request names: `JOB`, `JOB:step-50` or `JOB:base`")]
    object: str = "model"
    created: Annotated[int, Meta(description="When it could answer first")]
    owned_by: str
    session: Annotated[str, Meta(description="The job of kind serving that serves it")]
    step: Annotated[int | None, Meta(description="The adapter's step; null: the end of training, or no adapter")]
    ends_at: Annotated[int, Meta(description="When the session ends at the latest")]
    context: Annotated[int, Meta(description="Largest number of tokens of a conversation with its answer")]
    engine: Annotated[str, Meta(description="What computes it: `native` or `transformers`")]


class ServedModelList(Struct, frozen=True, kw_only=True):
    """All models that are served."""

    object: str = "list"
    data: list[ServedModel]


def job_of(record: JobRecord) -> Job:
    """The public form of a job."""
    here = f"/jobs/{record.id}"
    return Job(
        **{name: getattr(record, name) for name in shown_fields(JobView)},
        progress=_progress(record),
        error=_error_of(record.error),
        links=JobLinks(self=here, **{name: f"{here}/{name}" for name in JobLinks.__struct_fields__ if name != "self"}),
    )


def comparison_of(summary: GroupSummary) -> Comparison:
    """Build the table of some jobs."""
    return Comparison(fields=summary.fields, rows=_rows_of(summary), cautions=summary.cautions)


def group_of(group: str, summary: GroupSummary) -> Group:
    """Build the table of a group."""
    return Group(id=group, fields=summary.fields, rows=_rows_of(summary), cautions=summary.cautions)


def _rows_of(summary: GroupSummary) -> list[GroupRow]:
    return [
        GroupRow(
            settings=row.settings,
            jobs=[job_of(record) for record in row.jobs],
            figures={name: Spread(**vars(spread)) for name, spread in row.figures.items()},
        )
        for row in summary.rows
    ]


def submitted_job(record: JobRecord, warnings: list[SpecWarning]) -> SubmittedJob:
    """The public form of a job that was just accepted."""
    return SubmittedJob(**vars(job_of(record)), warnings=[warning_of(warning) for warning in warnings])


def job_detail(
    record: JobRecord, place: Place | None, trial: dict[str, Any] | None, prices: Prices | None = None
) -> JobDetail:
    """The public form of one job."""
    waiting = Waiting(**vars(place)) if place else None
    return JobDetail(
        **vars(job_of(record)),
        waiting=waiting,
        requested_spec=record.requested_spec,
        result=_trial_of(trial),
        use=_use_of(record, prices or Prices(PriceSettings())),
    )


def _use_of(record: JobRecord, prices: Prices) -> JobUse | None:
    if not record.spec["resources"]["gpus"]:
        return None
    hours = record.gpu_hours(datetime.now(UTC))
    return JobUse(
        gpu_hours=round(sum(hours.values()), 6),
        cost=_rounded(prices.cost(hours)),
        currency=prices.currency,
        by_gpu=[_cost_of(gpu, spent, prices) for gpu, spent in hours.items()],
    )


def _cost_of(gpu: str, hours: float, prices: Prices) -> GpuCost:
    return GpuCost(gpu=gpu or None, gpu_hours=round(hours, 6), cost=_rounded(prices.cost({gpu: hours})))


def _rounded(cost: float | None) -> float | None:
    return None if cost is None else round(cost, 4)


def costs_of(estimate: Estimate, spec: JobSpec, prices: Prices) -> list[GpuCost]:
    """What training costs on each kind of GPU that it fits and that has a price."""
    cards = spec.resources.gpus * spec.resources.hosts
    return [
        _cost_of(one.gpu, one.training_seconds * cards / 3600, prices)
        for one in estimate.gpus
        if one.fits and one.training_seconds is not None and prices.per_hour(one.gpu) is not None
    ]


def usage_of(usage: Usage, unfinished: int, max_unfinished: int | None) -> UsageReport:
    """The public form of an owner's usage."""
    return UsageReport(
        owner=usage.owner,
        gpu_hours=GpuUsage(
            used=round(usage.gpu_hours, 6),
            limit=usage.max_gpu_hours,
            window_days=usage.window_days,
            frees_at=usage.frees_at,
            left=None if usage.gpu_hours_left is None else round(usage.gpu_hours_left, 6),
        ),
        stored_bytes=StorageUsage(
            used=usage.stored.bytes,
            limit=usage.max_stored_bytes,
            measured_at=usage.stored.measured_at,
            left=usage.bytes_left,
        ),
        unfinished_jobs=JobUsage(
            used=unfinished,
            limit=max_unfinished,
            left=None if max_unfinished is None else max(0, max_unfinished - unfinished),
        ),
    )


def gpu_hours_of(row: UsageRow) -> GpuHours:
    """The public form of a row of a usage report."""
    return GpuHours(
        start=row.start,
        owner=row.owner,
        gpu=row.gpu or None,
        gpu_hours=round(row.gpu_hours, 6),
        jobs=row.jobs,
        cost=_rounded(row.cost),
    )


def worker_of(worker: FleetWorker, *, viewer: str | None) -> Worker:
    """The public form of a worker; `viewer` may see whose job it has if it is the own one, None sees all."""
    info, drain = worker.info, worker.drain
    return Worker(
        name=worker.name,
        state=worker.state,
        host=(info and info.host) or None,
        device=info and info.device,
        gpus=info.gpus if info else [],
        gpu_memory_gb=info and info.gpu_memory_gb,
        memory_gb=info and info.memory_gb,
        engines=info.engines if info else [],
        grader_isolation=info and info.grader_isolation,
        version=(info and info.version) or None,
        spec_format=info and info.spec_format,
        queues=info.queues if info else [],
        job=worker.job and _worker_job_of(worker.job, shown=viewer in (None, worker.job.owner)),
        drain=WorkerDrain(mode=drain.mode, by=drain.by, at=drain.at, empty=worker.empty)
        if drain and drain.mode
        else None,
        last_seen_at=worker.seen_at,
    )


def _worker_job_of(job: HeldJob, *, shown: bool) -> WorkerJob:
    return WorkerJob(
        id=job.id if shown else None,
        owner=job.owner if shown else None,
        name=(job.name or None) if shown else None,
        phase=job.phase or None,
        step=job.step,
        total_steps=job.total_steps,
    )


def warning_of(warning: SpecWarning) -> Warning:
    """The public form of a warning."""
    return Warning(pointer=warning.pointer, code=warning.code, message=warning.message)


def event_of(event: dict[str, Any]) -> Event:
    """The public form of an event, as in `docs/reference/events.md`."""
    return Event(
        v=event["v"],
        seq=event["seq"],
        epoch=event["epoch"],
        type=event["type"],
        time=event["time"],
        step=event["step"] or 0,
        data=event["data"],
    )


def artifacts_of(artifacts: list[Artifact], record: JobRecord, next_cursor: str | None) -> ArtifactList:
    """The public form of a page of a job's files."""
    return ArtifactList(
        data=[_file_of(artifact) for artifact in artifacts],
        complete=record.status in TERMINAL,
        has_more=next_cursor is not None,
        next_cursor=next_cursor,
    )


def checkpoint_of(checkpoint: LinkedCheckpoint) -> Checkpoint:
    """The public form of a checkpoint."""
    return Checkpoint(
        step=checkpoint.step,
        epoch=checkpoint.epoch,
        created_at=checkpoint.created_at,
        files=[_file_of(file) for file in checkpoint.files],
    )


def preview_of(spec: JobSpec, records: Sequence[Mapping[str, Any]], rows: int) -> DatasetPreview:
    """The columns of these records, and the first rows as prompts."""
    return DatasetPreview(
        columns=[PreviewColumn(name=one.name, holds=one.holds) for one in preview_columns(records)],
        data=[_preview_row(one) for one in preview_rows(spec, records[:rows])],
    )


def job_rows_of(found: JobRowPage, part: Part, cursor: str | None) -> JobRowList:
    """The public form of rows of a job's data set."""
    why = found.unavailable
    return JobRowList(
        data=[_job_row(one) for one in found.rows],
        has_more=cursor is not None,
        next_cursor=cursor,
        part=part,
        first_row=found.first,
        rows=found.count,
        unavailable=why and FieldProblem(pointer=why.pointer, code=why.code, detail=why.detail, remedy=why.remedy),
    )


def _job_row(found: FoundRow) -> JobRow:
    row = _preview_row(found.prompt)
    return JobRow(
        row=row.row,
        sha256=found.sha256,
        values=row.values,
        messages=row.messages,
        answer=row.answer,
        problem=row.problem,
    )


def _preview_row(row: PreviewedRow) -> PreviewRow:
    why = row.problem
    return PreviewRow(
        row=row.row,
        values=dict(row.values),
        messages=[PreviewTurn(**message) for message in row.messages],
        answer=row.answer,
        problem=FieldProblem(pointer="", code=why.code, detail=why.detail, remedy=why.remedy) if why else None,
    )


def dataset_of(record: DatasetRecord, chats: list[str] | UnsetType = UNSET) -> Dataset:
    """The public form of an uploaded data set."""
    return Dataset(
        id=record.id,
        owner=record.owner,
        name=record.name,
        rows=record.rows,
        bytes=record.bytes,
        sha256=record.sha256,
        columns=record.columns,
        chats=chats,
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


def _trial_of(found: dict[str, Any] | None) -> Trial | None:
    """A trial's result as its process wrote it; None where that is anything else, because it runs code of jobs."""
    try:
        return None if found is None else convert(found, Trial)
    except ValidationError:
        return None


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


def key_of(listed: ListedKey, secret: str | UnsetType = UNSET) -> ApiKey:
    """The public form of an API key; with its secret only in the answer that creates it."""
    record = listed.record
    expired = record.expires_at is not None and record.expires_at <= datetime.now(UTC)
    return ApiKey(
        id=record.id,
        owner=record.owner,
        name=record.name,
        hint=listed.hint,
        scopes=record.scopes,
        status="revoked" if record.revoked_at else "expired" if expired else "valid",
        created_at=record.created_at,
        created_by=listed.created_by,
        last_used_at=listed.last_used_at,
        expires_at=record.expires_at,
        revoked_at=record.revoked_at,
        key=secret,
    )


def webhook_of(record: WebhookRecord, *, secret: bool = False) -> Webhook:
    """A webhook; with its secret only in the answer that registers it."""
    return Webhook(
        id=record.id,
        url=record.url,
        events=[WebhookEvent(name) for name in record.events],
        status="enabled" if record.disabled_at is None else "disabled",
        disabled_at=record.disabled_at,
        disabled_reason=record.disabled_reason,
        created_at=record.created_at,
        secret=record.secret if secret else UNSET,
    )


def delivery_of(delivery: Delivery) -> WebhookDelivery:
    """A delivery, without its body."""
    return WebhookDelivery(
        event_id=delivery.event_id,
        type=delivery.type,
        job=delivery.job,
        state=delivery.state,
        attempts=delivery.attempts,
        last_status=delivery.last_status,
        last_error=delivery.last_error,
        last_attempt_at=delivery.last_attempt_at,
        next_attempt_at=delivery.next_attempt_at,
        created_at=delivery.created_at,
    )
