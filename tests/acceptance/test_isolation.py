"""The training process attacks its worker: as a user of its own, where the worker is root, and as the worker's own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from grpo_core.spec import parse_spec
from jobs.service import JobService
from jobs.store.job import JobRecord, JobStatus
from jobs.worker import isolation
from tests.acceptance.conftest import OWNER, ROOT, WorkerProcess, wait_for
from tests.clock import patience

Start = Callable[..., WorkerProcess]
HOSTILE = ROOT / "tests" / "hostile_trainer.py"
USER = 60600


MOST_AND_LEAST = pytest.mark.parametrize("attacker", ["own user and Landlock", "neither"], indirect=True)


def python_for_all() -> str | None:
    """A Python that a user without rights can run; the one of these tests may lie in root's home."""
    for name in (sys.executable, "/usr/bin/python3"):
        places = [Path(name).resolve(), HOSTILE]
        if all(p.exists() and all(above.stat().st_mode & 0o001 for above in p.parents) for p in places):
            return name
    return None


@dataclass(frozen=True, kw_only=True)
class Attacker:
    """Workers that run the hostile trainer, and jobs that say how."""

    start_worker: Start
    service: JobService
    folder: Path
    """Everyone can go through it."""
    users: str
    landlock: bool
    python: str

    def start(self, **variables: str) -> WorkerProcess:
        return self.start_worker(
            launcher=[self.python, str(HOSTILE)],
            GRPO_WORK_DIR=str(self.folder / "work"),
            GRPO_CACHE_DIR=str(self.folder / "caches"),
            GRPO_CHILD_USERS=self.users,
            GRPO_CHILD_LANDLOCK="on" if self.landlock else "off",
            **variables,
        )

    def submit(self, owner: str = OWNER, **how: str) -> JobRecord:
        spec = {"resources": {"gpus": 0}, "optimizer": {"name": "adamw_torch"}, "metadata": how}
        return self.service.submit(parse_spec(spec), owner)

    def artifacts(self, job: JobRecord) -> dict[str, bytes]:
        found = self.service.artifacts(job.id, job.owner)
        return {artifact.path: self.service.store.get(artifact.key) or b"" for artifact in found}

    def report(self, job: JobRecord) -> dict[str, Any]:
        return json.loads(self.artifacts(job)["report.json"])

    def detached(self, job: JobRecord) -> int:
        """The number of the process that the job has detached, once it has."""
        while True:
            events = self.service.events(job.id, OWNER, types={"warning"})
            if told := [event["data"]["message"] for event in events if event["data"]["code"] == "detached"]:
                return int(told[-1])
            assert self.service.get(job.id, OWNER).status in (JobStatus.QUEUED, JobStatus.RUNNING)
            time.sleep(0.05)


@pytest.fixture(params=["own user", "own user and Landlock", "Landlock", "neither"])
def attacker(request: pytest.FixtureRequest, start_worker: Start, service: JobService) -> Iterator[Attacker]:
    has_user, landlock = "user" in request.param, "Landlock" in request.param
    python = python_for_all()
    if has_user and (os.geteuid() != 0 or python is None):
        pytest.skip("needs root, and a Python that others may run")
    if landlock and not isolation.landlock_works():
        pytest.skip("needs Landlock")
    folder = Path(tempfile.mkdtemp(prefix="grpo-test-", dir="/var/tmp"))
    folder.chmod(0o711)
    yield Attacker(
        start_worker=start_worker,
        service=service,
        folder=folder,
        users=f"{USER}-{USER + 9}" if has_user else "",
        landlock=landlock,
        python=(python if has_user else None) or sys.executable,
    )
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.core
def test_neither_keys_nor_files_of_the_worker_are_had(attacker: Attacker) -> None:
    worker = attacker.start()
    secret = attacker.folder / "secrets.json"
    secret.write_text("s3cr3t")
    secret.chmod(0o600)
    first = attacker.submit(owner="bob", attack="look", secret=str(secret), plant=str(secret), other_cache="/root")
    bob = wait_until_ended(attacker, first)
    [bobs_cache] = (attacker.folder / "caches").iterdir()
    job = attacker.submit(
        attack="look",
        worker=str(worker.process.pid),
        secret=str(secret),
        plant=str(bobs_cache / "planted"),
        other_cache=str(bobs_cache),
    )
    done = wait_until_ended(attacker, job)
    assert (bob.status, done.status) == (JobStatus.SUCCEEDED, JobStatus.SUCCEEDED), (bob.error, done.error)
    found = attacker.report(done)
    stolen: list[str] = [*attacker.report(bob)["stolen"], *found["stolen"]]
    if not attacker.users and not attacker.landlock:  # other processes of the user are not safe then
        stolen = [what for what in stolen if what.endswith(f" {worker.process.pid}")]
    assert stolen == []
    assert found["capabilities"] == "0" * 16
    assert found["core"] == ["0", "0"]
    assert str(found["temporary"]).startswith("done")
    if attacker.users:
        assert (attacker.report(bob)["user"], found["user"]) == (USER, USER + 1)
        assert found["groups"] == isolation.device_groups()
        assert found["signalled"] == "PermissionError"
    if attacker.users or attacker.landlock:
        assert (found["secret"], found["planted"], found["cache"]) == ("PermissionError",) * 3
        assert str(found["own_cache"]).startswith("done")


