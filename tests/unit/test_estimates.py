"""Estimates: the arithmetic of a job, the choice of precision, and each warning from both sides."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Literal

import pytest

from grpo_core.cost import GIB, GPUS, gpu_of
from grpo_core.errors import JobFailure
from grpo_core.estimates import (
    detectable_difference,
    estimate,
    guess_parameters,
    largest_model,
    least_gpu_memory,
    resolve_precision,
    too_large,
    warnings,
    weight_bytes,
)
from grpo_core.spec import parse_spec


def test_the_recipe_in_numbers() -> None:
    found = asdict(estimate(parse_spec({}), rows=7473))
    assert [one["gpu"] for one in found.pop("gpus")] == [gpu.name for gpu in GPUS]
    assert found == {
        "completions_per_step": 6,
        "micro_batch": 6,
        "prompts": 250,
        "completions": 1500,
        "max_completion_tokens_per_step": 1200,
        "max_tokens_per_step": 2736,
        "max_completion_tokens": 300_000,
        "max_tokens": 684_000,
        "epoch_share": 0.0335,
        "checkpoints": 10,
        "parameters": 7_000_000_000,
        "weight_bytes": {"fp32": 28_000_000_000, "16bit": 14_000_000_000, "8bit": 8_050_000_000, "4bit": 5_250_000_000},
        "gpu_memory_bytes": {
            "fp32": 38_636_363_636,
            "16bit": 22_727_272_727,
            "8bit": 15_965_909_091,
            "4bit": 12_784_090_909,
        },
        "gpu": "H100 80 GB",
        "step_seconds": 1.5,
        "training_seconds": 375.0,
        "evaluations": 0,
        "evaluation_seconds": 0.0,
        "evaluation_share": 0.0,
        "peak_memory_bytes": 25_272_093_184,
        "weight_parts": 1,
        "weight_bytes_per_gpu": 14_000_000_000,
        "detectable_difference": None,
    }


THROUGHPUT: dict[str, Any] = {
    "engine": "unsloth",
    "sampling": {"prompts_per_step": 32, "generations": 8, "gradient_accumulation": 16},
    "loss": {"beta": 0.0},
    "model": {"gpu_memory_share": 0.3},
}
NATIVE = {**THROUGHPUT, "engine": "native"}
SMOLLM2: dict[str, Any] = {
    "engine": "unsloth",
    "model": {"name": "HuggingFaceTB/SmolLM2-135M-Instruct"},
    "sampling": {"prompts_per_step": 16, "generations": 8},
    "loss": {"beta": 0.0},
}
CODER: dict[str, Any] = {
    **THROUGHPUT,
    "model": {"name": "Qwen/Qwen2.5-Coder-1.5B-Instruct"},
    "sampling": THROUGHPUT["sampling"] | {"max_completion_tokens": 300},
}


@pytest.mark.parametrize(
    ("spec", "gigabytes", "seconds", "peak_gb"),
    [
        ({"engine": "unsloth", "model": {"precision": "16bit"}}, 80, 2.3, 53.5 * 1.074),
        ({"model": {"precision": "4bit"}}, 80, 3.92, None),
        (THROUGHPUT, 80, 9.5, 43.2 * 1.074),
        (THROUGHPUT, 141, 9.6, 60.3 * 1.074),
        (CODER, 141, 9.0, None),
        (SMOLLM2, 80, 3.8, None),
        ({}, 141, 1.18, 24.9),
        ({"engine": "native"}, 141, 1.18, 24.9),
        ({**CODER, "engine": "native"}, 141, 1.73, None),
        ({"model": {"name": "Qwen/Qwen2.5-Coder-1.5B-Instruct"}}, 141, 0.67, None),
        (NATIVE, 141, 5.09, 103.8),
        ({**NATIVE, "resources": {"gpus": 2}}, 141, 3.01, 92.8),
        ({**NATIVE, "model": {"precision": "8bit"}}, 141, 4.25, 95.0),
    ],
)
def test_a_step_is_estimated_near_what_was_measured(
    spec: dict[str, Any], gigabytes: int, seconds: float, peak_gb: float | None
) -> None:
    """docs/appendix/gpu-measurements.md has the measurements."""
    resources = {**spec.get("resources", {}), "min_gpu_memory_gb": gigabytes}
    size = estimate(parse_spec({**spec, "resources": resources}))
    assert size.step_seconds == pytest.approx(seconds, rel=0.25)
    assert size.peak_memory_bytes is not None
    if peak_gb is not None:
        assert size.peak_memory_bytes / 1e9 == pytest.approx(peak_gb, rel=0.25)
    assert size.peak_memory_bytes < gigabytes * 1024**3


def test_the_estimate_is_for_the_smallest_gpu_that_the_job_allows() -> None:
    found = [estimate(parse_spec({"resources": {"min_gpu_memory_gb": size}})) for size in (16, 24, 25, 80, 96)]
    assert [one.gpu for one in found] == ["A10 24 GB", "A10 24 GB", "L40S 48 GB", "H100 80 GB", "H200 141 GB"]
    seconds = [one.step_seconds or 0 for one in found]
    assert seconds == sorted(seconds, reverse=True)
    assert estimate(parse_spec({"resources": {"min_gpu_memory_gb": 192}})).gpu is None


@pytest.mark.parametrize(
    "spec",
    [
        {"model": {"name": "tiny"}},
        {"engine": "trl"},
        {"resources": {"gpus": 0}, "optimizer": {"name": "adamw_torch"}},
    ],
)
def test_what_was_not_measured_has_no_estimate(spec: dict[str, Any]) -> None:
    size = estimate(parse_spec(spec))
    assert (size.step_seconds, size.training_seconds, size.peak_memory_bytes) == (None, None, None)


def test_more_held_out_questions_find_smaller_changes() -> None:
    """docs/why/evaluation.md: with 200 questions a change of three points is missed more often than found."""
    assert detectable_difference(0) is None
    assert [detectable_difference(n) for n in (50, 200, 1319)] == [0.125, 0.063, 0.024]


def test_a_batch_of_completions_serves_several_iterations() -> None:
    spec = parse_spec({"training": {"steps": 10}, "loss": {"iterations": 4}, "sampling": {"prompts_per_step": 2}})
    result = estimate(spec)
    assert (result.prompts, result.completions, result.max_completion_tokens) == (6, 36, 7200)


@pytest.mark.parametrize(
    ("rows", "max_rows", "share"),
    [(None, None, None), (None, 10, None), (0, None, None), (500, None, 0.5), (500, 100, 2.5), (50, 100, 5.0)],
)
def test_share_of_an_epoch(rows: int | None, max_rows: int | None, share: float | None) -> None:
    assert estimate(parse_spec({"data": {"max_rows": max_rows}}), rows=rows).epoch_share == share


def test_a_model_without_a_size_in_its_name() -> None:
    result = estimate(parse_spec({"model": {"name": "tiny"}}))
    assert (result.parameters, result.weight_bytes) == (None, None)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("Qwen/Qwen2.5-7B-Instruct", 7_000_000_000),
        ("Qwen/Qwen2.5-0.5B", 500_000_000),
        ("Qwen/Qwen2.5-1.5B-Instruct", 1_500_000_000),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", 135_000_000),
        ("google/gemma-2b-it", 2_000_000_000),
        ("meta-llama/Llama-3.2-1B", 1_000_000_000),
        ("unsloth/llama-3-8b-bnb-4bit", 8_000_000_000),
        ("Qwen/Qwen3-30B-A3B", 30_000_000_000),
        ("EleutherAI/pythia-70m", 70_000_000),
        ("7B", 7_000_000_000),
        ("models_13B_v2", 13_000_000_000),
        ("7B-Labs/mystery", None),
        ("microsoft/phi-1_5", None),
        ("mistralai/Mixtral-8x7B", None),
        ("Qwen/Qwen1.5-MoE-A2.7B", None),
        ("gradientai/context-262k", None),
        ("x/model-0B", None),
        ("tiny", None),
    ],
)
def test_parameters_in_a_name(name: str, parameters: int | None) -> None:
    assert guess_parameters(name) == parameters


@pytest.mark.parametrize(
    ("requested", "device", "parameters", "memory_gib", "precision"),
    [
        ("auto", "cpu", 7_600_000_000, None, "fp32"),
        ("auto", "cpu", None, None, "fp32"),
        ("auto", "cuda", 7_600_000_000, 80, "16bit"),
        ("auto", "cuda", 7_600_000_000, 40, "16bit"),
        ("auto", "cuda", 7_600_000_000, 24, "4bit"),
        ("auto", "cuda", 1_500_000_000, 16, "16bit"),
        ("auto", "cuda", 2 * GIB, 10, "16bit"),
        ("auto", "cuda", 2 * GIB + 1, 10, "4bit"),
        ("auto", "cuda", None, 80, "4bit"),
        ("auto", "cuda", 500_000_000, None, "4bit"),
        ("16bit", "cuda", 7_600_000_000, 8, "16bit"),
        ("4bit", "cuda", 500_000_000, 80, "4bit"),
    ],
)
def test_precision(
    requested: Literal["auto", "16bit", "4bit"],
    device: Literal["cpu", "cuda"],
    parameters: int | None,
    memory_gib: int | None,
    precision: str,
) -> None:
    memory = None if memory_gib is None else memory_gib * GIB
    assert resolve_precision(requested, device=device, parameters=parameters, gpu_memory_bytes=memory) == precision


@pytest.mark.parametrize("requested", ["16bit", "4bit"])
def test_a_cpu_has_no_low_precision(requested: Literal["16bit", "4bit"]) -> None:
    with pytest.raises(JobFailure) as caught:
        resolve_precision(requested, device="cpu", parameters=None, gpu_memory_bytes=None)
    assert (caught.value.report.failure_class, caught.value.report.code) == ("user_config", "precision_needs_gpu")
    assert "auto" in caught.value.report.hint


def test_weights_shrink_with_precision() -> None:
    assert weight_bytes(1000, "fp32") == 4000
    assert weight_bytes(1000, "16bit") == 2000
    assert weight_bytes(1000, "4bit") == 750


def found(data: dict[str, Any]) -> list[tuple[str, str]]:
    result = warnings(parse_spec(data))
    assert all(warning.message.endswith(".") for warning in result)
    return [(warning.pointer, warning.code) for warning in result]


def tool_grader(reference: str) -> dict[str, Any]:
    check = {"type": "string_check", "input": "search", "reference": reference, "operation": "eq"}
    return {"type": "multi", "graders": {"name": check}, "calculate_output": "name"}


CPU: dict[str, Any] = {"resources": {"gpus": 0}, "optimizer": {"name": "adamw_torch"}}
SMALL = {"name": "Qwen/Qwen2.5-1.5B"}


@pytest.mark.parametrize(
    ("fine", "suspicious", "warning"),
    [
        (
            {"rewards": {"mode": "published", "weights": {"soft_format": 0, "strict_format": 2}}},
            {"rewards": {"mode": "published"}},
            ("/rewards/mode", "formats_exclude_each_other"),
        ),
        ({}, {"rewards": {"weights": {"integer": 0}}}, ("/rewards/weights/integer", "reward_ignored")),
        (
            {"rewards": {"graders": {"tools": tool_grader("{{sample}}")}}},
            {"rewards": {"graders": {"tools": tool_grader("{{sample.output_tools[0].function.name}}")}}},
            ("/rewards/graders/tools/graders/name/reference", "no_tool_calls"),
        ),
        ({}, {"rewards": {"weights": {"integer": -0.1}}}, ("/rewards/weights/integer", "reward_inverted")),
        (
            {"training": {"steps": 25}},
            {"training": {"steps": 24}},
            ("/training/checkpoint_every", "never_checkpoints"),
        ),
        (
            {"training": {"steps": 30, "log_every": 30}},
            {"training": {"steps": 30, "log_every": 31}},
            ("/training/log_every", "never_logs"),
        ),
        ({"sampling": {"top_k": 2}}, {"sampling": {"top_k": 1}}, ("/sampling/top_k", "no_variance")),
        ({"sampling": {"top_p": 0.1}}, {"sampling": {"top_p": 0.09}}, ("/sampling/top_p", "no_variance")),
        (
            {"sampling": {"temperature": 0.3}},
            {"sampling": {"temperature": 0.29}},
            ("/sampling/temperature", "no_variance"),
        ),
        (
            {"sampling": {"temperature": 1.5}},
            {"sampling": {"temperature": 1.6}},
            ("/sampling/temperature", "incoherent_completions"),
        ),
        (
            {"sampling": {"repetition_penalty": 1}},
            {"sampling": {"repetition_penalty": 1.1}},
            ("/sampling/repetition_penalty", "penalty_not_in_loss"),
        ),
        (
            {"sampling": {"max_completion_tokens": 24}},
            {"sampling": {"max_completion_tokens": 23}},
            ("/sampling/max_completion_tokens", "too_short_for_format"),
        ),
        (
            {"data": {"system_prompt": "x" * 1536}},
            {"data": {"system_prompt": "x" * 1535, "examples": [{"question": "x", "answer": "y"}]}},
            ("/sampling/max_prompt_tokens", "prompts_too_long"),
        ),
        (
            {"loss": {"type": "dr_grpo", "scale_by": "none"}},
            {"loss": {"type": "dr_grpo"}},
            ("/loss/scale_by", "dr_grpo_scaled"),
        ),
        (
            {"optimizer": {"learning_rate": 5e-4}},
            {"optimizer": {"learning_rate": 6e-4}},
            ("/optimizer/learning_rate", "high_learning_rate"),
        ),
        (
            {"model": {"name": "tiny-1M"}},
            {"model": {"name": "large-1B"}, "optimizer": {"learning_rate": 3e-3}},
            ("/optimizer/learning_rate", "high_learning_rate"),
        ),
        (
            {"optimizer": {"warmup_ratio": 0.5}},
            {"optimizer": {"warmup_ratio": 0.51}},
            ("/optimizer/warmup_ratio", "mostly_warm_up"),
        ),
        (
            {"model": {"precision": "4bit"}, "resources": {"min_gpu_memory_gb": 32}},
            {"model": {"precision": "4bit"}, "resources": {"min_gpu_memory_gb": 33}},
            ("/model/precision", "needless_4bit"),
        ),
        (
            {"model": {"precision": "16bit"}, "resources": {"min_gpu_memory_gb": 24}},
            {"model": {"precision": "16bit"}},
            ("/resources/min_gpu_memory_gb", "no_memory_floor"),
        ),
        (
            {"model": {"name": "Qwen/Qwen2.5-32B-Instruct"}},
            {"model": {"name": "Qwen/Qwen2.5-72B-Instruct"}},
            ("/resources/min_gpu_memory_gb", "no_memory_floor"),
        ),
        (
            {"model": {"precision": "16bit"}, "resources": {"min_gpu_memory_gb": 22}},
            {"model": {"precision": "16bit"}, "resources": {"min_gpu_memory_gb": 21}},
            ("/model/precision", "weights_too_large"),
        ),
        (
            {**CPU, "model": {"name": "tiny"}},
            {**CPU, "model": {"name": "SmolLM2-135M"}},
            ("/resources/gpus", "large_model_on_cpu"),
        ),
    ],
    ids=lambda value: value[1] if isinstance(value, tuple) else "",
)
def test_warnings_from_both_sides(fine: dict[str, Any], suspicious: dict[str, Any], warning: tuple[str, str]) -> None:
    assert warning not in found(fine)
    assert found(suspicious) == [warning]


def test_the_defaults_warn_of_nothing() -> None:
    assert found({}) == []


def test_the_sizes_of_a_tiny_models_high_rate_are_not_known() -> None:
    assert found({"model": {"name": "tiny"}, "optimizer": {"learning_rate": 5e-3}}) == []
    assert found({"model": {"name": "tiny", "precision": "16bit"}}) == []


def test_warnings_come_together() -> None:
    codes = [code for _, code in found({"rewards": {"mode": "published"}, "training": {"steps": 1, "log_every": 5}})]
    assert codes == ["never_checkpoints", "never_logs", "formats_exclude_each_other"]


@pytest.mark.parametrize(
    ("gigabytes", "in_16", "in_8"), [(24, 8.3, 14.5), (48, 19.7, 34.2), (80, 34.8, 60.5), (141, 63.6, 110.6)]
)
def test_the_largest_models_that_a_gpu_trains(gigabytes: int, in_16: float, in_8: float) -> None:
    assert largest_model(gigabytes, "16bit") / 1e9 == pytest.approx(in_16, abs=0.1)
    assert largest_model(gigabytes, "8bit") / 1e9 == pytest.approx(in_8, abs=0.2)
    for precision in ("16bit", "8bit"):
        assert least_gpu_memory(largest_model(gigabytes, precision), precision) <= gigabytes * 1024**3


@pytest.mark.parametrize(
    ("model", "gigabytes", "engine", "precision", "least"),
    [
        ("Qwen/Qwen3-235B-A22B", 24, "auto", "auto", 165),
        ("Qwen/Qwen2.5-7B-Instruct", 16, "native", "16bit", 22),
        ("Qwen/Qwen2.5-7B-Instruct", 24, "native", "16bit", None),
        ("Qwen/Qwen2.5-14B-Instruct", 24, "native", "16bit", 36),
        ("Qwen/Qwen2.5-14B-Instruct", 24, "native", "8bit", None),
        ("Qwen/Qwen2.5-32B-Instruct", 24, "unsloth", "4bit", None),
        ("a-model-of-ours", 16, "native", "16bit", None),
    ],
)
def test_a_model_that_cannot_fit_is_refused_with_both_numbers(
    model: str, gigabytes: int, engine: str, precision: str, least: int | None
) -> None:
    asked = {"model": {"name": model, "precision": precision}, "engine": engine}
    spec = parse_spec({**asked, "resources": {"min_gpu_memory_gb": gigabytes}})
    problem = too_large(spec)
    if least is None:
        assert problem is None
        return
    assert problem is not None
    assert (problem.pointer, problem.code) == ("/resources/min_gpu_memory_gb", "model_too_large")
    assert f"is {gigabytes}," in problem.detail
    assert f"{least} GB" in problem.detail
    assert f"Set it to {least} or more" in problem.remedy
    assert too_large(parse_spec({**asked, "resources": {"min_gpu_memory_gb": least}})) is None


@pytest.mark.parametrize(("size", "gpus", "gigabytes", "fits"), [
    ("32B", 1, 48, False), ("32B", 2, 40, False), ("32B", 2, 48, True), ("70B", 2, 80, False), ("70B", 4, 80, True),
])  # fmt: skip
def test_gpus_that_share_a_model_out_train_what_none_could_alone(
    size: str, gpus: int, gigabytes: int, fits: bool
) -> None:
    asked: dict[str, Any] = {
        "engine": "native",
        "model": {"name": f"Qwen/Model-{size}", "precision": "16bit"},
        "resources": {"gpus": gpus, "min_gpu_memory_gb": gigabytes},
    }
    problem = too_large(parse_spec(asked))
    assert (problem is None) == fits
    off = too_large(parse_spec({**asked, "model": {**asked["model"], "sharding": "off"}}))
    assert off is not None
    if problem is None:
        found = estimate(parse_spec(asked))
        on = next(one for one in found.gpus if one.gpu.endswith(f" {gigabytes} GB"))
        assert on.fits
        assert on.step_seconds is None
        assert on.peak_memory_bytes is not None
        assert on.peak_memory_bytes <= gigabytes * GIB
        assert (found.weight_parts, on.weight_parts) == (gpus, gpus)
        assert on.weight_bytes_per_gpu is not None
        assert 2e9 * float(size[:-1]) / gpus < on.weight_bytes_per_gpu < on.peak_memory_bytes
    else:
        assert "resources.gpus" in problem.remedy


@pytest.mark.parametrize(
    ("sharding", "gpus", "parts", "each"), [("off", 2, 1, 14.0), ("auto", 2, 1, 14.0), ("full", 2, 2, 8.92)]
)
def test_a_dry_run_names_the_parts_of_the_weights_and_their_size(
    sharding: str, gpus: int, parts: int, each: float
) -> None:
    model = {"name": "Qwen/Qwen2.5-7B-Instruct", "sharding": sharding}
    found = estimate(parse_spec({"engine": "native", "model": model, "resources": {"gpus": gpus}}))
    assert found.weight_parts == parts
    assert found.weight_bytes_per_gpu == pytest.approx(each * 1e9, rel=0.001)
    card = next(one for one in found.gpus if one.gpu == "H200 141 GB")
    assert (card.weight_parts, card.weight_bytes_per_gpu) == (parts, found.weight_bytes_per_gpu)
    on_a_cpu = estimate(parse_spec({"resources": {"gpus": 0}, "optimizer": {"name": "adamw_torch"}}))
    assert (on_a_cpu.weight_parts, on_a_cpu.weight_bytes_per_gpu) == (None, None)


def test_a_model_too_large_for_any_gpu_is_refused_also_without_a_size() -> None:
    assert too_large(parse_spec({"model": {"name": "Qwen/Qwen3-235B-A22B"}})) is None
    problem = too_large(parse_spec({"model": {"name": "deepseek-ai/DeepSeek-V3-671B"}}))
    assert problem is not None
    assert problem.detail == (
        "is not set, the largest GPUs have 288 GB, and a model of 671B parameters in 4bit alone needs a GPU of 469 GB"
    )


def test_the_estimate_of_each_gpu_of_the_workers_and_of_common_ones() -> None:
    spec = parse_spec({"model": {"name": "Qwen/Qwen2.5-7B-Instruct"}, "engine": "native"})
    devices = ["NVIDIA A100-SXM4-80GB", "NVIDIA GeForce RTX 4090", "cpu", "Some GPU of 2031"]
    found = {one.gpu: one for one in estimate(spec, devices=devices).gpus}
    assert [name for name, one in found.items() if one.has_worker] == ["RTX 4090 24 GB", "A100 80 GB"]
    assert {gpu.name for gpu in GPUS} < set(found)
    assert not found["RTX 4090 24 GB"].fits or found["RTX 4090 24 GB"].peak_memory_bytes <= 24 * GIB
    fast, slow = found["H100 80 GB"], found["A100 80 GB"]
    assert 0 < fast.training_seconds < slow.training_seconds
    assert fast.step_seconds == estimate(spec.model_copy()).step_seconds
    asked = parse_spec({**spec.as_dict(), "resources": {"min_gpu_memory_gb": 80}})
    assert {one.gpu for one in estimate(asked, devices=devices).gpus if one.fits} == {
        *("A100 80 GB", "H100 80 GB", "H200 141 GB"),
    }
    assert estimate(parse_spec({"resources": {"gpus": 0}, "optimizer": {"name": "adamw_torch"}})).gpus == []
    assert estimate(parse_spec({"model": {"name": "someone/nameless"}})).gpus == []


@pytest.mark.parametrize(
    ("device", "gpu"),
    [
        ("NVIDIA H100 80GB HBM3", "H100 80 GB"),
        ("NVIDIA H200", "H200 141 GB"),
        ("NVIDIA A100-PCIE-40GB", "A100 40 GB"),
        ("NVIDIA A100 80GB PCIe", "A100 80 GB"),
        ("NVIDIA A10", "A10 24 GB"),
        ("NVIDIA L40S", "L40S 48 GB"),
        ("NVIDIA L4", "L4 24 GB"),
        ("NVIDIA RTX A6000", "RTX A6000 48 GB"),
        ("2 × NVIDIA H200", "H200 141 GB"),
        ("NVIDIA GB10", None),
        ("cpu", None),
    ],
)
def test_the_gpu_that_a_worker_announces(device: str, gpu: str | None) -> None:
    found = gpu_of(device)
    assert (found and found.name) == gpu
