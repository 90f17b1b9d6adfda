"""The position of a queued job: the jobs before it, the workers that can run it, and why it waits.

For people only, never for decisions. Jobs are counted in the order in which workers would take them now, by priority
and fair shares; jobs that are submitted or end later change it. A worker that serves several queues takes from each in
turn, so the position is only a rough measure of how long a job waits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from grpo_core.reasons import Reason
from grpo_core.rewards.graders.models import has_process
from grpo_core.spec import JobSpec, SpecError, parse_spec
from jobs.store.job import JobRecord, JobStatus
from jobs.store.job_store import JobStore
from jobs.store.queues import any_format, queue_for
from jobs.store.workers import WorkerInfo, WorkerRegistry


class WaitReason(Reason):
    """Why a queued job does not run yet."""

    TURN = "turn", "waiting for a worker", "等待空闲的工作进程"
    NO_WORKER = "no_worker", "no worker that can run it is connected", "没有能运行它的工作进程连接"
    NEWER_WORKER = (
        "newer_worker",
        "needs a newer worker: the connected ones cannot read it",
        "需要更新版本的工作进程",
    )
    NO_CONFINEMENT = (
        "no_confinement",
        "needs a worker that can confine the code of its graders: the connected ones cannot",
        "需要能够隔离评分代码的工作进程：已连接的都做不到",
    )
    HOSTS = "hosts", "waiting until enough cards are free at the same time", "等待足够多的显卡同时空闲"
    FEW_HOSTS = (
        "few_hosts",
        "asks for more hosts with such cards than the cluster has",
        "要求的主机数多于集群中符合条件的主机数",
    )


@dataclass(frozen=True, kw_only=True)
class Workers:
    """The connected workers, from the view of one job."""

    able: int
    """Number of workers that can run it, busy or not."""
    reason: WaitReason
    newest_format: int | None
    """The newest spec format that a worker with its resources reads; None if none is connected."""


@dataclass(frozen=True, kw_only=True)
class QueuePosition:
    """A queued job's position."""

    queue: str
    ahead: int
    """Number of jobs in this queue whose turn comes before."""
    workers: int
    """Number of connected workers that can run it, busy or not; with 0 the job waits until one starts."""
    reason: WaitReason
    spec_format: int
    """The spec format that a worker must read to run it."""
    workers_spec_format: int | None
    """The newest spec format that a connected worker with its resources reads; None if none is connected."""
    hosts: int
    """Number of hosts that it needs at the same time."""
    gpus: int
    """Number of cards that it needs on each."""
    hosts_found: int | None
    """Number of hosts with enough cards when they were last not free at once; None: not looked at."""


def queue_position_of(record: JobRecord, job_store: JobStore, registry: WorkerRegistry) -> QueuePosition | None:
    """Return the position of a queued job; None if it is not queued. Raises `Unavailable`."""
    if record.status is not JobStatus.QUEUED:
        return None
    ahead = job_store.jobs_ahead(record.id)
    if ahead is None:  # it has just been claimed
        return None
    # A worker that refused the spec could not read it, even if the API assigned it a lower format.
    needed = max(record.spec_format, record.refused_format + 1)
    found = _workers_for(record.queue, needed, registry.all(), runs_code=_runs_code(record.spec))
    resources = record.spec.get("resources", {})
    hosts = resources.get("min_hosts") or resources.get("hosts", 1)
    reason = found.reason
    if reason is WaitReason.TURN and record.hosts_found >= 0:
        reason = WaitReason.HOSTS if record.hosts_found >= hosts else WaitReason.FEW_HOSTS
    return QueuePosition(
        queue=record.queue,
        ahead=ahead,
        workers=found.able,
        reason=reason,
        spec_format=needed,
        workers_spec_format=found.newest_format,
        hosts=hosts,
        gpus=resources.get("gpus", 1),
        hosts_found=None if record.hosts_found < 0 else record.hosts_found,
    )


def workers_for(spec: JobSpec, prefix: str, registry: WorkerRegistry) -> tuple[str, Workers]:
    """Return the queue in which a job with this spec would wait, and the workers for it. Raises `Unavailable`."""
    queue = queue_for(spec, prefix)
    runs_code = has_process(spec.rewards.graders)
    return queue, _workers_for(queue, spec.needed_format(), registry.all(), runs_code=runs_code)


def _workers_for(queue: str, needed: int, connected: list[WorkerInfo], *, runs_code: bool) -> Workers:
    fit = [worker for worker in connected if {queue, any_format(queue)} & set(worker.queues)]
    readers = [worker for worker in fit if queue in worker.queues and worker.spec_format >= needed]
    able = [worker for worker in readers if not runs_code or worker.grader_isolation != "none"]
    reason = (
        WaitReason.TURN
        if able
        else WaitReason.NO_CONFINEMENT
        if readers
        else WaitReason.NEWER_WORKER
        if fit
        else WaitReason.NO_WORKER
    )
    return Workers(able=len(able), reason=reason, newest_format=max((w.spec_format for w in fit), default=None))


def _runs_code(spec: Mapping[str, Any]) -> bool:
    """Whether a job's graders run in a process that a worker must confine."""
    if not spec.get("rewards", {}).get("graders"):
        return False
    try:
        return has_process(parse_spec(spec).rewards.graders)
    except SpecError:  # of a newer release
        return False
