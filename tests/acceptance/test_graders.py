"""A job with rewards of its own, through the real stack: accepted, confined below the worker's isolation, learnt."""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from api.schemas import job_detail
from grpo_core import strict_json
from grpo_core.datasets import JsonlChecker
from grpo_core.rewards.graders.confined import why_not_confined
from grpo_core.spec import parse_spec
from jobs.read.rollout_query import RolloutQuery
from jobs.service import JobService
from jobs.store.job import JobStatus
from tests.acceptance.conftest import OWNER, ROOT, WorkerProcess, wait_for
from tests.acceptance.test_worker import artifact

GRADERS = ROOT / "examples" / "graders"


def example(name: str) -> dict[str, object]:
    return json.loads((GRADERS / f"{name}.json").read_text("utf-8"))["rewards"]["graders"]


def stored_rows(service: JobService, folder: Path) -> str:
    """The id of the demo's rows as an upload."""
    rows, checker = ROOT / "examples/tiny/train.jsonl", JsonlChecker()
    checker.feed(rows.read_bytes())
    shutil.copyfile(rows, folder / "rows.jsonl")
    return service.store_dataset(folder / "rows.jsonl", checker.finish(), OWNER, None)[0].id


def start_real_worker(start_worker: Callable[..., WorkerProcess]) -> None:
    start_worker(
        [sys.executable, "-m", "grpo_core", "train"],
        GRPO_MODEL_DIR=str(ROOT / "examples" / "models"),
        OMP_NUM_THREADS="1",
    )


@pytest.mark.skipif(bool(why_not_confined()), reason=why_not_confined())
@pytest.mark.timeout(900)
def test_a_job_with_graders_learns_what_they_reward(
    service: JobService, start_worker: Callable[..., WorkerProcess], tmp_path: Path
) -> None:
    spec = json.loads((ROOT / "examples/tiny/job.json").read_text("utf-8"))
    exact = {
        "type": "string_check",
        "input": "{{sample.output_text}}",
        "reference": "<answer>\n{{item.answer}}\n</answer>",
        "operation": "like",
    }
    spec["rewards"] = {
        "graders": {"exact": exact, "layout": example("format")["layout"], **example("python")},
        "weights": {"exact": 2.0, "layout": 0.5},
    }
    spec["data"]["dataset"] = stored_rows(service, tmp_path)
    spec["training"] = {"steps": 16, "save_steps": 16, "checkpoint_every": 8}
    start_real_worker(start_worker)
    record = service.submit(parse_spec(spec), OWNER)
    assert record.queue.endswith(".f2"), "an older worker must not get it"
    done = wait_for(service, record.id, seconds=600)
    assert done.status is JobStatus.SUCCEEDED, done.error
    lines = [strict_json.loads(line) for line in artifact(service, done, "metrics.jsonl").splitlines()]
    for name in ("exact", "layout", "shown_work"):
        values = [line["rewards"][name] for line in lines]
        assert statistics.fmean(values[-4:]) > statistics.fmean(values[:4]) + 0.1, name
    report = strict_json.loads(artifact(service, done, "report.json"))
    assert report["graders"]["shown_work"]["process"]["isolation"] == "landlock+seccomp"


@pytest.mark.timeout(900)
def test_a_trial_says_whether_a_job_would_learn(
    service: JobService, start_worker: Callable[..., WorkerProcess], tmp_path: Path
) -> None:
    spec = json.loads((ROOT / "examples/tiny/job.json").read_text("utf-8"))
    spec |= {"kind": "try", "trial": {"rows": 10}}
    spec["data"]["dataset"] = stored_rows(service, tmp_path)
    asked = parse_spec(spec)
    record = service.submit(asked, OWNER)
    assert record.queue.endswith(".f2"), "an older worker must not get it"
    cancelled = service.cancel(service.submit(asked, OWNER).id, OWNER)
    assert cancelled.status is JobStatus.CANCELLED
    start_real_worker(start_worker)
    done = wait_for(service, record.id, seconds=600)
    assert done.status is JobStatus.SUCCEEDED, done.error
    assert done.step == done.total_steps == asked.training.steps
    result = service.trial_result(done)
    assert result is not None
    assert job_detail(done, None, result).result is not None  # it has the form that the API promises
    assert (result["will_learn"], 0 < result["signal_share"] <= 1) == ("yes", True)
    rollouts = service.rollouts(done.id, OWNER, RolloutQuery(), limit=500).items
    assert len(rollouts) == result["completions"]
    paths = {entry.path for entry in service.artifacts(done.id, OWNER)}
    assert {"report.json", "report.html", "metrics.jsonl"} <= paths
    assert not [path for path in paths if path.startswith(("adapter/", "checkpoints/"))]


@pytest.mark.timeout(900)
def test_a_trial_that_was_paused_goes_on_and_concludes(
    service: JobService, start_worker: Callable[..., WorkerProcess], tmp_path: Path
) -> None:
    spec = json.loads((ROOT / "examples/tiny/job.json").read_text("utf-8"))
    spec |= {"kind": "try", "trial": {"rows": 160}}
    spec["data"]["dataset"] = stored_rows(service, tmp_path)
    asked = parse_spec(spec)
    waiting = service.submit(asked, OWNER)
    assert service.pause(waiting.id, OWNER).status is JobStatus.PAUSED
    service.cancel(waiting.id, OWNER)
    record = service.submit(asked, OWNER)
    start_real_worker(start_worker)
    wait_for(service, record.id, JobStatus.RUNNING, seconds=300)
    while service.get(record.id, OWNER).step == 0:
        time.sleep(0.05)
    service.pause(record.id, OWNER)
    paused = wait_for(service, record.id, JobStatus.PAUSED, seconds=120)
    assert 0 < paused.step < asked.training.steps
    assert service.trial_result(paused) is None
    service.resume(record.id, OWNER)
    done = wait_for(service, record.id, seconds=600)
    assert (done.status, done.epoch) == (JobStatus.SUCCEEDED, 2), done.error
    result = service.trial_result(done)
    assert result is not None
    assert result["prompts"] == asked.training.steps * asked.sampling.prompts_per_step
    lines = [strict_json.loads(line) for line in artifact(service, done, "metrics.jsonl").splitlines()]
    assert [line["step"] for line in lines] == list(range(1, asked.training.steps + 1))


@pytest.mark.timeout(900)
def test_a_running_trial_is_cancelled(
    service: JobService, start_worker: Callable[..., WorkerProcess], tmp_path: Path
) -> None:
    spec = json.loads((ROOT / "examples/tiny/job.json").read_text("utf-8"))
    spec |= {"kind": "try", "trial": {"rows": 500}}
    spec["data"]["dataset"] = stored_rows(service, tmp_path)
    start_real_worker(start_worker)
    record = service.submit(parse_spec(spec), OWNER)
    wait_for(service, record.id, JobStatus.RUNNING, seconds=300)
    while service.get(record.id, OWNER).step == 0:
        time.sleep(0.05)
    service.cancel(record.id, OWNER)
    done = wait_for(service, record.id, seconds=60)
    assert (done.status, service.trial_result(done)) == (JobStatus.CANCELLED, None)
