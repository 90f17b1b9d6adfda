"""The worker process: a Celery consumer of one task, which claims a job and runs it to its end.

Owns start-up, shut-down and what happens on a wake-up. Celery's solo pool runs the task in the main thread, so
that the training child, which dies with the thread that started it, lives as long as this process, and so that
a TERM reaches the run at once. Invariant: a wake-up for a job that cannot be claimed does nothing.
"""

from __future__ import annotations

import os
import secrets
import shlex
import socket
import sys
import threading
from pathlib import Path
from typing import Annotated

import structlog
from celery import signals
from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from jobs import journal, scratch
from jobs.archive import Archive
from jobs.datasets import DatasetStore
from jobs.ending import settle
from jobs.errors import Fenced, Unavailable
from jobs.gpus import Gpu, find_gpus
from jobs.ledger import Ledger
from jobs.outbox import Outbox
from jobs.queue import TASK, Doorbell, make_celery, queues_served
from jobs.record import JobStatus
from jobs.registry import EXPIRY_SECONDS, WorkerInfo, WorkerRegistry
from jobs.run import JobRun, Toolbox
from jobs.settings import QueueSettings, StorageSettings
from jobs.storage import ObjectStore
from jobs.sweeper import Sweeper

log = structlog.get_logger()


class WorkerSettings(BaseSettings):
    """What one worker needs to know of itself."""

    model_config = SettingsConfigDict(frozen=True, populate_by_name=True, extra="ignore")

    name: str = Field(default="", max_length=100, validation_alias="GRPO_WORKER_NAME")
    """Shown in records and logs; empty is the host's name and a random part."""
    work_dir: Path = Field(default=Path("/tmp/grpo-work"), validation_alias="GRPO_WORK_DIR")  # noqa: S108 - a default
    """Scratch: needs room for a few checkpoints."""
    queues: Annotated[list[str], NoDecode] = Field(default=[], validation_alias="GRPO_QUEUES")
    """Queues to serve, separated by commas; empty is what the GPUs found here can run."""
    launcher: str = Field(default="", validation_alias="GRPO_LAUNCHER")
    """The training command; empty is `python -m grpo_core train` with this Python."""

    @field_validator("queues", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value

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
        )

    @property
    def queues(self) -> list[str]:
        """The queues this worker listens on."""
        memory = min((gpu.memory_bytes for gpu in self._gpus), default=0) / 1e9
        return self._settings.queues or queues_served(len(self._gpus), memory, self._queue_settings.prefix)

    def serve(self) -> None:
        """Listen until TERM; a run at hand is asked to checkpoint and is handed back."""
        self._settings.work_dir.mkdir(parents=True, exist_ok=True)
        for folder in scratch.remove_abandoned(self._settings.work_dir):
            log.info("scratch_removed", folder=folder.name)
        self._store.ensure_ready()
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

    def _consume(self) -> None:
        app = make_celery(self._queue_settings)
        app.task(name=TASK, ignore_result=True)(self.run_job)

        def drain(**_: object) -> None:
            self._tools.drain.set()

        signals.worker_shutting_down.connect(drain, weak=False)
        app.worker_main(
            [
                *("worker", "--pool", "solo", "--concurrency", "1", "--loglevel", "WARNING"),
                *("--queues", ",".join(self.queues), "--hostname", f"{self.name}@%h"),
                *("--without-gossip", "--without-mingle", "--without-heartbeat"),
            ]
        )

    def run_job(self, job_id: str) -> None:
        """What a wake-up does: claim the job and run it, or nothing."""
        if self._tools.drain.is_set():
            return  # the sweeper rings again, for a worker that stays
        try:
            epoch = self._claim(job_id)
            if epoch is None:
                return
            self._run(job_id, epoch)
        except Fenced as error:
            log.warning("fenced", job_id=job_id, reason=str(error))
        except Unavailable as error:
            log.warning("run_given_up", job_id=job_id, reason=str(error))
        except Exception:  # a process edge: Celery must go on to the next job, and the lease frees this one
            log.exception("run_broken", job_id=job_id)
        finally:
            self._job = None

    def _claim(self, job_id: str) -> int | None:
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
        claimed = self._ledger.claim(
            job_id, epoch=epoch, worker=self.name, lease_seconds=self._queue_settings.lease_seconds
        )
        return epoch if claimed else None

    def _run(self, job_id: str, epoch: int) -> None:
        record = self._ledger.get(job_id)
        if record is None:
            raise Fenced(f"the record of {job_id} is gone")
        self._job = job_id
        log.info("run_started", job_id=job_id, epoch=epoch)
        with scratch.run_folder(self._settings.work_dir, job_id, epoch) as folder:
            JobRun(self._tools, record, epoch, folder).execute()

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


def _device(gpus: list[Gpu]) -> str:
    return f"{len(gpus)} × {gpus[0].name}" if gpus else f"cpu ({os.cpu_count()} cores)"
