"""The release before this one beside this one: its workers, its API and the records that it wrote.

Its code is taken from the repository's history and run with this release's dependencies. Where the history is not
there (a shallow clone), only the recorded objects of `tests/unit/test_contract_fixtures.py` are checked.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from grpo_core.run_dir.records import read_rollouts
from grpo_core.spec import parse_spec
from jobs.read.queue_position import WaitReason
from jobs.service import JobService
from jobs.settings import QueueSettings, StorageSettings
from jobs.store.job import JobRecord, JobStatus
from tests.acceptance.conftest import OWNER, ROOT, WorkerProcess, wait_for
from tests.integration.children import MODELS, Run, prepare, spec_with

BEFORE = "46fd869cd6454062fb19c0c9db3920bdf3fe4fb9"
CPU: dict[str, Any] = {"resources": {"gpus": 0}, "optimizer": {"name": "adamw_torch"}, "training": {"steps": 5}}

SERVICE = """\
import json, sys
from jobs.service import JobService
import grpo_core
from grpo_core.spec import parse_spec
service, owner = JobService.from_settings(), sys.argv[1]
def job(record):
    return {"id": record.id, "status": record.status, "spec": record.spec, "queue": record.queue}
"""


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tree of the release before."""
    known = subprocess.run(["git", "cat-file", "-e", BEFORE], cwd=ROOT, capture_output=True, check=False)
    if known.returncode:
        pytest.skip(f"the history has no {BEFORE}")
    folder = tmp_path_factory.mktemp("before")
    archive = subprocess.run(["git", "archive", BEFORE], cwd=ROOT, capture_output=True, check=True)
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tree:
        tree.extractall(folder, filter="data")
    return folder


