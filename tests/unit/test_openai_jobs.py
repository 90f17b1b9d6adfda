"""The mapping between OpenAI's fine-tuning jobs and job specs: every field is carried over, noted or refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_client import openai_jobs
from grpo_client.openai_jobs import (
    HYPERPARAMETERS,
    TABLE,
    CannotMap,
    differences,
    from_spec,
    grader_key,
    is_openais_model,
    to_spec,
    with_named_members,
)
from grpo_core import schedule
from grpo_core.spec import JobSpec, parse_spec
from grpo_core.spec.sections import RewardWeights

FILE, OTHER = "ds-01JDZ5T1E4Q8Y7M2N3P4R5S6T7", "ds-01JDZ5T1E4Q8Y7M2N3P4R5S6T8"
JOB = "job-01JDZ5T1E4Q8Y7M2N3P4R5S6T7"
EXACT = {
    "type": "string_check",
    "name": "exact",
    "input": "{{sample.output_text}}",
    "reference": "{{item.answer}}",
    "operation": "eq",
}
MULTI = {
    "type": "multi",
    "name": "All of it",
    "graders": {
        "exact": EXACT,
        "judge": {
            "type": "score_model",
            "name": "judge",
            "model": "judge-1",
            "input": [{"role": "user", "content": "Rate {{sample.output_text}}", "type": "message"}],
            "range": [0, 10],
            "sampling_params": {"max_completions_tokens": 64, "temperature": 0},
        },
        "similar": {
            "type": "text_similarity",
            "name": "similar",
            "input": "{{sample.output_text}}",
            "reference": "{{item.answer}}",
            "evaluation_metric": "rouge_l",
            "pass_threshold": 0.5,
        },
        "py": {"type": "python", "name": "py", "source": "def grade(sample, item):\n    return 1.0"},
        "remote": {"type": "endpoint", "name": "remote", "url": "https://x.example/grade", "rate_limit": 50},
    },
    "calculate_output": "0.5*exact + 0.5*judge/10",
}
FORMAT = {
    "type": "json_schema",
    "json_schema": {"name": "answer", "strict": True, "schema": {"type": "object", "properties": {}}},
}
FULL: dict[str, Any] = {
    "model": "Qwen/Qwen2.5-7B-Instruct",
    "training_file": FILE,
    "validation_file": OTHER,
    "suffix": "math",
    "seed": 11,
    "metadata": {"team": "a"},
    "method": {
        "type": "reinforcement",
        "reinforcement": {
            "grader": MULTI,
            "response_format": FORMAT,
            "hyperparameters": {
                "batch_size": 4,
                "compute_multiplier": 2,
                "eval_interval": 5,
                "learning_rate_multiplier": 1.5,
                "n_epochs": 3,
            },
        },
    },
}


def changed(path: str, value: Any, job: dict[str, Any] = FULL) -> dict[str, Any]:
    """A job with a field changed; `...` takes it out."""
    result = copy.deepcopy(job)
    *names, last = path.split(".")
    section = result
    for name in names:
        section = section.setdefault(name, {})
    section[last] = value
    if value is ...:
        del section[last]
    return result


def refused(job: Any, **how: Any) -> dict[str, str]:
    """The refused fields with their codes."""
    with pytest.raises(CannotMap) as error:
        to_spec(job, **how)
    return {one.param: one.code for one in error.value.refusals}


def test_a_whole_job_becomes_a_spec_that_says_the_same() -> None:
    spec = to_spec(FULL, rows=100, validation_rows=40).spec
    assert spec == {
        "name": "math",
        "metadata": {"team": "a"},
        "model": {"name": "Qwen/Qwen2.5-7B-Instruct"},
        "data": {"source": "upload", "dataset": FILE, "format": "messages"},
        "evaluation": {"dataset": OTHER, "questions": 40, "every": 5},
        "training": {"seed": 11, "steps": 75},
        "lora": {"seed": 11},
        "sampling": {"prompts_per_step": 4, "generations": 12, "response_format": FORMAT},
        "optimizer": {"learning_rate": 5e-6 * 1.5},
        "rewards": {"graders": {"all_of_it": MULTI}},
    }
    resolved = parse_spec(spec)
    assert resolved.data.system_prompt == ""
    assert resolved.data.question_column == "messages"
    assert resolved.as_dict()["rewards"]["graders"]["all_of_it"] == MULTI


@pytest.mark.parametrize("rows", [(100, 40), (10, 2000), (None, None)])
def test_a_round_trip_is_equal_as_json(rows: tuple[int | None, int | None]) -> None:
    known = {"rows": rows[0], "validation_rows": rows[1]}
    spec = json.loads(json.dumps(to_spec(FULL, **known).spec))
    back = from_spec(spec, **known)
    assert differences(FULL, back) == ([] if rows[0] else [f"{HYPERPARAMETERS}.n_epochs"])
    if rows[0]:
        assert back == FULL
        assert to_spec(back, **known).spec == spec


@pytest.mark.parametrize("grader", [EXACT, MULTI, *MULTI["graders"].values()], ids=lambda one: one["name"])
def test_each_grader_comes_back_unchanged(grader: Any) -> None:
    job = changed("method.reinforcement.grader", grader)
    assert from_spec(to_spec(job, rows=9, validation_rows=9).spec, rows=9, validation_rows=9) == job


@given(
    st.integers(1, 1024),
    st.integers(1, 20),
    st.integers(1, 5000),
    st.integers(1, 4000).map(lambda n: n / 100),
    st.integers(2, 256),
)
@settings(max_examples=100, deadline=None)
def test_numbers_survive_the_round_trip(batch: int, epochs: int, rows: int, rate: float, completions: int) -> None:
    job = changed(HYPERPARAMETERS, {"batch_size": batch, "n_epochs": epochs, "learning_rate_multiplier": rate})
    back = from_spec(to_spec(job, rows=rows, validation_rows=9).spec, rows=rows, validation_rows=9)
    found = back["method"]["reinforcement"]["hyperparameters"]
    assert (found["batch_size"], found["learning_rate_multiplier"]) == (batch, rate)
    if batch <= rows:
        assert found["n_epochs"] == epochs
    sampling = {**MINIMAL, "model": {"name": "tiny"}, "sampling": {"generations": completions}}
    again = to_spec(from_spec(sampling)).spec
    assert again["sampling"]["generations"] == completions


MINIMAL = {
    "data": {"source": "upload", "dataset": FILE, "format": "messages"},
    "rewards": {"graders": {"exact": EXACT}},
}


def test_a_compute_multiplier_between_two_counts_is_told_of() -> None:
    job = changed(HYPERPARAMETERS, {"compute_multiplier": 1.1})
    mapped = to_spec(job)
    assert mapped.spec["sampling"]["generations"] == 7
    assert [note.code for note in mapped.notes] == ["interpreted"]
    assert differences(job, from_spec(mapped.spec)) == [f"{HYPERPARAMETERS}.compute_multiplier"]


def test_auto_and_null_leave_the_choice_to_the_service() -> None:
    names = [row.param.rpartition(".")[2] for row in TABLE if row.param.startswith(HYPERPARAMETERS)]
    for value in ("auto", None):
        given_ = {name: value for name in names if name != "reasoning_effort"}
        job = changed(HYPERPARAMETERS, given_, changed("validation_file", None))
        mapped = to_spec(job)
        assert not mapped.notes
        assert set(mapped.spec) == {"name", "metadata", "model", "data", "training", "lora", "sampling", "rewards"}
        assert differences(job, from_spec(mapped.spec)) == []


def test_what_a_spec_has_beyond_openais_fields_is_in_grpo() -> None:
    spec = {**MINIMAL, "lora": {"rank": 16, "seed": 3}, "training": {"seed": 3, "steps": 7}, "engine": "native"}
    job = from_spec({**spec, "model": {"name": "tiny"}}, rows=100)
    assert job["grpo"] == {"lora": {"rank": 16}, "training": {"steps": 7}, "engine": "native"}
    assert to_spec(job, rows=100).spec == {**spec, "model": {"name": "tiny"}}


@pytest.mark.parametrize(
    "rewards",
    [
        {"weights": {"correctness": 2.0}},
        {"graders": {"exact": EXACT, "other": EXACT}, "weights": {"exact": 2.0}},
        {"graders": {"exact": EXACT}, "formula": "exact * 2"},
        {"graders": {"exact": EXACT}, "weights": {"exact": 1.0, "integer": 0.5}},
    ],
)
def test_rewards_that_are_no_single_grader_are_in_grpo_as_a_whole(rewards: Any) -> None:
    spec = {**MINIMAL, "model": {"name": "tiny"}, "rewards": rewards}
    job = from_spec(spec)
    assert job["grpo"] == {"rewards": rewards}
    assert to_spec(job).spec == spec


def test_a_job_that_was_read_from_openai_is_one_that_was_asked_for() -> None:
    read = {
        **FULL,
        "object": "fine_tuning.job",
        "id": "ftjob-abc",
        "created_at": 1,
        "error": None,
        "fine_tuned_model": "ft:o4-mini:org::x",
        "finished_at": 2,
        "hyperparameters": {},
        "organization_id": "org-1",
        "result_files": [],
        "status": "succeeded",
        "trained_tokens": 5,
        "estimated_finish": None,
        "integrations": [],
        "user_provided_suffix": "math",
    }
    del read["suffix"]
    assert to_spec(read, rows=8).spec == to_spec(FULL, rows=8).spec
    assert refused({**read, "object": "something"})["id"] == "unknown_parameter"
    assert differences(read, from_spec(to_spec(read, rows=8, validation_rows=9).spec, rows=8, validation_rows=9)) == []


def test_a_model_of_a_job_is_where_training_starts() -> None:
    for name in (f"{JOB}:step-50", f"ft:{JOB}:step-50", f"ft:qwen:me:{JOB}:ckpt-step-50"):
        assert to_spec(changed("model", name)).spec["from_checkpoint"] == {"job": JOB, "step": 50}
    assert to_spec(changed("model", JOB)).spec["from_checkpoint"] == {"job": JOB}
    assert from_spec({**MINIMAL, "from_checkpoint": {"job": JOB, "step": 50}})["model"] == f"{JOB}:step-50"


def test_openais_models_are_told_from_others() -> None:
    for name in ("o4-mini-2025-04-16", "gpt-4.1", "gpt-4o-mini", "babbage-002", "o1", "ft:gpt-4o:org::abc", "GPT-4"):
        assert is_openais_model(name)
    for name in ("gpt2", "openai/gpt-oss-20b", "Qwen/Qwen2.5-7B-Instruct", JOB, f"ft:{JOB}", "tiny-arithmetic", "olmo"):
        assert not is_openais_model(name)


@pytest.mark.parametrize("graders", [[EXACT, EXACT], EXACT, [{**EXACT, "name": None}]])
def test_members_that_typed_clients_send_get_names(graders: Any) -> None:
    named = with_named_members({**MULTI, "graders": graders})["graders"]
    assert list(named.values()) == (graders if isinstance(graders, list) else [graders])
    assert all(grader_key({"name": name}) == name for name in named)


def test_keys_of_graders_are_what_a_spec_takes() -> None:
    for name in ("Exact Match!", "5 points", "", None, "correctness", "x" * 300, "你好", "a-b_c", 7):
        spec = to_spec(changed("method.reinforcement.grader", {**EXACT, "name": name})).spec
        (key,) = spec["rewards"]["graders"]
        assert key not in RewardWeights.model_fields
        JobSpec.model_validate({"rewards": {"graders": {key: EXACT}}})


def test_notes_say_what_has_no_effect() -> None:
    job = changed(f"{HYPERPARAMETERS}.reasoning_effort", "high")
    job["integrations"] = [{"type": "wandb", "wandb": {"project": "p", "tags": ["x"]}}]
    job["trainingType"] = "GlobalStandard"
    job["method"]["reinforcement"]["grader"] = {
        "type": "python",
        "name": "p",
        "source": "def grade(sample, item): return 1",
        "image_tag": "2025-05-08",
    }
    mapped = to_spec(job, rows=8)
    assert {note.param for note in mapped.notes} == {
        f"{HYPERPARAMETERS}.reasoning_effort",
        f"{HYPERPARAMETERS}.compute_multiplier",
        "integrations.0.wandb",
        "trainingType",
        "method.reinforcement.grader.image_tag",
    }
    assert mapped.spec["training"]["report_to"] == ["wandb"]


def test_evaluations_without_a_validation_file_hold_rows_out() -> None:
    job = changed("validation_file", None)
    assert to_spec(job, rows=2000).spec["evaluation"] == {"questions": 128, "every": 5}
    assert to_spec(job, rows=150).spec["evaluation"] == {"questions": 15, "every": 5}
    assert to_spec(job).spec["evaluation"] == {"questions": 128, "automatic": True, "every": 5}
    small = to_spec(job, rows=20)
    assert "evaluation" not in small.spec
    assert f"{HYPERPARAMETERS}.eval_interval" in {note.param for note in small.notes}
    for rows in (None, 150, 2000):
        assert from_spec(to_spec(job, rows=rows).spec, rows=rows).get("grpo", {}).get("evaluation") is None


def test_samples_of_an_evaluation_are_answers_to_each_question_not_questions() -> None:
    """Read as a number of questions, 2 of a whole validation file were asked, and chose the best step."""
    mapped = to_spec(changed(f"{HYPERPARAMETERS}.eval_samples", 2), rows=8)
    assert mapped.spec["evaluation"] == to_spec(FULL, rows=8).spec["evaluation"]
    assert "one greedy answer" in {note.param: note.message for note in mapped.notes}[f"{HYPERPARAMETERS}.eval_samples"]
    assert to_spec(changed(f"{HYPERPARAMETERS}.eval_samples", 1), rows=8).notes == to_spec(FULL, rows=8).notes
    spec = {**mapped.spec, "evaluation": {**mapped.spec["evaluation"], "sample": 9}}
    assert from_spec(spec, rows=8)["grpo"]["evaluation"]["sample"] == 9


def hostile() -> Iterator[tuple[str, Any, str]]:  # noqa: C901 - a table
    """Fields with wrong values, and the field that is refused."""
    for name in ("model", "training_file"):
        for value in (None, "", 5, [], {}, True):
            yield name, value, name
    yield "validation_file", 5, "validation_file"
    yield "suffix", "x" * 65, "suffix"
    for value in ({"type": "wandb"}, "wandb", [5], [{"type": "mlflow"}], [None]):
        yield "integrations", value, "integrations"
    for value in (None, "reinforcement", [], 5):
        yield "method", value, "method"
    for value in ("supervised", "dpo", None, 5, {}):
        yield "method.type", value, "method.type"
    yield "method.supervised", {"hyperparameters": {}}, "method.supervised"
    yield "method.dpo", {"hyperparameters": {}}, "method.dpo"
    yield "method.other", 1, "method.other"
    yield "hyperparameters", {"n_epochs": 3}, "hyperparameters"
    yield "hyperparameters", "x", "hyperparameters"
    yield "method.reinforcement", "x", "method.reinforcement"
    for value in (None, "x", [], 5):
        yield "method.reinforcement.grader", value, "method.reinforcement.grader"
    yield "method.reinforcement.tools", [{}], "method.reinforcement.tools"
    yield "method.reinforcement.max_episode_steps", 3, "method.reinforcement.max_episode_steps"
    yield "method.reinforcement.other", 3, "method.reinforcement.other"
    yield HYPERPARAMETERS, "x", HYPERPARAMETERS
    yield f"{HYPERPARAMETERS}.beta", 0.1, f"{HYPERPARAMETERS}.beta"
    for name in ("batch_size", "n_epochs", "eval_interval", "eval_samples"):
        for value in (0, -1, 1.5, "4", True, [], {}):
            yield f"{HYPERPARAMETERS}.{name}", value, f"{HYPERPARAMETERS}.{name}"
    for value in (0, -1, "4", True, [], 1e7):
        yield f"{HYPERPARAMETERS}.learning_rate_multiplier", value, f"{HYPERPARAMETERS}.learning_rate_multiplier"
    for value in (0, -1, "4", True, [], 0.1, 43, 1e300, 10**400):
        yield f"{HYPERPARAMETERS}.compute_multiplier", value, f"{HYPERPARAMETERS}.compute_multiplier"
    for value in ("maximal", 5, [], {}):
        yield f"{HYPERPARAMETERS}.reasoning_effort", value, f"{HYPERPARAMETERS}.reasoning_effort"
    for value in ("x", [], 5, True):
        yield "grpo", value, "grpo"
    yield "functions", [], "functions"
    yield "x" * 500, 1, "x" * 80


@pytest.mark.parametrize(("path", "value", "param"), list(hostile()))
def test_a_wrong_field_is_refused_by_its_name(path: str, value: Any, param: str) -> None:
    found = refused(changed(path, value), rows=10, validation_rows=10)
    assert any(one == param or one.startswith(f"{param}.") for one in found), found


@pytest.mark.parametrize("path", ["model", "training_file", "method", "method.type", "method.reinforcement.grader"])
def test_a_missing_field_is_refused_by_its_name(path: str) -> None:
    assert path in refused(changed(path, ...))


def test_a_field_of_grpo_that_says_something_else_is_refused_with_both_names() -> None:
    with pytest.raises(CannotMap) as error:
        to_spec({**FULL, "grpo": {"sampling": {"prompts_per_step": 8}}}, rows=10)
    (one,) = error.value.refusals
    assert (one.param, one.code) == ("grpo.sampling.prompts_per_step", "conflict")
    assert f"{HYPERPARAMETERS}.batch_size" in one.detail
    assert refused({**FULL, "grpo": {"sampling": 5}}, rows=10)["grpo.sampling"] == "conflict"
    assert refused({**FULL, "grpo": {"name": "other"}}, rows=10)["grpo.name"] == "conflict"
    same = to_spec({**FULL, "grpo": {"sampling": {"prompts_per_step": 4, "top_p": 0.9}}}, rows=10).spec
    assert same["sampling"]["top_p"] == 0.9
    rest = to_spec({**FULL, "grpo": {"data": {"format": "qa"}, "evaluation": {"questions": 5}}}, rows=10).spec
    assert (rest["data"]["format"], rest["evaluation"]["questions"]) == ("qa", 5)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=8,
)
PLACES = ["", "grpo", "method", "method.reinforcement", "method.reinforcement.grader", HYPERPARAMETERS, "integrations"]


@given(
    st.sampled_from([row.param for row in TABLE if "[" not in row.param] + PLACES[1:]),
    JSON,
    st.none() | st.integers(1, 10**6),
)
@settings(max_examples=150, deadline=None)
def test_no_value_makes_it_fail(path: str, value: Any, rows: int | None) -> None:
    job = changed(path, value)
    try:
        spec = to_spec(job, rows=rows).spec
    except CannotMap as error:
        assert all(one.param and one.detail and one.remedy for one in error.refusals)  # noqa: PT017
        return
    differences(job, from_spec(spec, rows=rows))


def test_the_recipe_is_what_the_multipliers_multiply() -> None:
    recipe = JobSpec()
    assert recipe.optimizer.learning_rate == openai_jobs.LEARNING_RATE
    assert recipe.sampling.generations == openai_jobs.GENERATIONS
    assert recipe.sampling.prompts_per_step == 1
    assert tuple(RewardWeights.model_fields) == openai_jobs.RECIPE_REWARDS
    assert (schedule.QUESTIONS, schedule.AUTOMATIC_SHARE, schedule.LEAST_AUTOMATIC) == (
        openai_jobs.QUESTIONS,
        openai_jobs.HELD_OUT_SHARE,
        openai_jobs.LEAST_QUESTIONS,
    )
