"""Translates a job spec to the settings of TRL and Unsloth, and checks that a trainer has them.

Owns the mapping of names and the list of settings that matter. Each is set explicitly, because defaults of libraries
change and Unsloth drops unknown settings. Imports no torch. Invariant: a run whose trainer differs from the requested
settings fails before its first step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_core.compat.unsloth import TAKEN_FOR_NOT_GIVEN
from grpo_core.errors import JobFailure
from grpo_core.hardware.models import Precision
from grpo_core.reasons import FailureCode
from grpo_core.spec import JobSpec

if TYPE_CHECKING:
    from grpo_core.engines.protocol import EngineName

Settings = dict[str, Any]

_AT_ONCE_FOR_EVALUATION = 64
"""Questions per batch. A question takes as long as in a batch of six, because reading the weights takes the time; and
vLLM captures few graphs."""


def trainer_settings(spec: JobSpec, precision: Precision, output_dir: Path, engine: EngineName = "trl") -> Settings:
    """Return the settings that this job's trainer must have: the arguments of TRL's `GRPOConfig`."""
    on_cpu = precision.weights == "fp32"
    settings = {
        **_batch(spec),
        **_optimizer(spec),
        **_sampling(spec),
        **_loss(spec),
        **_rollout_engine(),
        **_memory(spec),
        **_bookkeeping(),
        "output_dir": str(output_dir),
        "use_cpu": on_cpu,
        "bf16": precision.dtype == "bfloat16",
        "fp16": precision.dtype == "float16",
        "dataloader_pin_memory": not on_cpu,
    }
    return {**settings, **_for_unsloth(settings)} if engine == "unsloth" else settings


def unsloth_arguments(settings: Mapping[str, Any]) -> Settings:
    """Return the arguments of Unsloth's `GRPOConfig` that result in `settings`.

    With `dr_grpo`, Unsloth replaces scaling by group, but leaves the value None unchanged.
    """
    scale = settings["scale_rewards"]
    return {**settings, "scale_rewards": None if settings["loss_type"] == "dr_grpo" and scale == "group" else scale}


def unsloth_model_settings(spec: JobSpec, precision: Precision) -> Settings:
    """Return the arguments of `FastLanguageModel.from_pretrained`, without the model's path and data type."""
    return {
        "max_seq_length": spec.model.max_sequence,
        "load_in_4bit": precision.weights == "4bit",
        "fast_inference": True,
        "max_lora_rank": spec.lora.rank,
        "gpu_memory_utilization": spec.model.gpu_memory_share,
        "max_num_seqs": sequences_at_once(spec),
        "use_gradient_checkpointing": unsloth_checkpointing(spec),
        "random_state": spec.training.seed,
        # Otherwise Unsloth replaces the names of well-known models by its own copies.
        "use_exact_model_name": True,
        "trust_remote_code": False,
        "disable_log_stats": True,
    }


def unsloth_adapter_settings(spec: JobSpec) -> Settings:
    """Return the arguments of `FastLanguageModel.get_peft_model` for this job."""
    named = {name: value for name, value in adapter_settings(spec).items() if name not in ("task_type", "use_dora")}
    return {
        **named,
        "use_gradient_checkpointing": unsloth_checkpointing(spec),
        "random_state": spec.lora.seed,
        "max_seq_length": spec.model.max_sequence,
    }


def unsloth_checkpointing(spec: JobSpec) -> str | bool:
    """Return Unsloth's value for gradient checkpointing."""
    wanted = spec.lora.gradient_checkpointing
    return {"off": False, "standard": True}.get(wanted, "unsloth")


