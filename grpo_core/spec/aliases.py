"""Finds the intended field for another tool's name, a field in the wrong section, or a misspelt name.

Owns the names that TRL, Unsloth, vLLM, PEFT and hosted APIs use for the fields of a spec, and the advice on settings
without a field. Invariant: every field named here is in the schema, and only advice is given: no alias is ever
accepted, so a spec reads the same everywhere.
"""

from __future__ import annotations

import difflib
import re
from collections import defaultdict
from functools import cache
from typing import Any, cast

from grpo_core.spec.hints import expected, field_schema, resolve, schema
from grpo_core.strict_json import Path

_FIELDS: dict[str, str] = {
    "name": "suffix job_name run_name display_name title experiment_name experiment",
    "metadata": "tags labels annotations",
    "model": "base policy",
    "model.name": "base_model base_model_name model_id model_path model_name_or_path pretrained_model_name_or_path"
    " pretrained_model checkpoint_path",
    "model.revision": "commit branch",
    "model.max_sequence": "max_seq_length max_seq_len max_sequence_length max_length max_model_len context_length"
    " sequence_len seq_len",
    "model.gpu_memory_share": "gpu_memory_utilization vllm_gpu_memory_utilization gpu_memory_fraction",
    "model.precision": "dtype torch_dtype quantization quantize bits quantization_config",
    "lora": "peft peft_config lora_config adapter",
    "lora.rank": "r lora_r rank",
    "lora.gradient_checkpointing": "use_gradient_checkpointing",
    "optimizer": "optimizer_config",
    "optimizer.name": "optim",
    "optimizer.learning_rate": "lr learning_rate_multiplier initial_lr",
    "optimizer.beta1": "adam_beta1",
    "optimizer.beta2": "adam_beta2",
    "optimizer.schedule": "lr_scheduler_type lr_scheduler scheduler lr_schedule",
    "optimizer.warmup_ratio": "warmup",
    "optimizer.max_grad_norm": "gradient_clipping grad_clip clip_grad clip max_norm",
    "training.steps": "step max_steps num_steps n_steps total_steps train_steps num_train_steps max_iters iters",
    "training.log_every": "logging_steps log_steps log_interval",
    "training.save_steps": "save_every save_interval",
    "training.report_to": "wandb tensorboard mlflow tracker trackers logger integrations wandb_project",
    "sampling": "generation sampler sampling_params generation_config",
    "sampling.generations": "num_generations num_samples group_size rollouts num_rollouts n_rollouts samples_per_prompt"
    " num_return_sequences rollout_n n_samples",
    "sampling.gradient_accumulation": "gradient_accumulation_steps grad_accum accumulation_steps",
    "sampling.max_prompt_tokens": "max_prompt_length max_prompt_len max_input_tokens",
    "sampling.max_completion_tokens": "max_completion_length max_tokens max_new_tokens max_response_length"
    " max_output_tokens response_length max_completion_len",
    "loss.beta": "kl kl_coef kl_coeff kl_beta kl_weight kl_penalty kl_loss_coef kl_penalty_coef",
    "loss.epsilon": "clip_range clip_eps clip_ratio cliprange epsilon_low",
    "loss.scale_by": "scale_rewards normalize_advantages advantage_scaling",
    "loss.iterations": "num_iterations mu ppo_epochs updates_per_step",
    "rewards.weights": "reward_funcs reward_functions reward_function reward_fn reward_weights reward rewards_weights",
    "rewards.graders": "grader verifier verifiers custom_rewards",
    "rewards.formula": "calculate_output",
    "data": "train_data",
    "data.dataset": "dataset training_file train_file training_data file file_id path data_path data_files dataset_name"
    " dataset_id dataset_path dataset_name_or_path train_dataset datasets hub_id",
    "evaluation.dataset": "eval_dataset validation_file validation_data eval_data validation_dataset test_dataset"
    " test_data",
    "data.source": "dataset_source source_type",
    "data.subset": "config_name dataset_config configuration dataset_config_name",
    "data.question_column": "prompt prompt_column prompt_field prompt_key question_field question_key input_column"
    " input_key input_field problem_column instruction_column question",
    "data.answer_column": "answer_field answer_key solution_column label_column target_column response_column"
    " output_column completion_column ground_truth_column solution answer",
    "data.system_prompt": "system system_message system_instruction",
    "data.examples": "few_shot few_shots few_shot_examples shots demonstrations worked_examples",
    "data.max_rows": "max_samples max_examples limit num_rows max_train_samples",
    "engine": "backend framework trainer use_vllm fast_inference use_unsloth vllm",
    "evaluation.questions": "eval_questions eval_size num_eval_samples n_eval test_size",
    "evaluation.every": "eval_steps eval_interval eval_every",
    "evaluation.sample": "eval_samples",
    "evaluation.stop_when": "early_stopping early_stopping_patience early_stopping_threshold patience",
    "resources.gpus": "gpu num_gpus n_gpus gpu_count devices n_gpu",
    "resources.hosts": "nodes num_nodes nnodes n_nodes num_machines",
    "resources.min_gpu_memory_gb": "gpu_memory gpu_memory_gb vram min_vram min_gpu_memory memory_gb",
    "from_checkpoint": "resume_from_checkpoint checkpoint init_from parent_job resume_from initial_checkpoint",
    "schema_version": "version spec_version",
}
"""Other names of a field, as TRL, Unsloth, vLLM, PEFT, verl and hosted APIs call it."""

