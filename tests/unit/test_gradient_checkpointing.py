"""Gradient checkpointing: off where a part of a step fits the card, and memory saved wherever anything is unknown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from grpo_core.engines.gradient_checkpointing import bytes_per_token, choose_gradient_checkpointing
from grpo_core.engines.protocol import EngineName
from grpo_core.hardware.models import Hardware, ModelFiles, choose_precision
from grpo_core.spec import parse_spec

QWEN_7B = {"num_hidden_layers": 28, "hidden_size": 3584, "intermediate_size": 18944}


def card(size: float, free: float | None = None) -> Hardware:
    return Hardware(1, int(size * 1e9), bf16=True, gpu_free_bytes=int((size if free is None else free) * 1e9))


H100, A10, T4 = map(card, (85.0, 24.1, 15.6))


def choose(
    folder: Path,
    hardware: Hardware,
    engine: EngineName = "unsloth",
    config: dict[str, Any] | None = QWEN_7B,
    **sections: Any,
) -> tuple[str, str]:
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    spec = parse_spec(sections)
    files = ModelFiles("model", None, "folder", folder, 7_615_600_000)
    precision = choose_precision(spec.model, files.parameters, hardware)
    chosen = choose_gradient_checkpointing(spec, files, precision, hardware, engine)
    return chosen.way, chosen.reason


def test_a_token_of_the_recipes_model() -> None:
    assert bytes_per_token(QWEN_7B) == 6_651_904


@pytest.mark.parametrize(
    ("hardware", "engine", "way"),
    [
        (H100, "unsloth", "off"),
        (H100, "trl", "off"),
        (A10, "unsloth", "unsloth"),
        (A10, "trl", "standard"),
        (T4, "unsloth", "unsloth"),
        (Hardware(), "trl", "standard"),
    ],
)
def test_the_recipe(tmp_path: Path, hardware: Hardware, engine: EngineName, way: str) -> None:
    assert choose(tmp_path, hardware, engine)[0] == way


def test_the_reason_has_both_numbers(tmp_path: Path) -> None:
    # 6 × (256 + 200) tokens at 6.65 MB; 0.9 of the card less vLLM's 0.6.
    way, reason = choose(tmp_path, H100)
    assert (way, "18.2 GB" in reason, "25.5 GB" in reason) == ("off", True, True)


@pytest.mark.parametrize(
    ("parts", "way"),
    [(16, "off"), (8, "unsloth")],
)
def test_smaller_parts_need_less(tmp_path: Path, parts: int, way: str) -> None:
    sampling = {"prompts_per_step": 32, "generations": 8, "gradient_accumulation": parts}
    assert choose(tmp_path, H100, sampling=sampling, model={"gpu_memory_share": 0.3})[0] == way


def test_what_rollouts_may_fill_is_not_free(tmp_path: Path) -> None:
    assert choose(tmp_path, H100, model={"gpu_memory_share": 0.8})[0] == "unsloth"
    assert choose(tmp_path, H100, "trl", model={"gpu_memory_share": 0.8})[0] == "off"


@pytest.mark.parametrize("engine", ["unsloth", "trl"])
def test_nor_is_what_somebody_else_has(tmp_path: Path, engine: EngineName) -> None:
    assert choose(tmp_path, card(85, free=80), engine)[0] == "off"
    assert choose(tmp_path, card(85, free=35), engine)[0] != "off"


@pytest.mark.parametrize("asked", ["unsloth", "standard", "off"])
def test_who_asks_for_a_way_gets_it(tmp_path: Path, asked: str) -> None:
    assert choose(tmp_path, T4, lora={"gradient_checkpointing": asked}) == (asked, "as requested")


@pytest.mark.parametrize("config", [None, {}, {"hidden_size": 3584}, {**QWEN_7B, "num_hidden_layers": None}, []])
def test_memory_is_saved_where_the_model_is_unknown(tmp_path: Path, config: Any) -> None:
    assert choose(tmp_path, H100, config=config)[0] == "unsloth"


def test_a_model_of_several_kinds_of_input_has_its_sizes_within(tmp_path: Path) -> None:
    assert choose(tmp_path, H100, config={"text_config": QWEN_7B})[0] == "off"
