"""A spec in TRL's words: the empty one is the recipe, and a trainer that differs from the request is refused."""

from __future__ import annotations

import enum
import json
import struct
from pathlib import Path
from typing import Any

import pytest

from grpo_core import engines
from grpo_core.engines import Choice, choose_engine
from grpo_core.engines.protocol import EngineName
from grpo_core.engines.settings import Settings, adapter_settings, require_same, trainer_settings
from grpo_core.errors import JobFailure
from grpo_core.hardware import models
from grpo_core.hardware.gpus import Gpu
from grpo_core.hardware.models import Hardware, Precision, choose_precision, count_parameters, find_model, local_folder
from grpo_core.spec import parse_spec

CPU_SPEC: dict[str, Any] = {"resources": {"gpus": 0}, "optimizer": {"name": "adamw_torch"}}
BF16 = Precision("auto", "16bit", "bfloat16", "")
FP32 = Precision("auto", "fp32", "float32", "")


TINY = Path("examples/models/tiny-arithmetic").resolve()


H100 = Gpu("H100", 80 << 30, (9, 0))


def choose(
    spec: dict[str, Any],
    gpus: int,
    ranks: int = 1,
    *,
    card: Gpu = H100,
    model: Path = TINY,
    parameters: int = 10**6,
    wrote: EngineName | None = None,
) -> Choice:
    return choose_engine(parse_spec(spec), [card] * gpus, ranks, model=model, parameters=parameters, wrote=wrote)


def no_warning(code: str, message: str) -> None:
    raise AssertionError((code, message))


def settings_of(spec: dict[str, Any], precision: Precision = BF16) -> Settings:
    return trainer_settings(parse_spec(spec), precision, Path("out"))


def test_the_empty_spec_is_the_recipe() -> None:
    settings = settings_of({})
    recipe = {
        "learning_rate": 5e-6,
        "adam_beta1": 0.9,
        "adam_beta2": 0.99,
        "weight_decay": 0.1,
        "warmup_steps": 25,
        "lr_scheduler_type": "cosine",
        "optim": "paged_adamw_8bit",
        "per_device_train_batch_size": 6,
        "gradient_accumulation_steps": 1,
        "steps_per_generation": 1,
        "num_generations": 6,
        "max_completion_length": 200,
        "max_steps": 250,
        "max_grad_norm": 0.1,
        "temperature": 0.9,
        "top_p": 1.0,
        "top_k": 0,
        "repetition_penalty": 1.0,
        "loss_type": "grpo",
        "beta": 0.04,
        "epsilon": 0.2,
        "scale_rewards": "group",
        "num_iterations": 1,
        "reward_weights": [1.0],
        "use_bias_correction_kl": False,
        "vllm_importance_sampling_correction": False,
        "seed": 3407,
        "bf16": True,
        "fp16": False,
        "use_cpu": False,
        "report_to": [],
        "save_strategy": "no",
    }
    assert {name: settings[name] for name in recipe} == recipe


def test_the_recipes_adapter() -> None:
    settings = adapter_settings(parse_spec({}))
    assert (settings["r"], settings["lora_alpha"], settings["lora_dropout"]) == (32, 32, 0.0)
    assert set(settings["target_modules"]) == {
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    }


def test_a_step_is_prompts_times_generations_however_it_is_split() -> None:
    settings = settings_of({"sampling": {"prompts_per_step": 4, "generations": 8, "gradient_accumulation": 2}})
    assert settings["per_device_train_batch_size"] == 16
    assert settings["gradient_accumulation_steps"] == settings["steps_per_generation"] == 2


def test_a_cpu_trains_in_fp32() -> None:
    settings = settings_of(CPU_SPEC, FP32)
    assert (settings["use_cpu"], settings["bf16"], settings["fp16"]) == (True, False, False)


@pytest.mark.parametrize(("ratio", "steps", "warmup"), [(0.0, 10, 0), (0.1, 4, 1), (1.0, 10, 10)])
def test_warm_up_is_counted_in_steps(ratio: float, steps: int, warmup: int) -> None:
    spec = {"optimizer": {"warmup_ratio": ratio}, "training": {"steps": steps}}
    assert settings_of(spec)["warmup_steps"] == warmup


