"""What a job will take, by arithmetic alone: completions, tokens, share of an epoch, precision, memory of weights.

A dry run shows these numbers and the warnings: settings that are legal and yet rarely meant. Knows no device and
downloads nothing; what depends on the card is decided by the worker, with `resolve_precision`. Invariant: a warning
never stops a job, and each has a reason that its message gives.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from grpo_core.errors import JobFailure
from grpo_core.spec import JobSpec

Precision = Literal["fp32", "16bit", "4bit"]

WEIGHTS_SHARE = 0.4
"""`auto` takes 16-bit weights where they fill at most this share of the card."""

BYTES_PER_PARAMETER: dict[Precision, float] = {"fp32": 4.0, "16bit": 2.0, "4bit": 0.75}
"""In 4-bit the projections take about half a byte, but embeddings and the output layer stay in 16-bit."""

_GIB = 1024**3
"""Cards are sold by it: one of 80 GB has 80 of these. Weights are told in units of 10^9 bytes, as everywhere."""
_SIZE = re.compile(r"(?<![A-Za-z0-9.])(\d+(?:\.\d+)?)([BM])(?![A-Za-z0-9])", re.IGNORECASE)
_LARGE_MODEL = 100_000_000
_FORMAT_TOKENS = 24
"""The four tags, their line breaks and one digit take about as many tokens in a common tokenizer."""
_CHARACTERS_PER_TOKEN = 6
"""Texts do not pack more on average: English has about 4, Chinese fewer than 2."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The size of a job. Tokens are upper bounds: completions may end early, prompts may be shorter."""

    completions_per_step: int
    micro_batch: int
    """Completions in one forward and backward pass."""
    prompts: int
    """Questions asked in all, repeats included."""
    completions: int
    max_completion_tokens_per_step: int
    max_tokens_per_step: int
    """Prompts and completions together, as trained on."""
    max_completion_tokens: int
    max_tokens: int
    epoch_share: float | None
    """How often the job goes through the data set; null where its rows are not known."""
    checkpoints: int
    """Checkpoints that a lost run could go on from."""
    parameters: int | None
    """Guessed from the model's name."""
    weight_bytes: dict[str, int] | None
    """The base model's weights alone, for each precision."""


@dataclass(frozen=True, kw_only=True)
class SpecWarning:
    """A setting that is accepted and probably not meant."""

    pointer: str
    code: str
    message: str


