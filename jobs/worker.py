"""The worker process: a Celery consumer of one task, which claims a job and runs it to its end.

Owns start-up, shut-down and what happens on a wake-up. Celery's solo pool runs the task in the main thread, so
that the training child, which dies with the thread that started it, lives as long as this process, and so that
a TERM reaches the run at once. Invariant: a wake-up for a job that cannot be claimed does nothing.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shlex
import socket
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import structlog
from celery import signals
from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from grpo_core.errors import FailureReport
from jobs import journal, scratch
from jobs.archive import Archive
from jobs.datasets import DatasetStore
from jobs.ending import Lapse, hand_back, settle
from jobs.errors import Fenced, Misconfigured, Unavailable
from jobs.gpus import Gpu, find_gpus
from jobs.ledger import Ledger
from jobs.outbox import Outbox
from jobs.queue import TASK, Doorbell, make_celery, queues_served
from jobs.record import HELD, JobRecord, JobStatus
from jobs.registry import EXPIRY_SECONDS, WorkerInfo, WorkerRegistry
from jobs.run import JobRun
from jobs.settings import CommaSeparated, QueueSettings, StorageSettings
from jobs.stall import StallLimits
from jobs.stopping import StopOrder
from jobs.storage import ObjectStore
from jobs.sweeper import Sweeper
from jobs.tenure import Toolbox
from jobs.verdict import machine_failure

log = structlog.get_logger()

STARTUP_RETRY_SECONDS = 2.0


class WorkerSettings(BaseSettings):
    """What one worker needs to know of itself."""

    model_config = SettingsConfigDict(frozen=True, populate_by_name=True, extra="ignore")

    name: str = Field(default="", max_length=100, validation_alias="GRPO_WORKER_NAME")
    """Shown in records and logs; empty is the host's name and a random part."""
    work_dir: Path = Field(default=Path("/tmp/grpo-work"), validation_alias="GRPO_WORK_DIR")  # noqa: S108 - a default
    """Scratch: needs room for a few checkpoints."""
    queues: CommaSeparated[list[str]] = Field(default=[], validation_alias="GRPO_QUEUES")
    """Queues to serve; empty is what the GPUs found here can run."""
    min_free_mb: int = Field(default=64, ge=0, validation_alias="GRPO_MIN_FREE_MB")
    """Room below `work_dir` without which no job is claimed."""
    stop_grace_seconds: float = Field(default=120.0, ge=0, le=86_400, validation_alias="GRPO_STOP_GRACE_SECONDS")
    """How long after TERM a run may take to save, and be sent; three quarters of it are the training process's."""
    stall_factor: float = Field(default=10.0, ge=2, le=10_000, validation_alias="GRPO_STALL_FACTOR")
    """A step that takes so many times the median is stalled."""
    stall_floor_seconds: float = Field(default=600.0, gt=0, validation_alias="GRPO_STALL_FLOOR_SECONDS")
    """And at least so long."""
    stall_quiet_seconds: float = Field(default=3600.0, gt=0, validation_alias="GRPO_STALL_QUIET_SECONDS")
    """Loading, the first step and evaluations are stalled after so long without an event or a line of output."""
    startup_seconds: float = Field(default=600.0, ge=0, validation_alias="GRPO_STARTUP_SECONDS")
    """How long a worker that starts waits for Valkey and object storage before it gives up."""
    launcher: str = Field(default="", validation_alias="GRPO_LAUNCHER")
    """The training command; empty is `python -m grpo_core train` with this Python."""

    def launcher_argv(self) -> tuple[str, ...]:
        """The training command as an argument list."""
        return tuple(shlex.split(self.launcher)) or (sys.executable, "-m", "grpo_core", "train")