def test_a_constant_rate_still_warms_up() -> None:
    assert settings_of({"optimizer": {"schedule": "constant"}})["lr_scheduler_type"] == "constant_with_warmup"


def test_trl_knows_one_reward_whatever_the_weights() -> None:
    weights = {"correctness": 2.0, "xml_count": 0.0}
    assert settings_of({"rewards": {"weights": weights}})["reward_weights"] == [1.0]


def test_every_section_of_a_spec_is_translated_or_used_elsewhere() -> None:
    """Two specs that differ in what a trainer should do must not translate to the same settings."""
    changed = {
        "optimizer": {"learning_rate": 1e-4, "beta1": 0.8, "beta2": 0.9, "weight_decay": 0.0, "max_grad_norm": 1.0},
        "training": {"steps": 7, "seed": 1},
        "sampling": {"temperature": 1.0, "top_p": 0.9, "top_k": 5, "repetition_penalty": 1.1, "generations": 4},
        "loss": {"type": "dapo", "beta": 0.0, "epsilon": 0.1, "scale_by": "none", "iterations": 2},
    }
    recipe = settings_of({})
    for section, fields in changed.items():
        for field, value in fields.items():
            assert settings_of({section: {field: value}}) != recipe, f"{section}.{field}"


class _Kind(enum.Enum):
    COSINE = "cosine"


def test_equal_settings_pass_also_where_a_library_made_them_enums() -> None:
    require_same({"lr_scheduler_type": "cosine"}, {"lr_scheduler_type": _Kind.COSINE, "other": 1}, "The trainer")


def test_a_differing_or_missing_setting_is_named() -> None:
    with pytest.raises(
        JobFailure, match=r"beta: requested 0\.04, got 0\.0; top_k: requested 0, got nothing"
    ) as failure:
        require_same({"beta": 0.04, "top_k": 0, "top_p": 1.0}, {"beta": 0.0, "top_p": 1.0}, "The trainer")
    assert failure.value.report.code == "settings_differ"


def test_the_engine_follows_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "_unsloth_is_ready", lambda: True)
    assert choose({}, 1) == Choice("native")
    assert choose({"resources": {"gpus": 2}}, 2, 2) == Choice("native")
    assert choose({}, 1, parameters=70 * 10**9) == Choice("unsloth", "The native engine has no weights in 4 bits.")
    assert choose({"model": {"precision": "16bit"}}, 1, parameters=70 * 10**9) == Choice("native")
    assert choose({}, 1, card=Gpu("T4", 16 << 30, (7, 5))).name == "unsloth"
    assert choose({"lora": {"dropout": 0.1}}, 1).reason == "The native engine has no dropout."
    assert choose({"engine": "trl"}, 1) == Choice("trl")
    assert choose(CPU_SPEC, 4) == Choice("native")
    assert choose({"engine": "native"}, 1) == Choice("native")
    assert choose(CPU_SPEC | {"engine": "trl"}, 0) == Choice("trl")


def test_a_job_that_native_cannot_run_on_a_cpu_runs_on_trl(tmp_path: Path) -> None:
    choice = choose(CPU_SPEC | {"lora": {"dropout": 0.1}}, 0)
    assert (choice.name, choice.reason) == ("trl", "The native engine has no dropout.")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}', encoding="utf-8")
    other = choose(CPU_SPEC, 0, model=tmp_path)
    assert other.name == "trl"
    assert "family 'gpt2'" in other.reason
    assert choose(CPU_SPEC, 0, 2, model=tmp_path).name == "trl"
    with pytest.raises(JobFailure, match="would depend on the number of processes, 2"):
        choose(CPU_SPEC | {"lora": {"dropout": 0.1}}, 0, 2)
    (tmp_path / "config.json").write_text('{"model_type": "tomorrow"}', encoding="utf-8")
    assert choose(CPU_SPEC, 0, model=tmp_path).name == "trl"