_QUESTIONS_A_STEP = "a step draws sampling.generations completions for each of sampling.prompts_per_step questions"
_NO_PIECES = "Give its values in optimizer, training, sampling and loss."
_NOTES: dict[str, str] = {
    "load_in_4bit": 'Use model.precision: "4bit", or "16bit"; "auto" decides by the card\'s memory.',
    "load_in_8bit": 'Use model.precision: "8bit" with engine: "native", which is FP8; or "4bit" or "16bit".',
    "load_in_16bit": 'Use model.precision: "16bit".',
    "bf16": 'Use model.precision: "16bit", which is bfloat16 if the GPU supports it.',
    "fp16": 'Use model.precision: "16bit", which is bfloat16 if the GPU supports it, else float16.',
    "full_finetuning": "Remove it; a job trains a LoRA adapter (lora).",
    "betas": "Use optimizer.beta1 and optimizer.beta2.",
    "warmup_steps": "Use optimizer.warmup_ratio: the share of training.steps.",
    "seed": "Use training.seed, for data and sampling, or lora.seed, for the adapter's initial weights.",
    "batch_size": f"Use sampling.prompts_per_step and sampling.generations: {_QUESTIONS_A_STEP}.",
    "epochs": f"Use training.steps: {_QUESTIONS_A_STEP}, so an epoch is rows / prompts_per_step of them.",
    "eval_strategy": "Use evaluation.every: the number of steps between two evaluations, 0 for none during training.",
    "gpu_type": "Use resources.min_gpu_memory_gb: GPUs are chosen by their memory.",
    "stop": "Remove it; a completion ends at the model's end-of-sequence token or at sampling.max_completion_tokens.",
    "output_dir": "Remove it; results are stored in the service's bucket: fetch them with grpo download.",
    "timeout": "Remove it; a job runs all training.steps, and can be cancelled.",
    "webhook": "Remove it; follow GET /jobs/{id}/events.",
    "hyperparameters": _NO_PIECES,
    "reference_model": "Remove it; the reference is the base model, and loss.beta is the weight of its KL term.",
    "push_to_hub": "Remove it; fetch the adapter with grpo download, and push it from there.",
}
_SAME_NOTE: dict[str, str] = {
    "batch_size": "per_device_train_batch_size train_batch_size micro_batch_size per_device_batch_size"
    " generation_batch_size global_batch_size",
    "epochs": "num_epochs num_train_epochs n_epochs epoch",
    "eval_strategy": "evaluation_strategy",
    "gpu_type": "accelerator instance_type gpu_model",
    "stop": "stop_sequences stop_token_ids eos_token stop_strings",
    "output_dir": "output output_path save_dir",
    "timeout": "max_runtime max_time time_limit max_duration",
    "webhook": "webhook_url callback_url callback webhooks",
    "hyperparameters": "method training_args training_arguments grpo_config grpo args config params",
    "reference_model": "ref_model ref_model_path sync_ref_model",
    "push_to_hub": "hub_model_id hub_token",
    "seed": "random_seed",
}
_IN_SECTION: dict[tuple[str, str], str] = {
    ("model", "model.name"): "id path base",
    ("model", "model.revision"): "version",
    ("optimizer", "optimizer.name"): "type kind",
    ("training", "training.steps"): "max_steps iterations",
    ("training", "optimizer"): "optimizer",
    ("sampling", "sampling.generations"): "n k",
    ("loss", "loss.epsilon"): "clip clipping eps",
    ("data", "data.subset"): "name config",
    ("data", "data.dataset"): "id",
    ("data", "data.revision"): "commit branch version",
    ("data", "data.question_column"): "questions",
    ("data", "data.answer_column"): "answers label labels target",
    ("data", "data.max_rows"): "num_samples n_samples size rows",
    ("data", "training.seed"): "seed",
    ("data.examples", "data.examples.question"): "q prompt input user problem",
    ("data.examples", "data.examples.answer"): "a completion output assistant response solution",
    ("evaluation", "evaluation.questions"): "n limit size rows samples num_samples n_samples max_samples num_questions"
    " num_examples max_examples",
    ("evaluation", "evaluation.max_completion_tokens"): "max_tokens max_new_tokens max_completion_length"
    " max_output_tokens",
    ("evaluation", "evaluation.dataset"): "data file",
    ("evaluation", "evaluation.every"): "steps interval eval_steps eval_every eval_interval",
    ("evaluation", "evaluation.stop_when"): "early_stopping patience stop",
    ("audits", "audits.kl_runaway"): "kl",
    ("from_checkpoint", "from_checkpoint.job"): "id parent_job",
    ("from_checkpoint", "from_checkpoint.step"): "checkpoint checkpoint_step",
}
"""By section and field: names that mean that field only in this section."""
_NOTE_IN_SECTION: dict[tuple[str, str], str] = {
    ("optimizer", "betas"): "beta",
    ("evaluation", "eval_strategy"): "strategy eval_strategy",
}
"""The same for settings without a field."""
_APART = frozenset({"data.examples", "rewards.weights", "evaluation", "guards", "audits", "from_checkpoint"})
"""Sections in which the name of another section's field means something else: `evaluation.temperature` is not that of
sampling."""
_GENERIC = frozenset(
    "type beta epsilon step job mode weights integer alpha iterations questions truncation duplicates base policy"
    " path title commit branch version labels annotations bits clip mu limit num_samples n_samples max_samples"
    " checkpoint prompt question answer solution reward generation config args params method output".split()
)
"""Names that do not suggest a section: in a section without such a field they may mean anything."""

