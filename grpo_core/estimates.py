"""Estimates of a job's size from its spec alone: completions, tokens, passes over the data, precision, memory of
weights. A dry run shows them, with warnings about settings that are legal but rarely intended. Knows no device and
downloads nothing; the worker decides what depends on the GPU, with `resolve_precision`. Invariant: a warning never
stops a job, and its message gives the reason.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final, Literal

from grpo_core import cost
from grpo_core.cost import ASIDE_BYTES, GIB, USABLE
from grpo_core.errors import JobFailure
from grpo_core.reasons import FailureCode
from grpo_core.rewards.graders.templates import Template
from grpo_core.schedule import fixed_interval, sample_size, spaced
from grpo_core.spec import JobSpec, Problem

Precision = Literal["fp32", "16bit", "8bit", "4bit"]

WEIGHTS_SHARE = 0.4
"""`auto` chooses 16-bit weights if they take at most this share of the GPU."""

BYTES_PER_PARAMETER: dict[Precision, float] = {"fp32": 4.0, "16bit": 2.0, "8bit": 1.15, "4bit": 0.75}
"""In 8 and 4 bits the projections take a byte or half of one, but embeddings and the output layer stay in 16-bit."""

LARGEST_GPU_GB = 288
SMALL_GPU_GB = 24
"""A model that fits into this fits into most GPUs that train."""
GATHERED_SHARE: Final = 0.03
GATHERED_BYTES: Final = 1_500_000_000
"""Two layers and the head of a model, as a share of its weights and bytes beside it; within 5 % for 7B to 70B."""
LEAST_ROOM_BYTES = 10**9
"""What it needs at least for keys and activations."""

_NEEDED_ERRORS: Final = 1.96 + 0.84
"""Standard errors between no change and one that is found at the 5 % level in 8 of 10 cases."""
_FLIPPED_SHARE: Final = 0.1

_SIZE = re.compile(r"(?<![A-Za-z0-9.])(\d+(?:\.\d+)?)([BM])(?![A-Za-z0-9])", re.IGNORECASE)
_LARGE_MODEL = 100_000_000
_FORMAT_TOKENS = 24
"""The four tags, their line breaks and one digit take about as many tokens in a common tokenizer."""
_CHARACTERS_PER_TOKEN = 6
"""Texts do not pack more on average: English has about 4, Chinese fewer than 2."""


@dataclass(frozen=True, kw_only=True)
class GpuEstimate:
    """What a job costs on one kind of GPU, about."""

    gpu: str
    has_worker: bool
    """Whether a connected worker has one."""
    fits: bool
    """Whether the model trains on it, and the job allows its size."""
    precision: str | None
    """The precision of the weights there; null where it does not fit."""
    step_seconds: float | None
    training_seconds: float | None
    peak_memory_bytes: int | None
    weight_parts: int | None
    """In how many parts the job's GPUs hold the weights (`model.sharding`): 1 if each holds all; null where it does not
    fit."""
    weight_bytes_per_gpu: int | None
    """The weights on each of them, about, with the layers that are gathered at a time."""


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
    """Checkpoints from which a lost run could resume."""
    parameters: int | None
    """Guessed from the model's name."""
    weight_bytes: dict[str, int] | None
    """The base model's weights alone, for each precision."""
    gpu_memory_bytes: dict[str, int] | None
    """The smallest GPU, about, that trains this model in each precision."""
    gpu: str | None
    """The GPU that time and peak memory are estimated for, of the smallest size that the job allows; null on a CPU."""
    step_seconds: float | None
    """One step, about, on that GPU; null without one, with engine `trl` and where the model's size is not known."""
    training_seconds: float | None
    """All steps, about, on that GPU; without loading and evaluation."""
    evaluations: int | None
    """Evaluations during training, beside those before and after it; null if their number depends on what they cost,
    and that is not known."""
    evaluation_seconds: float | None
    """All evaluations together, about, on that GPU."""
    evaluation_share: float | None
    """The same as a share of `training_seconds`."""
    peak_memory_bytes: int | None
    """Peak memory of each such GPU, about."""
    weight_parts: int | None
    """In how many parts such GPUs hold the weights (`model.sharding`): 1 if each holds all of them."""
    weight_bytes_per_gpu: int | None
    """The weights on each of them, about, with the layers that are gathered at a time."""
    gpus: list[GpuEstimate]
    """The same for the GPUs of connected workers and for some common ones, smallest first; empty on a CPU, with engine
    `trl` and where the model's size is not known."""
    detectable_difference: float | None
    """The smallest change in held-out accuracy that such a run finds in 8 of 10 cases, if one answer in ten flips;
    null without held-out questions."""


@dataclass(frozen=True, kw_only=True)
class SpecWarning:
    """A setting that is accepted and probably not meant."""

    pointer: str
    code: str
    message: str


