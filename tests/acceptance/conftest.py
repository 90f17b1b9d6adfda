"""A service and real worker processes on the session's servers; the workers train with `tests/fake_trainer.py`."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from grpo_core.spec import parse_spec
from jobs.service import JobService
from jobs.settings import QueueSettings, StorageSettings
from jobs.store.job import TERMINAL, JobRecord, JobStatus
from tests.clock import patience

HERE = Path(__file__).parent
ROOT = Path(__file__).resolve().parents[2]
FAKE_TRAINER = ROOT / "tests" / "fake_trainer.py"
OWNER = "ann"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of whole processes are for `make long`, except one of each kind."""
    for item in items:
        if HERE in item.path.parents and item.get_closest_marker("core") is None:
            item.add_marker(pytest.mark.long)


@pytest.fixture
def queue_settings(queue_settings: QueueSettings) -> QueueSettings:
    """Short leases: every process of a test must agree on them, since any of their sweepers may be the one."""
    return queue_settings.model_copy(update={"lease_seconds": 3.0})


class WorkerProcess:
    """One `python -m jobs`."""

    def __init__(self, environment: dict[str, str], log: Path, cwd: Path = ROOT) -> None:
        self.log = log
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "jobs"], env=environment, stdout=output, stderr=output, cwd=cwd
            )

    def stop(self) -> int:
        self.process.terminate()
        return self.process.wait(timeout=patience(30))


@pytest.fixture
def start_worker(
    tmp_path: Path, queue_settings: QueueSettings, storage_settings: StorageSettings
) -> Iterator[Callable[..., WorkerProcess]]:
    started: list[WorkerProcess] = []

    def start(launcher: list[str] | None = None, cwd: Path = ROOT, **variables: str) -> WorkerProcess:
        number = len(started)
        environment = {
            **os.environ,
            "REDIS_URL": queue_settings.redis_url.get_secret_value(),
            "GRPO_PREFIX": queue_settings.prefix,
            "GRPO_LEASE_SECONDS": str(queue_settings.lease_seconds),
            "S3_ENDPOINT": storage_settings.endpoint,
            "S3_BUCKET": storage_settings.bucket,
            "AWS_ACCESS_KEY_ID": storage_settings.access_key.get_secret_value(),
            "AWS_SECRET_ACCESS_KEY": storage_settings.secret_key.get_secret_value(),
            "GRPO_WORKER_NAME": f"w{number}",
            "GRPO_WORK_DIR": str(tmp_path / f"work{number}"),
            "GRPO_CACHE_DIR": str(tmp_path / "caches"),
            "GRPO_LAUNCHER": shlex.join(launcher or [sys.executable, str(FAKE_TRAINER)]),
            **variables,
        }
        started.append(WorkerProcess(environment, tmp_path / f"worker{number}.log", cwd))
        return started[-1]

    yield start
    for worker in started:
        if worker.process.poll() is None:
            worker.process.kill()
            worker.process.wait()


@pytest.fixture
def submit(service: JobService) -> Callable[..., JobRecord]:
    def submit(
        steps: int = 5, checkpoint_every: int = 2, data: dict[str, object] | None = None, **how: str
    ) -> JobRecord:
        spec = {
            "resources": {"gpus": 0},
            "optimizer": {"name": "adamw_torch"},
            "training": {"steps": steps, "checkpoint_every": checkpoint_every},
            "metadata": how,
            **({"data": data} if data else {}),
        }
        return service.submit(parse_spec(spec), OWNER)

    return submit


def wait_for(service: JobService, job_id: str, *statuses: JobStatus, seconds: float = 120) -> JobRecord:
    """The job once it has one of these states (any end when none are named)."""
    deadline = time.monotonic() + patience(seconds)
    while True:
        record = service.get(job_id, OWNER)
        if record.status in (statuses or TERMINAL):
            return record
        assert time.monotonic() < deadline, f"{job_id} is still {record.status} ({record.phase}, step {record.step})"
        time.sleep(0.05)