_GRADERS = ("rewards", "graders")
_SIBLING_LIKENESS = 0.72
_LIKENESS = 0.82
_LONGEST = 100


def meant_by(path: Path) -> str:
    """What to write instead of the unknown field at `path`, in one sentence."""
    section, name = path[:-1], _plain(path[-1])[:_LONGEST]
    siblings = _fields_of(section)
    if section[:2] == _GRADERS and len(section) > len(_GRADERS):
        return _among(siblings, name)
    near = {_plain(sibling): sibling for sibling in siblings}
    if name in near:
        return f"Did you mean {near[name]}?"
    here = ".".join(part for part in section if isinstance(part, str))
    field = _in_section().get((here, name)) or _alias_among(here, name)
    if field:
        return _advice(field, here)
    is_telling = not here or (here not in _APART and name not in _GENERIC_PLAIN)
    known = _notes_in_section().get((here, name)) or (_known(name, here, siblings) if is_telling else None)
    if known:
        return known
    close = difflib.get_close_matches(name, near, n=1, cutoff=_SIBLING_LIKENESS)
    if close:
        return f"Did you mean {near[close[0]]}?"
    meant = _like_one_elsewhere(name, here) if is_telling else None
    return meant or (f"Remove it; the fields here are {', '.join(siblings)}." if siblings else "Remove it.")


def field_of(name: str) -> str:
    """The dotted field that a name of another tool means, such as `lr`; any other name as it is."""
    return name if name in _all_fields() else _other_names().get(_plain(name), name)