@MOST_AND_LEAST
@pytest.mark.parametrize("end", ["done", "cancel", "worker killed"])
def test_nothing_that_it_started_outlives_it(attacker: Attacker, end: str) -> None:
    worker = attacker.start()
    job = attacker.submit(attack="detach", **({} if end == "done" else {"stay": "1"}))
    pid = attacker.detached(job)
    if end == "worker killed":
        trainers = os_processes(attacker.folder)
        worker.process.send_signal(signal.SIGKILL)
        worker.process.wait()
        wait_until_gone(pid, *trainers)
        return
    if end == "cancel":
        assert is_alive(pid)
        attacker.service.cancel(job.id, OWNER)
    wait_until_ended(attacker, job)
    assert not is_alive(pid), "gone before the job is said to have ended"


@MOST_AND_LEAST
def test_a_killed_guardian_leaves_nothing_either(attacker: Attacker) -> None:
    attacker.start()
    job = attacker.submit(attack="guardian")
    pid = attacker.detached(job)
    if attacker.users or attacker.landlock:
        # It may not even be sent a signal.
        assert is_alive(pid)
        attacker.service.cancel(job.id, OWNER)
        wait_until_ended(attacker, job)
    wait_until_gone(pid)


@MOST_AND_LEAST
def test_what_leads_elsewhere_is_neither_shipped_nor_written_through(attacker: Attacker) -> None:
    target = attacker.folder / "private" / "target"
    target.parent.mkdir(mode=0o700)
    target.write_text('{"a": "s3cr3t of the worker"}\n')
    before = sorted(target.parent.iterdir())
    attacker.start()
    done = wait_until_ended(attacker, attacker.submit(attack="traps", target=str(target)))
    assert done.status is JobStatus.SUCCEEDED, done.error
    left = attacker.artifacts(done)
    assert left["adapter/plain"] == b"plain"
    assert {path for path in left if path.startswith(("adapter", "checkpoints", "tensorboard"))} == {"adapter/plain"}
    assert not [path for path, body in left.items() if b"s3cr3t" in body or b"AWS_SECRET" in body]
    assert (sorted(target.parent.iterdir()), "s3cr3t" in target.read_text()) == (before, True)


@MOST_AND_LEAST
def test_memory_is_limited(attacker: Attacker) -> None:
    worker = attacker.start(GRPO_CHILD_MEMORY_MB="300")
    done = wait_until_ended(attacker, attacker.submit(attack="memory", megabytes="1000"))
    assert done.status is JobStatus.FAILED
    assert done.error is not None
    assert (done.error["class"], done.error["code"]) == ("oom", "attempts_used_up"), done.error
    told = attacker.service.events(done.id, OWNER, types={"warning"})
    assert {event["data"].get("cause") for event in told} == {"memory_limit"}
    assert worker.process.poll() is None, "the worker lives"
    assert wait_until_ended(attacker, attacker.submit(attack="detach")).status is JobStatus.SUCCEEDED


def wait_until_ended(attacker: Attacker, job: JobRecord) -> JobRecord:
    if job.owner == OWNER:
        return wait_for(attacker.service, job.id)
    while (record := attacker.service.get(job.id, job.owner)).status in (JobStatus.QUEUED, JobStatus.RUNNING):
        time.sleep(0.05)
    return record


def os_processes(folder: Path) -> list[int]:
    """What works below a folder."""
    found: list[int] = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cwd").readlink().is_relative_to(folder):
                found.append(int(process.name))
        except OSError:
            continue
    return found


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def wait_until_gone(*pids: int) -> None:
    deadline = time.monotonic() + patience(10)
    while any(map(is_alive, pids)):
        assert time.monotonic() < deadline, "it lives on"
        time.sleep(0.02)
