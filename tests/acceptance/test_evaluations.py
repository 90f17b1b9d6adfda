"""A job that says nothing of evaluation, through the real stack: evaluated all the same, and its best step kept."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from grpo_core import strict_json
from grpo_core.schedule import COST_SHARE
from grpo_core.spec import parse_spec
from jobs.service import JobService
from jobs.store.job import JobRecord, JobStatus
from tests.acceptance.conftest import OWNER, ROOT, WorkerProcess, wait_for
from tests.acceptance.test_graders import start_real_worker, stored_rows
from tests.acceptance.test_worker import artifact

Start = Callable[..., WorkerProcess]


def finished(service: JobService, folder: Path, steps: int, **evaluation: Any) -> JobRecord:
    spec = json.loads((ROOT / "examples/tiny/job.json").read_text("utf-8"))
    spec["data"]["dataset"] = stored_rows(service, folder)
    spec["training"] = {"steps": steps, "save_steps": 1000, "checkpoint_every": 1000}
    spec.pop("evaluation", None)
    if evaluation:
        spec["evaluation"] = evaluation
    record = service.submit(parse_spec(spec), OWNER)
    done = wait_for(service, record.id, seconds=600)
    assert done.status is JobStatus.SUCCEEDED, done.error
    return done


def curve_of(service: JobService, job: JobRecord) -> list[dict[str, Any]]:
    return [strict_json.loads(line) for line in artifact(service, job, "evaluations.jsonl").splitlines()]


@pytest.mark.timeout(900)
def test_a_job_without_any_setting_ends_with_a_before_and_after(
    service: JobService, start_worker: Start, tmp_path: Path
) -> None:
    start_real_worker(start_worker)
    job = finished(service, tmp_path, 40)
    assert (job.spec["evaluation"]["questions"], job.spec_format) == (128, 1)
    report = json.loads(artifact(service, job, "report.json"))["evaluation"]
    assert report["questions"] + report["dropped"] == 128
    assert report["paired"]["strict"]["verdict"]
    points = curve_of(service, job)
    assert (points[0]["step"], points[-1]["step"]) == (0, 40)
    assert job.best_step == report["best_step"] in {point["step"] for point in points[1:]}

    # Each one during training was within the share by what was known then; what it took, a busy machine decides too.
    lines = [strict_json.loads(line) for line in artifact(service, job, "metrics.jsonl").splitlines()]
    seconds = {line["step"]: line["seconds"]["total"] for line in lines}
    spent, expected = 2 * report["before"]["seconds"], points[0]["seconds"]
    for point in points[1:-1]:
        mean = statistics.fmean(seconds[step] for step in range(2, point["step"] + 1))
        assert spent + expected <= 1.01 * COST_SHARE * 40 * mean, point["step"]
        spent, expected = spent + point["seconds"], point["seconds"]


@pytest.mark.timeout(900)
def test_the_best_and_the_last_adapter_are_in_the_manifest_and_an_early_end_says_why(
    service: JobService, start_worker: Start, tmp_path: Path
) -> None:
    start_real_worker(start_worker)
    asked: dict[str, Any] = {"questions": 40, "sample": 20, "every": 2, "metric": "xml_count"}
    asked |= {"max_completion_tokens": 48, "stop_when": {"no_better_for": 2}}
    job = finished(service, tmp_path, 30, **asked)
    points = curve_of(service, job)
    last = points[-1]["step"]
    assert job.best_step is not None
    assert job.step == last
    manifest = service.write_once.manifest(job.manifest or "")
    assert manifest is not None
    assert manifest.best_step == job.best_step
    paths = {entry.path for entry in manifest.objects}
    assert {f"checkpoints/step-{job.best_step:06d}/adapter_model.safetensors", "adapter/adapter_config.json"} <= paths
    if last < 30:
        assert job.stopped is not None
        assert f"Training ended after step {last}" in job.stopped
        assert last == job.best_step + 4
    rows = {row["step"]: row for row in service.metrics(job.id, OWNER)}
    for point in points[1:]:
        assert rows[point["step"]]["eval_metric"] == point["value"]
    assert "Held-out questions" in artifact(service, job, "report.html").decode()
