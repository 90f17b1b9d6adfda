"""The fleet: every worker with its job, and whether it drains; and the orders of operators to workers.

Reads the registry, the marks of drains and the records of held jobs. Invariant: a worker is said to be drained only if
it has no job, by its own word or, once it is silent, by the leases.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

from grpo_core.reasons import Word
from jobs.errors import JobsError, NotFound
from jobs.store.drains import Drain, DrainMode, DrainStore
from jobs.store.job_store import HeldJob, JobStore
from jobs.store.workers import WorkerInfo, WorkerRegistry

LOST_SECONDS = 3600
"""How long a worker that fell silent is listed."""


class WorkerState(Word):
    """What a worker is doing."""

    IDLE = "idle", "waits for a job", "空闲"
    BUSY = "busy", "runs a job", "忙碌"
    DRAINING = "draining", "takes no new job and still has one", "正在排空"
    DRAINED = "drained", "takes no new job and has none", "已排空"
    LOST = "lost", "fell silent without stopping", "失联"
    STOPPED = "stopped", "was stopped; it takes no job either when it starts again", "已停止"


class CannotDrain(JobsError):
    """The worker's release knows no drain."""

    def __init__(self, worker: str, version: str) -> None:
        super().__init__(
            f"Worker {worker} runs release {version or 'of an earlier time'}, which cannot be drained. Stop it with "
            "TERM: it saves its job and hands it back; then start the new release."
        )


@dataclass(frozen=True, kw_only=True)
class FleetWorker:
    """One worker, as the service knows it."""

    name: str
    state: WorkerState
    info: WorkerInfo | None
    """What it says of itself; None once it is silent."""
    seen_at: datetime | None
    """None: it was stopped."""
    drain: Drain | None
    job: HeldJob | None

    @property
    def empty(self) -> bool:
        """Whether it is drained, and can be stopped."""
        return self.state is WorkerState.DRAINED or (
            self.drain is not None and self.job is None and self.state in (WorkerState.LOST, WorkerState.STOPPED)
        )


class Fleet:
    """All workers."""

    def __init__(self, job_store: JobStore, registry: WorkerRegistry) -> None:
        self._job_store = job_store
        self._registry = registry
        self._drains = DrainStore(job_store)

    def all(self) -> list[FleetWorker]:
        """Return every worker, by name: those connected, lost for less than an hour, or drained."""
        infos = {info.name: info for info in self._registry.all()}
        seen = self._registry.seen()
        drains = {name: drain for name, drain in self._drains.all().items() if drain.mode}
        held = {job.worker: job for job in self._job_store.held_jobs()}
        now = datetime.now(UTC).timestamp()
        recent = {name for name, time in seen.items() if now - time < LOST_SECONDS}
        names = sorted({*infos, *recent, *drains})
        return [_worker(name, infos.get(name), seen.get(name), drains.get(name), held.get(name)) for name in names]

    def get(self, name: str) -> FleetWorker:
        """Return one worker. Raises `NotFound`."""
        found = next((worker for worker in self.all() if worker.name == name), None)
        if found is None:
            raise NotFound("worker", name)
        return found

    def drain(self, name: str, mode: DrainMode | None, *, by: str) -> FleetWorker:
        """Order a worker to take no new job, or with None take the order back. Raises `NotFound`, `CannotDrain`."""
        worker = self.get(name)
        if worker.info is not None and worker.info.drain is None:
            raise CannotDrain(name, worker.info.version)
        if mode is not None or worker.drain is not None:
            self._drains.put(name, Drain(mode=mode, by=by, at=datetime.now(UTC)))
        self._drains.forget_old(self._registry.seen())
        try:
            return self.get(name)
        except NotFound:  # it had stopped, and nothing is known of it any more
            return _worker(name, None, None, None, None)


def _worker(
    name: str, info: WorkerInfo | None, seen: float | None, drain: Drain | None, job: HeldJob | None
) -> FleetWorker:
    return FleetWorker(
        name=name,
        state=_state(info, seen, drain, job),
        info=info,
        seen_at=None if seen is None else datetime.fromtimestamp(seen, UTC),
        drain=drain,
        job=job,
    )


def _state(info: WorkerInfo | None, seen: float | None, drain: Drain | None, job: HeldJob | None) -> WorkerState:
    if info is None:
        return WorkerState.STOPPED if seen is None else WorkerState.LOST
    is_busy = info.busy or job is not None
    if drain is None:
        return WorkerState.BUSY if is_busy else WorkerState.IDLE
    # Until it has said that it obeys, it may be about to claim a job.
    return WorkerState.DRAINING if is_busy or not info.drain else WorkerState.DRAINED
