"""A whole service as processes that can be hurt one by one: Valkey, SeaweedFS, the API and workers, all on one machine.

Owns their start, their restart and the lines between them: API and workers reach each server through a proxy of their
own. The workers train with `tests/fake_trainer.py` unless told otherwise. Invariant: nothing started here outlives the
process that started it.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx

from deploy.local.ports import pick_port, pick_s3_port
from deploy.local.process import Child, Service
from deploy.local.seaweedfs import SeaweedFS
from deploy.local.valkey import Valkey
from grpo_client import ClientError, GrpoClient
from jobs.auth.api_keys import SCOPES, KeyStore
from jobs.settings import QueueSettings, StorageSettings
from jobs.store.bucket import ObjectStore
from jobs.store.job import TERMINAL, JobRecord, JobStatus
from jobs.store.job_store import JobStore
from jobs.store.write_once import WriteOnceStore
from tests.acceptance.faults.proxy import Network, Proxy
from tests.clock import patience

ROOT = Path(__file__).resolve().parents[3]
FAKE_TRAINER = ROOT / "tests" / "fake_trainer.py"
OWNER = "ann"
PREFIX = "faults"
LEASE_SECONDS = 3.0
WORKER = {
    "GRPO_STALL_FACTOR": "5",
    "GRPO_STALL_FLOOR_SECONDS": "3",
    "GRPO_STALL_QUIET_SECONDS": "60",
    "GRPO_STOP_GRACE_SECONDS": "4",
    "GRPO_MIN_FREE_MB": "1",
}
"""Settings of every worker here: what takes minutes in production takes seconds."""


class Process:
    """A program that can be killed, frozen and started again, on the same ports and with the same data."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self._child: Child | None = None

    @property
    def name(self) -> str:
        return self.service.name

    @property
    def pid(self) -> int:
        assert self._child is not None, f"{self.name} was never started"
        return self._child.pid

    @property
    def alive(self) -> bool:
        return self._child is not None and self._child.alive()

    def start(self, *, wait: bool = True) -> None:
        """Start it where it does not run; returns when it answers."""
        if not self.alive:
            if self._child is not None:
                self._child.kill()  # reaps
            self._child = Child(self.service)
        if wait:
            self.wait_ready()

    def wait_ready(self) -> None:
        assert self._child is not None
        self._child.wait_ready(patience(30))

    def kill(self) -> None:
        """As a crash does: no goodbye. What it started in sessions of its own is left to itself."""
        if self._child is not None:
            self._child.kill()

    def stop(self) -> None:
        """As an operator does: TERM, and KILL after the service's time."""
        if self._child is not None:
            self._child.stop()

    def signal(self, number: int) -> None:
        """Send a signal to the process alone; safe in any thread."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    @contextlib.contextmanager
    def frozen(self) -> Generator[None]:
        """Stopped by SIGSTOP for the length of a block: there, and deaf."""
        self.signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.signal(signal.SIGCONT)

    @contextlib.contextmanager
    def down(self) -> Generator[None]:
        """Killed, and started again after the block."""
        self.kill()
        try:
            yield
        finally:
            self.start()


class Member(Process):
    """An API or a worker, with its lines to both servers."""

    def __init__(self, service: Service, valkey: Proxy, storage: Proxy) -> None:
        super().__init__(service)
        self.valkey = valkey
        self.storage = storage


class Worker(Member):
    """One worker and the folder it works in."""

    def __init__(self, service: Service, valkey: Proxy, storage: Proxy, work_dir: Path) -> None:
        super().__init__(replace(service, probe=self._missing), valkey, storage)
        self.work_dir = work_dir
        self._starts = 0

    def start(self, *, wait: bool = True) -> None:
        if not self.alive:
            self._starts = self._ready_lines()
        super().start(wait=wait)

    def training(self, job_id: str = "") -> list[int]:
        """The processes that work in a run's folder here."""
        return processes_below(self.work_dir, job_id)

    def scratch(self) -> list[Path]:
        return list(self.work_dir.glob("job-*"))

    def _missing(self) -> str | None:
        return None if self._ready_lines() > self._starts else "it has not said that it is ready"

    def _ready_lines(self) -> int:
        log = self.service.log
        return log.read_bytes().count(b'"worker_ready"') if log.exists() else 0


