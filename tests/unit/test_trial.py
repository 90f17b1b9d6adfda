"""A trial: what it resolves to, who may take it, and what is concluded from its metrics."""

from __future__ import annotations

from typing import Any

import pytest
from litestar import Litestar
from litestar.testing import TestClient

from grpo_core.estimates import warnings
from grpo_core.spec import SPEC_FORMAT, SpecError, parse_spec
from grpo_core.training.trial import conclude, without_learning
from jobs.store.job import JobStatus
from jobs.store.queues import queue_for
from tests.unit.fakes import FakeJobService, make_record

SPEC: dict[str, Any] = {
    "kind": "try",
    "trial": {"rows": 10},
    "sampling": {"prompts_per_step": 4, "generations": 2},
    "training": {"steps": 900, "report_to": ["wandb"]},
    "evaluation": {"questions": 50, "metric": "correctness"},
    "loss": {"iterations": 3},
}


def line(**changes: Any) -> dict[str, Any]:
    """A step's metrics."""
    return {
        "zero_variance_share": 0.5,
        "reward": 1.0,
        "reward_std": 0.3,
        "rewards": {"correctness": 1.0, "strict_format": 0.1, "soft_format": 0.2},
        "completion_tokens_mean": 30.0,
        "completion_tokens_max": 60,
        "truncated_share": 0.1,
        "duplicate_share": 0.0,
        "unscored_share": None,
        "seconds": {"total": 2.0},
        **changes,
    }


def test_a_trial_draws_each_question_once_and_does_nothing_else() -> None:
    spec = parse_spec(SPEC)
    assert spec.training.steps == 3
    assert spec.training.report_to == ()
    assert spec.evaluation.questions == 0
    assert spec.loss.iterations == 1
    assert spec.guards.no_signal_steps == 0
    assert parse_spec(spec.as_dict()) == spec  # as a worker reads it
    assert spec.requested["training"]["steps"] == 900
    assert without_learning(spec).optimizer.learning_rate == 0.0
    assert not [one for one in warnings(spec) if one.pointer.startswith("/training")]


def test_older_workers_are_not_given_a_trial() -> None:
    assert queue_for(parse_spec({"kind": "try"})).endswith(f".f{SPEC_FORMAT}")
    assert queue_for(parse_spec({})) == queue_for(parse_spec({"kind": "training"})) == "grpo.gpu1"
    assert "kind" not in parse_spec({"kind": "training"}).as_dict()
    assert without_learning(parse_spec({})) == parse_spec({})


@pytest.mark.parametrize(
    ("spec", "pointer"),
    [
        ({"trial": {"rows": 7}}, "/trial/rows"),
        ({"kind": "try", "trial": {"rows": 0}}, "/trial/rows"),
        ({"kind": "try", "trial": []}, "/trial"),
        ({"kind": "try", "sampling": {"prompts_per_step": "4"}}, "/sampling/prompts_per_step"),
        ({"kind": "try", "training": 3}, "/training"),
        ({"kind": "test"}, "/kind"),
    ],
)
def test_what_is_wrong_with_a_trial_is_named(spec: dict[str, Any], pointer: str) -> None:
    with pytest.raises(SpecError) as refused:
        parse_spec(spec)
    assert pointer in [problem.pointer for problem in refused.value.problems]


def test_rewards_that_differ_within_groups_teach() -> None:
    slow_start = line(seconds={"total": 60.0})
    found = conclude(parse_spec(SPEC), [slow_start, line(), line(seconds={"total": 3.0})])
    assert (found["will_learn"], found["prompts"], found["completions"]) == ("yes", 12, 24)
    assert found["sentence"].startswith("Yes: completions of 6 of 12 questions")
    assert found["signal_share"] == 0.5
    assert found["format_share"] == pytest.approx(0.4)
    assert found["step_seconds"] == 2.5  # without the first, which warms up
    assert found["unscored_share"] is None


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        ({"truncated_share": 0.9}, "sampling.max_completion_tokens"),
        ({"duplicate_share": 0.8}, "sampling.temperature"),
        ({"unscored_share": 0.5}, "Graders failed to score 50%"),
        ({"rewards": {"strict_format": 0.0, "soft_format": 0.0}}, "data.examples"),
        ({}, "harder questions"),
    ],
)
def test_without_any_signal_the_reason_is_named(changes: dict[str, Any], advice: str) -> None:
    found = conclude(parse_spec(SPEC), [line(zero_variance_share=1.0, **changes)] * 3)
    assert (found["will_learn"], found["signal_share"]) == ("no", 0.0)
    assert found["sentence"].startswith("No: for each of 12 questions")
    assert advice in found["sentence"]


def test_little_signal_is_little() -> None:
    steps = [line(zero_variance_share=1.0), line(zero_variance_share=0.75), line(zero_variance_share=1.0)]
    found = conclude(parse_spec(SPEC), steps)
    assert found["will_learn"] == "slowly"
    assert "only 1 of 12 questions" in found["sentence"]


def test_a_format_that_no_reward_asks_for_is_not_reported() -> None:
    graders = {"short": {"type": "length", "maximum": 9}}
    assert conclude(parse_spec({**SPEC, "rewards": {"graders": graders}}), [line()])["format_share"] is None


def test_the_result_is_shown_with_the_job(client: TestClient[Litestar], service: FakeJobService) -> None:
    spec = parse_spec(SPEC)
    record = service.put(make_record(spec=spec, status=JobStatus.SUCCEEDED))
    assert client.get(f"/jobs/{record.id}").json()["result"] is None
    found = conclude(spec, [line()] * 3)
    service.add_event(record.id, "log", code="trial", message=found["sentence"], result=found)
    assert client.get(f"/jobs/{record.id}").json()["result"] == found


def test_a_result_in_another_form_is_left_out(client: TestClient[Litestar], service: FakeJobService) -> None:
    """A training process runs code of jobs, so what it wrote may be anything."""
    record = service.put(make_record(spec=parse_spec(SPEC), status=JobStatus.SUCCEEDED))
    service.add_event(record.id, "log", code="trial", message="x", result={"sentence": 7})
    answer = client.get(f"/jobs/{record.id}")
    assert (answer.status_code, answer.json()["result"]) == (200, None)
