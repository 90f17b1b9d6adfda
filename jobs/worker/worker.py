"""The worker process: a Celery consumer of one task, which claims a job and runs it until it ends.

Owns start, shutdown and the handling of wake-ups. Celery's solo pool runs the task in the main thread: the training
child dies with the thread that started it, so it lives as long as this process, and TERM reaches the run at once.
Invariant: a wake-up for a job that cannot be claimed changes nothing.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import secrets
import shlex
import socket
import sys
import threading
import time
from collections.abc import Generator
from dataclasses import replace
from functools import cache
from itertools import repeat
from pathlib import Path
from typing import Literal

import structlog
from celery import signals
from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from grpo_core import processes
from grpo_core.egress import Host
from grpo_core.hardware.gpus import Gpu, find_gpus
from grpo_core.retry import retry
from grpo_core.rewards.graders.models import has_process
from grpo_core.rewards.graders.proof import prove
from grpo_core.spec import SPEC_FORMAT, SpecError, parse_spec
from jobs.errors import Fenced, Misconfigured, Unavailable
from jobs.lifecycle.celery_app import TASK, WakeupSender, make_celery
from jobs.lifecycle.commands import Commands
from jobs.lifecycle.outcomes import HandBack, apply_outcome, hand_back
from jobs.lifecycle.sweeper import Sweeper
from jobs.lifecycle.time_limit import TimeLimitSettings
from jobs.lifecycle.valkey_recovery import ValkeyRecovery
from jobs.lifecycle.wakeups import WakeupPublisher
from jobs.settings import CommaSeparated, QueueSettings, StorageSettings
from jobs.store import event_log
from jobs.store.bucket import ObjectStore
from jobs.store.datasets import DatasetStore
from jobs.store.drains import DrainStore
from jobs.store.job import HELD, JobRecord, JobStatus
from jobs.store.job_store import JobStore
from jobs.store.queues import queues_served, with_formats
from jobs.store.valkey_checks import ValkeyWatch
from jobs.store.workers import EXPIRY_SECONDS, WorkerInfo, WorkerRegistry
from jobs.store.write_once import WriteOnceStore
from jobs.worker import gang, isolation, run_dirs
from jobs.worker.draining import LOOK_SECONDS, Draining
from jobs.worker.exit_status import broken_machine
from jobs.worker.gang import Reservation
from jobs.worker.run import JobRun
from jobs.worker.run_context import WorkerDeps
from jobs.worker.shutdown import GracefulShutdown
from jobs.worker.stall_detector import StallLimits

log = structlog.get_logger()

STARTUP_RETRY_SECONDS = 2.0
MOST_REFUSED = 32
"""Number of jobs that a worker looks at for one wake-up, if it cannot run them."""


class WorkerSettings(BaseSettings):
    """Settings of one worker."""

    model_config = SettingsConfigDict(frozen=True, populate_by_name=True, extra="ignore")

    name: str = Field(default="", max_length=100, validation_alias="GRPO_WORKER_NAME")
    """Name in records and logs; empty: the host's name and a random part."""
    work_dir: Path = Field(default=Path("/tmp/grpo-work"), validation_alias="GRPO_WORK_DIR")  # noqa: S108 - a default
    """Scratch folder, which needs space for a few checkpoints."""
    queues: CommaSeparated[list[str]] = Field(default=[], validation_alias="GRPO_QUEUES")
    """Queues to serve; empty: those of jobs that this host's GPUs can run."""
    min_free_mb: int = Field(default=64, ge=0, validation_alias="GRPO_MIN_FREE_MB")
    """Free space in MB below `work_dir` without which no job is claimed."""
    max_run_mb: int = Field(default=1_000_000, ge=1, validation_alias="GRPO_MAX_RUN_MB")
    """Largest size in MB of one run's files in the bucket."""
    stop_grace_seconds: float = Field(default=120.0, ge=0, le=86_400, validation_alias="GRPO_STOP_GRACE_SECONDS")
    """Seconds after TERM for a run to save and upload; three quarters of them are for the training process."""
    stall_factor: float = Field(default=10.0, ge=2, le=10_000, validation_alias="GRPO_STALL_FACTOR")
    """Limit of a step as a multiple of the median; a longer step counts as stalled."""
    stall_floor_seconds: float = Field(default=600.0, gt=0, validation_alias="GRPO_STALL_FLOOR_SECONDS")
    """Smallest limit of a step in seconds."""
    stall_quiet_seconds: float = Field(default=3600.0, gt=0, validation_alias="GRPO_STALL_QUIET_SECONDS")
    """Seconds without event or output after which loading, the first step and evaluations count as stalled."""
    startup_seconds: float = Field(default=600.0, ge=0, validation_alias="GRPO_STARTUP_SECONDS")
    """Seconds that a starting worker waits for Valkey and object storage before it gives up."""
    egress_hosts: CommaSeparated[list[str]] = Field(default=[], validation_alias="GRPO_EGRESS_HOSTS")
    """Hosts beside the hub to which training may connect. Training reads this variable; it is only validated here."""
    hf_token_repos: CommaSeparated[list[str]] = Field(default=[], validation_alias="GRPO_HF_TOKEN_REPOS")
    """Repositories for which the hub's token is used: `PATTERN`, or `OWNER:PATTERN` for one owner's jobs."""
    launcher: str = Field(default="", validation_alias="GRPO_LAUNCHER")
    """The training command; empty: `python -m grpo_core train` with this Python."""

    child_users: str = Field(
        default="60600-61183", pattern=r"^(\d{1,9}-\d{1,9})?$", validation_alias="GRPO_CHILD_USERS"
    )
    """Range of user ids for training processes, one for each owner, if the worker is root; empty: its own user."""
    child_landlock: Literal["auto", "on", "off"] = Field(default="auto", validation_alias="GRPO_CHILD_LANDLOCK")
    """Whether Landlock limits the files of training processes. `auto`: if the kernel supports it, except as root on a
    GPU."""
    child_readable: CommaSeparated[list[Path]] = Field(default=[], validation_alias="GRPO_CHILD_READABLE")
    """Further files and folders that training processes may read."""
    child_memory_mb: int = Field(default=0, ge=0, validation_alias="GRPO_CHILD_MEMORY_MB")
    """Memory limit in MB of a training process and its children; 0: nine tenths of the machine's or container's."""
    cache_dir: Path | None = Field(default=None, validation_alias="GRPO_CACHE_DIR")
    """Folder for models and compiled kernels, with a folder for each owner; the default is below the user's caches."""
    shared_caches: bool = Field(default=False, validation_alias="GRPO_SHARED_CACHES")
    """Whether all owners' jobs share the worker's caches."""
    ray_address: str = Field(default="", pattern=r"^([\w.\[\]:-]+:\d{1,5}|auto)?$", validation_alias="GRPO_RAY_ADDRESS")
    """Address and port of the Ray cluster to which this host belongs, and which deals out its cards; empty: none."""
    ray_wait_seconds: float = Field(default=10.0, ge=0, le=600, validation_alias="GRPO_RAY_WAIT_SECONDS")
    """Seconds that a job's wake-up waits for its cards to be free at the same time; then the job waits for the next."""

    @field_validator("egress_hosts")
    @classmethod
    def _are_hosts(cls, entries: list[str]) -> list[str]:
        for entry in entries:
            Host.parse(entry)
        return entries

    def launcher_argv(self) -> tuple[str, ...]:
        """The training command as an argument list."""
        return tuple(shlex.split(self.launcher)) or (sys.executable, "-m", "grpo_core", "train")