@pytest.fixture
def old_service(
    before: Path, queue_settings: QueueSettings, storage_settings: StorageSettings
) -> Callable[[str], dict[str, Any]]:
    """Runs lines with the old release's service; they print JSON."""

    def run(lines: str) -> dict[str, Any]:
        environment = {
            **os.environ,
            "PYTHONPATH": str(before),
            "REDIS_URL": queue_settings.redis_url.get_secret_value(),
            "GRPO_PREFIX": queue_settings.prefix,
            "S3_ENDPOINT": storage_settings.endpoint,
            "S3_BUCKET": storage_settings.bucket,
            "AWS_ACCESS_KEY_ID": storage_settings.access_key.get_secret_value(),
            "AWS_SECRET_ACCESS_KEY": storage_settings.secret_key.get_secret_value(),
        }
        where = f"assert grpo_core.__file__.startswith({str(before)!r}), grpo_core.__file__\n"
        command = [sys.executable, "-c", SERVICE + where + lines, OWNER]
        done = subprocess.run(command, env=environment, cwd=before, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run


@pytest.fixture
def old_worker(before: Path, start_worker: Callable[..., WorkerProcess]) -> Callable[[], WorkerProcess]:
    """Starts a worker of the old release, with its own trainer."""
    trainer = f"import sys, runpy; sys.path.insert(0, {str(before)!r}); "
    trainer += f"runpy.run_path({str(before / 'tests' / 'fake_trainer.py')!r}, run_name='__main__')"
    return lambda: start_worker([sys.executable, "-c", trainer], cwd=before, PYTHONPATH=str(before))


def test_an_old_worker_runs_what_it_can_and_is_not_given_the_rest(
    service: JobService, old_worker: Callable[[], WorkerProcess], start_worker: Callable[..., WorkerProcess]
) -> None:
    old_worker()
    newer = service.submit(parse_spec({**CPU, "engine": "native"}), OWNER)
    plain = service.submit(parse_spec(CPU), OWNER)
    assert wait_for(service, plain.id).status is JobStatus.SUCCEEDED
    waiting = service.waiting(service.get(newer.id, OWNER))
    assert waiting is not None
    assert (waiting.reason, waiting.workers, waiting.workers_spec_format) == (WaitReason.NEWER_WORKER, 0, 1)
    start_worker()
    ended = wait_for(service, newer.id)
    assert (ended.status, ended.attempts, ended.epoch) == (JobStatus.SUCCEEDED, 0, 1)


def test_a_worker_runs_what_an_old_service_accepted(
    service: JobService,
    old_service: Callable[[str], dict[str, Any]],
    start_worker: Callable[..., WorkerProcess],
) -> None:
    job = old_service(f"print(json.dumps(job(service.submit(parse_spec({CPU!r}), owner))))")
    start_worker()
    service.job_store.mark_rung(job["id"])
    service.start()  # its sweeper rings: the old service has ended before it could
    ended = wait_for(service, job["id"])
    service.close()
    assert (ended.status, ended.requested_spec, ended.spec_format) == (JobStatus.SUCCEEDED, None, 1)
    assert parse_spec(ended.spec).digest() == ended.spec_sha256


def test_an_old_service_reads_the_jobs_and_workers_of_this_one(
    service: JobService,
    old_service: Callable[[str], dict[str, Any]],
    start_worker: Callable[..., WorkerProcess],
    submit: Callable[..., JobRecord],
) -> None:
    start_worker()
    ended = wait_for(service, submit().id)
    native = service.submit(parse_spec({"engine": "native"}), OWNER)
    seen = old_service(
        f"found = [service.get(id, owner) for id in {[ended.id, native.id]!r}]\n"
        "workers = [worker.name for worker in service.workers.all()]\n"
        "codes = [warning.code for warning in service.warnings(parse_spec(found[0].spec))]\n"
        "events = len(service.events(found[0].id, owner))\n"
        "print(json.dumps({'jobs': [job(record) for record in found], 'workers': workers, 'codes': codes,"
        " 'events': events}))"
    )
    assert [job["status"] for job in seen["jobs"]] == ["succeeded", "queued"]
    assert seen["jobs"][1]["spec"]["engine"] == "native"
    assert (seen["workers"], "no_worker" in seen["codes"]) == (["w0"], False)
    assert seen["events"] > 0


def train(root: Path, spec: dict[str, Any], *, release: Path = ROOT, epoch: int = 1) -> Run:
    """A run by the trainer of a release."""
    environment = {**os.environ, "PYTHONPATH": str(release), "GRPO_MODEL_DIR": str(MODELS), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "grpo_core", *prepare(root, spec, epoch=epoch)]
    done = subprocess.run(command, cwd=release, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return Run(root, done.returncode)


def prompts_of(run: Run, *, after: int) -> list[str]:
    return [row["prompt"] for row in read_rollouts(run.folder.rollouts) if row["step"] > after]


def test_a_run_resumes_across_releases(before: Path, tmp_path: Path) -> None:
    """On the engine that trained so far; the old release knows one only, which takes over from the new one.

    The questions continue. Completions are others, since each has a seed of its own now.
    """
    spec = spec_with(data={"max_rows": 16}, training={"steps": 4, "checkpoint_every": 1, "save_steps": 1})
    old = train(tmp_path / "old", spec, release=before)
    shutil.copytree(old.folder.checkpoint(2), tmp_path / "new" / "inputs" / "resume")
    new = train(tmp_path / "new", spec, epoch=2)
    assert json.loads(new.folder.report.read_text("utf-8"))["engine"] == "trl"
    assert prompts_of(new, after=2) == prompts_of(old, after=2)
    assert [line["step"] for line in new.metrics] == [1, 2, 3, 4]

    native = train(tmp_path / "native", spec)
    assert json.loads(native.folder.report.read_text("utf-8"))["engine"] == "native"
    shutil.copytree(native.folder.checkpoint(2), tmp_path / "back" / "inputs" / "resume")
    back = train(tmp_path / "back", spec, release=before, epoch=2)
    assert [line["step"] for line in back.metrics] == [1, 2, 3, 4]