def estimate(spec: JobSpec, *, rows: int | None = None) -> Estimate:
    """The numbers of a job; `rows` is the size of its data set, where known."""
    sampling = spec.sampling
    # A batch of completions serves `iterations` optimizer steps.
    batches = -(-spec.training.steps // spec.loss.iterations)
    per_step = spec.completions_per_step
    tokens_each = sampling.max_prompt_tokens + sampling.max_completion_tokens
    prompts = batches * sampling.prompts_per_step
    parameters = guess_parameters(spec.model.name)
    return Estimate(
        completions_per_step=per_step,
        micro_batch=spec.micro_batch,
        prompts=prompts,
        completions=batches * per_step,
        max_completion_tokens_per_step=per_step * sampling.max_completion_tokens,
        max_tokens_per_step=per_step * tokens_each,
        max_completion_tokens=batches * per_step * sampling.max_completion_tokens,
        max_tokens=batches * per_step * tokens_each,
        epoch_share=_epoch_share(prompts, rows, spec.data.max_rows),
        checkpoints=spec.training.steps // spec.training.checkpoint_every,
        parameters=parameters,
        weight_bytes=None
        if parameters is None
        else {name: weight_bytes(parameters, name) for name in BYTES_PER_PARAMETER},
    )


def resolve_precision(
    requested: Literal["auto", "16bit", "4bit"],
    *,
    device: Literal["cpu", "cuda"],
    parameters: int | None,
    gpu_memory_bytes: int | None,
) -> Precision:
    """The precision a run uses; raises `JobFailure` where the device has no such precision.

    On a GPU, `auto` is 4-bit while size or memory is unknown: too coarse is better than out of memory.
    """
    if device == "cpu":
        if requested != "auto":
            raise JobFailure(
                "user_config",
                "precision_needs_gpu",
                f"model.precision is {requested}, and this worker has no GPU",
                hint="Set model.precision to auto; a CPU trains in 32-bit.",
            )
        return "fp32"
    if requested != "auto":
        return requested
    if parameters is None or gpu_memory_bytes is None:
        return "4bit"
    fits = weight_bytes(parameters, "16bit") <= WEIGHTS_SHARE * gpu_memory_bytes
    return "16bit" if fits else "4bit"


def guess_parameters(model_name: str) -> int | None:
    """The parameter count in a name such as `Qwen2.5-7B-Instruct`; None where there is none.

    Sizes are whole words: the 2.5 above, `4bit` and the active part `A3B` of a mixture are not taken for one.
    """
    sizes = [
        float(number) * (1e9 if unit in "Bb" else 1e6) for number, unit in _SIZE.findall(model_name.rsplit("/", 1)[-1])
    ]
    return round(max(sizes)) or None if sizes else None


def weight_bytes(parameters: int, precision: Precision) -> int:
    """Memory of a model's weights, about."""
    return round(parameters * BYTES_PER_PARAMETER[precision])


def warnings(spec: JobSpec) -> list[SpecWarning]:
    """Everything in a spec that is legal and suspicious, in the order of the spec's sections."""
    return [warning for check in CHECKS for warning in check(spec)]


def _epoch_share(prompts: int, rows: int | None, max_rows: int | None) -> float | None:
    if rows is None or rows < 1:
        return None
    used = rows if max_rows is None else min(rows, max_rows)
    return round(prompts / used, 4)


def _precision_fits_the_card(spec: JobSpec) -> Iterator[SpecWarning]:
    parameters, memory_gb = guess_parameters(spec.model.name), spec.resources.min_gpu_memory_gb
    if parameters is None or spec.model.precision == "auto":
        return
    full = weight_bytes(parameters, "16bit")
    if spec.model.precision == "4bit":
        if memory_gb is not None and full <= WEIGHTS_SHARE * memory_gb * _GIB:
            yield SpecWarning(
                pointer="/model/precision",
                code="needless_4bit",
                message=f"The 16-bit weights take about {_gb(full)} and fit a card of {memory_gb} GB; 4-bit is slower "
                "there, and coarser.",
            )
    elif memory_gb is None:
        if parameters >= _LARGE_MODEL:
            yield SpecWarning(
                pointer="/resources/min_gpu_memory_gb",
                code="no_memory_floor",
                message=f"The 16-bit weights take about {_gb(full)}, and any card may get the job; set "
                "min_gpu_memory_gb, or precision auto.",
            )
    elif full > spec.model.gpu_memory_share * memory_gb * _GIB:
        yield SpecWarning(
            pointer="/model/precision",
            code="weights_too_large",
            message=f"The 16-bit weights take about {_gb(full)}, more than gpu_memory_share of a card of {memory_gb} "
            "GB; the rollout engine will probably not start.",
        )


def _cpu_can_bear_the_model(spec: JobSpec) -> Iterator[SpecWarning]:
    parameters = guess_parameters(spec.model.name)
    if spec.resources.gpus == 0 and parameters is not None and parameters >= _LARGE_MODEL:
        yield SpecWarning(
            pointer="/resources/gpus",
            code="large_model_on_cpu",
            message=f"On a CPU the 32-bit weights take about {_gb(weight_bytes(parameters, 'fp32'))}, and a step takes "
            "minutes.",
        )


def _learning_rate_is_usual(spec: JobSpec) -> Iterator[SpecWarning]:
    parameters = guess_parameters(spec.model.name)
    if spec.optimizer.learning_rate > 5e-4 and parameters is not None and parameters >= _LARGE_MODEL:
        yield SpecWarning(
            pointer="/optimizer/learning_rate",
            code="high_learning_rate",
            message=f"{spec.optimizer.learning_rate:g} destroys most models of this size within a few steps; adapters "
            "are usually trained with 1e-6 to 1e-4.",
        )
    if spec.optimizer.warmup_ratio > 0.5:
        yield SpecWarning(
            pointer="/optimizer/warmup_ratio",
            code="mostly_warm_up",
            message="The learning rate is still rising for most of the job.",
        )


def _intervals_are_within_the_job(spec: JobSpec) -> Iterator[SpecWarning]:
    training = spec.training
    if training.checkpoint_every > training.steps:
        yield SpecWarning(
            pointer="/training/checkpoint_every",
            code="never_checkpoints",
            message=f"The job ends after {training.steps} steps, before its first checkpoint: a lost run starts over.",
        )
    if training.log_every > training.steps:
        yield SpecWarning(
            pointer="/training/log_every",
            code="never_logs",
            message=f"The job ends after {training.steps} steps, before its first metric event.",
        )


def _completions_can_differ(spec: JobSpec) -> Iterator[SpecWarning]:
    sampling = spec.sampling
    alike = "the completions of a group come out alike, and a group without variance teaches nothing."
    if sampling.top_k == 1:
        yield SpecWarning(pointer="/sampling/top_k", code="no_variance", message=f"With one candidate token {alike}")
    if sampling.top_p < 0.1:
        yield SpecWarning(pointer="/sampling/top_p", code="no_variance", message=f"With top_p below 0.1 {alike}")
    if sampling.temperature < 0.3:
        yield SpecWarning(
            pointer="/sampling/temperature", code="no_variance", message=f"With a temperature below 0.3 {alike}"
        )
    if sampling.temperature > 1.5:
        yield SpecWarning(
            pointer="/sampling/temperature",
            code="incoherent_completions",
            message="Above 1.5 most models write noise, which is seldom rewarded.",
        )
    if sampling.repetition_penalty != 1:
        yield SpecWarning(
            pointer="/sampling/repetition_penalty",
            code="penalty_not_in_loss",
            message="Completions are drawn with the penalty and trained on without it, so the probabilities differ.",
        )


def _tokens_suffice(spec: JobSpec) -> Iterator[SpecWarning]:
    if spec.sampling.max_completion_tokens < _FORMAT_TOKENS:
        yield SpecWarning(
            pointer="/sampling/max_completion_tokens",
            code="too_short_for_format",
            message=f"The asked format alone takes about {_FORMAT_TOKENS} tokens in a common tokenizer: completions "
            "are cut off before the answer.",
        )
    data = spec.data
    fixed = len(data.system_prompt) + sum(len(turn.question) + len(turn.answer) for turn in data.examples)
    if fixed > _CHARACTERS_PER_TOKEN * spec.sampling.max_prompt_tokens:
        yield SpecWarning(
            pointer="/sampling/max_prompt_tokens",
            code="prompts_too_long",
            message=f"The system prompt and worked examples have {fixed} characters, more than "
            f"{spec.sampling.max_prompt_tokens} tokens hold: every row would be dropped.",
        )


def _loss_is_consistent(spec: JobSpec) -> Iterator[SpecWarning]:
    if spec.loss.type == "dr_grpo" and spec.loss.scale_by != "none":
        yield SpecWarning(
            pointer="/loss/scale_by",
            code="dr_grpo_scaled",
            message=f"dr_grpo leaves out the division by the standard deviation, and scale_by {spec.loss.scale_by} "
            "brings it back; use none.",
        )


def _rewards_can_be_earned(spec: JobSpec) -> Iterator[SpecWarning]:
    weights = spec.rewards.weights
    if spec.rewards.mode == "published" and weights.strict_format and weights.soft_format:
        yield SpecWarning(
            pointer="/rewards/mode",
            code="formats_exclude_each_other",
            message="In mode published strict_format wants line breaks where soft_format allows none, so that no "
            "completion earns both; mode fixed pays both.",
        )
    for name, weight in weights.model_dump().items():
        if weight == 0:
            yield SpecWarning(
                pointer=f"/rewards/weights/{name}",
                code="reward_ignored",
                message=f"{name} is recorded and has no effect on training.",
            )
        elif weight < 0:
            yield SpecWarning(
                pointer=f"/rewards/weights/{name}",
                code="reward_inverted",
                message=f"A weight below 0 teaches the model to avoid what {name} pays for.",
            )


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB"


CHECKS: tuple[Callable[[JobSpec], Iterator[SpecWarning]], ...] = (
    _precision_fits_the_card,
    _learning_rate_is_usual,
    _intervals_are_within_the_job,
    _completions_can_differ,
    _tokens_suffice,
    _loss_is_consistent,
    _rewards_can_be_earned,
    _cpu_can_bear_the_model,
)