def estimate(spec: JobSpec, *, rows: int | None = None, devices: Iterable[str] = ()) -> Estimate:
    """The numbers of a job; `rows` is the size of its data set, where known, and `devices` are those of workers."""
    if not spec.has_steps:
        return _of_weights(spec)
    sampling = spec.sampling
    # A batch of completions serves `iterations` optimizer steps.
    batches = -(-spec.training.steps // spec.loss.iterations)
    per_step = spec.completions_per_step
    tokens_each = sampling.max_prompt_tokens + sampling.max_completion_tokens
    prompts = batches * sampling.prompts_per_step
    parameters = guess_parameters(spec.model.name)
    gpu, seconds, peak, ranks, weights = cost.gpu_for(spec), None, None, None, None
    evaluations, evaluating = _evaluations(spec, None, None)
    if gpu is not None and parameters is not None:
        precision = precision_on(spec, parameters, gpu.memory_bytes)
        ranks = _ranks_on(spec, parameters, gpu, precision)
        if ranks == 1:  # how long layers take to be gathered was not measured
            seconds = cost.step_seconds(spec, gpu, parameters, precision)
            evaluations, evaluating = _evaluations(
                spec, seconds, lambda questions: cost.answer_seconds(spec, gpu, parameters, precision, questions)
            )
        weights = shared_weight_bytes(parameters, precision, ranks)
        peak = cost.peak_memory_bytes(spec, gpu, parameters, precision, weights)
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
        weight_bytes=_by_precision(parameters, weight_bytes),
        gpu_memory_bytes=_by_precision(parameters, least_gpu_memory),
        gpu=None if gpu is None else gpu.name,
        step_seconds=seconds,
        training_seconds=None if seconds is None else round(seconds * spec.training.steps, 1),
        evaluations=evaluations,
        evaluation_seconds=evaluating,
        evaluation_share=None
        if evaluating is None or not seconds
        else round(evaluating / (seconds * spec.training.steps), 4),
        peak_memory_bytes=peak,
        weight_parts=ranks,
        weight_bytes_per_gpu=weights,
        gpus=[] if parameters is None else _by_gpu(spec, parameters, devices),
        detectable_difference=detectable_difference(spec.evaluation.questions),
    )


def _of_weights(spec: JobSpec) -> Estimate:
    """The numbers of a job that draws no completions by itself: those of the model's weights."""
    parameters = guess_parameters(spec.model.name)
    return Estimate(
        completions_per_step=0,
        micro_batch=0,
        prompts=0,
        completions=0,
        max_completion_tokens_per_step=0,
        max_tokens_per_step=0,
        max_completion_tokens=0,
        max_tokens=0,
        epoch_share=None,
        checkpoints=0,
        parameters=parameters,
        weight_bytes=_by_precision(parameters, weight_bytes),
        gpu_memory_bytes=None,
        gpu=None,
        step_seconds=None,
        training_seconds=None,
        evaluations=0,
        evaluation_seconds=None,
        evaluation_share=None,
        peak_memory_bytes=None,
        weight_parts=None,
        weight_bytes_per_gpu=None,
        gpus=[],
        detectable_difference=None,
    )


def _by_gpu(spec: JobSpec, parameters: int, devices: Iterable[str]) -> list[GpuEstimate]:
    """The estimate for each GPU of the workers, and the common ones."""
    if spec.resources.gpus == 0 or spec.engine == "trl":
        return []
    here = {gpu for device in devices if (gpu := cost.gpu_of(device)) is not None}
    all_of_them = sorted({*here, *cost.GPUS}, key=lambda gpu: (gpu.memory_gb, gpu.bandwidth))
    return [_on_gpu(spec, parameters, gpu, has_worker=gpu in here) for gpu in all_of_them]


def _ranks_on(spec: JobSpec, parameters: int, gpu: cost.Gpu, precision: Precision) -> int:
    """The number of GPUs of this kind that share out the weights; 1 where each holds all of them."""
    fits = least_gpu_memory(parameters, precision) <= gpu.memory_bytes
    return 1 if spec.model.sharding == "auto" and fits else ranks_that_share(spec)


def _on_gpu(spec: JobSpec, parameters: int, gpu: cost.Gpu, *, has_worker: bool) -> GpuEstimate:
    precision = precision_on(spec, parameters, gpu.memory_bytes)
    is_native, ranks = cost.engine_of(spec, precision) == "native", _ranks_on(spec, parameters, gpu, precision)
    weights = shared_weight_bytes(parameters, precision, ranks)
    fits = least_gpu_memory(parameters, precision, native=is_native, ranks=ranks) <= gpu.memory_bytes
    fits = fits and gpu.memory_gb >= (spec.resources.min_gpu_memory_gb or 0)
    # How long layers take to be gathered was not measured.
    seconds = cost.step_seconds(spec, gpu, parameters, precision) if fits and ranks == 1 else None
    return GpuEstimate(
        gpu=gpu.name,
        has_worker=has_worker,
        fits=fits,
        precision=precision if fits else None,
        step_seconds=seconds,
        training_seconds=None if seconds is None else round(seconds * spec.training.steps, 1),
        peak_memory_bytes=cost.peak_memory_bytes(spec, gpu, parameters, precision, weights) if fits else None,
        weight_parts=ranks if fits else None,
        weight_bytes_per_gpu=weights if fits else None,
    )