class Stage:
    """Everything. Make it in the main thread: the processes are bound to the thread that starts them."""

    def __init__(
        self,
        folder: Path,
        workers: int = 2,
        *,
        lease_seconds: float = LEASE_SECONDS,
        worker_settings: dict[str, str] | None = None,
    ) -> None:
        self.folder = folder
        self.network = Network()
        self._worker_settings = {**WORKER, **(worker_settings or {})}
        self._valkey = Valkey(
            data=folder / "valkey", port=pick_port(), password=secrets.token_urlsafe(24), log=folder / "valkey.log"
        )
        self._seaweedfs = SeaweedFS(
            data=folder / "seaweedfs",
            port=pick_s3_port(),
            access_key=secrets.token_hex(10),
            secret_key=secrets.token_urlsafe(30),
            log=folder / "seaweedfs.log",
        )
        self.valkey = Process(self._valkey.service())
        self.seaweedfs = Process(self._seaweedfs.service())
        self.queue = QueueSettings.model_validate(
            {"redis_url": self._valkey.url, "prefix": PREFIX, "lease_seconds": lease_seconds}
        )
        self.storage = StorageSettings.model_validate(
            {
                "endpoint": self._seaweedfs.endpoint,
                "bucket": self._seaweedfs.bucket,
                "region": self._seaweedfs.region,
                "access_key": self._seaweedfs.access_key,
                "secret_key": self._seaweedfs.secret_key,
            }
        )
        self.job_store = JobStore(self.queue)
        self.store = ObjectStore(self.storage)
        self.write_once = WriteOnceStore(self.store)
        self.valkey.start()
        self.seaweedfs.start()
        self.key, _ = KeyStore(self.store, self.job_store).create(OWNER, SCOPES)
        self.api = self._make_api()
        self.workers = [self.make_worker(f"w{number}") for number in range(workers)]
        self.client = GrpoClient(self.url, self.key)

    def start(self) -> None:
        """Bring everything into order: every line open, every process there and awake."""
        for member in (self.api, *self.workers):
            member.valkey.open()
            member.storage.open()
        for process in (self.valkey, self.seaweedfs, self.api, *self.workers):
            process.start(wait=False)
            process.signal(signal.SIGCONT)
        for process in (self.valkey, self.seaweedfs, self.api, *self.workers):
            process.wait_ready()

    def close(self) -> None:
        """End everything."""
        self.client.close()
        for process in (*self.workers, self.api, self.valkey, self.seaweedfs):
            process.kill()
        self.job_store.client.close()
        self.network.close()

    def make_worker(
        self, name: str, *, work_dir: Path | None = None, launcher: Iterable[str] = (), **settings: str
    ) -> Worker:
        """A worker that is not started yet, with lines of its own."""
        valkey, storage = self._lines()
        work_dir = work_dir or self.folder / f"work-{name}"
        environment = {
            **self._environment(valkey, storage),
            **self._worker_settings,
            "GRPO_WORKER_NAME": name,
            "GRPO_WORK_DIR": str(work_dir),
            "GRPO_LAUNCHER": shlex.join(launcher or [sys.executable, str(FAKE_TRAINER)]),
            **settings,
        }
        service = Service(
            name=name,
            argv=(sys.executable, "-m", "jobs"),
            env=environment,
            cwd=ROOT,
            log=self.folder / f"{name}.log",
            stop_s=15.0,
        )
        return Worker(service, valkey, storage, work_dir)

    def _make_api(self) -> Member:
        valkey, storage = self._lines()
        port = pick_port()
        self.url = f"http://127.0.0.1:{port}"
        environment = {
            **self._environment(valkey, storage),
            "GRPO_API_PORT": str(port),
            "S3_PUBLIC_ENDPOINT": self._seaweedfs.endpoint,
        }
        service = Service(
            name="api",
            argv=(sys.executable, "-m", "api", "api"),
            env=environment,
            cwd=ROOT,
            log=self.folder / "api.log",
            probe=lambda: _not_ready(self.url),
        )
        return Member(service, valkey, storage)

    def _lines(self) -> tuple[Proxy, Proxy]:
        return Proxy(self.network, self._valkey.port), Proxy(self.network, self._seaweedfs.port)

    def _environment(self, valkey: Proxy, storage: Proxy) -> dict[str, str]:
        return {
            **{name: value for name, value in os.environ.items() if not name.startswith(("GRPO_", "S3_", "AWS_"))},
            "REDIS_URL": f"redis://:{self._valkey.password}@127.0.0.1:{valkey.port}/0",
            "GRPO_PREFIX": PREFIX,
            "GRPO_LEASE_SECONDS": str(self.queue.lease_seconds),
            "GRPO_MODEL_DIR": str(ROOT / "examples" / "models"),
            "OMP_NUM_THREADS": "1",
            "S3_ENDPOINT": f"http://127.0.0.1:{storage.port}",
            "S3_BUCKET": self.storage.bucket,
            "AWS_ACCESS_KEY_ID": self._seaweedfs.access_key,
            "AWS_SECRET_ACCESS_KEY": self._seaweedfs.secret_key,
        }

    @property
    def admin_environment(self) -> dict[str, str]:
        """For commands that go straight to the servers, as `grpo admin` does."""
        return {
            **{name: value for name, value in os.environ.items() if not name.startswith(("GRPO_", "S3_", "AWS_"))},
            "REDIS_URL": self._valkey.url,
            "GRPO_PREFIX": PREFIX,
            "GRPO_LEASE_SECONDS": str(self.queue.lease_seconds),
            "S3_ENDPOINT": self._seaweedfs.endpoint,
            "S3_BUCKET": self.storage.bucket,
            "AWS_ACCESS_KEY_ID": self._seaweedfs.access_key,
            "AWS_SECRET_ACCESS_KEY": self._seaweedfs.secret_key,
        }

    def lose_valkey(self) -> None:
        """Kill it and throw its data away: it comes back with nothing."""
        self.valkey.kill()
        shutil.rmtree(self._valkey.data)
        self._valkey.data.mkdir(mode=0o700)
        self.valkey.start()

    def submit(self, steps: int = 30, checkpoint_every: int = 5, *, gpus: int = 0, **how: str) -> str:
        """Submit a job of 0.1 s a step through the API; returns its id."""
        return self.client.submit(job_spec(steps, checkpoint_every, gpus=gpus, **how))["id"]

    def record(self, job_id: str) -> JobRecord:
        """What Valkey has, past the API and its proxies."""
        record = self.job_store.get(job_id)
        assert record is not None, f"{job_id} has no record"
        return record

    def holder(self, job_id: str) -> Worker:
        """The worker that has a job."""
        name = self.record(job_id).worker
        return next(worker for worker in self.workers if worker.name == name)

    def other(self, worker: Worker) -> Worker:
        """Any other worker."""
        return next(other for other in self.workers if other is not worker)

    def until(self, true: Callable[[], Any], seconds: float = 60, what: str = "it did not come true") -> float:
        """Wait; returns how long it took."""
        began = time.monotonic()
        while not true():
            assert time.monotonic() - began < patience(seconds), what
            time.sleep(0.02)
        return time.monotonic() - began

    def until_step(self, job_id: str, step: int, seconds: float = 60) -> float:
        """Wait until a job has trained a step."""
        return self.until(lambda: self.record(job_id).step >= step, seconds, f"{job_id} did not reach step {step}")

    def until_committed(self, job_id: str, step: int) -> float:
        """Wait until the checkpoint of a step is committed."""
        return self.until(lambda: self.record(job_id).checkpoint_step >= step, what=f"{step} was not committed")

    def until_run(self, job_id: str, epoch: int, seconds: float = 60) -> float:
        """Wait until a run has begun and has trained a step of its own."""

        def trains() -> bool:
            record = self.record(job_id)
            if record.epoch < epoch and record.status not in TERMINAL:
                return False
            return (record.phase != "preparing" and record.phase != "loading") or record.status in TERMINAL

        return self.until(trains, seconds, f"run {epoch} of {job_id} did not begin")

    def until_ended(self, job_id: str, *, seconds: float = 90) -> JobRecord:
        """The job once it has ended."""
        self.until(lambda: self.record(job_id).status in TERMINAL, seconds, f"{job_id} did not end")
        return self.record(job_id)

    def until_status(self, job_id: str, *statuses: JobStatus, seconds: float = 30) -> float:
        """Wait for a state."""
        return self.until(
            lambda: self.record(job_id).status in statuses, seconds, f"{job_id} is {self.record(job_id).status}"
        )