class Worker:
    """One worker. `serve` blocks until the worker is stopped."""

    def __init__(self, settings: WorkerSettings, storage: StorageSettings, queue: QueueSettings) -> None:
        self._settings = settings
        self._queue_settings = queue
        self.name = settings.name or f"{socket.gethostname()}-{secrets.token_hex(3)}"
        make_work_dir(settings.work_dir)
        self._gpus = find_gpus()
        self._gpu = self._gpus[0].name if self._gpus else ""
        """The name under which usage counts its GPUs."""
        self._proof = prove(os.environ, os.getpid())
        log.info("grader_isolation", isolation=self._proof.isolation, reason=self._proof.reason)
        self._store = ObjectStore(storage)
        self._job_store = JobStore(queue)
        self._write_once = WriteOnceStore(self._store)
        self._wakeups = WakeupPublisher(WakeupSender(queue), self._job_store)
        self._valkey_recovery = ValkeyRecovery(self._store, self._job_store, self._wakeups, queue)
        self._sweeper = Sweeper(
            self._job_store, self._write_once, self._wakeups, queue, valkey_recovery=self._valkey_recovery
        )
        self._registry = WorkerRegistry(self._job_store)
        self._stopped = threading.Event()
        self._news = threading.Event()
        self._job: str | None = None
        stop = GracefulShutdown(settings.stop_grace_seconds)
        self._draining = Draining(DrainStore(self._job_store), self.name, stop)
        self._deps = WorkerDeps(
            worker=self.name,
            job_store=self._job_store,
            write_once=self._write_once,
            store=self._store,
            datasets=DatasetStore(self._store),
            wakeups=self._wakeups,
            commands=Commands(self._job_store, self._write_once, self._wakeups, by=self.name),
            lease_seconds=queue.lease_seconds,
            launcher=settings.launcher_argv(),
            isolation=isolate(settings),
            stop=stop,
            queues=tuple(self.queues),
            stall_limits=StallLimits(
                factor=settings.stall_factor,
                floor_seconds=settings.stall_floor_seconds,
                quiet_seconds=settings.stall_quiet_seconds,
            ),
            max_job_seconds=TimeLimitSettings().seconds,
            max_run_bytes=settings.max_run_mb * 1_000_000,
        )

    @property
    def queues(self) -> list[str]:
        """The queues this worker listens on."""
        # CUDA decides which of several GPUs a job gets, so each must have the requested memory.
        memory = min((gpu.memory_bytes / 1e9 for gpu in self._gpus), default=None)
        in_cluster = bool(self._settings.ray_address)
        served = queues_served(memory, self._queue_settings.prefix, gpus=len(self._gpus), hosts=in_cluster)
        return with_formats(self._settings.queues or served)

    def serve(self) -> None:
        """Listen until TERM. A current run gets TERM, saves a checkpoint and is handed back."""
        processes.adopt()
        self._clean_scratch()
        self._await_servers()
        self._wakeups.start()
        self._sweeper.start()
        threading.Thread(target=self._announce, name="announcer", daemon=True).start()
        log.info("worker_ready", worker=self.name, queues=self.queues, device=_device(self._gpus))
        try:
            self._consume()
        finally:
            self._stopped.set()
            self._news.set()
            self._sweeper.close()
            self._wakeups.close()
            self._withdraw()

    def _clean_scratch(self) -> None:
        for folder in run_dirs.remove_abandoned(self._settings.work_dir):
            log.info("scratch_removed", folder=folder.name)

    def _await_servers(self) -> None:
        """Wait for storage and Valkey, which may start after this process. Raises `Unavailable` after the time
        limit."""
        until = time.monotonic() + self._settings.startup_seconds

        def reach_both() -> None:
            self._store.ensure_ready()
            ValkeyWatch(self._job_store).require()

        def note(error: Exception, _: float) -> None:
            if time.monotonic() > until:
                raise error
            log.warning("waiting_for_server", reason=str(error))

        retry(reach_both, Unavailable, repeat(STARTUP_RETRY_SECONDS), note=note)

    def _consume(self) -> None:
        app = make_celery(self._queue_settings)
        app.task(name=TASK, ignore_result=True)(self.run_job)

        def stop(**_: object) -> None:
            self._deps.stop.give()

        signals.worker_shutting_down.connect(stop, weak=False)
        app.worker_main(
            [
                *("worker", "--pool", "solo", "--concurrency", "1", "--loglevel", "WARNING"),
                *("--queues", ",".join(self.queues), "--hostname", f"{self.name}@%h"),
                *("--without-gossip", "--without-mingle", "--without-heartbeat"),
            ]
        )

    def run_job(self, job_id: str) -> None:
        """Handle a wake-up: claim the job and run it, or do nothing."""
        if self._deps.stop.asked or not self._has_room():
            return  # the sweeper publishes another wake-up, for a worker that stays and has space
        try:
            if not self._draining.begin():
                self._stand_aside(job_id)
                return
            refused: list[str] = []
            while (record := self._next(job_id, refused)) and not self._has_run(record):
                refused.append(record.id)  # a smaller job behind it may find its cards
        except Fenced as error:
            log.warning("fenced", job_id=job_id, reason=str(error))
        except Unavailable as error:
            log.warning("run_given_up", job_id=job_id, reason=str(error))
        except Exception:  # the outermost level: Celery continues with the next job, and the lease frees this one
            log.exception("run_broken", job_id=job_id)
        finally:
            self._job = None
            self._draining.end()
            self._news.set()
            processes.reap()  # it is process 1 of a container
            self._clean_scratch()

    def _stand_aside(self, job_id: str) -> None:
        """Pass the wake-up on to another worker, and receive none while this one is drained.

        Celery delivers the next message once this returns. Otherwise an idle, drained worker would use up the wake-ups
        for which the others have yet to get free.
        """
        record = self._job_store.get(job_id)
        if record is not None and record.status is JobStatus.QUEUED:
            self._wakeups.add(job_id, record.queue)
        self._draining.end()
        self._news.set()
        self._draining.wait(lambda: self._deps.stop.asked, self._news)

    def _has_room(self) -> bool:
        free = run_dirs.free_bytes(self._settings.work_dir)
        if free >= self._settings.min_free_mb * 1_000_000:
            return True
        log.error("no_room", work_dir=str(self._settings.work_dir), free_mb=free // 1_000_000)
        return False

    @contextlib.contextmanager
    def _reserve(self, record: JobRecord) -> Generator[Reservation | None]:
        """Hold the job's cards, where Ray deals them out. Without them the job waits for the next wake-up."""
        if not self._settings.ray_address:
            yield None
            return
        spec, seconds = parse_spec(record.spec), self._settings.ray_wait_seconds
        with gang.reserve(self._settings.ray_address, spec, seconds=seconds) as cards:
            if not cards.hosts:
                log.warning("no_cards", job_id=record.id, fitting_hosts=cards.fitting)
                fields = {"hosts_found": -1 if cards.fitting is None else cards.fitting}
                self._job_store.change(record.id, from_statuses={JobStatus.QUEUED}, fields=fields)
            yield cards

    def _claim(self, job_id: str, hosts: int = 0) -> JobRecord | None:
        """Claim a job for a run on this number of hosts, 0 for as many as it asks for. Returns its record, or None."""
        record = self._find(job_id)
        if record is None:
            return None
        epoch = self._write_once.allocate_epoch(
            job_id,
            self.name,
            event_log.now_iso(),
            attempts=record.attempts,
            run_ms=record.run_ms,
            orders=record.orders,
            gpu=self._gpu,
            hosts=hosts,
            gpu_ms=record.gpu_ms,
        )
        if epoch is None:
            return None
        held = replace(record, status=JobStatus.RUNNING, epoch=epoch, gpu=self._gpu, run_hosts=hosts)
        return held if self._take(held) else None

    def _has_run(self, record: JobRecord) -> bool:
        """Run a job whose turn it is. Returns False if its cards are not free, so that another may have its turn."""
        with self._reserve(record) as cards:
            has_cards = cards is None or bool(cards.hosts)
            leaves = self._deps.stop.asked or self._draining.mode  # asked for while the cards were awaited
            claimed = self._claim(record.id, len(cards.hosts) if cards else 0) if has_cards and not leaves else None
            if claimed is None:
                self._job_store.release_pick(record.id)
            else:
                self._run(claimed, cards)
            return has_cards or bool(leaves)

    def _next(self, job_id: str, refused: list[str]) -> JobRecord | None:
        """Return the job whose turn it is in the queue of a wake-up; the job that it names is only one of them.

        Jobs that this worker cannot run are added to `refused`, which are passed over.
        """
        self._valkey_recovery.ensure()
        while len(refused) < MOST_REFUSED and (picked := self._job_store.pick(job_id, self.name, refused)):
            record = self._find(picked)
            if record is not None:
                return record
            self._job_store.release_pick(picked)
            refused.append(picked)
        return None

    def _find(self, job_id: str) -> JobRecord | None:
        """Return the record of a job that this worker can run and that waits for one, or None."""
        # Before taking an epoch: a Valkey that was not compared refuses the claim, and the unused epoch looks like a
        # run.
        self._valkey_recovery.ensure()
        record = self._deps.commands.apply_pending(job_id)
        if record is None or record.status is not JobStatus.QUEUED:
            return None
        outcome = self._write_once.outcome(job_id)
        if outcome is not None:
            apply_outcome(self._job_store, job_id, outcome)
            return None
        return record if self._can_read(record) and self._can_grade(record) else None

    def _can_read(self, record: JobRecord) -> bool:
        """Whether this release can read a job's spec. If not, the record says so and the job waits."""
        try:
            if record.spec_format <= SPEC_FORMAT:
                parse_spec(record.spec)
                return True
        except SpecError as error:
            log.warning("spec_unreadable", job_id=record.id, reason=str(error)[:500])
        log.warning("newer_worker_needed", job_id=record.id, needs=record.spec_format, reads=SPEC_FORMAT)
        if record.refused_format < SPEC_FORMAT:
            fields = {"refused_format": SPEC_FORMAT}
            self._job_store.change(record.id, from_statuses={JobStatus.QUEUED}, fields=fields)
        return False

    def _can_grade(self, record: JobRecord) -> bool:
        """Whether this worker can confine the job's code. If not, the job waits for another worker."""
        if self._proof.isolation != "none" or not has_process(parse_spec(record.spec).rewards.graders):
            return True
        log.warning("graders_not_confined", job_id=record.id, reason=self._proof.reason)
        return False

    def _take(self, held: JobRecord) -> bool:
        """Claim a job with its new epoch. If an answer is lost, the repeated claim is refused, so the record decides.

        No other worker can have the epoch, so a held record with it is held by this worker.
        """
        lease_seconds = self._queue_settings.lease_seconds
        with contextlib.suppress(Unavailable):
            if self._job_store.claim(
                held.id,
                epoch=held.epoch,
                worker=self.name,
                lease_seconds=lease_seconds,
                gpu=held.gpu,
                hosts=held.run_hosts,
            ):
                return True
        record = self._job_store.get(held.id)
        return record is not None and record.epoch == held.epoch and record.status in HELD

    def _run(self, record: JobRecord, cards: Reservation | None) -> None:
        self._job = record.id
        self._news.set()
        log.info("run_started", job_id=record.id, epoch=record.epoch)
        try:
            with run_dirs.run_folder(self._settings.work_dir, record.id, record.epoch) as folder:
                JobRun(self._deps, record, record.epoch, folder, cards).execute()
        except (Fenced, Unavailable):
            raise
        except (
            Exception
        ) as error:  # an error of the worker or the machine: reported at once, not after the lease expires
            log.exception("run_broken", job_id=record.id)
            self._hand_back(record, broken_machine(error, self._settings.work_dir).handback)

    def _hand_back(self, record: JobRecord, handback: HandBack) -> None:
        """Hand back a job that could not be started here."""
        current = self._job_store.get(record.id)
        if current is not None and current.epoch == record.epoch and current.status in HELD:
            hand_back(self._job_store, self._write_once, self._wakeups, current, handback, by=self.name)

    def _announce(self) -> None:
        """Announce this worker regularly, and at once when something about it has changed."""
        due = 0.0
        while not self._stopped.is_set():
            try:
                if self._draining.look() or self._news.is_set() or time.monotonic() >= due:
                    self._news.clear()
                    self._registry.announce(self._info())
                    due = time.monotonic() + EXPIRY_SECONDS / 6
            except Unavailable as error:
                log.warning("announce_failed", reason=str(error))
            self._news.wait(LOOK_SECONDS)

    def _info(self) -> WorkerInfo:
        memory = min((gpu.memory_bytes / 1e9 for gpu in self._gpus), default=None)
        # `busy` is read last: a drain that is obeyed was read before it.
        return WorkerInfo(
            name=self.name,
            queues=self.queues,
            device=_device(self._gpus),
            job=self._job,
            grader_isolation=self._proof.isolation,
            host=socket.gethostname(),
            gpus=[gpu.name for gpu in self._gpus],
            gpu_memory_gb=None if memory is None else round(memory, 1),
            memory_gb=round(isolation.machine_memory() / 1e9, 1),
            engines=_engines(),
            drain=self._draining.mode,
            busy=self._draining.busy,
        )

    def _withdraw(self) -> None:
        try:
            self._registry.withdraw(self.name)
        except Unavailable as error:
            log.warning("withdraw_failed", reason=str(error))


def make_work_dir(folder: Path) -> None:
    """Make the scratch folder. Raises `Misconfigured` if it cannot be used."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if fault := run_dirs.fault_of(folder):
            raise _unusable(folder, fault)
        isolation.let_pass(folder)
    except OSError as error:
        raise _unusable(folder, f"cannot be made ({error.strerror or error})") from error
    if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        raise _unusable(folder, "this process may not write to")


def isolate(settings: WorkerSettings) -> isolation.Isolation:
    """Decide how this worker isolates training processes, as far as the machine allows, and log it."""
    users: range | None = None
    if settings.child_users and os.geteuid() == 0:
        first, _, last = settings.child_users.partition("-")
        users = range(int(first), int(last) + 1)
        if not users or users[0] == 0:
            raise Misconfigured(
                "GRPO_CHILD_USERS", settings.child_users, "is no range of users", "Set it to FIRST-LAST, above 0."
            )
    asked = isolation.Isolation(
        users=users,
        landlock=settings.child_landlock != "off" and isolation.landlock_works(),
        caches=settings.cache_dir or isolation.usual_caches(),
        shared_caches=settings.shared_caches,
        memory_bytes=settings.child_memory_mb * 1_000_000 or int(isolation.machine_memory() * isolation.ROOM),
        readable=tuple(map(str, settings.child_readable)),
    )
    decided, reasons = isolation.decide(asked, settings.launcher_argv(), settings.work_dir)
    if settings.child_landlock == "auto" and decided.landlock and decided.users is None and os.geteuid() == 0:
        decided, reasons = isolation.without_landlock_on_cards(decided, reasons)
    for reason in reasons:
        log.warning("isolation_weaker", reason=reason)
    log.info(
        "isolation",
        users=decided.users and f"{decided.users[0]}-{decided.users[-1]}",
        landlock=decided.landlock,
        caches=str(decided.caches),
        shared_caches=decided.shared_caches,
        memory_mb=(decided.memory_bytes or 0) // 1_000_000,
    )
    return decided


def _unusable(folder: Path, fault: str) -> Misconfigured:
    return Misconfigured("GRPO_WORK_DIR", folder, fault, "Set it to a folder that this process may make and write to.")


@cache
def _engines() -> list[str]:
    """What is installed to train and serve with, without importing it."""
    packages = {"native": "torch", "trl": "trl", "unsloth": "unsloth", "vllm": "vllm"}
    return [engine for engine, package in packages.items() if importlib.util.find_spec(package) is not None]


def _device(gpus: list[Gpu]) -> str:
    return f"{len(gpus)} × {gpus[0].name}" if gpus else f"cpu ({os.cpu_count()} cores)"
