"""Which evaluation a job gets that says nothing of it, and what evaluations are estimated to cost."""

from __future__ import annotations

from typing import Any

import pytest

from grpo_core.estimates import estimate
from grpo_core.schedule import COST_SHARE, automatic_questions, with_evaluation
from grpo_core.spec import JobSpec, parse_spec

UPLOAD = {"source": "upload", "dataset": "ds-01ARZ3NDEKTSV4RRFFQ69G5FAV"}


def resolved(rows: int | None = None, **sections: Any) -> JobSpec:
    return with_evaluation(parse_spec(sections), rows)


@pytest.mark.parametrize(
    ("data", "rows", "questions", "automatic"),
    [
        ({}, None, 128, False),
        ({"max_rows": 50}, None, 128, False),
        ({"dataset": "someone/set"}, None, 128, True),
        ({"split": "test"}, None, 128, True),
        (UPLOAD, 5000, 128, False),
        (UPLOAD, 400, 40, False),
        (UPLOAD, 99, 0, False),
        ({**UPLOAD, "max_rows": 200}, 5000, 20, False),
        ({"source": "s3", "dataset": "s3://bucket/rows.jsonl"}, None, 128, True),
        ({"source": "s3", "dataset": "s3://bucket/rows.jsonl", "max_rows": 200}, None, 20, True),
    ],
)
def test_a_job_without_any_setting_gets_held_out_questions(
    data: dict[str, Any], rows: int | None, questions: int, automatic: bool
) -> None:
    spec = resolved(rows, data=data)
    assert (spec.evaluation.questions, spec.evaluation.automatic) == (questions, automatic)
    assert spec.needed_format() == (2 if automatic else 1)
    assert spec.requested == {"data": data}
    assert parse_spec(spec.as_dict()).digest() == spec.digest()
    assert with_evaluation(parse_spec(spec.as_dict()), rows).digest() == spec.digest()


@pytest.mark.parametrize(
    "sections",
    [
        {"evaluation": {"questions": 0}},
        {"evaluation": {"questions": 5}},
        {"kind": "try"},
        {"rewards": {"graders": {"judge": {"type": "endpoint", "url": "https://graders.example.com/"}}}},
        {"data": UPLOAD, "sampling": {"prompts_per_step": 95}},
    ],
)
def test_a_job_that_says_so_or_could_not_or_would_pay_for_it_does_not(sections: dict[str, Any]) -> None:
    spec = parse_spec(sections)
    assert with_evaluation(spec, 100).digest() == spec.digest()


def test_other_settings_of_the_evaluation_are_kept() -> None:
    spec = resolved(evaluation={"max_completion_tokens": 300, "metric": "correctness"})
    assert (spec.evaluation.max_completion_tokens, spec.evaluation.metric) == (300, "correctness")
    assert resolved().evaluation.max_completion_tokens == 400
    assert resolved(model={"max_sequence": 500}).evaluation.max_completion_tokens == 500 - 256


@pytest.mark.parametrize("engine", ["auto", "native"])
@pytest.mark.parametrize("sampling", [{}, {"prompts_per_step": 32, "generations": 8}])
def test_the_defaults_cost_at_most_five_percent_and_the_dry_run_says_it(engine: str, sampling: dict[str, Any]) -> None:
    size = estimate(resolved(engine=engine, sampling=sampling))
    assert size.evaluation_share is not None
    assert size.evaluations is not None
    assert 0 < size.evaluation_share <= COST_SHARE
    assert size.evaluations >= 1


def test_what_evaluations_on_request_cost_is_said_too() -> None:
    dear = estimate(parse_spec({"evaluation": {"questions": 1000, "every": 5, "sample": 500}}))
    assert dear.evaluations == 49
    assert dear.evaluation_share is not None
    assert dear.evaluation_share > COST_SHARE
    cpu = {"resources": {"gpus": 0}, "optimizer": {"name": "adamw_torch"}}
    unknown = estimate(parse_spec({**cpu, "evaluation": {"questions": 100}}))
    assert (unknown.evaluations, unknown.evaluation_seconds, unknown.evaluation_share) == (None, None, None)


def test_a_tenth_of_the_rows_and_not_too_few() -> None:
    assert [automatic_questions(rows) for rows in (99, 100, 1279, 1280, 10**6)] == [0, 10, 127, 128, 128]
