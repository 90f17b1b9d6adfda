"""The job spec: the recipe's values, every rule from both sides, and errors that name field and remedy."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from grpo_core import strict_json
from grpo_core.spec import JobSpec, Problem, SpecError, json_schema, parse_spec, pointer_of
from grpo_core.spec.problems import MAX_PROBLEMS
from grpo_core.spec.sections import FORMS
from tests.clock import patience

ULID = "01ARZ3NDEKTSV4RRFFQ69G5FAV"

WORKED = {"question": "x", "answer": "y"}

RECIPE: dict[str, Any] = {
    "schema_version": 1,
    "name": None,
    "metadata": {},
    "model": {
        "name": "Qwen/Qwen2.5-7B-Instruct",
        "revision": None,
        "max_sequence": 1024,
        "gpu_memory_share": 0.6,
        "precision": "auto",
    },
    "lora": {
        "rank": 32,
        "alpha": 32,
        "dropout": 0.0,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        "gradient_checkpointing": "auto",
        "seed": 3407,
    },
    "optimizer": {
        "name": "paged_adamw_8bit",
        "learning_rate": 5e-6,
        "beta1": 0.9,
        "beta2": 0.99,
        "weight_decay": 0.1,
        "schedule": "cosine",
        "warmup_ratio": 0.1,
        "max_grad_norm": 0.1,
    },
    "training": {
        "steps": 250,
        "log_every": 1,
        "save_steps": 250,
        "checkpoint_every": 25,
        "seed": 3407,
        "report_to": [],
    },
    "sampling": {
        "prompts_per_step": 1,
        "generations": 6,
        "gradient_accumulation": 1,
        "max_prompt_tokens": 256,
        "max_completion_tokens": 200,
        "temperature": 0.9,
        "top_p": 1.0,
        "top_k": 0,
        "repetition_penalty": 1.0,
    },
    "loss": {"type": "grpo", "beta": 0.04, "epsilon": 0.2, "scale_by": "group", "iterations": 1},
    "rewards": {
        "mode": "fixed",
        "weights": {
            "correctness": 1.0,
            "integer": 1.0,
            "strict_format": 1.0,
            "soft_format": 1.0,
            "xml_count": 1.0,
        },
    },
    "data": {
        "source": "hub",
        "dataset": "swulling/gsm8k_chinese",
        "subset": None,
        "split": "train",
        "revision": None,
        "question_column": "question_zh-cn",
        "answer_column": "answer_only",
        "system_prompt": "采用下方格式回复用户问题:\n<reasoning>\n...\n</reasoning>\n<answer>\n...\n</answer>\n",
        "examples": [],
        "max_rows": None,
    },
    "engine": "auto",
    "evaluation": {"questions": 0, "split": "test", "max_completion_tokens": 512},
    "guards": {"no_signal_steps": 100, "runaway_factor": 10_000.0, "max_logprob_diff": 0.1},
    "audits": {
        "no_variance": 20,
        "format_gaming": 0.9,
        "truncation": 0.3,
        "length_collapse": 3.0,
        "length_growth": 2.0,
        "duplicates": 0.5,
        "entropy_collapse": 5.0,
        "kl_runaway": 1.0,
    },
    "resources": {"gpus": 1, "min_gpu_memory_gb": None},
    "from_checkpoint": None,
}
"""Written out by hand: a default that drifts must fail here."""

RECIPE_DIGEST = "9b5206f7a315bcc75a6b8da7a738ad78514010b16bbe868756cfd75b5904fadb"


def problems_of(data: object) -> list[Problem]:
    with pytest.raises(SpecError) as caught:
        parse_spec(data)
    assert caught.value.problems
    for problem in caught.value.problems:
        assert problem.code
        assert problem.detail
        assert problem.remedy.endswith((".", "?")), problem
    return caught.value.problems


def found(data: object) -> list[tuple[str, str]]:
    return [(problem.pointer, problem.code) for problem in problems_of(data)]


def at(pointer: str, value: object) -> dict[str, Any]:
    """A spec with one field."""
    result: Any = value
    for part in reversed(pointer.split("/")[1:]):
        result = {part: result}
    return result


def leaves(node: Any, pointer: str = "") -> Iterator[str]:
    for name, value in node.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{pointer}/{name}")
        else:
            yield f"{pointer}/{name}"


# The recipe


def test_an_empty_spec_is_the_recipe() -> None:
    assert parse_spec({}).as_dict() == RECIPE


def test_sizes_of_a_step() -> None:
    spec = parse_spec({"sampling": {"prompts_per_step": 4, "generations": 8, "gradient_accumulation": 2}})
    assert (spec.completions_per_step, spec.micro_batch) == (32, 16)


@pytest.mark.parametrize("source", ["upload", "file"])
def test_plain_column_names_where_the_data_is_ones_own(source: str) -> None:
    data = parse_spec({"data": {"source": source, "dataset": f"ds-{ULID}"}}).data
    assert (data.question_column, data.answer_column) == ("question", "answer")
    named = parse_spec({"data": {"source": source, "dataset": f"ds-{ULID}", "answer_column": "a"}}).data
    assert (named.question_column, named.answer_column) == ("question", "a")


# One value, one digest


def test_round_trip() -> None:
    spec = parse_spec({"name": "好", "metadata": {"a": "b"}, "lora": {"target_modules": ["v_proj", "q_proj"]}})
    again = parse_spec(strict_json.loads(strict_json.dumps(spec.as_dict())))
    assert again == spec
    assert again.digest() == spec.digest()
    assert again.as_dict()["lora"]["target_modules"] == ["v_proj", "q_proj"]


def test_the_recipes_digest_is_pinned() -> None:
    assert parse_spec({}).digest() == RECIPE_DIGEST


def test_digest_does_not_depend_on_order_or_spelling() -> None:
    one = {"name": "x", "loss": {"beta": 0, "type": "dapo"}, "metadata": {"a": "1", "b": "2"}}
    two = {"metadata": {"b": "2", "a": "1"}, "loss": {"type": "dapo", "beta": -0.0}, "name": "x", "engine": "auto"}
    assert parse_spec(one).digest() == parse_spec(two).digest()


@pytest.mark.parametrize("other", [{"name": "x"}, {"training": {"seed": 1}}, {"lora": {"target_modules": ["q_proj"]}}])
def test_another_spec_has_another_digest(other: dict[str, Any]) -> None:
    assert parse_spec(other).digest() != RECIPE_DIGEST


def test_frozen() -> None:
    spec = parse_spec({})
    for target, name in ((spec, "name"), (spec.training, "steps"), (spec.rewards.weights, "integer")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(target, name, 2)


def test_the_input_is_left_as_it_was() -> None:
    data = {"training": {"steps": 0, "seed": 1}, "model": {"max_sequence": 64}, "junk": [1]}
    before = copy.deepcopy(data)
    problems_of(data)
    assert data == before


# Fields, one by one

SHARES = ("format_gaming", "truncation", "duplicates")
LISTS = {"/data/examples", "/lora/target_modules", "/training/report_to"}


@pytest.mark.parametrize("pointer", sorted({*leaves(RECIPE)} - LISTS))
def test_a_value_of_another_type_is_named_with_what_to_give(pointer: str) -> None:
    (problem,) = problems_of(at(pointer, [1]))
    assert (problem.pointer, problem.code) == (pointer, "bad_value")
    assert problem.remedy.startswith("Give ")
    assert len(problem.remedy) < 200
    assert not any(mark in problem.remedy for mark in ("^", "\\", "{", "\n"))


@pytest.mark.parametrize(
    ("pointer", "good", "bad"),
    [
        ("/schema_version", [1], [0, 2, True, 1.0, "1", None]),
        ("/name", ["x", "好" * 100, None], ["", "a\nb", "\x7f", "x" * 101]),
        ("/model/name", ["a", "Qwen/Qwen2.5-0.5B", "x" * 96], ["", "../x", "/x", "a/b/c", "a b", "x" * 97, "-x", "好"]),
        ("/model/revision", [None, "main", "v1.0", "a" * 40], ["", "a/b", "-x", "x" * 65, "a\n"]),
        ("/model/max_sequence", [456, 131_072], [31, 131_073, 1024.0, "1024", True, None, -1, 10**400]),
        ("/model/gpu_memory_share", [0.05, 0.95], [0, 0.04, 0.96, 1, "0.5", True, None]),
        ("/model/precision", ["auto", "4bit", "16bit"], ["2bit", "AUTO", 4, None]),
        ("/model/sharding", ["auto", "off"], ["none", "FULL", 2, None]),
        ("/lora/rank", [1, 256], [0, 257, 32.0, "32", True]),
        ("/lora/alpha", [1, 1024], [0, 1025]),
        ("/lora/dropout", [0, 0.0, 0.5], [-0.1, 0.51, True, "0"]),
        ("/lora/target_modules", [["q_proj"], ["down_proj", "up_proj"]], [[], "q_proj", None, {}, ["q_proj"] * 2]),
        ("/lora/gradient_checkpointing", ["auto", "unsloth", "standard", "off"], [True, False, "on"]),
        ("/lora/seed", [0, 2**31 - 1], [-1, 2**31, None]),
        ("/optimizer/name", ["paged_adamw_8bit", "adamw_8bit", "adamw_torch"], ["adamw", "sgd"]),
        ("/optimizer/learning_rate", [1e-12, 1, 1.0], [0, 0.0, -1e-6, 1.1, "5e-6", True, 10**400]),
        ("/optimizer/beta1", [0, 0.999], [1, 1.0, -0.1]),
        ("/optimizer/beta2", [0, 0.999], [1, 1.0, -0.1]),
        ("/optimizer/weight_decay", [0, 1], [-0.1, 1.1]),
        ("/optimizer/schedule", ["cosine", "linear", "constant"], ["cosine_with_restarts"]),
        ("/optimizer/warmup_ratio", [0, 1], [-0.1, 1.1]),
        ("/optimizer/max_grad_norm", [1e-3, 1000], [0, -1, 1001]),
        ("/training/steps", [1, 100_000], [0, 100_001, 32.0, "32", True, None]),
        ("/training/log_every", [1, 1000], [0, 1001]),
        ("/training/save_steps", [1, 100_000], [0, 100_001]),
        ("/training/checkpoint_every", [1, 100_000], [0, 100_001]),
        ("/training/report_to", [[], ["wandb"], ["mlflow", "tensorboard", "trackio", "wandb"]], [None, "wandb", 3]),
        ("/training/seed", [0, 2**31 - 1], [-1, 2**31]),
        ("/sampling/prompts_per_step", [1, 1024], [0, 1025, True]),
        ("/sampling/generations", [2, 256], [1, 257]),
        ("/sampling/gradient_accumulation", [1, 6], [0, 4097]),
        ("/sampling/max_prompt_tokens", [1, 824], [0, 131_073]),
        ("/sampling/max_completion_tokens", [1, 768], [0, 131_073]),
        ("/sampling/temperature", [0.01, 5], [0, 0.009, 5.1]),
        ("/sampling/top_p", [0.01, 1], [0, 1.1]),
        ("/sampling/top_k", [0, 1_000_000], [-1, 1_000_001, 50.0]),
        ("/sampling/repetition_penalty", [0.1, 10], [0, 11]),
        ("/loss/type", ["grpo", "bnpo", "dr_grpo", "dapo"], ["ppo", None]),
        ("/loss/beta", [0, 10], [-0.01, 11]),
        ("/loss/epsilon", [0.01, 0.99], [0, 1]),
        ("/loss/scale_by", ["group", "batch", "none"], [None, True, "std"]),
        ("/loss/iterations", [1, 16], [0, 17]),
        ("/rewards/mode", ["fixed", "published"], ["publish"]),
        *[
            (f"/rewards/weights/{name}", [-100, 0, 0.5, 100], [-101, 101, True, None, "1"])
            for name in ("correctness", "integer", "strict_format", "soft_format", "xml_count")
        ],
        ("/data/source", ["hub"], ["url", None]),
        ("/data/dataset", ["a/b", "a"], ["", "x" * 513, None]),
        ("/data/subset", [None, "main"], ["", "a/b", "a b"]),
        ("/data/split", ["train"], ["", "train[:10%]", None]),
        ("/data/revision", [None, "v1"], ["", "a/b"]),
        ("/data/question_column", ["q", "好" * 128], ["", "x" * 129, None]),
        ("/data/answer_column", ["a", "好" * 128], ["", "x" * 129, None]),
        ("/data/system_prompt", ["", "x" * 8192], ["x" * 8193, None]),
        ("/data/examples", [[], [WORKED] * 16], [None, {}, [WORKED] * 17]),
        ("/data/max_rows", [None, 1, 10_000_000], [0, 10_000_001]),
        ("/engine", ["auto", "unsloth", "trl"], ["vllm", None]),
        ("/evaluation/questions", [0, 10_000], [-1, 10_001, True, None]),
        ("/evaluation/split", ["test", "train"], ["", "test[:10]", None]),
        ("/evaluation/max_completion_tokens", [1, 131_072], [0, 131_073]),
        ("/guards/no_signal_steps", [0, 100_000], [-1, 100_001]),
        ("/guards/runaway_factor", [0, 1e12], [-1, 1e13, "1"]),
        ("/guards/max_logprob_diff", [0, 0.5, 100], [-0.1, 101, None]),
        ("/audits/no_variance", [0, 100_000], [-1, 100_001, 1.5]),
        *[(f"/audits/{name}", [0, 0.5, 1], [-0.1, 1.1, None]) for name in SHARES],
        *[(f"/audits/{name}", [0, 1.5, 1000], [-1, 1001, "2"]) for name in ("length_collapse", "length_growth")],
        *[(f"/audits/{name}", [0, 0.5, 1e6], [-1, 1e7, None]) for name in ("entropy_collapse", "kl_runaway")],
        ("/resources/gpus", [1], [-1, 9, True]),
        ("/resources/min_gpu_memory_gb", [None, 1, 1024], [0, 1025]),
        ("/resources/hosts", [1], [0, 65, None]),
        ("/resources/min_hosts", [None, 1], [0, 65]),
        ("/from_checkpoint", [None, {"job": f"job-{ULID}", "step": 1}], ["job", [], 1]),
        ("/from_checkpoint/job", [], ["", ULID, f"job-{ULID.lower()}", f"job-{ULID}0", f"ds-{ULID}"]),
        ("/metadata", [{}, {f"k{i}": "x" * 512 for i in range(16)}], [{f"k{i}": "" for i in range(17)}, [], None]),
    ],
)  # fmt: skip
def test_bounds_of_every_field(pointer: str, good: list[Any], bad: list[Any]) -> None:
    for value in good:
        parse_spec(at(pointer, value))
    for value in bad:
        assert pointer in [where for where, _ in found(at(pointer, value))], value


@pytest.mark.parametrize("names", [["all"], ["none"], ["comet_ml"], [None], ["wandb", "wandb"], ["wandb"] * 5])
def test_only_trackers_that_are_known_and_each_once(names: list[Any]) -> None:
    [(pointer, _)] = found(at("/training/report_to", names))
    assert pointer.startswith("/training/report_to")


def test_the_table_above_has_every_field() -> None:
    (mark,) = (mark for mark in test_bounds_of_every_field.pytestmark if mark.name == "parametrize")
    assert set(leaves(RECIPE)) <= {case[0] for case in mark.args[1]}


def test_every_pattern_has_words() -> None:
    patterns = set()

    def collect(node: Any) -> None:
        if isinstance(node, dict):
            if isinstance(node.get("pattern"), str):
                patterns.add(node["pattern"])
            for inner in node.values():
                collect(inner)
        elif isinstance(node, list):
            for inner in node:
                collect(inner)

    collect(json_schema())
    assert patterns
    assert patterns <= set(FORMS)


@pytest.mark.parametrize(
    ("data", "pointer", "remedy"),
    [
        ({"lerning_rate": 1}, "/lerning_rate", "Did you mean optimizer.learning_rate?"),
        ({"optimizer": {"lr": 1}}, "/optimizer/lr", "Did you mean learning_rate?"),
        ({"optimizer": {"nesterov": True}}, "/optimizer/nesterov", "Remove it; the fields here are name, learning_"),
        ({"optimizer": {"learningrate": 1}}, "/optimizer/learningrate", "Did you mean learning_rate?"),
        ({"rewards": {"weights": {"corectness": 1}}}, "/rewards/weights/corectness", "Did you mean correctness?"),
        ({"trainning": {}}, "/trainning", "Did you mean training?"),
        ({"a/b~c": 1}, "/a~1b~0c", "Remove it"),
        ({"": 1}, "/", "Remove it"),
        ({"data": {"examples": [{"question": "x", "answer": "y", "anwser": 1}]}}, "/data/examples/0/anwser", "Did you"),
    ],
)  # fmt: skip
def test_unknown_fields(data: dict[str, Any], pointer: str, remedy: str) -> None:
    (problem,) = problems_of(data)
    assert (problem.pointer, problem.code) == (pointer, "unknown_field")
    assert problem.remedy.startswith(remedy)


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        ({"from_checkpoint": {"step": 1}}, ("/from_checkpoint/job", "missing_field")),
        ({"from_checkpoint": {"job": f"job-{ULID}"}}, ("/from_checkpoint/step", "missing_field")),
        ({"data": {"examples": [{"question": "x"}]}}, ("/data/examples/0/answer", "missing_field")),
        ({"data": {"examples": [3]}}, ("/data/examples/0", "bad_value")),
        ({"lora": {"target_modules": ["q_proj", "x"]}}, ("/lora/target_modules/1", "bad_value")),
        ({"metadata": {"a": 1}}, ("/metadata/a", "bad_value")),
        ({"metadata": {"": "x"}}, ("/metadata/", "bad_value")),
        ({"metadata": {"a\nb": "x"}}, ("/metadata/a\nb", "bad_value")),
        ({"metadata": {"k" * 65: "x"}}, ("/metadata/" + "k" * 65, "bad_value")),
        ({"metadata": {"a": "x" * 513}}, ("/metadata/a", "bad_value")),
        ({"model": None}, ("/model", "bad_value")),
        ({"rewards": {"weights": []}}, ("/rewards/weights", "bad_value")),
        ([], ("", "not_an_object")),
        (None, ("", "not_an_object")),
        ("{}", ("", "not_an_object")),
    ],
)
def test_nested_and_missing_fields(data: Any, problem: tuple[str, str]) -> None:
    assert found(data) == [problem]


def test_remedies_in_full() -> None:
    remedies = {
        "/training/steps": "Give a whole number from 1 to 100000; the default is 250.",
        "/optimizer/learning_rate": "Give a number above 0 and at most 1; the default is 5e-06.",
        "/optimizer/beta1": "Give a number at least 0 and below 1; the default is 0.9.",
        "/loss/type": "Give one of grpo, bnpo, dr_grpo, dapo; the default is grpo.",
        "/data/max_rows": "Give a whole number from 1 to 10000000; the default is null.",
        "/data/system_prompt": "Give text of 0 to 8192 characters.",
        "/name": "Give one line of text of 1 to 100 characters; the default is null.",
        "/from_checkpoint": "Give an object with job and step; the default is null.",
    }
    assert {pointer: problems_of(at(pointer, [1]))[0].remedy for pointer in remedies} == remedies
    (key,) = problems_of({"metadata": {"": "x"}})
    assert key.remedy == "Each key is one line of text of 1 to 64 characters."


# Rules that span fields


def upload(**fields: Any) -> dict[str, Any]:
    return {"data": {"source": "upload", "dataset": f"ds-{ULID}", **fields}}


CPU = {"resources": {"gpus": 0}, "optimizer": {"name": "adamw_torch"}}
WEIGHTLESS = dict.fromkeys(RECIPE["rewards"]["weights"], 0)


@pytest.mark.parametrize(
    ("good", "bad", "problem"),
    [
        pytest.param(
            {"model": {"max_sequence": 456}},
            {"model": {"max_sequence": 455}},
            ("/sampling/max_completion_tokens", "sequence_too_long"),
            id="prompt and completion fit the sequence",
        ),
        pytest.param(
            {"model": {"max_sequence": 768}, "evaluation": {"questions": 1}},
            {"model": {"max_sequence": 767}, "evaluation": {"questions": 1}},
            ("/evaluation/max_completion_tokens", "sequence_too_long"),
            id="prompt and held-out answer fit the sequence",
        ),
        pytest.param(
            upload(max_rows=200) | {"evaluation": {"questions": 100}},
            upload(max_rows=200) | {"evaluation": {"questions": 101}},
            ("/evaluation/questions", "too_many_held_out"),
            id="at most half of an upload is held out",
        ),
        pytest.param(
            {"data": {"max_rows": 200}, "evaluation": {"questions": 101}},
            {"data": {"max_rows": 200}, "evaluation": {"questions": 101, "split": "train"}},
            ("/evaluation/questions", "too_many_held_out"),
            id="a split of its own takes nothing from the training rows",
        ),
        pytest.param(
            {"sampling": {"prompts_per_step": 4}, **upload(max_rows=8), "evaluation": {"questions": 4}},
            {"sampling": {"prompts_per_step": 5}, **upload(max_rows=8), "evaluation": {"questions": 4}},
            ("/data/max_rows", "too_few_rows"),
            id="rows left by the held-out ones fill a step",
        ),
        pytest.param(
            {"sampling": {"gradient_accumulation": 3}},
            {"sampling": {"gradient_accumulation": 4}},
            ("/sampling/gradient_accumulation", "indivisible_batch"),
            id="accumulation divides the step",
        ),
        pytest.param(
            {"sampling": {"prompts_per_step": 8}, "data": {"max_rows": 8}},
            {"sampling": {"prompts_per_step": 8}, "data": {"max_rows": 7}},
            ("/data/max_rows", "too_few_rows"),
            id="rows fill a step",
        ),
        pytest.param(
            {"sampling": {"prompts_per_step": 1024, "generations": 8}},
            {"sampling": {"prompts_per_step": 1024, "generations": 9}},
            ("/sampling/prompts_per_step", "step_too_large"),
            id="completions of a step",
        ),
        pytest.param(
            {
                "sampling": {"prompts_per_step": 128, "generations": 64, "max_prompt_tokens": 1848},
                "model": {"max_sequence": 2048},
            },
            {
                "sampling": {"prompts_per_step": 128, "generations": 64, "max_prompt_tokens": 1849},
                "model": {"max_sequence": 2049},
            },
            ("/sampling/prompts_per_step", "step_too_large"),
            id="tokens of a step",
        ),
        pytest.param(
            {"sampling": {"prompts_per_step": 125, "generations": 8}, "training": {"steps": 100_000}},
            {"sampling": {"prompts_per_step": 126, "generations": 8}, "training": {"steps": 100_000}},
            ("/training/steps", "job_too_large"),
            id="completions of a job",
        ),
        pytest.param(
            {"rewards": {"weights": {**WEIGHTLESS, "integer": 0.1}}},
            {"rewards": {"weights": WEIGHTLESS}},
            ("/rewards/weights", "no_reward"),
            id="something is rewarded",
        ),
        pytest.param(
            {"data": {"dataset": "openai/gsm8k", "subset": "main", "revision": "v1"}},
            {"data": {"dataset": "../../etc/passwd"}},
            ("/data/dataset", "bad_name"),
            id="a hub name",
        ),
        pytest.param(upload(), upload(dataset="ds-1"), ("/data/dataset", "bad_name"), id="an upload's id"),
        pytest.param(
            {"data": {"source": "file", "dataset": "../my data/x.jsonl"}},
            {"data": {"source": "hub", "dataset": "../my data/x.jsonl"}},
            ("/data/dataset", "bad_name"),
            id="a path is for files only",
        ),
        pytest.param(upload(), upload(subset="x"), ("/data/subset", "not_applicable"), id="subset is the hub's"),
        pytest.param(upload(), upload(revision="x"), ("/data/revision", "not_applicable"), id="revision is the hub's"),
        pytest.param(
            {"data": {"question_column": "q", "answer_column": "a"}},
            {"data": {"question_column": "q", "answer_column": "q"}},
            ("/data/answer_column", "same_column"),
            id="columns differ",
        ),
        pytest.param(CPU, {"resources": {"gpus": 0}}, ("/optimizer/name", "needs_gpu"), id="8-bit optimizer"),
        pytest.param(
            {"resources": {"gpus": 3, "hosts": 2}},
            {"resources": {"gpus": 4, "hosts": 2}},
            ("/resources/hosts", "too_many_hosts"),
            id="more ranks than completions",
        ),
        pytest.param(
            {"resources": {"hosts": 2}, "engine": "trl"},
            {"resources": {"hosts": 2}, "engine": "unsloth"},
            ("/engine", "one_gpu_only"),
            id="an engine for one host",
        ),
        pytest.param(
            {"resources": {"gpus": 2}, "lora": {"dropout": 0.0}},
            {"resources": {"gpus": 2}, "lora": {"dropout": 0.1}},
            ("/lora/dropout", "one_gpu_only"),
            id="dropout on one card",
        ),
        pytest.param(
            {"model": {"sharding": "full"}, "resources": {"gpus": 2}},
            {"model": {"sharding": "full"}, "resources": {"gpus": 1}},
            ("/model/sharding", "one_gpu_only"),
            id="nobody to share a model with",
        ),
        pytest.param(
            {"model": {"sharding": "off"}, "engine": "trl"},
            {"model": {"sharding": "full"}, "engine": "trl"},
            ("/engine", "no_sharding"),
            id="an engine that shares no model",
        ),
        pytest.param(
            {"resources": {"hosts": 2, "min_hosts": 2}},
            {"resources": {"hosts": 2, "min_hosts": 3}},
            ("/resources/min_hosts", "more_than_hosts"),
            id="fewer hosts that are more",
        ),
        pytest.param(
            {**CPU, "model": {"precision": "auto"}},
            {**CPU, "model": {"precision": "16bit"}},
            ("/model/precision", "needs_gpu"),
            id="precision on a CPU",
        ),
        pytest.param(
            {**CPU, "engine": "trl"}, {**CPU, "engine": "unsloth"}, ("/engine", "needs_gpu"), id="unsloth on a CPU"
        ),
        pytest.param(
            {"resources": {"gpus": 1, "min_gpu_memory_gb": 24}},
            {**CPU, "resources": {"gpus": 0, "min_gpu_memory_gb": 24}},
            ("/resources/min_gpu_memory_gb", "not_applicable"),
            id="GPU memory on a CPU",
        ),
        pytest.param(
            {"lora": {"rank": 8, "alpha": 512}},
            {"lora": {"rank": 8, "alpha": 513}},
            ("/lora/alpha", "scale_too_large"),
            id="alpha over rank",
        ),
    ],
)
def test_rules_from_both_sides(good: dict[str, Any], bad: dict[str, Any], problem: tuple[str, str]) -> None:
    parse_spec(good)
    assert found(bad) == [problem]


def test_a_remedy_of_a_rule_is_accepted() -> None:
    (problem,) = problems_of({"sampling": {"prompts_per_step": 5, "generations": 2, "gradient_accumulation": 4}})
    assert problem.remedy == "Use one of 1, 2, 5, 10."
    for parts in (1, 2, 5, 10):
        parse_spec({"sampling": {"prompts_per_step": 5, "generations": 2, "gradient_accumulation": parts}})


def test_everything_wrong_is_said_at_once() -> None:
    bad = {
        "nmae": "x",
        "schema_version": 2,
        "metadata": {"a": 1},
        "model": {"max_sequence": 64, "precision": "2bit"},
        "optimizer": {"learning_rate": "5e-6"},
        "training": {"steps": True},
        "sampling": {"gradient_accumulation": 4},
        "rewards": {"weights": {"corectness": 1.0}},
        "data": {"question_column": "x", "answer_column": "x", "examples": [{"question": "q"}]},
        "from_checkpoint": {"job": "job-1"},
    }
    assert sorted(found(bad)) == sorted(
        [
            ("/nmae", "unknown_field"),
            ("/schema_version", "bad_value"),
            ("/metadata/a", "bad_value"),
            ("/model/precision", "bad_value"),
            ("/optimizer/learning_rate", "bad_value"),
            ("/training/steps", "bad_value"),
            ("/rewards/weights/corectness", "unknown_field"),
            ("/data/examples/0/answer", "missing_field"),
            ("/from_checkpoint/job", "bad_value"),
            ("/from_checkpoint/step", "missing_field"),
            ("/sampling/max_completion_tokens", "sequence_too_long"),
            ("/sampling/gradient_accumulation", "indivisible_batch"),
            ("/data/answer_column", "same_column"),
        ]
    )


def test_the_message_names_every_field() -> None:
    with pytest.raises(SpecError, match=r"/training/steps should .*\. Give .*; /loss/beta should .*"):
        parse_spec({"training": {"steps": 0}, "loss": {"beta": -1}})


def test_a_body_of_junk_is_answered_fast_and_shortly() -> None:
    junk = {f"field{i}": i for i in range(20_000)}
    started = time.process_time()
    assert len(problems_of({**junk, "model": {"max_sequence": 64}})) <= MAX_PROBLEMS + 20
    assert time.process_time() - started < patience(3)


# Anything else

FIELD_CODES = ("bad_value", "unknown_field", "missing_field", "not_an_object")
json_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers().map(lambda n: n * 10**300) | st.floats() | json_text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(json_text, inner, max_size=3),
    max_leaves=8,
)
field_pointers = st.sampled_from([*leaves(RECIPE), *(f"/{name}" for name in RECIPE), "/from_checkpoint/job", "/junk"])
near_values = st.sampled_from([0, 1, -1, 2, 0.5, True, None, "", "auto", [], {}, [{}], 10**400, 1e308, "upload", "x/y"])


def put(document: Any, pointer: str, value: object) -> None:
    *parents, last = pointer.split("/")[1:]
    for part in parents:
        if not isinstance(document.get(part), dict):
            document[part] = {}
        document = document[part]
    document[last] = value


def pointed(data: Any, pointer: str) -> bool:
    """Whether all but the last part of a pointer is in the document: the field itself may be missing."""
    for part in pointer.split("/")[1:-1]:
        name = part.replace("~1", "/").replace("~0", "~")
        if isinstance(data, dict) and name in data:
            data = data[name]
        elif isinstance(data, list) and name.isdigit() and int(name) < len(data):
            data = data[int(name)]
        else:
            return False
    return True


@given(json_values)
@settings(max_examples=300)
def test_any_json_gives_a_spec_or_problems(data: Any) -> None:
    for problem in tried(data):
        # Rules may point at a field that was left out, to be set.
        assert pointed(data, problem.pointer) or problem.code not in FIELD_CODES


@given(st.dictionaries(field_pointers, near_values | json_values, max_size=4))
@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_mutations_of_a_good_spec_give_a_spec_or_problems(changes: dict[str, Any]) -> None:
    data = copy.deepcopy(RECIPE)
    for pointer, value in changes.items():
        put(data, pointer, value)
    for problem in tried(data):
        assert all((problem.code, problem.detail, problem.remedy))
        assert pointed(data, problem.pointer) or problem.code not in FIELD_CODES


def tried(data: Any) -> list[Problem]:
    """The problems of a spec; a good one survives the way through storage instead."""
    try:
        spec = parse_spec(data)
    except SpecError as error:
        problems = error.problems
    else:
        assert parse_spec(strict_json.loads(strict_json.dumps(spec.as_dict()))) == spec
        return []
    assert problems
    return problems


# The schema


def objects(node: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(node, dict):
        if node.get("type") == "object":
            yield path, node
        for name, inner in node.items():
            yield from objects(inner, f"{path}/{name}")
    elif isinstance(node, list):
        for index, inner in enumerate(node):
            yield from objects(inner, f"{path}/{index}")


def test_the_schema_is_closed_everywhere() -> None:
    schemas = dict(objects(json_schema()))
    assert len(schemas) >= 14
    open_ones = {path for path, schema in schemas.items() if schema.get("additionalProperties") is not False}
    # Weights of graders stand under names of the job's own, and somebody's JSON Schema is theirs.
    assert open_ones == {
        "/$defs/RewardWeights",
        "/$defs/JsonSchema/properties/schema",
        "/$defs/NamedSchema/properties/schema",
    }


def test_every_field_of_the_schema_is_explained_and_bounded() -> None:
    for path, schema in objects(json_schema()):
        for name, field in schema.get("properties", {}).items():
            where = f"{path}/{name}"
            described = field if "description" in field else json_schema()["$defs"].get(field.get("$ref", "/")[8:], {})
            assert described.get("description"), where
            sides = [side for side in field.get("anyOf", [field]) if side.get("type") != "null"]
            for side in sides:
                if side.get("type") in ("integer", "number"):
                    assert {"maximum", "exclusiveMaximum", "const"} & {*side, *field}, where
                    assert {"minimum", "exclusiveMinimum", "const"} & {*side, *field}, where
                if side.get("type") == "string":
                    assert {"maxLength", "pattern", "enum", "const"} & set(side), where
                if side.get("type") == "array":
                    assert "maxItems" in side, where


def test_the_schema_is_json_and_always_the_same() -> None:
    assert strict_json.loads(strict_json.dumps(json_schema())) == json_schema()
    assert json_schema()["$schema"] == "https://json-schema.org/draft/2020-12/schema"


@pytest.mark.parametrize(
    ("path", "pointer"), [((), ""), (("a",), "/a"), (("a", 0, "b"), "/a/0/b"), (("a/b", "~"), "/a~1b/~0"), (("",), "/")]
)
def test_pointer_of(path: tuple[str | int, ...], pointer: str) -> None:
    assert pointer_of(path) == pointer


def test_a_spec_made_in_python_obeys_the_rules_too() -> None:
    with pytest.raises(ValidationError, match="max_sequence"):
        JobSpec(model={"max_sequence": 64})  # pyright: ignore[reportArgumentType]
