"""From a job spec to TRL's and Unsloth's settings, and the check that a built trainer really has them.

Owns the mapping of names and the list of settings that matter: each is given explicitly, because library defaults
drift and Unsloth drops what it does not know. Imports no torch. Invariant: a run whose trainer differs from the
request in any of them fails before its first step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_core.errors import JobFailure
from grpo_core.models import Precision
from grpo_core.rewards import REWARD_NAMES
from grpo_core.spec import JobSpec

if TYPE_CHECKING:
    from grpo_core.engines import EngineName

Settings = dict[str, Any]

_TAKEN_FOR_NOT_GIVEN = 256
"""Unsloth's default of `max_num_seqs`; whoever asks for exactly that gets what Unsloth thinks fits the card."""

_AT_ONCE_FOR_EVALUATION = 64
"""Questions answered at a time: as fast for each as six (reading the weights takes the time), and few graphs."""


def trainer_settings(spec: JobSpec, precision: Precision, output_dir: Path, engine: EngineName = "trl") -> Settings:
    """The settings a built trainer of this job must have: the arguments of TRL's `GRPOConfig`."""
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
    """What to give Unsloth's `GRPOConfig` so that it ends at `settings`.

    With `dr_grpo` it replaces scaling by group, but takes None for "as it would be without me".
    """
    scale = settings["scale_rewards"]
    return {**settings, "scale_rewards": None if settings["loss_type"] == "dr_grpo" and scale == "group" else scale}


def unsloth_model_settings(spec: JobSpec, precision: Precision) -> Settings:
    """The arguments of `FastLanguageModel.from_pretrained` for this job, less the model's path and data type."""
    return {
        "max_seq_length": spec.model.max_sequence,
        "load_in_4bit": precision.weights == "4bit",
        "fast_inference": True,
        "max_lora_rank": spec.lora.rank,
        "gpu_memory_utilization": spec.model.gpu_memory_share,
        "max_num_seqs": sequences_at_once(spec),
        "use_gradient_checkpointing": unsloth_checkpointing(spec),
        "random_state": spec.training.seed,
        # Else names of well-known models are replaced by Unsloth's own copies of them.
        "use_exact_model_name": True,
        "trust_remote_code": False,
        "disable_log_stats": True,
    }


def unsloth_adapter_settings(spec: JobSpec) -> Settings:
    """The arguments of `FastLanguageModel.get_peft_model` for this job."""
    named = {name: value for name, value in adapter_settings(spec).items() if name not in ("task_type", "use_dora")}
    return {
        **named,
        "use_gradient_checkpointing": unsloth_checkpointing(spec),
        "random_state": spec.lora.seed,
        "max_seq_length": spec.model.max_sequence,
    }


def unsloth_checkpointing(spec: JobSpec) -> str | bool:
    """Gradient checkpointing in Unsloth's words."""
    wanted = spec.lora.gradient_checkpointing
    return {"off": False, "standard": True}.get(wanted, "unsloth")


def sequences_at_once(spec: JobSpec) -> int:
    """How many completions vLLM draws at a time: those of a step, so that few graphs are captured.

    Rounded up to a number that vLLM captures a graph for: six at a time would be decoded layer by layer, since the
    graph of eight is only made where eight can be asked for, and the one of four is too small.
    """
    wanted = spec.completions_per_step
    if spec.evaluation.questions:
        wanted = max(wanted, min(spec.evaluation.questions, _AT_ONCE_FOR_EVALUATION))
    captured = next((size for size in (1, 2, 4) if size >= wanted), None)
    if captured is None:
        step = 8 if wanted <= _TAKEN_FOR_NOT_GIVEN else 16
        captured = -(-wanted // step) * step
    return captured + 1 if captured == _TAKEN_FOR_NOT_GIVEN else captured


def adapter_settings(spec: JobSpec) -> Settings:
    """The arguments of PEFT's `LoraConfig` for this job."""
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
    """Fail the job if any requested setting is missing or different among the effective ones."""
    missing = object()
    differing = [
        f"{name}: asked {_plain(value)!r}, got {'nothing' if found is missing else repr(_plain(found))}"
        for name, value in requested.items()
        if _plain(found := effective.get(name, missing)) != _plain(value)
    ]
    if differing:
        raise JobFailure(
            "internal",
            "settings_differ",
            f"{where} has other settings than were asked for: {'; '.join(differing)}.",
            hint="This is a fault of the service or of its library versions: install the locked versions.",
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
        # Plain "constant" leaves the warm-up out.
        "lr_scheduler_type": "constant_with_warmup" if optimizer.schedule == "constant" else optimizer.schedule,
        # In steps: transformers reads a ratio from numbers below 1, and so would take a ratio of 1 for one step.
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
    weights = spec.rewards.weights.model_dump()
    return {
        "loss_type": spec.loss.type,
        "beta": spec.loss.beta,
        "epsilon": spec.loss.epsilon,
        "epsilon_high": spec.loss.epsilon,
        "delta": None,
        "scale_rewards": spec.loss.scale_by,
        "reward_weights": [weights[name] for name in REWARD_NAMES],
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
    """What differs where the trainer is Unsloth's and the completions are vLLM's."""
    return {
        "use_vllm": True,
        "vllm_mode": "colocate",
        # Waking and sleeping costs time in each step, and with shared weights frees little.
        "vllm_enable_sleep_mode": False,
        "vllm_sampling_params": None,
        # vLLM's word for "off".
        "top_k": settings["top_k"] or -1,
        # Unsloth's forward pass cannot be repeated by the other kind of checkpointing.
        "gradient_checkpointing_kwargs": {"use_reentrant": True} if settings["gradient_checkpointing"] else None,
        "unsloth_num_chunks": -1,
        # One part of the logits for each completion: a quarter of Unsloth's number, so that reading the output head
        # for each takes less time than multiplying with it.
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
    """Silence: `records` and `checkpoints` write what a run leaves behind, the library writes nothing."""
    return {
        "logging_strategy": "steps",
        "logging_steps": 1,
        # Filtering would replace a loss that is not finite by an average, and hide that a run diverged.
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
