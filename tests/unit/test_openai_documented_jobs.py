"""Jobs as OpenAI's and Azure's guides write them: each becomes a spec that this service takes, and the same job
again."""

from __future__ import annotations

import copy
import json
from typing import Any, Final

import pytest

from grpo_client.openai_jobs import FORMAT, GRADER, HYPERPARAMETERS, CannotMap, differences, from_spec, to_spec
from grpo_core.spec import parse_spec
from tests.unit.test_openai_jobs import FILE, OTHER

KNOWN: Final = {"rows": 100, "validation_rows": 40}
SCHEMA: Final = {
    "type": "object",
    "properties": {"compliant": {"type": "string"}, "explanation": {"type": "string"}},
    "required": ["compliant", "explanation"],
    "additionalProperties": False,
}
NAMED: Final = {"name": "security_assistant", "strict": True, "schema": SCHEMA}
STRUCTURED: Final = {"type": "json_schema", "json_schema": NAMED}
PYTHON: Final = {
    "type": "python",
    "source": "def grade(sample, item) -> float:\n    return 0.5",
    "image_tag": "2025-05-08",
}
CHECK: Final = {
    "type": "string_check",
    "name": "compliant",
    "input": "{{sample.output_json.compliant}}",
    "reference": "{{item.compliant}}",
    "operation": "eq",
}
SIMILAR: Final = {
    "type": "text_similarity",
    "name": "similarity grader",
    "input": "{{ sample.output_text }}",
    "reference": "{{ item.summary }}",
    "evaluation_metric": "bleu",
    "pass_threshold": 0.8,
}
JUDGE: Final = {
    "type": "score_model",
    "name": "Explanation text grader",
    "model": "gpt-4o-2024-08-06",
    "input": [
        {"role": "user", "type": "message", "content": "{{item.explanation}}\n{{sample.output_json.explanation}}"}
    ],
}
LONG_JUDGE: Final = {
    "type": "score_model",
    "name": "my_score_model",
    "model": "o4-mini-2025-04-16",
    "range": [0, 1],
    "pass_threshold": 0.5,
    "input": [
        {"role": "system", "content": "1 if they mean the same, else 0."},
        {"role": "user", "content": "{{ item.reference_answer }} / {{ sample.output_text }}"},
    ],
    "sampling_params": {"max_completions_tokens": 32768, "top_p": 1, "reasoning_effort": "medium"},
}
LABEL: Final = {
    "type": "label_model",
    "name": "label",
    "model": "gpt-4o-2024-08-06",
    "input": [
        {"type": "message", "role": "user", "content": {"type": "input_text", "text": "Label {{sample.output_text}}"}}
    ],
    "labels": ["positive", "neutral", "negative"],
    "passing_labels": ["positive"],
}
WHOLE: Final = {
    "n_epochs": 4,
    "batch_size": 8,
    "learning_rate_multiplier": 1.0,
    "compute_multiplier": 1.5,
    "eval_interval": 5,
}


def multi(formula: str, **graders: Any) -> dict[str, Any]:
    return {"type": "multi", "graders": graders, "calculate_output": formula}


def job(grader: Any, form: Any = None, parameters: Any = None, **fields: Any) -> dict[str, Any]:
    given = {"grader": grader, "response_format": form, "hyperparameters": parameters}
    reinforcement = {name: value for name, value in given.items() if value is not None}
    return {
        "model": "tiny-english",
        "training_file": FILE,
        "validation_file": OTHER,
        "method": {"type": "reinforcement", "reinforcement": reinforcement},
        **fields,
    }


def retrieved(chosen: Any, **fields: Any) -> dict[str, Any]:
    """A job as both services answer with it once it has ended; `chosen` is its deprecated `hyperparameters`."""
    return {
        **job(CHECK, STRUCTURED, WHOLE, seed=950189191),
        "object": "fine_tuning.job",
        "id": "ftjob-abc123",
        "created_at": 1721764800,
        "finished_at": 1721769000,
        "fine_tuned_model": "ft:o4-mini-2025-04-16:acme:med:abc",
        "organization_id": "org-123",
        "result_files": ["file-r"],
        "status": "succeeded",
        "trained_tokens": 1234,
        "error": {},
        "user_provided_suffix": "med",
        "estimated_finish": None,
        "integrations": [],
        "metadata": None,
        "hyperparameters": chosen,
        **fields,
    }