class Worker:
    """One worker. `serve` blocks until it is told to stop."""

    def __init__(self, settings: WorkerSettings, storage: StorageSettings, queue: QueueSettings) -> None:
        self._settings = settings
        self._queue_settings = queue
        self.name = settings.name or f"{socket.gethostname()}-{secrets.token_hex(3)}"
        self._gpus = find_gpus()
        self._store = ObjectStore(storage)
        self._ledger = Ledger(queue)
        self._archive = Archive(self._store)
        self._outbox = Outbox(Doorbell(queue), self._ledger)
        self._sweeper = Sweeper(self._ledger, self._archive, self._outbox, queue)
        self._registry = WorkerRegistry(self._ledger)
        self._stopped = threading.Event()
        self._job: str | None = None
        self._tools = Toolbox(
            worker=self.name,
            ledger=self._ledger,
            archive=self._archive,
            store=self._store,
            datasets=DatasetStore(self._store),
            outbox=self._outbox,
            lease_seconds=queue.lease_seconds,
            launcher=settings.launcher_argv(),
            stop=StopOrder(settings.stop_grace_seconds),
            stall_limits=StallLimits(
                factor=settings.stall_factor,
                floor_seconds=settings.stall_floor_seconds,
                quiet_seconds=settings.stall_quiet_seconds,
            ),
        )

    @property
    def queues(self) -> list[str]:
        """The queues this worker listens on."""
        # Of several cards training takes one, and which is CUDA's order to say.
        memory = min((gpu.memory_bytes / 1e9 for gpu in self._gpus), default=None)
        return self._settings.queues or queues_served(memory, self._queue_settings.prefix)

    def serve(self) -> None:
        """Listen until TERM; a run at hand is asked to checkpoint and is handed back."""
        self._make_work_dir()
        self._clean_scratch()
        self._await_servers()
        self._outbox.start()
        self._sweeper.start()
        threading.Thread(target=self._announce, name="announcer", daemon=True).start()
        log.info("worker_ready", worker=self.name, queues=self.queues, device=_device(self._gpus))
        try:
            self._consume()
        finally:
            self._stopped.set()
            self._sweeper.close()
            self._outbox.close()
            self._withdraw()

    def _make_work_dir(self) -> None:
        folder = self._settings.work_dir
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unusable(folder, f"cannot be made ({error.strerror or error})") from error
        if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
            raise _unusable(folder, "this process may not write to")

    def _clean_scratch(self) -> None:
        for folder in scratch.remove_abandoned(self._settings.work_dir):
            log.info("scratch_removed", folder=folder.name)

    def _await_servers(self) -> None:
        """Wait for storage and Valkey, which may start after this process; raises `Unavailable` in the end."""
        until = time.monotonic() + self._settings.startup_seconds
        while True:
            try:
                self._store.ensure_ready()
                self._ledger.ping()
            except Unavailable as error:
                if time.monotonic() > until:
                    raise
                log.warning("waiting_for_server", reason=str(error))
                time.sleep(STARTUP_RETRY_SECONDS)
            else:
                return

    def _consume(self) -> None:
        app = make_celery(self._queue_settings)
        app.task(name=TASK, ignore_result=True)(self.run_job)

        def stop(**_: object) -> None:
            self._tools.stop.give()

        signals.worker_shutting_down.connect(stop, weak=False)
        app.worker_main(
            [
                *("worker", "--pool", "solo", "--concurrency", "1", "--loglevel", "WARNING"),
                *("--queues", ",".join(self.queues), "--hostname", f"{self.name}@%h"),
                *("--without-gossip", "--without-mingle", "--without-heartbeat"),
            ]
        )

    def run_job(self, job_id: str) -> None:
        """What a wake-up does: claim the job and run it, or nothing."""
        if self._tools.stop.asked or not self._has_room():
            return  # the sweeper rings again, for a worker that stays and has room
        try:
            claimed = self._claim(job_id)
            if claimed is not None:
                self._run(claimed)
        except Fenced as error:
            log.warning("fenced", job_id=job_id, reason=str(error))
        except Unavailable as error:
            log.warning("run_given_up", job_id=job_id, reason=str(error))
        except Exception:  # a process edge: Celery must go on to the next job, and the lease frees this one
            log.exception("run_broken", job_id=job_id)
        finally:
            self._job = None
            self._clean_scratch()

    def _has_room(self) -> bool:
        free = scratch.free_bytes(self._settings.work_dir)
        if free >= self._settings.min_free_mb * 1_000_000:
            return True
        log.error("no_room", work_dir=str(self._settings.work_dir), free_mb=free // 1_000_000)
        return False

    def _claim(self, job_id: str) -> JobRecord | None:
        """The record of a job that is now this worker's, or None."""
        record = self._ledger.get(job_id)
        if record is None or record.status is not JobStatus.QUEUED:
            return None
        outcome = self._archive.outcome(job_id)
        if outcome is not None:
            settle(self._ledger, job_id, outcome)
            return None
        epoch = self._archive.allocate_epoch(job_id, self.name, journal.now_iso(), attempts=record.attempts)
        if epoch is None:
            return None
        claimed = self._take(job_id, epoch)
        return replace(record, status=JobStatus.RUNNING, epoch=epoch) if claimed else None

    def _take(self, job_id: str, epoch: int) -> bool:
        """Claim at an epoch. An answer may be lost, and the claim that is sent again be refused: the record tells.

        Nobody else can have the epoch, so a record that is held at it is held by this worker.
        """
        lease_seconds = self._queue_settings.lease_seconds
        with contextlib.suppress(Unavailable):
            if self._ledger.claim(job_id, epoch=epoch, worker=self.name, lease_seconds=lease_seconds):
                return True
        record = self._ledger.get(job_id)
        return record is not None and record.epoch == epoch and record.status in HELD

    def _run(self, record: JobRecord) -> None:
        self._job = record.id
        log.info("run_started", job_id=record.id, epoch=record.epoch)
        try:
            with scratch.run_folder(self._settings.work_dir, record.id, record.epoch) as folder:
                JobRun(self._tools, record, record.epoch, folder).execute()
        except (Fenced, Unavailable):
            raise
        except Exception as error:  # a fault of ours or of the machine: told at once, and not after a lease
            log.exception("run_broken", job_id=record.id)
            self._hand_back(record, machine_failure(error, self._settings.work_dir))

    def _hand_back(self, record: JobRecord, report: FailureReport) -> None:
        """Return a job that could not even begin here."""
        current = self._ledger.get(record.id)
        if current is not None and current.epoch == record.epoch and current.status in HELD:
            hand_back(self._ledger, self._archive, self._outbox, current, Lapse(report=report), by=self.name)

    def _announce(self) -> None:
        while True:
            try:
                self._registry.announce(
                    WorkerInfo(name=self.name, queues=self.queues, device=_device(self._gpus), job=self._job)
                )
            except Unavailable as error:
                log.warning("announce_failed", reason=str(error))
            if self._stopped.wait(EXPIRY_SECONDS / 6):
                return

    def _withdraw(self) -> None:
        try:
            self._registry.withdraw(self.name)
        except Unavailable as error:
            log.warning("withdraw_failed", reason=str(error))


def _unusable(folder: Path, fault: str) -> Misconfigured:
    return Misconfigured("GRPO_WORK_DIR", folder, fault, "Set it to a folder that this process may make and write to.")


def _device(gpus: list[Gpu]) -> str:
    return f"{len(gpus)} × {gpus[0].name}" if gpus else f"cpu ({os.cpu_count()} cores)"
