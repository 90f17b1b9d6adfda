"""The page of a job whose worker was killed: it tells of the whole job, as if nothing had happened and that it had."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from grpo_core.datasets import JsonlChecker
from grpo_core.spec import parse_spec
from jobs.service import JobService
from jobs.store import commits
from jobs.store.job import JobRecord
from tests.acceptance.conftest import OWNER, ROOT, WorkerProcess, wait_for
from tests.acceptance.test_worker import artifact, assert_whole, resumed_at, wait_until, warnings


def test_the_page_of_a_job_whose_worker_was_killed_is_that_of_the_whole_job(
    service: JobService, start_worker: Callable[..., WorkerProcess], submit: Callable[..., JobRecord]
) -> None:
    first = start_worker()
    # The first run stops by itself in the last fifth of the steps, of which completions are shown.
    job = submit(steps=48, checkpoint_every=4, fail="hang", fail_step="42", fail_epochs="1")
    wait_until(lambda: service.get(job.id, OWNER).checkpoint_step == 40)
    os.kill(first.process.pid, signal.SIGKILL)
    first.process.wait()
    start_worker()
    done = wait_for(service, job.id)
    assert done.epoch == 2
    assert resumed_at(service, job) == [40]
    page = artifact(service, done, "report.html").decode()
    assert '<h2 id="runs">' in page
    assert "run_lost: " in page

    straight = wait_for(service, submit(steps=48, checkpoint_every=4).id)
    whole = artifact(service, straight, "report.html").decode()
    assert '<h2 id="runs">' not in whole
    assert completions(page) == completions(whole)
    assert any(f"step <b>{step}</b>" in completions(page) for step in (39, 40)), "drawn by the run that was killed"

    listed = commits.listed_rollouts(service.write_once.manifest(done.manifest or "").objects)  # type: ignore[union-attr]
    steps = [step for file in listed for step in range(file.first, file.last + 1)]
    assert steps == list(range(1, 49)), "what was fetched for the page is not shipped again"
    assert_whole(service, done)


@pytest.mark.timeout(500)
def test_what_a_real_run_was_told_before_it_was_killed_is_on_its_page(
    service: JobService, start_worker: Callable[..., WorkerProcess], tmp_path: Path
) -> None:
    """The demo's job with a learning rate of nothing, which draws the same again and again: docs/why/audits.md."""
    spec = json.loads((ROOT / "examples/tiny/job.json").read_text())
    rows, checker = ROOT / "examples/tiny/train.jsonl", JsonlChecker()
    checker.feed(rows.read_bytes())
    shutil.copyfile(rows, tmp_path / "rows.jsonl")
    spec["data"]["dataset"] = service.store_dataset(tmp_path / "rows.jsonl", checker.finish(), OWNER, None)[0].id
    spec["optimizer"]["learning_rate"] = 1e-12
    spec["sampling"]["max_completion_tokens"] = 8
    spec["training"] = {"steps": 30, "checkpoint_every": 2, "save_steps": 30}
    launcher = [sys.executable, "-m", "grpo_core", "train"]
    models = str(ROOT / "examples/models")
    first = start_worker(launcher, GRPO_MODEL_DIR=models, GRPO_LEASE_SECONDS="3")
    job = service.submit(parse_spec(spec), OWNER)
    wait_until(lambda: service.get(job.id, OWNER).checkpoint_step >= 22, seconds=200)
    os.kill(first.process.pid, signal.SIGKILL)
    first.process.wait()
    start_worker(launcher, GRPO_MODEL_DIR=models)
    done = wait_for(service, job.id, seconds=200)
    assert (done.epoch, done.error) == (2, None)
    page = artifact(service, done, "report.html").decode()
    (told,) = [data for data in warnings(service, job, "duplicates") if data["steps"][1] <= 22]
    audits = page[page.index('id="audits"') : page.index('id="runs"')]
    assert audits.count("duplicates <span") == 1
    assert f"steps {told['steps'][0]} to {told['steps'][1]}" in audits
    step = told["rollouts"]["step"]
    assert audits.count(f"step <b>{step}</b>") == 3, "the completions that show it, drawn by the run that was killed"
    assert "not in this folder" not in audits
    assert "run_lost: " in page


def completions(page: str) -> str:
    """The best and the worst completions, as they are shown."""
    return page[page.index('id="best"') : page.index('id="settings"')]