def sequences_at_once(spec: JobSpec, ranks: int = 1) -> int:
    """Return how many completions vLLM generates at a time: the share of each rank in those of a step, so that few
    graphs are captured.

    It is rounded up to a number for which vLLM captures a graph. Six at a time would run without a graph: the graph for
    eight is captured only if eight are allowed, and the one for four is too small.
    """
    wanted = -(-spec.completions_per_step // ranks)
    if spec.evaluation.questions:
        wanted = max(wanted, min(spec.evaluation.questions, _AT_ONCE_FOR_EVALUATION))
    captured = next((size for size in (1, 2, 4) if size >= wanted), None)
    if captured is None:
        step = 8 if wanted <= TAKEN_FOR_NOT_GIVEN else 16
        captured = -(-wanted // step) * step
    return captured + 1 if captured == TAKEN_FOR_NOT_GIVEN else captured


def adapter_settings(spec: JobSpec) -> Settings:
    """Return the arguments of PEFT's `LoraConfig` for this job."""
    return {
        "r": spec.lora.rank,
        "lora_alpha": spec.lora.alpha,
        "lora_dropout": spec.lora.dropout,
        "target_modules": sorted(spec.lora.target_modules),
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "task_type": "CAUSAL_LM",
    }


def require_same(requested: Mapping[str, Any], effective: Mapping[str, Any], where: str) -> None:
    """Fail the job if a requested setting is missing from the effective ones or differs."""
    missing = object()
    differing = [
        f"{name}: requested {_plain(value)!r}, got {'nothing' if found is missing else repr(_plain(found))}"
        for name, value in requested.items()
        if _plain(found := effective.get(name, missing)) != _plain(value)
    ]
    if differing:
        raise JobFailure(
            FailureCode.SETTINGS_DIFFER,
            f"{where} differs from the requested settings: {'; '.join(differing)}.",
            hint="This is an error of the service or of its library versions: install the locked versions.",
        )


def _batch(spec: JobSpec) -> Settings:
    parts = spec.sampling.gradient_accumulation
    return {
        # TRL counts completions, not prompts: the recipe's 1 prompt x 6 generations is a batch of 6.
        "per_device_train_batch_size": spec.micro_batch,
        "gradient_accumulation_steps": parts,
        "steps_per_generation": parts,
        "num_generations": spec.sampling.generations,
        "num_iterations": spec.loss.iterations,
        "max_steps": spec.training.steps,
        "seed": spec.training.seed,
        "shuffle_dataset": True,
        "auto_find_batch_size": False,
        "dataloader_num_workers": 0,
        "dataloader_drop_last": False,
        "remove_unused_columns": False,
    }


def _optimizer(spec: JobSpec) -> Settings:
    optimizer = spec.optimizer
    warmup = math.ceil(optimizer.warmup_ratio * spec.training.steps)
    return {
        "optim": optimizer.name,
        "learning_rate": optimizer.learning_rate,
        "adam_beta1": optimizer.beta1,
        "adam_beta2": optimizer.beta2,
        "adam_epsilon": 1e-8,
        "weight_decay": optimizer.weight_decay,
        # "constant" has no warm-up.
        "lr_scheduler_type": "constant_with_warmup" if optimizer.schedule == "constant" else optimizer.schedule,
        # In steps, because transformers reads numbers below 1 as a ratio, and a ratio of 1 as one step.
        "warmup_steps": warmup,
        "max_grad_norm": optimizer.max_grad_norm,
    }


def _sampling(spec: JobSpec) -> Settings:
    sampling = spec.sampling
    return {
        "max_completion_length": sampling.max_completion_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": None,
        "repetition_penalty": sampling.repetition_penalty,
        "generation_kwargs": None,
        "cache_implementation": None,
        "mask_truncated_completions": False,
    }


def _loss(spec: JobSpec) -> Settings:
    return {
        "loss_type": spec.loss.type,
        "beta": spec.loss.beta,
        "epsilon": spec.loss.epsilon,
        "epsilon_high": spec.loss.epsilon,
        "delta": None,
        "scale_rewards": spec.loss.scale_by,
        # `grading` applies weights and formulas, so TRL has one reward, the total.
        "reward_weights": [1.0],
        "multi_objective_aggregation": "sum_then_normalize",
        "importance_sampling_level": "token",
        "off_policy_mask_threshold": None,
        # The recipe's KL term has no importance weight; TRL 1.15 adds one by default.
        "use_bias_correction_kl": False,
        "top_entropy_quantile": 1.0,
        "entropy_coef": 0.0,
        "use_adaptive_entropy": False,
        "sync_ref_model": False,
        "disable_dropout": False,
        "cast_lm_head_to_fp32": False,
    }


def _rollout_engine() -> Settings:
    return {
        "use_vllm": False,
        "vllm_importance_sampling_correction": False,
        "use_transformers_continuous_batching": False,
    }


def _for_unsloth(settings: Mapping[str, Any]) -> Settings:
    """Return the settings that differ with Unsloth's trainer and vLLM."""
    return {
        "use_vllm": True,
        "vllm_mode": "colocate",
        # Sleeping and waking takes time in each step, and with shared weights frees little memory.
        "vllm_enable_sleep_mode": False,
        "vllm_sampling_params": None,
        # vLLM's word for "off".
        "top_k": settings["top_k"] or -1,
        # The other kind of checkpointing cannot repeat Unsloth's forward pass.
        "gradient_checkpointing_kwargs": {"use_reentrant": True} if settings["gradient_checkpointing"] else None,
        "unsloth_num_chunks": -1,
        # One part of the logits per completion, a quarter of Unsloth's number: then reading the output head for each
        # part takes less time than the multiplication.
        "unsloth_logit_chunk_multiplier": 1,
    }


def _memory(spec: JobSpec) -> Settings:
    checkpointing = spec.lora.gradient_checkpointing != "off"
    return {
        "gradient_checkpointing": checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if checkpointing else None,
        "use_liger_kernel": False,
        "torch_compile": False,
    }


def _bookkeeping() -> Settings:
    """Disable the trainer's own logging, saving and evaluation: `records` and `checkpoints` write all files."""
    return {
        "logging_strategy": "steps",
        "logging_steps": 1,
        # The filter would replace a loss that is not finite by an average, and hide that a run diverged.
        "logging_nan_inf_filter": False,
        "log_completions": False,
        "save_strategy": "no",
        "eval_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "push_to_hub": False,
        "trust_remote_code": False,
    }


def _plain(value: object) -> object:
    return value.value if isinstance(value, Enum) else value