def closest(name: str, names: tuple[str, ...]) -> str:
    """Which of `names` was intended, in one sentence."""
    close = difflib.get_close_matches(name, names, n=1, cutoff=_SIBLING_LIKENESS)
    if close:
        return f"Did you mean {close[0]}?"
    return f"Use one of {', '.join(names)}." if names else "Remove it."


def _among(siblings: list[str], name: str) -> str:
    """Advice for a field of an object whose fields exist nowhere else."""
    by_plain = {_plain(sibling): sibling for sibling in siblings}
    close = difflib.get_close_matches(name, by_plain, n=1, cutoff=0.6)
    return f"Did you mean {by_plain[close[0]]}?" if close else f"Remove it; the fields here are {', '.join(siblings)}."


def _known(name: str, here: str, siblings: list[str]) -> str | None:
    """The field of another section with this name, or a setting without a field."""
    field = _other_names().get(name) or _leaf_of(name, siblings) or _section_and_leaf(name)
    return _advice(field, here) if field and field != here else _notes().get(name)


def _like_one_elsewhere(name: str, here: str) -> str | None:
    """The field of another section with a similar name."""
    names = sorted({*_leaves(), *_other_names()} - (_GENERIC_PLAIN if here else set()))
    close = difflib.get_close_matches(name, names, n=1, cutoff=_LIKENESS)
    fields = (_leaves().get(close[0]) or [_other_names()[close[0]]]) if close else []
    return f"Did you mean {' or '.join(fields)}?" if fields and here not in fields else None


def _plain(name: str | int) -> str:
    """A name without case, dashes and underscores: `loraRank`, `lora-rank` and `lora_rank` are one."""
    return re.sub(r"[^a-z0-9]", "", str(name).lower())


_GENERIC_PLAIN = frozenset(map(_plain, _GENERIC))


def _alias_among(here: str, name: str) -> str | None:
    """The field of this section that other tools call by this name."""
    field = _other_names().get(name)
    return field if field and field.rpartition(".")[0] == here else None


def _advice(field: str, here: str) -> str:
    """Where to write it, and which values it takes; short for a field of the same section."""
    section, _, leaf = field.rpartition(".")
    if section == here:
        return f"Did you mean {leaf}?"
    return f"Use {field}: {expected(field_schema(tuple(field.split('.'))))}."


def _leaf_of(name: str, siblings: list[str]) -> str | None:
    """The only field of any section with exactly this name."""
    fields = _leaves().get(name, [])
    return fields[0] if len(fields) == 1 and name not in siblings else None


def _section_and_leaf(name: str) -> str | None:
    """The field whose section and name are written as one: `lora_dropout`, `optimizerName`."""
    return next((field for field in _all_fields() if _plain(field) == name), None)


@cache
def _other_names() -> dict[str, str]:
    return {_plain(name): field for field, names in _FIELDS.items() for name in names.split()}


@cache
def _in_section() -> dict[tuple[str, str], str]:
    return {(here, _plain(name)): field for (here, field), names in _IN_SECTION.items() for name in names.split()}


@cache
def _notes_in_section() -> dict[tuple[str, str], str]:
    return {
        (here, _plain(name)): _NOTES[note] for (here, note), names in _NOTE_IN_SECTION.items() for name in names.split()
    }


@cache
def _notes() -> dict[str, str]:
    same = {_plain(name): _NOTES[note] for note, names in _SAME_NOTE.items() for name in names.split()}
    return {**{_plain(name): text for name, text in _NOTES.items()}, **same}


@cache
def _leaves() -> dict[str, list[str]]:
    """The dotted fields by their last part."""
    leaves: dict[str, list[str]] = defaultdict(list)
    for field in _all_fields():
        leaves[_plain(field.rpartition(".")[2])].append(field)
    return dict(leaves)


@cache
def _all_fields() -> list[str]:
    """Every field of the spec with dots, sections before their fields, without elements of lists."""
    fields: list[str] = []

    def walk(node: dict[str, Any], prefix: str) -> None:
        for name, child in resolve(node, schema()).get("properties", {}).items():
            fields.append(prefix + name)
            walk(cast("dict[str, Any]", child), f"{prefix}{name}.")

    walk(schema(), "")
    return fields


def _fields_of(section: Path) -> list[str]:
    parent = field_schema(section) if section else schema()
    return list(parent.get("properties", {}))
