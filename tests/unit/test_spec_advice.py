"""Specs as people really write them, each answered with the field that was meant: by names of other tools, in the
wrong place, misspelt, or with a value that is nearly right."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from grpo_core.spec import Problem, SpecError, aliases, parse_spec
from grpo_core.spec.hints import field_schema

DATASET = "ds-01M82BSW0T5K4T171YZB9EJZRM"


def in_parts(path: str) -> tuple[str | int, ...]:
    return tuple(int(part) if part.isdigit() else part for part in path.split("."))


def remedies(data: object) -> str:
    with pytest.raises(SpecError) as caught:
        parse_spec(data)
    return " ".join(problem.remedy for problem in caught.value.problems)


@pytest.mark.parametrize(
    ("data", "remedy"),
    [
        ({"learning_rate": 1e-5}, "Use optimizer.learning_rate: a number above 0 and at most 1."),
        ({"training": {"learning_rate": 1e-5}}, "Use optimizer.learning_rate: "),
        ({"num_generations": 8}, "Use sampling.generations: a whole number from 2 to 256."),
        ({"sampling": {"num_generations": 8}}, "Did you mean generations?"),
        ({"lora_r": 16}, "Use lora.rank: "),
        ({"loraRank": 16}, "Use lora.rank: "),
        ({"lora": {"r": 16}}, "Did you mean rank?"),
        ({"lora": {"lora_alpha": 16}}, "Did you mean alpha?"),
        ({"lora_dropout": 0}, "Use lora.dropout: "),
        ({"lora": {"targetModules": []}}, "Did you mean target_modules?"),
        ({"max_steps": 100}, "Use training.steps: "),
        ({"training": {"max_steps": 100}}, "Did you mean steps?"),
        ({"training": {"epochs": 3}}, "Use training.steps: a step draws "),
        ({"num_train_epochs": 3}, "Use training.steps: a step draws "),
        ({"base_model": "x/y"}, "Use model.name: "),
        ({"model_name_or_path": "x/y"}, "Use model.name: "),
        ({"model": {"base_model": "x/y"}}, "Did you mean name?"),
        ({"load_in_4bit": True}, 'Use model.precision: "4bit"'),
        ({"model": {"load_in_4bit": True}}, 'Use model.precision: "4bit"'),
        ({"bf16": True}, 'Use model.precision: "16bit"'),
        ({"model": {"max_seq_length": 2048}}, "Did you mean max_sequence?"),
        ({"max_prompt_length": 256}, "Use sampling.max_prompt_tokens: "),
        ({"sampling": {"max_tokens": 200}}, "Did you mean max_completion_tokens?"),
        ({"per_device_train_batch_size": 8}, "Use sampling.prompts_per_step and sampling.generations: "),
        ({"gradient_accumulation_steps": 4}, "Use sampling.gradient_accumulation: "),
        ({"beta": 0.04}, "Use loss.beta: "),
        ({"loss": {"kl_coef": 0.04}}, "Did you mean beta?"),
        ({"loss_type": "dapo"}, "Use loss.type: "),
        ({"optimizer": {"lr": 1e-5}}, "Did you mean learning_rate?"),
        ({"optimizer": {"betas": [0.9, 0.99]}}, "Use optimizer.beta1 and optimizer.beta2."),
        ({"optimizer": {"warmup_steps": 10}}, "Use optimizer.warmup_ratio: the share of training.steps."),
        ({"reward_funcs": ["correctness"]}, "Use rewards.weights: "),
        ({"rewards": {"correctness": 1}}, "Use rewards.weights.correctness: "),
        ({"dataset": DATASET}, "Use data.dataset: "),
        ({"training_file": "file-1"}, "Use data.dataset: "),
        ({"data": {"prompt_column": "q"}}, "Did you mean question_column?"),
        ({"data": {"name": "main"}}, "Did you mean subset?"),
        ({"data": {"examples": [{"q": "1", "a": "1"}]}}, "Did you mean question? Did you mean answer?"),
        ({"system_prompt": "x"}, "Use data.system_prompt: "),
        ({"seed": 1}, "Use training.seed, for data and sampling, or lora.seed"),
        ({"gpus": 1}, "Use resources.gpus: "),
        ({"resources": {"gpu_type": "H100"}}, "Use resources.min_gpu_memory_gb: "),
        ({"gpu_memory_utilization": 0.6}, "Use model.gpu_memory_share: "),
        ({"use_vllm": True}, "Did you mean engine?"),
        ({"wandb": {}}, "Use training.report_to: "),
        ({"resume_from_checkpoint": True}, "Did you mean from_checkpoint?"),
        ({"suffix": "mine"}, "Did you mean name?"),
        ({"hyperparameters": {"n_epochs": 1}}, "Give its values in optimizer, training, sampling and loss."),
        ({"output_dir": "x"}, "Remove it; results are stored in the service's bucket"),
        ({"sampling": {"stop": ["x"]}}, "Remove it; a completion ends at"),
    ],
)
def test_another_name_is_answered_with_ours(data: dict[str, Any], remedy: str) -> None:
    assert remedy in remedies(data)


@pytest.mark.parametrize(
    ("data", "remedy"),
    [
        ({"training": {"steps": "250"}}, "Write it without quotes: 250."),
        ({"training": {"steps": 250.0}}, "Write it without a decimal point: 250."),
        ({"training": {"steps": 250.5}}, "Give a whole number from 1 to 100000"),
        ({"training": {"steps": "many"}}, "Give a whole number from 1 to 100000"),
        ({"training": {"steps": "0"}}, "Give a whole number from 1 to 100000"),
        ({"optimizer": {"learning_rate": "5e-6"}}, "Write it without quotes: 5e-06."),
        ({"optimizer": {"learning_rate": "nan"}}, "Give a number above 0"),
        ({"schema_version": 2}, "Give 1"),
        ({"metadata": {"run": 7}}, 'Write it in quotes: "7".'),
        ({"loss": {"type": "GRPO"}}, "Did you mean grpo?"),
        ({"loss": {"type": "dr-grpo"}}, "Did you mean dr_grpo?"),
        ({"loss": {"type": "ppo"}}, "Give one of grpo, bnpo, dr_grpo, dapo"),
        ({"engine": "vllm"}, "Did you mean unsloth?"),
        ({"model": {"precision": "bf16"}}, "Did you mean 16bit?"),
        ({"model": {"precision": 4}}, "Did you mean 4bit?"),
        ({"data": {"source": "huggingface"}}, "Did you mean hub?"),
        ({"model": "x/y"}, 'Write {"name": "x/y"}.'),
        ({"lora": 16}, 'Write {"rank": 16}.'),
        ({"lora": None}, "Leave it out for the default."),
        ({"data": "x/y"}, 'Write {"dataset": "x/y"}.'),
        ({"rewards": ["correctness"]}, 'Write {"weights": {"correctness": 1.0, ...}}'),
        ({"lora": {"target_modules": "q_proj"}}, 'Write a list: ["q_proj"].'),
        ({"lora": {"target_modules": "all-linear"}}, "Leave it out for all seven"),
        ({"training": {"report_to": "none"}}, "Write an empty list: []."),
        ({"model": {"name": "https://huggingface.co/Qwen/Qwen3-4B"}}, 'Write the name alone: "Qwen/Qwen3-4B".'),
        ({"model": {"name": "https://huggingface.co/.x/y"}}, "Give a name or owner/name"),
        ({"model": "/data/x"}, 'Write an object, {"name": ...}. Put the folder into the worker'),
        ({"model": "https://huggingface.co/a/b"}, 'Write an object, {"name": ...}. Write the name alone: "a/b".'),
        ({"optimizer": "adam"}, 'Write an object, {"name": ...}. Did you mean adamw_torch?'),
        ({"loss": "drgrpo"}, 'Write an object, {"type": ...}. Did you mean dr_grpo?'),
        ({"lora": 16.5}, 'Write an object, {"rank": ...}. Give a whole number from 1 to 256'),
        ({"lora": 4096}, 'Write an object, {"rank": ...}. Give a whole number from 1 to 256'),
        ({"training": 250.0}, 'Write an object, {"steps": ...}. Write it without a decimal point: 250.'),
        ({"resources": 99}, 'Write an object, {"gpus": ...}. Give a whole number from 0 to 8'),
        ({"data": "s3://bucket/x.jsonl"}, 'Write an object, {"dataset": ...}. It is an object in S3: set data.source'),
        ({"from_checkpoint": "7"}, 'Write an object, {"job": ..., "step": ...}. Give the id of a job: '),
        ({"from_checkpoint": {"job": 5, "step": 1}}, "Give the id of a job: "),
        ({"model": {"revision": -1}}, "Give a name of at most 64 letters"),
        ({"data": {"dataset": "https://huggingface.co/datasets/.a/b"}}, "Use owner/name, or upload a file"),
        ({"model": {"name": "/models/qwen"}}, "Put the folder into the worker's GRPO_MODEL_DIR"),
        ({"data": {"dataset": DATASET}}, "It is an upload: set data.source to upload."),
        ({"data": {"dataset": "s3://bucket/data/x.jsonl"}}, "It is an object in S3: set data.source to s3."),
        ({"data": {"dataset": "https://huggingface.co/datasets/a/b"}}, 'Write the name alone: "a/b".'),
    ],
)
def test_a_value_that_is_nearly_right_is_corrected(data: dict[str, Any], remedy: str) -> None:
    assert remedy in remedies(data)


@pytest.mark.parametrize("value", ["7", "7.0", 7.0, "1_0"])
def test_a_corrected_number_is_accepted(value: object) -> None:
    corrected = remedies({"training": {"steps": value}}).rpartition(": ")[2].rstrip(".")
    assert parse_spec({"training": {"steps": json.loads(corrected)}}).training.steps in (7, 10)


@pytest.mark.parametrize(
    ("path", "advice"),
    [
        ("optimizer.beta", "Use optimizer.beta1 and optimizer.beta2."),
        ("optimizer.type", "Did you mean name?"),
        ("loss.clip", "Did you mean epsilon?"),
        ("training.step", "Did you mean steps?"),
        ("training.iterations", "Did you mean steps?"),
        ("training.checkpoint", "Did you mean checkpoint_every?"),
        ("sampling.generation", "Did you mean generations?"),
        ("evaluation.num_samples", "Did you mean questions?"),
        ("evaluation.limit", "Did you mean questions?"),
        ("evaluation.eval_dataset", "Did you mean dataset?"),
        ("validation_file", "Use evaluation.dataset: "),
        ("evaluation.eval_steps", "Did you mean every?"),
        ("eval_interval", "Use evaluation.every: "),
        ("evaluation.patience", "Did you mean stop_when?"),
        ("data.label", "Did you mean answer_column?"),
        ("data.labels", "Did you mean answer_column?"),
        ("data.config", "Did you mean subset?"),
        ("data.branch", "Did you mean revision?"),
        ("data.examples.0.solution", "Did you mean answer?"),
        ("model.version", "Did you mean revision?"),
        ("from_checkpoint.id", "Did you mean job?"),
        ("from_checkpoint.checkpoint", "Did you mean step?"),
        ("audits.kl", "Did you mean kl_runaway?"),
        ("optimizer.clip", "Did you mean max_grad_norm?"),
        ("loss.beta1", "Use optimizer.beta1: "),
        ("rewards.model", "Use model: "),
        ("sampling.num_iterations", "Use loss.iterations: "),
        ("sampling.demonstrations", "Use data.examples: "),
        ("step", "Use training.steps: "),
    ],
)
def test_a_name_means_what_it_means_where_it_stands(path: str, advice: str) -> None:
    assert aliases.meant_by(in_parts(path)).startswith(advice)


@pytest.mark.parametrize(
    "path",
    [
        *("optimizer.epsilon", "optimizer.adam_epsilon", "model.type", "model.config", "model.policy", "lora.path"),
        *("loss.alpha", "training.num_samples", "optimizer.mu", "sampling.prompt", "sampling.truncation"),
        *("evaluation.temperature", "evaluation.generations", "from_checkpoint.path", "guards.steps", "audits.type"),
    ],
)
def test_where_nobody_can_tell_the_fields_there_are_named(path: str) -> None:
    assert aliases.meant_by(in_parts(path)).startswith("Remove it; the fields here are ")


def test_no_section_is_advised_to_itself() -> None:
    sections = [field for field in aliases._all_fields() if aliases._fields_of(in_parts(field))]
    for section in sections:
        for name in {*aliases._leaves(), *aliases._other_names()}:
            assert not aliases.meant_by(in_parts(f"{section}.{name}")).startswith(f"Use {section}:"), (section, name)


SCALARS = (
    *(0, 1, 7, 16, 99, 4096, 10**9, -1, 0.5, 16.5, 250.0, 1e300),
    *("", "x", "x/y", "/data/x", "./x", "~/x", "s3://b/k", "https://huggingface.co/a/b", "adam", "adamw_torch", "grpo"),
    *("drgrpo", "GRPO", "7", "none", "a b", "a\nb", DATASET, "job-01M82BSW0T5K4T171YZB9EJZRM", "é/x", "x" * 60),
)


@pytest.mark.parametrize("section", [name for name in aliases._all_fields() if aliases._fields_of(in_parts(name))])
def test_a_section_that_is_suggested_is_accepted(section: str) -> None:
    for value in SCALARS:
        suggestion = re.search(r"Write (\{.*\})\.", advice_on(section, value), re.S)
        if suggestion and (given := json.loads(suggestion[1].replace("...", "1"))):
            assert not [
                told for told in told_of(section, given) if told.pointer.startswith("/" + section.replace(".", "/"))
            ], value


TEXTS = [
    field
    for field in [*aliases._all_fields(), "metadata.key", "data.examples.0.question", "data.examples.0.answer"]
    if field_schema(in_parts(field)).get("type") == "string" and "enum" not in field_schema(in_parts(field))
]


@pytest.mark.parametrize("field", TEXTS)
def test_a_text_that_is_suggested_is_accepted(field: str) -> None:
    pointer = "/" + field.replace(".", "/")
    for value in SCALARS:
        suggestion = re.search(r'(?:in quotes|name alone): (".*")\.', advice_on(field, value))
        if suggestion:
            given = json.loads(suggestion[1])
            assert not [told for told in told_of(field, given) if told.pointer == pointer], value


def test_values_are_suggested_where_they_would_do() -> None:
    """Else the two before this would hold of advice that suggests nothing."""
    assert len(TEXTS) > 10
    for section, value in (("model", "x/y"), ("lora", 16), ("optimizer", "adamw_torch"), ("loss", "grpo")):
        assert re.search(r"Write \{.*\}\.", advice_on(section, value))
    for field in ("name", "model.name", "metadata.key", "data.examples.0.answer", "data.subset"):
        assert advice_on(field, 7) == 'Write it in quotes: "7".'


def advice_on(field: str, value: object) -> str:
    """The remedy for this value of this field alone; empty where it is accepted."""
    pointer = "/" + field.replace(".", "/")
    return next((told.remedy for told in told_of(field, value) if told.pointer == pointer), "")


def told_of(field: str, value: object) -> list[Problem]:
    spec = value
    for part in reversed(in_parts(field)):
        spec = [spec] if isinstance(part, int) else {part: spec}
    try:
        parse_spec(spec)
    except SpecError as error:
        return error.problems
    return []


def test_every_field_that_advice_names_is_in_the_schema() -> None:
    for field in [*aliases._FIELDS, *(field for _, field in aliases._IN_SECTION)]:
        path = field.replace("data.examples.", "data.examples.0.").split(".")
        assert field_schema(tuple(int(part) if part.isdigit() else part for part in path)), field


def test_no_name_means_two_things() -> None:
    other = [name for text in aliases._FIELDS.values() for name in text.split()]
    notes = [*aliases._NOTES, *(name for text in aliases._SAME_NOTE.values() for name in text.split())]
    assert sorted({*other, *notes}) == sorted([*other, *notes])
    assert set(aliases._SAME_NOTE) | {note for _, note in aliases._NOTE_IN_SECTION} <= set(aliases._NOTES)


def test_a_huge_name_costs_no_time() -> None:
    assert remedies({"learning_rate" * 10_000: 1}).startswith("Remove it")
