"""Jobs over two hosts: a Ray cluster of this machine and a network namespace, hurt in every way while jobs run.

The worker, its lease and the bucket are real, and so are launcher, driver and Ray; in all tests but the last the ranks
are `tests/gang_trainer.py`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from grpo_core import processes
from grpo_core.ranks import ADDRESS
from grpo_core.spec import parse_spec
from jobs.service import JobService
from jobs.store.job import JobRecord, JobStatus
from jobs.worker.gang_host import SILENT_SECONDS
from tests.acceptance.conftest import OWNER, ROOT, WorkerProcess, wait_for
from tests.acceptance.test_worker import (
    adapter,
    artifact,
    assert_whole,
    resumed_at,
    wait_for_step,
    wait_until,
    warnings,
)
from tests.clock import patience
from tests.conftest import pick_port
from tests.integration.children import MODELS, ROWS, is_running, spec_with
from tests.integration.test_service import upload
from tests.ray_cluster import RayCluster, unavailable

Start = Callable[..., WorkerProcess]
LAUNCHER = [sys.executable, str(ROOT / "tests" / "gang_trainer.py")]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    if why := unavailable():
        pytest.skip(why)
    folder = tmp_path_factory.mktemp("ray")
    environment = {"GRPO_LAUNCHER": " ".join(LAUNCHER), "GRPO_MODEL_DIR": str(MODELS), "OMP_NUM_THREADS": "1"}
    cluster = RayCluster(folder, pick_port(), **environment)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture
def start(start_worker: Start, cluster: RayCluster) -> Start:
    variables = {**cluster.variables, "GRPO_MODEL_DIR": str(MODELS), "GRPO_RAY_WAIT_SECONDS": "2"}
    return lambda: start_worker(LAUNCHER, **variables)


def submit(
    service: JobService, *, hosts: int = 2, min_hosts: int | None = None, steps: int = 40, **how: str
) -> JobRecord:
    spec = {
        "resources": {"gpus": 0, "hosts": hosts, "min_hosts": min_hosts},
        "optimizer": {"name": "adamw_torch"},
        "training": {"steps": steps, "checkpoint_every": 4},
        "metadata": {"step_seconds": "0.1", **how},
    }
    return service.submit(parse_spec(spec), OWNER)


def ranks(cluster: RayCluster) -> dict[int, int]:
    """The processes of the ranks that this cluster runs, by their number; other tests run some beside it."""
    places = tuple(f"tcp://{address}:" for address in cluster.addresses)
    found: dict[int, int] = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            variables = dict(
                part.split("=", 1) for part in (process / "environ").read_text().split("\0") if "=" in part
            )
        except (OSError, UnicodeDecodeError):
            continue
        if "GRPO_RANK_PULSE" in variables and variables[ADDRESS].startswith(places):
            found[int(variables["RANK"])] = int(process.name)
    return found


@pytest.mark.core
def test_a_job_of_two_hosts_succeeds(service: JobService, start: Start, cluster: RayCluster) -> None:
    start()
    job = submit(service, steps=3, step_seconds="0.01")
    done = wait_for(service, job.id)
    assert (done.status, done.epoch, done.step) == (JobStatus.SUCCEEDED, 1, 3), done.error
    assert job.queue.removesuffix(".f2").endswith(".cpu.hosts")
    assert_whole(service, done)
    wait_until(lambda: not list(cluster.work.glob("job-*")), seconds=10)


def test_a_rank_that_is_killed_on_the_other_host_costs_an_attempt_and_no_step(
    service: JobService, start: Start, cluster: RayCluster
) -> None:
    start()
    job = submit(service)
    wait_for_step(service, job, 6)
    os.kill(ranks(cluster)[1], signal.SIGKILL)
    done = wait_for(service, job.id)
    assert (done.status, done.epoch) == (JobStatus.SUCCEEDED, 2)
    assert_whole(service, done)
    (lost,) = warnings(service, job, "run_lost")
    assert lost["cause"] == "rank_lost"
    assert f"host {cluster.addresses[1]}" in lost["message"] or "killed by signal 9" in lost["message"], lost


def test_the_failure_of_a_rank_on_the_other_host_is_told_as_what_it_is(
    service: JobService, start: Start, cluster: RayCluster
) -> None:
    start()
    job = submit(service, steps=6, other_fails="13", other_step="3")
    done = wait_for(service, job.id)
    assert (done.status, done.epoch, done.attempts, done.accumulation) == (JobStatus.SUCCEEDED, 2, 0, 2)
    (told,) = warnings(service, job, "micro_batch_lowered")
    assert told["message"].startswith(f"On host {cluster.addresses[1]}: Too little memory.")
    assert "the last words of a rank" in artifact(service, done, "stderr-e1.log").decode()


def test_a_killed_driver_or_worker_leaves_no_rank_behind(
    service: JobService, start: Start, cluster: RayCluster
) -> None:
    first = start()
    job = submit(service, steps=60)
    wait_for_step(service, job, 5)
    os.kill(driver_of(first), signal.SIGKILL)
    wait_until(lambda: service.get(job.id, OWNER).epoch == 2)
    wait_for_step(service, job, 12)
    os.kill(first.process.pid, signal.SIGKILL)
    wait_until(lambda: not ranks(cluster), seconds=10)
    start()
    done = wait_for(service, job.id)
    assert (done.status, done.epoch) == (JobStatus.SUCCEEDED, 3)
    assert_whole(service, done)


def test_a_job_waits_for_a_full_cluster_and_says_so(service: JobService, start: Start) -> None:
    start()
    first = submit(service, steps=10_000)
    wait_for_step(service, first, 2)
    start()
    second, larger = submit(service, steps=2), submit(service, steps=2, hosts=3)
    wait_until(lambda: why(service, second) == "hosts" and why(service, larger) == "few_hosts")
    waiting = service.waiting(service.get(second.id, OWNER))
    assert waiting is not None
    assert (waiting.hosts, waiting.hosts_found, service.get(second.id, OWNER).epoch) == (2, 2, 0)
    began = time.monotonic()
    service.cancel(first.id, OWNER)
    assert wait_for(service, first.id).status is JobStatus.CANCELLED
    assert time.monotonic() - began < patience(5)
    assert wait_for(service, second.id).status is JobStatus.SUCCEEDED
    service.cancel(larger.id, OWNER)


def test_a_pause_and_a_stop_save_the_step_that_all_have_reached(
    service: JobService, start: Start, cluster: RayCluster
) -> None:
    first = start()
    job = submit(service, steps=40)
    wait_for_step(service, job, 5)
    began = time.monotonic()
    service.pause(job.id, OWNER)
    paused = wait_for(service, job.id, JobStatus.PAUSED)
    assert time.monotonic() - began < patience(8)
    assert paused.checkpoint_step == paused.step
    assert not ranks(cluster)
    service.resume(job.id, OWNER)
    wait_until(lambda: service.get(job.id, OWNER).step > paused.step + 2)
    assert first.stop() == 0
    stopped = service.get(job.id, OWNER)
    assert (stopped.status, stopped.attempts) == (JobStatus.QUEUED, 0)
    start()
    done = wait_for(service, job.id)
    assert done.status is JobStatus.SUCCEEDED
    assert resumed_at(service, job) == [paused.step, stopped.step]
    assert_whole(service, done)


def test_a_cut_cable_ends_the_run_on_both_sides(service: JobService, start: Start, cluster: RayCluster) -> None:
    start()
    job = submit(service, steps=40)
    wait_for_step(service, job, 6)
    there = ranks(cluster)[1]
    cluster.cut()
    began = time.monotonic()
    try:
        wait_until(lambda: service.get(job.id, OWNER).status is JobStatus.QUEUED, seconds=20)
        noticed = time.monotonic() - began
        wait_until(lambda: not is_running(there), seconds=SILENT_SECONDS + 10)
        print(f"noticed after {noticed:.1f} s, the other side ended after {time.monotonic() - began:.1f} s")
    finally:
        cluster.mend()
        cluster.kill_second()
        cluster.start_second()
    done = wait_for(service, job.id)
    assert (done.status, done.epoch) == (JobStatus.SUCCEEDED, 2)
    assert_whole(service, done)


def test_a_job_goes_on_with_fewer_hosts_after_one_was_lost(
    service: JobService, start: Start, cluster: RayCluster
) -> None:
    start()
    job = submit(service, min_hosts=1)
    wait_for_step(service, job, 6)
    cluster.kill_second()
    try:
        done = wait_for(service, job.id)
        assert (done.status, done.epoch) == (JobStatus.SUCCEEDED, 2)
        assert_whole(service, done)
    finally:
        cluster.start_second()


def test_a_real_run_on_two_hosts_resumes_to_the_byte(
    service: JobService, start: Start, cluster: RayCluster, tmp_path: Path
) -> None:
    """With torch over gloo between the hosts; one job is undisturbed, of the other a rank is killed."""
    start()
    dataset = upload(service, tmp_path, OWNER, ROWS.read_bytes())
    spec = spec_with(
        data={"source": "upload", "dataset": dataset.id},
        training={"steps": 5, "checkpoint_every": 1, "save_steps": 5},
        sampling={"gradient_accumulation": 1, "max_completion_tokens": 24},
        resources={"hosts": 2},
    ) | {"engine": "native", "metadata": {"real": "1"}}
    jobs = [service.submit(parse_spec(spec), OWNER) for _ in range(2)]
    straight = wait_for(service, jobs[0].id, seconds=200)
    assert (straight.status, straight.epoch) == (JobStatus.SUCCEEDED, 1), straight.error
    assert json.loads(artifact(service, straight, "report.json"))["ranks"] == 2
    wait_until(lambda: service.get(jobs[1].id, OWNER).checkpoint_step >= 2, seconds=100)
    os.kill(ranks(cluster)[1], signal.SIGKILL)
    resumed = wait_for(service, jobs[1].id, seconds=200)
    assert (resumed.status, resumed.epoch) == (JobStatus.SUCCEEDED, 2), resumed.error
    assert adapter(service, resumed) == adapter(service, straight)


def driver_of(worker: WorkerProcess) -> int:
    (driver,) = [
        pid
        for pid in processes.children(worker.process.pid)
        if "gang_driver" in Path(f"/proc/{pid}/cmdline").read_text()
    ]
    return driver


def why(service: JobService, job: JobRecord) -> str | None:
    waiting = service.waiting(service.get(job.id, OWNER))
    return waiting and waiting.reason.value
