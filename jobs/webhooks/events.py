"""The events that webhooks report: their names, ids and bodies.

Training jobs end with OpenAI's names, so that its SDK reads them; jobs of other kinds end with `job.*`. Invariant: what
happened once has one id, no matter how often or by which process it is reported, so that receivers can drop repeats.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from grpo_core.reasons import Word
from jobs.store.job import HELD, TERMINAL, JobRecord, JobStatus

TRAINING = "training"


class WebhookEvent(Word):
    """What a webhook can ask for."""

    SUCCEEDED = "fine_tuning.job.succeeded", "a training job has succeeded; its adapter is stored", "训练任务成功"
    FAILED = "fine_tuning.job.failed", "a training job has failed; `error` says why", "训练任务失败"
    CANCELLED = "fine_tuning.job.cancelled", "a training job was cancelled", "训练任务已取消"
    QUEUED = "job.queued", "a job was accepted or resumed, and waits for a worker", "任务排队中"
    RUNNING = "job.running", "a worker has started a run of a job", "任务开始运行"
    PAUSED = "job.paused", "a job is paused and holds no GPU", "任务已暂停"
    REQUEUED = "job.requeued", "a run was lost or stopped; the job waits for another worker", "任务重新排队"
    EVALUATED = "job.evaluated", "held-out questions were answered; `evaluation` has the results", "任务完成评估"
    OTHER_SUCCEEDED = "job.succeeded", "a job of another kind than training has succeeded", "其他任务成功"
    OTHER_FAILED = "job.failed", "a job of another kind than training has failed", "其他任务失败"
    OTHER_CANCELLED = "job.cancelled", "a job of another kind than training was cancelled", "其他任务已取消"


TEST = "webhook.test"
"""Sent when the owner asks for it, to any webhook."""

_ENDS = {
    JobStatus.SUCCEEDED: (WebhookEvent.SUCCEEDED, WebhookEvent.OTHER_SUCCEEDED),
    JobStatus.FAILED: (WebhookEvent.FAILED, WebhookEvent.OTHER_FAILED),
    JobStatus.CANCELLED: (WebhookEvent.CANCELLED, WebhookEvent.OTHER_CANCELLED),
}


@dataclass(frozen=True, kw_only=True)
class Change:
    """A change of a job that the job store has recorded, until it was reported."""

    member: str
    """As it is stored."""
    at_ms: int
    job: str
    owner: str
    what: tuple[str, ...]
    """Old status, new status, epoch, number of commands; or `evaluated` and the number of the event."""

    @classmethod
    def read(cls, member: str, at_ms: float) -> Self:
        """Read what `announce` in prelude.lua wrote."""
        job, owner, *what = member.split(" ")
        return cls(member=member, at_ms=int(at_ms), job=job, owner=owner, what=tuple(what))

    @property
    def evaluation(self) -> int | None:
        """Number of the event with an evaluation's results; None for a change of status."""
        return int(self.what[1]) if self.what[0] == "evaluated" else None

    @property
    def status(self) -> JobStatus | None:
        """The new status; None for an evaluation."""
        return None if self.evaluation is not None else JobStatus(self.what[1])

    @property
    def ends(self) -> bool:
        """Whether the job has ended."""
        return self.status in TERMINAL

    @property
    def event_id(self) -> str:
        """The event's id. That of a job's end depends on the job alone."""
        return ended_id(self.job) if self.ends else _id(self.job, *self.what)

    def type(self, record: JobRecord | None) -> WebhookEvent:
        """The event's name."""
        if self.status is None:
            return WebhookEvent.EVALUATED
        if self.status in TERMINAL:
            return type_of_end(self.status, record)
        if self.status is JobStatus.QUEUED:
            return WebhookEvent.REQUEUED if self.what[0] in HELD else WebhookEvent.QUEUED
        return WebhookEvent.RUNNING if self.status is JobStatus.RUNNING else WebhookEvent.PAUSED


def ended_id(job_id: str) -> str:
    """The id of the event of a job's end."""
    return _id(job_id, "ended")


def type_of_end(status: JobStatus, record: JobRecord | None) -> WebhookEvent:
    """The name of the event of a job's end."""
    kind = record.spec.get("kind") or TRAINING if record else TRAINING
    return _ENDS[status][0 if kind == TRAINING else 1]


def body_of(event_id: str, event_type: str, at_ms: int, data: Mapping[str, Any]) -> dict[str, Any]:
    """The body, in the form of OpenAI's webhooks. `at_ms` is a time in ms since 1970."""
    return {"id": event_id, "object": "event", "type": event_type, "created_at": at_ms // 1000, "data": dict(data)}


def data_of(job_id: str, status: JobStatus | None, record: JobRecord | None) -> dict[str, Any]:
    """The part of the body about a job; of a deleted job only its id and status."""
    if record is None:
        return {"id": job_id, "status": status}
    return {
        "id": job_id,
        "kind": record.spec.get("kind") or TRAINING,
        "name": record.name,
        "metadata": record.metadata,
        "status": status or record.status,
        "step": record.step,
        "total_steps": record.total_steps,
        "epoch": record.epoch,
        "reward": record.reward,
        "group": record.group,
        "error": record.error,
    }


def _id(*parts: str) -> str:
    return f"evt_{hashlib.sha256(' '.join(parts).encode()).hexdigest()[:32]}"