def resolve_precision(
    requested: Literal["auto", "16bit", "8bit", "4bit"],
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
                FailureCode.PRECISION_NEEDS_GPU,
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


def precision_on(spec: JobSpec, parameters: int, gpu_memory_bytes: int) -> Precision:
    """The precision that a job gets on a GPU of this size; the native engine has no 4-bit weights."""
    if (spec.engine == "native" or ranks_that_share(spec) > 1) and spec.model.precision == "auto":
        return "16bit"
    return resolve_precision(
        spec.model.precision, device="cuda", parameters=parameters, gpu_memory_bytes=gpu_memory_bytes
    )


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


def shared_weight_bytes(parameters: int, precision: Precision, ranks: int) -> int:
    """Memory of a GPU's part of the weights if `ranks` GPUs share them out, about; with the two layers and the head
    that are gathered at a time."""
    whole = weight_bytes(parameters, precision)
    return whole if ranks == 1 else round(whole / ranks + GATHERED_SHARE * whole + GATHERED_BYTES)


def ranks_that_share(spec: JobSpec) -> int:
    """The number of GPUs that may share out a job's weights; 1 if each must hold all of them."""
    shares = spec.has_steps and spec.model.sharding != "off" and spec.model.precision != "4bit"
    is_native = spec.engine == "native" or (spec.engine == "auto" and spec.model.sharding == "full")
    return spec.resources.ranks if shares and is_native else 1


def least_gpu_memory(parameters: int, precision: Precision, *, native: bool = True, ranks: int = 1) -> int:
    """The smallest memory of a GPU, in bytes, that a model of this size trains on, if `ranks` GPUs share out the
    weights; of other engines only the weights are counted."""
    weights = shared_weight_bytes(parameters, precision, ranks)
    return round((weights + ASIDE_BYTES + LEAST_ROOM_BYTES) / USABLE) if native else weights


def detectable_difference(questions: int) -> float | None:
    """The smallest change of a share that a paired test of this number of questions finds in 8 of 10 cases."""
    return None if questions < 1 else round(_NEEDED_ERRORS * math.sqrt(_FLIPPED_SHARE / questions), 3)


def _by_precision(parameters: int | None, size: Callable[[int, Precision], int]) -> dict[str, int] | None:
    return None if parameters is None else {name: size(parameters, name) for name in BYTES_PER_PARAMETER}


def largest_model(memory_gb: float, precision: Precision) -> int:
    """The number of parameters of the largest model that the native engine trains on a GPU of this size."""
    room = USABLE * memory_gb * GIB - ASIDE_BYTES - LEAST_ROOM_BYTES
    return max(0, int(room / BYTES_PER_PARAMETER[precision]))


def too_large(spec: JobSpec) -> Problem | None:
    """Why a job can never run on the smallest GPU that it allows, by the size in its model's name; None if it can.

    No rule of the spec, since the size is a guess: jobs that were accepted before stay readable.
    """
    needs, asked_gb = _least_needs(spec), spec.resources.min_gpu_memory_gb
    if needs is None or needs.gigabytes <= (asked_gb or LARGEST_GPU_GB):
        return None
    least, precision = needs.gigabytes, needs.precision
    more = precision != "4bit" and spec.has_steps and spec.resources.gpus < 8 and spec.model.sharding != "off"
    has = f"is {asked_gb}, and" if asked_gb else f"is not set, the largest GPUs have {LARGEST_GPU_GB} GB, and"
    return Problem(
        pointer="/resources/min_gpu_memory_gb",
        code="model_too_large",
        detail=f"{has} {needs.of} needs a GPU of {least} GB",
        remedy=f"Set it to {least} or more, or use a smaller model"
        + (", more GPUs (resources.gpus; the engine native shares the model out)" if more else "")
        + (" or a lower model.precision." if precision in ("16bit", "8bit") else "."),
    )


@dataclass(frozen=True, slots=True)
class _Needs:
    """The least that a job needs of a GPU."""

    of: str
    gigabytes: int
    precision: Precision


def _least_needs(spec: JobSpec) -> _Needs | None:
    """In the smallest precision that the job may get; None on a CPU and where the model's size is not known."""
    parameters, ranks = guess_parameters(spec.model.name), ranks_that_share(spec)
    if parameters is None or spec.resources.gpus == 0:
        return None
    native, asked = spec.engine == "native" or ranks > 1, spec.model.precision
    precision: Precision = ("16bit" if native else "4bit") if asked == "auto" else asked
    what = "and the room to train it" if native else "alone"
    shared = f" that {ranks} GPUs share out" if ranks > 1 else ""
    return _Needs(
        f"a model of {parameters / 1e9:g}B parameters in {precision}{shared} {what}",
        -(-least_gpu_memory(parameters, precision, native=native, ranks=ranks) // GIB),
        precision,
    )


def warnings(spec: JobSpec) -> list[SpecWarning]:
    """Everything in a spec that is legal and suspicious, in the order of the spec's sections.

    The checks are about training, so that a job of another kind gets none.
    """
    if not spec.has_steps:
        return []
    return [warning for check in CHECKS for warning in check(spec)]


def _evaluations(
    spec: JobSpec, step_seconds: float | None, answer: Callable[[int], float | None] | None
) -> tuple[int | None, float | None]:
    """Number of evaluations during training, and seconds of all, where they are known."""
    steps, questions = spec.training.steps, spec.evaluation.questions
    if not questions:
        return 0, 0.0
    every, sample = fixed_interval(spec), sample_size(spec, questions)
    one, ends = (answer(sample), answer(questions)) if answer else (None, None)
    if one is None or ends is None:
        return (None if every is None else _points(steps, every)), None
    if every is None and step_seconds is not None:
        every = spaced(steps, step_seconds=step_seconds, one=one, ends=2 * ends)
    count = _points(steps, every or 0)
    return count, round(2 * ends + count * one, 1)


def _points(steps: int, every: int) -> int:
    return (steps - 1) // every if every else 0


def _epoch_share(prompts: int, rows: int | None, max_rows: int | None) -> float | None:
    if rows is None or rows < 1:
        return None
    used = rows if max_rows is None else min(rows, max_rows)
    return round(prompts / used, 4)


def _precision_fits_the_card(spec: JobSpec) -> Iterator[SpecWarning]:
    parameters, memory_gb = guess_parameters(spec.model.name), spec.resources.min_gpu_memory_gb
    if parameters is None:
        return
    if spec.model.precision == "auto":
        needs = _least_needs(spec)
        if memory_gb is None and needs is not None and needs.gigabytes > SMALL_GPU_GB:
            yield SpecWarning(
                pointer="/resources/min_gpu_memory_gb",
                code="no_memory_floor",
                message=f"Any GPU may get the job, and {needs.of} needs one of {needs.gigabytes} GB; set "
                f"min_gpu_memory_gb to {needs.gigabytes} or more.",
            )
        return
    full = weight_bytes(parameters, "16bit")
    if spec.model.precision == "4bit":
        if memory_gb is not None and full <= WEIGHTS_SHARE * memory_gb * GIB:
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
    elif spec.engine != "unsloth":
        if (least := least_gpu_memory(parameters, "16bit", ranks=ranks_that_share(spec))) > memory_gb * GIB:
            yield SpecWarning(
                pointer="/model/precision",
                code="weights_too_large",
                message=f"The 16-bit weights and the room to train them take about {_gb(least)}, more than a card of "
                f"{memory_gb} GB has.",
            )
    elif full > spec.model.gpu_memory_share * memory_gb * GIB:
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
    if spec.kind == "try":
        return
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
            message=f"The required format alone takes about {_FORMAT_TOKENS} tokens in a common tokenizer: completions "
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
    for name, weight in weights.by_name.items():
        if weight == 0:
            if spec.rewards.is_own and name not in spec.rewards.graders:
                continue  # 0 is what the five have beside graders
            yield SpecWarning(
                pointer=f"/rewards/weights/{name}",
                code="reward_ignored",
                message=f"{name} is recorded and has no effect on training.",
            )
        elif weight < 0:
            yield SpecWarning(
                pointer=f"/rewards/weights/{name}",
                code="reward_inverted",
                message=f"A weight below 0 teaches the model to avoid what {name} rewards.",
            )


def _graders_read_what_is_there(spec: JobSpec) -> Iterator[SpecWarning]:
    for name, grader in spec.rewards.graders.items():
        for pointer, text in grader.templates:
            if any(path.root == "sample" and path.parts[:1] == ("output_tools",) for path in Template(text).paths):
                yield SpecWarning(
                    pointer=f"/rewards/graders/{name}{pointer}",
                    code="no_tool_calls",
                    message="A completion is a single turn without tools, so that sample.output_tools is always empty: "
                    "a template that reads a call scores 0.",
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
    _graders_read_what_is_there,
    _cpu_can_bear_the_model,
)