class Follower:
    """A reader who follows a job's events over the API, through whatever happens to it."""

    def __init__(self, stage: Stage, job_id: str) -> None:
        self.seen: list[dict[str, Any]] = []
        self.error: Exception | None = None
        self._client = GrpoClient(stage.url, stage.key)
        self._job_id = job_id
        self._thread = threading.Thread(target=self._follow, name=f"follower-{job_id}", daemon=True)
        self._thread.start()

    def finish(self) -> list[dict[str, Any]]:
        """The events once the job has ended, and all are read."""
        self._thread.join(90)
        assert not self._thread.is_alive(), "the stream did not end with the job"
        self._client.close()
        if self.error is not None:
            raise self.error
        return self.seen

    def _follow(self) -> None:
        try:
            for event in self._client.stream(self._job_id, poll=0.2, patience=90):
                self.seen.append(event)
        except ClientError as error:
            self.error = error


def job_spec(steps: int, checkpoint_every: int, *, gpus: int = 0, **how: str) -> dict[str, Any]:
    """A job for the fake trainer: `how` it behaves is in its metadata."""
    return {
        "resources": {"gpus": gpus},
        "optimizer": {"name": "adamw_torch"},
        "training": {"steps": steps, "checkpoint_every": checkpoint_every},
        "metadata": {"step_seconds": "0.1", **how},
    }


def processes_below(folder: Path, part: str = "") -> list[int]:
    """The processes whose working folder lies below one, and has this in its path."""
    found: list[int] = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            place = (process / "cwd").readlink()
            if place.is_relative_to(folder) and part in str(place):
                found.append(int(process.name))
    return found


def _not_ready(url: str) -> str | None:
    try:
        answer = httpx.get(f"{url}/readyz", timeout=2)
    except httpx.HTTPError as error:
        return repr(error)
    return None if answer.is_success else answer.text
