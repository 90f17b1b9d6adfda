"""Training metrics as CSV: columns that do not move, values that come back, and a choice by header or by query."""

from __future__ import annotations

import csv
import io
from typing import Any

import pytest
from litestar import Litestar
from litestar.testing import TestClient

from api.metric_table import columns, to_csv
from grpo_core.spec import JobSpec
from tests.unit.fakes import FakeJobService, make_record

NAMES = list(JobSpec().as_dict()["rewards"]["weights"])


def metrics(step: int, **values: Any) -> dict[str, Any]:
    return {
        "step": step,
        "epoch": 1,
        "reward": 0.1 + step,
        "rewards": {name: number / 4 for number, name in enumerate(NAMES)},
        "seconds": {"generation": 1.5, "reward": 0.1, "update": 0.4, "total": 2.0},
        "kl": None,
        "gpu_memory_gb": None,
        **values,
    }


def read(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text, newline="")))


def test_a_line_a_step_with_every_number_as_it_was() -> None:
    steps = [metrics(step) for step in range(1, 502)]
    parts = list(to_csv(steps, NAMES))
    assert len(parts) == 3, "long tables go out in parts"
    rows = read("".join(parts))
    assert [int(row["step"]) for row in rows] == list(range(1, 502))
    assert [float(row["reward"]) for row in rows] == [step["reward"] for step in steps]
    assert float(rows[0][f"rewards.{NAMES[3]}"]) == 0.75
    assert (rows[0]["kl"], rows[0]["seconds.update"]) == ("", "0.4")


def test_columns_do_not_depend_on_what_there_is() -> None:
    empty = next(iter(to_csv([], NAMES)))
    assert empty == ",".join(columns(NAMES)) + "\r\n"
    assert empty.startswith("step,epoch,reward,reward_std,rewards.")
    assert next(iter(to_csv([metrics(1, extra=1)], NAMES))).startswith(empty)


def test_an_older_step_without_a_newer_number_leaves_it_empty() -> None:
    row = read("".join(to_csv([metrics(1)], NAMES)))[0]
    assert row[f"rewards_std.{NAMES[0]}"] == ""


@pytest.fixture
def path(service: FakeJobService) -> str:
    job = make_record()
    service.put(job)
    values = {name: value for name, value in metrics(1).items() if name != "step"}
    service.add_event(job.id, "metric", step=1, **values)
    return f"/jobs/{job.id}/metrics"


@pytest.mark.parametrize(
    ("query", "accept", "is_csv"),
    [
        ("", "*/*", False),
        ("", "application/json", False),
        ("", "text/csv", True),
        ("", "text/csv, application/json;q=0.5", True),
        ("?format=csv", "application/json", True),
        ("?format=json", "text/csv", False),
    ],
)
def test_json_or_csv(client: TestClient[Litestar], path: str, query: str, accept: str, is_csv: bool) -> None:
    answer = client.get(path + query, headers={"Accept": accept})
    assert answer.status_code == 200
    assert "Accept" in answer.headers["vary"].split(", ")
    if is_csv:
        assert answer.headers["content-type"] == "text/csv; charset=utf-8"
        assert "-metrics.csv" in answer.headers["content-disposition"]
        assert [row["reward"] for row in read(answer.text)] == ["1.1"]
    else:
        assert [step["reward"] for step in answer.json()["data"]] == [1.1]


def test_csv_of_no_job_is_a_problem_and_another_format_is_refused(client: TestClient[Litestar], path: str) -> None:
    missing = client.get(f"/jobs/job-{'0' * 26}/metrics?format=csv")
    assert (missing.status_code, missing.headers["content-type"]) == (404, "application/problem+json")
    refused = client.get(f"{path}?format=xml")
    assert refused.status_code == 400
    assert refused.json()["errors"][0]["remedy"] == "Give one of json, csv."
