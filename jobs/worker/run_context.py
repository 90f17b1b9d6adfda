"""The state of one run while a worker holds its job: record, epoch, run folder, lease and uploader.

Decides nothing: `run` trains with it and `finalize` ends it. Invariant: at most one uploader at a time writes below the
epoch's prefix, and it stops with the run.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import structlog

from jobs.lifecycle.commands import Commands
from jobs.lifecycle.wakeups import WakeupPublisher
from jobs.store.bucket import ObjectStore
from jobs.store.commits import ResumeBase
from jobs.store.datasets import DatasetStore
from jobs.store.job import JobRecord
from jobs.store.job_store import JobStore
from jobs.store.write_once import WriteOnceStore
from jobs.worker.event_forwarder import EventForwarder
from jobs.worker.interruptible_retry import InterruptibleRetry
from jobs.worker.isolation import Isolation
from jobs.worker.lease import Lease
from jobs.worker.shutdown import GracefulShutdown
from jobs.worker.stall_detector import StallLimits
from jobs.worker.uploader import MAX_RUN_BYTES, Uploader


@dataclass(frozen=True, kw_only=True)
class WorkerDeps:
    """The dependencies that all runs of a worker share."""

    worker: str
    job_store: JobStore
    write_once: WriteOnceStore
    store: ObjectStore
    datasets: DatasetStore
    wakeups: WakeupPublisher
    commands: Commands
    lease_seconds: float
    launcher: tuple[str, ...]
    """The training command, without its arguments."""
    stop: GracefulShutdown
    queues: tuple[str, ...] = ()
    """The queues of jobs that this worker can run."""
    isolation: Isolation = field(default_factory=Isolation)
    """How training processes are isolated."""
    stall_limits: StallLimits = field(default_factory=StallLimits)
    max_run_bytes: int = MAX_RUN_BYTES
    """Largest size of a run's files in the bucket."""
    max_job_seconds: float | None = None
    """Time limit of a job's runs together; None: no limit."""


class RunContext:
    """One epoch of one job, from claim to release."""

    def __init__(self, deps: WorkerDeps, record: JobRecord, epoch: int, folder: Path) -> None:
        self.deps = deps
        self.record = record
        self.epoch = epoch
        self.folder = folder
        self.lease = Lease(
            *(deps.job_store, record.id, epoch, deps.lease_seconds),
            worker=deps.worker,
            orders=record.orders,
            gpu=record.gpu,
            hosts=record.run_hosts,
        )
        self.retry = InterruptibleRetry(self.lease, deps.stop)
        self.forwarder = EventForwarder(deps.job_store, self.lease, record.id, epoch, folder)
        self.base: ResumeBase | None = None
        """The base from which the run resumed; None until it is known."""
        self.uploader: Uploader | None = None
        """None until the base is known."""
        self.log = structlog.get_logger().bind(job_id=record.id, epoch=epoch)

    @property
    def job_id(self) -> str:
        return self.record.id

    def begin(self) -> None:
        """Start to keep the lease."""
        self.lease.start()

    def end(self) -> None:
        """Release everything. May be repeated."""
        if self.uploader is not None:
            self.uploader.abandon()
        self.lease.stop()

    def upload_from(self, base: ResumeBase) -> Uploader:
        """Start to upload the folder, in addition to the objects of the base."""
        deps = self.deps
        self.uploader = Uploader(
            *(deps.store, deps.job_store, self.lease, self.job_id, self.epoch, self.folder, base),
            committed=lambda: deps.commands.apply_pending(self.job_id),
            max_bytes=deps.max_run_bytes,
        )
        self.uploader.start()
        return self.uploader
