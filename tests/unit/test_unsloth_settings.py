"""A spec in Unsloth's words: what it would change behind one's back is given so that it ends where the spec says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from grpo_core.engines.settings import (
    adapter_settings,
    sequences_at_once,
    trainer_settings,
    unsloth_adapter_settings,
    unsloth_arguments,
    unsloth_model_settings,
)
from grpo_core.hardware.models import Precision
from grpo_core.spec import parse_spec

BF16 = Precision("auto", "16bit", "bfloat16", "")
NF4 = Precision("4bit", "4bit", "bfloat16", "")


def settings_of(spec: dict[str, Any], precision: Precision = BF16) -> dict[str, Any]:
    return trainer_settings(parse_spec(spec), precision, Path("out"), "unsloth")


def test_only_what_must_differs_from_plain_trl() -> None:
    plain = trainer_settings(parse_spec({}), BF16, Path("out"))
    settings = settings_of({})
    differing = {name for name, value in settings.items() if plain.get(name, "none such") != value}
    assert differing == {
        *("use_vllm", "vllm_mode", "vllm_enable_sleep_mode", "vllm_sampling_params", "top_k"),
        *("gradient_checkpointing_kwargs", "unsloth_num_chunks", "unsloth_logit_chunk_multiplier"),
    }
    assert plain.keys() <= settings.keys()


def test_the_recipe_stays_a_batch_of_six_without_correction() -> None:
    settings = settings_of({})
    assert settings["per_device_train_batch_size"] == settings["num_generations"] == 6
    assert settings["beta"] == 0.04
    assert settings["vllm_importance_sampling_correction"] is False
    assert settings["mask_truncated_completions"] is False


@pytest.mark.parametrize(("given", "told"), [(0, -1), (20, 20)])
def test_top_k_off_has_vllms_name(given: int, told: int) -> None:
    assert settings_of({"sampling": {"top_k": given}})["top_k"] == told


@pytest.mark.parametrize(
    ("kind", "scale_by", "argument"),
    [("dr_grpo", "group", None), ("dr_grpo", "none", "none"), ("grpo", "group", "group"), ("dapo", "batch", "batch")],
)
def test_scaling_is_given_so_that_unsloth_leaves_it(kind: str, scale_by: str, argument: str | None) -> None:
    settings = settings_of({"loss": {"type": kind, "scale_by": scale_by}})
    assert settings["scale_rewards"] == scale_by
    assert unsloth_arguments(settings) == {**settings, "scale_rewards": argument}


@pytest.mark.parametrize(
    ("wanted", "model", "kwargs"),
    [
        ("unsloth", "unsloth", {"use_reentrant": True}),
        ("standard", True, {"use_reentrant": True}),
        ("off", False, None),
    ],
)
def test_gradient_checkpointing(wanted: str, model: str | bool, kwargs: dict[str, bool] | None) -> None:
    spec = parse_spec({"lora": {"gradient_checkpointing": wanted}})
    settings = trainer_settings(spec, BF16, Path("out"), "unsloth")
    assert settings["gradient_checkpointing"] is (wanted != "off")
    assert settings["gradient_checkpointing_kwargs"] == kwargs
    assert unsloth_model_settings(spec, BF16)["use_gradient_checkpointing"] == model
    assert unsloth_adapter_settings(spec)["use_gradient_checkpointing"] == model


def test_the_model_is_loaded_as_the_spec_says() -> None:
    spec = parse_spec({"model": {"gpu_memory_share": 0.3, "max_sequence": 2048}, "lora": {"rank": 16}})
    settings = unsloth_model_settings(spec, NF4)
    expected = {"max_seq_length": 2048, "load_in_4bit": True, "max_lora_rank": 16, "gpu_memory_utilization": 0.3}
    assert settings | expected == settings
    assert settings["fast_inference"] is True
    assert settings["trust_remote_code"] is False
    assert unsloth_model_settings(spec, BF16)["load_in_4bit"] is False


def test_the_adapter_is_the_same_as_plain_pefts() -> None:
    spec = parse_spec({"lora": {"rank": 8, "alpha": 16, "seed": 5}})
    settings, plain = unsloth_adapter_settings(spec), adapter_settings(spec)
    assert settings["random_state"] == 5
    assert {name: settings[name] for name in ("r", "lora_alpha", "lora_dropout", "target_modules", "bias")} == {
        name: plain[name] for name in ("r", "lora_alpha", "lora_dropout", "target_modules", "bias")
    }
    # vLLM serves neither, and Unsloth refuses any value but None.
    assert settings["modules_to_save"] is None


@pytest.mark.parametrize(
    ("prompts", "generations", "questions", "expected"),
    [(1, 3, 0, 4), (1, 6, 0, 8), (1, 6, 300, 64), (1, 6, 10, 16), (8, 8, 300, 64), (16, 8, 300, 128), (32, 8, 0, 257)],
)
def test_graphs_are_captured_for_what_the_job_draws(
    prompts: int, generations: int, questions: int, expected: int
) -> None:
    spec = {
        "sampling": {"prompts_per_step": prompts, "generations": generations},
        "evaluation": {"questions": questions},
    }
    assert sequences_at_once(parse_spec(spec)) == expected
