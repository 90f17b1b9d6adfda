"""The objects of OpenAI's API, with the fields that its SDK reads.

Owns these shapes; those of native routes are in `api.schemas`. Invariant: times are seconds since 1970.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Any, Final, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

METRIC_NAMES: Final = {"loss": "train_loss", "reward": "train_reward_mean", "eval_metric": "valid_reward_mean"}
"""Metrics of a step that OpenAI's events, checkpoints and files have under other names."""


class OpenAIErrorBody(Struct, frozen=True, kw_only=True):
    """What went wrong."""

    message: Annotated[str, Meta(description="What happened, and what to do")]
    type: str
    param: Annotated[str | None, Meta(description="The first wrong field, as a path with dots; null: no single one")]
    code: Annotated[str | None, Meta(description="Stable name of the error")]


class OpenAIError(Struct, frozen=True, kw_only=True):
    """The answer to a request that failed."""

    error: OpenAIErrorBody


class OpenAIFile(Struct, frozen=True, kw_only=True):
    """An uploaded data set, or a file of results."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    filename: str
    purpose: Annotated[str, Meta(description="`fine-tune`, `evals`, `user_data`, or `fine-tune-results`")]
    status: Literal["processed"] = "processed"
    status_details: str | None = None
    expires_at: int | None = None


class OpenAIDeletedFile(Struct, frozen=True, kw_only=True):
    """The answer to a deletion."""

    id: str
    object: Literal["file"] = "file"
    deleted: bool = True


class OpenAIFileList(Struct, frozen=True, kw_only=True):
    """A page of files."""

    object: Literal["list"] = "list"
    data: list[OpenAIFile]
    has_more: bool
    first_id: str | None
    last_id: str | None


class OpenAIJobError(Struct, frozen=True, kw_only=True):
    """Why a job failed."""

    code: str
    message: str
    param: Annotated[str | None, Meta(description="The field to change; null: no single one")]


class OpenAIJobWarning(Struct, frozen=True, kw_only=True):
    """A field that has no effect, or another one; or something that is probably a mistake."""

    param: str
    code: str
    message: str


class OpenAIJob(Struct, frozen=True, kw_only=True):
    """A job as OpenAI's fine-tuning job."""

    id: str
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int
    error: OpenAIJobError | None
    fine_tuned_model: Annotated[str | None, Meta(description="The name of its model once it has succeeded")]
    finished_at: int | None
    hyperparameters: dict[str, Any] = {}
    model: str
    organization_id: Annotated[str, Meta(description="The owner of the API key that submitted it")]
    result_files: Annotated[list[str], Meta(description="The file with its metrics, once it has ended")]
    status: Annotated[
        str,
        Meta(
            description="`queued`, `validating_files` (its worker fetches data), `running`, `pausing`, `paused`, "
            "`cancelling`, `cancelled`, `succeeded` or `failed`"
        ),
    ]
    trained_tokens: int | None = None
    training_file: str
    validation_file: str | None
    seed: int
    estimated_finish: int | None = None
    integrations: list[dict[str, Any]]
    metadata: dict[str, str]
    method: dict[str, Any]
    user_provided_suffix: str | None
    grpo: Annotated[dict[str, Any], Meta(description="Sections of the job spec that OpenAI has no field for")]
    warnings: Annotated[
        list[OpenAIJobWarning] | UnsetType, Meta(description="Only in the answer to a create request")
    ] = UNSET


class OpenAIJobList(Struct, frozen=True, kw_only=True):
    """A page of jobs, newest first."""

    object: Literal["list"] = "list"
    data: list[OpenAIJob]
    has_more: bool
    first_id: str | None
    last_id: str | None


class OpenAIEvent(Struct, frozen=True, kw_only=True):
    """An event of a job."""

    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: dict[str, Any]


class OpenAIEventList(Struct, frozen=True, kw_only=True):
    """A page of events, newest first."""

    object: Literal["list"] = "list"
    data: list[OpenAIEvent]
    has_more: bool
    first_id: str | None
    last_id: str | None


class OpenAICheckpoint(Struct, frozen=True, kw_only=True):
    """A checkpoint of a job."""

    id: str
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuned_model_checkpoint: Annotated[str, Meta(description="The name of its model: `job-ID:step-50`")]
    fine_tuning_job_id: str
    metrics: dict[str, Any]
    step_number: int


class OpenAICheckpointList(Struct, frozen=True, kw_only=True):
    """A page of checkpoints, newest first."""

    object: Literal["list"] = "list"
    data: list[OpenAICheckpoint]
    has_more: bool
    first_id: str | None
    last_id: str | None


def seconds(moment: datetime) -> int:
    """A time as OpenAI writes it."""
    return int(moment.timestamp())


def first_id(items: Sequence[Any]) -> str | None:
    """The id of the first item of a page."""
    return items[0].id if items else None


def last_id(items: Sequence[Any]) -> str | None:
    """The id of the last item of a page."""
    return items[-1].id if items else None