def test_a_run_resumes_with_the_engine_that_wrote_its_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "_unsloth_is_ready", lambda: True)
    assert choose(CPU_SPEC, 0, wrote="trl").name == "trl"
    assert choose({}, 1, wrote="trl").name == "trl"
    assert choose(CPU_SPEC | {"engine": "native"}, 0, wrote="trl") == Choice("native")
    monkeypatch.setattr(engines, "_unsloth_is_ready", lambda: False)
    assert choose({}, 1, wrote="unsloth").name == "trl"


@pytest.mark.parametrize(
    ("spec", "gpus", "code"),
    [
        ({}, 0, "too_few_gpus"),
        ({"engine": "unsloth"}, 1, "engine_not_available"),
    ],
)
def test_what_a_machine_cannot_run_is_refused(
    monkeypatch: pytest.MonkeyPatch, spec: dict[str, Any], gpus: int, code: str
) -> None:
    monkeypatch.setattr(engines, "_unsloth_is_ready", lambda: False)
    with pytest.raises(JobFailure) as failure:
        choose(spec, gpus)
    assert (failure.value.report.code, failure.value.exit_code) == (code, 10)
    assert failure.value.report.hint


@pytest.mark.parametrize(
    ("requested", "parameters", "hardware", "weights", "dtype"),
    [
        ("auto", 7.6e9, Hardware(), "fp32", "float32"),
        ("auto", 7.6e9, Hardware(1, int(80e9), bf16=True), "16bit", "bfloat16"),
        ("auto", 7.6e9, Hardware(1, int(24e9), bf16=True), "4bit", "bfloat16"),
        ("auto", 1.6e9, Hardware(1, int(8e9), bf16=False), "16bit", "float16"),
        ("16bit", 7.6e9, Hardware(1, int(16e9), bf16=False), "16bit", "float16"),
        ("4bit", 1e9, Hardware(1, int(80e9), bf16=True), "4bit", "bfloat16"),
    ],
)
def test_precision(requested: str, parameters: float, hardware: Hardware, weights: str, dtype: str) -> None:
    section = parse_spec({"model": {"precision": requested}}).model
    precision = choose_precision(section, int(parameters), hardware)
    assert (precision.requested, precision.weights, precision.dtype) == (requested, weights, dtype)
    assert precision.reason


def write_safetensors(file: Path, **shapes: list[int]) -> None:
    header = {name: {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]} for name, shape in shapes.items()}
    raw = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(struct.pack("<Q", len(raw)) + raw)
    (file.parent / "config.json").write_text("{}")


def test_parameters_are_counted_from_the_headers_of_all_shards(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "model-1.safetensors", a=[3, 4], b=[5])
    write_safetensors(tmp_path / "model-2.safetensors", c=[2, 2])
    assert count_parameters(tmp_path) == 21


def test_a_local_model_comes_before_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_safetensors(tmp_path / "owner" / "tiny" / "model.safetensors", a=[2])
    monkeypatch.setenv(models.MODEL_DIR_VARIABLE, str(tmp_path))
    files = find_model(parse_spec({"model": {"name": "owner/tiny"}}).model, no_warning)
    assert (files.source, files.parameters, files.path.name) == ("folder", 2, "tiny")


def test_a_model_folder_that_leads_out_of_the_directory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_safetensors(tmp_path / "elsewhere" / "model.safetensors", a=[2])
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "tiny").symlink_to(tmp_path / "elsewhere")
    monkeypatch.setenv(models.MODEL_DIR_VARIABLE, str(tmp_path / "models"))
    with pytest.raises(JobFailure, match="leads out"):
        local_folder("tiny")


@pytest.mark.parametrize("content", [None, b"", b"\xff" * 32, struct.pack("<Q", 2) + b"[]"])
def test_weights_that_cannot_be_read_are_the_users_to_mend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None
) -> None:
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text("{}")
    if content is not None:
        (tmp_path / "tiny" / "model.safetensors").write_bytes(content)
    monkeypatch.setenv(models.MODEL_DIR_VARIABLE, str(tmp_path))
    with pytest.raises(JobFailure) as failure:
        find_model(parse_spec({"model": {"name": "tiny"}}).model, no_warning)
    assert (failure.value.report.code, failure.value.exit_code) == ("model_unreadable", 10)
    assert str(tmp_path) not in failure.value.report.message