JOBS: Final[dict[str, tuple[dict[str, Any], list[str]]]] = {
    "the guide's": (job(multi("0.5 * compliant + 0.5 * judge", judge=JUDGE, compliant=CHECK), STRUCTURED), []),
    "a judge": (job(LONG_JUDGE, None, WHOLE, suffix="medical", seed=42), []),
    "a judge with blocks": (job({**JUDGE, "input": LABEL["input"]}), []),
    "python without a name": (job(PYTHON), []),
    "two pythons": (job(multi("0.85 * a + 0.15 * b", a={**PYTHON, "name": "phrase"}, b=PYTHON)), []),
    "similarity": (job(SIMILAR), []),
    "the default format": (job(SIMILAR, {"type": "text"}), []),
    "labels": (job(multi("label", label=LABEL), None, {"n_epochs": "auto", "batch_size": "auto"}), []),
    "Azure's threshold": (job({**PYTHON, "name": "z", "pass_threshold": 0.8}, None, WHOLE), []),
    "reasoning effort": (
        job(CHECK, STRUCTURED, {**WHOLE, "eval_samples": 2, "reasoning_effort": "medium"}),
        [f"{HYPERPARAMETERS}.eval_samples", f"{HYPERPARAMETERS}.reasoning_effort"],
    ),
    "Azure's kind of training": (job(CHECK, STRUCTURED, WHOLE, trainingType="GlobalStandard"), ["trainingType"]),
    "Azure's flat format": (
        job(CHECK, {"type": "json_schema", **NAMED}),
        [f"{FORMAT}.{name}" for name in ("json_schema", "name", "schema", "strict")],
    ),
    "Azure's invalid grade": (job({**multi("a", a=PYTHON), "invalid_grade": 0.0}), [f"{GRADER}.invalid_grade"]),
    "retrieved": (retrieved(None), []),
    "retrieved, with what was chosen": (retrieved({"n_epochs": 4, "batch_size": 8}), []),
    "retrieved from Azure": (
        retrieved(None, updated_at=1721769001, trainingType="globalStandard", capabilities={"fine_tune": True}),
        ["capabilities", "trainingType"],
    ),
}
"""Each job, and the fields in which it differs after the round trip."""


@pytest.mark.parametrize("name", JOBS)
def test_a_documented_job_is_the_same_after_the_round_trip(name: str) -> None:
    asked, changed = JOBS[name]
    mapped = to_spec(copy.deepcopy(asked), **KNOWN)
    assert parse_spec(mapped.spec).model.name == "tiny-english"
    back = from_spec(json.loads(json.dumps(mapped.spec)), **KNOWN)
    assert differences(asked, back) == sorted(changed)
    noted = {one.param for one in mapped.notes}
    assert all(any(path.startswith(param) for param in noted) for path in changed)
    if not changed and not any(word in json.dumps(asked) for word in ('"object": "fine', '"auto"', '"type": "text"')):
        assert back == asked


def test_a_flat_format_is_the_same_spec() -> None:
    flat, nested = job(CHECK, {"type": "json_schema", **NAMED}), job(CHECK, STRUCTURED)
    assert to_spec(flat, **KNOWN).spec == to_spec(nested, **KNOWN).spec


def test_what_a_service_chose_is_refused_in_a_request() -> None:
    """In a job that was retrieved it is only an answer."""
    chosen = {"n_epochs": 4}
    assert "hyperparameters" in {one.param for one in to_spec(retrieved(chosen), **KNOWN).notes}
    with pytest.raises(CannotMap, match="hyperparameters: is not read"):
        to_spec(job(CHECK, STRUCTURED, hyperparameters=chosen), **KNOWN)
    with pytest.raises(CannotMap, match="capabilities: is not a field"):
        to_spec(job(CHECK, STRUCTURED, capabilities={}), **KNOWN)


@pytest.mark.parametrize("field", ["tools", "max_episode_steps"])
def test_a_job_with_tools_is_refused(field: str) -> None:
    asked = job(PYTHON)
    asked["method"]["reinforcement"][field] = [{"name": "get_order"}] if field == "tools" else 5
    with pytest.raises(CannotMap, match="single turn"):
        to_spec(asked, **KNOWN)
