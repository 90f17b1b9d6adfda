"""Rules that span several fields of a spec: what would only fail after the model is loaded is refused here.

Each rule reads a spec whose fields are valid one by one and yields the problems it finds; its docstring is its
line in docs/spec.md. Invariant: a rule names the field to change and what to change it to; all rules run, so all
problems are reported together.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from pydantic_core import PydanticCustomError

from grpo_core.spec.problems import Problem
from grpo_core.spec.sections import DATASET_ID, HUB_NAME, S3_URL, JobSpec

MAX_COMPLETIONS_PER_STEP = 8192
MAX_TOKENS_PER_STEP = 16_777_216
MAX_COMPLETIONS = 100_000_000
RULES_ERROR = "spec_rules"


def check(spec: JobSpec) -> None:
    """Run every rule; raise one pydantic error that carries all problems found."""
    problems = [problem for rule in RULES for problem in rule(spec)]
    if problems:
        text = "; ".join(f"{problem.pointer}: {problem.detail}" for problem in problems)
        raise PydanticCustomError(RULES_ERROR, "{text}", {"text": text, "problems": problems})


def _sequence_fits(spec: JobSpec) -> Iterator[Problem]:
    """`sampling.max_prompt_tokens` + `sampling.max_completion_tokens` is at most `model.max_sequence`."""
    longest = spec.sampling.max_prompt_tokens + spec.sampling.max_completion_tokens
    if longest > spec.model.max_sequence:
        yield Problem(
            pointer="/sampling/max_completion_tokens",
            code="sequence_too_long",
            detail=f"prompt and completion may take {longest} tokens, "
            f"but model.max_sequence is {spec.model.max_sequence}",
            remedy=f"Lower max_prompt_tokens or max_completion_tokens, or set model.max_sequence to {longest}.",
        )


def _evaluation_fits(spec: JobSpec) -> Iterator[Problem]:
    """Where `evaluation.questions` is not 0: `sampling.max_prompt_tokens` + `evaluation.max_completion_tokens` is at
    most `model.max_sequence`, and rows held out of training are at most half of `data.max_rows`."""
    if not spec.evaluation.questions:
        return
    longest = spec.sampling.max_prompt_tokens + spec.evaluation.max_completion_tokens
    if longest > spec.model.max_sequence:
        yield Problem(
            pointer="/evaluation/max_completion_tokens",
            code="sequence_too_long",
            detail=f"prompt and answer may take {longest} tokens, but model.max_sequence is {spec.model.max_sequence}",
            remedy=f"Lower it, or set model.max_sequence to {longest}.",
        )
    rows, held_out = spec.data.max_rows, spec.held_out_rows
    if rows is not None and 2 * held_out > rows:
        yield Problem(
            pointer="/evaluation/questions",
            code="too_many_held_out",
            detail=f"{held_out} questions would be held out of {rows} rows, more than half of them",
            remedy=f"Use at most {rows // 2}, or more rows.",
        )


def _accumulation_divides(spec: JobSpec) -> Iterator[Problem]:
    """`sampling.gradient_accumulation` divides the step's completions."""
    total, parts = spec.completions_per_step, spec.sampling.gradient_accumulation
    if total % parts:
        divisors = [str(n) for n in range(1, total + 1) if total % n == 0]
        yield Problem(
            pointer="/sampling/gradient_accumulation",
            code="indivisible_batch",
            detail=f"{parts} does not divide the {total} completions of a step",
            remedy=f"Use one of {', '.join(divisors[:12])}.",
        )


def _rows_fill_a_step(spec: JobSpec) -> Iterator[Problem]:
    """`data.max_rows`, less the rows held out for evaluation, is at least `sampling.prompts_per_step`."""
    rows, held_out, prompts = spec.data.max_rows, spec.held_out_rows, spec.sampling.prompts_per_step
    if rows is not None and rows - held_out < prompts:
        yield Problem(
            pointer="/data/max_rows",
            code="too_few_rows",
            detail=f"{max(0, rows - held_out)} rows to train on cannot fill a step of {prompts} prompts",
            remedy=f"Use at least {prompts + held_out}, or lower sampling.prompts_per_step.",
        )


def _step_is_bounded(spec: JobSpec) -> Iterator[Problem]:
    """A step draws at most 8,192 completions and 16,777,216 tokens, a job at most 100,000,000 completions."""
    completions = spec.completions_per_step
    tokens = completions * (spec.sampling.max_prompt_tokens + spec.sampling.max_completion_tokens)
    if completions > MAX_COMPLETIONS_PER_STEP:
        yield Problem(
            pointer="/sampling/prompts_per_step",
            code="step_too_large",
            detail=f"a step would draw {completions} completions; at most {MAX_COMPLETIONS_PER_STEP} are accepted",
            remedy="Lower prompts_per_step or generations.",
        )
    elif tokens > MAX_TOKENS_PER_STEP:
        yield Problem(
            pointer="/sampling/prompts_per_step",
            code="step_too_large",
            detail=f"a step could hold {tokens} tokens; at most {MAX_TOKENS_PER_STEP} are accepted",
            remedy="Lower prompts_per_step, generations or the token limits.",
        )
    if completions * spec.training.steps > MAX_COMPLETIONS:
        yield Problem(
            pointer="/training/steps",
            code="job_too_large",
            detail=f"the job would draw {completions * spec.training.steps} completions; "
            f"at most {MAX_COMPLETIONS} are accepted",
            remedy="Lower training.steps, or split the job.",
        )


def _something_is_rewarded(spec: JobSpec) -> Iterator[Problem]:
    """At least one of `rewards.weights` is not 0."""
    if not any(spec.rewards.weights.model_dump().values()):
        yield Problem(
            pointer="/rewards/weights",
            code="no_reward",
            detail="every weight is 0, so nothing could be learnt",
            remedy="Give at least one reward a weight other than 0.",
        )


def _source_remedy(name: str) -> str:
    """What to write where the name of a hub data set is something else."""
    address = re.fullmatch(r"(?:https?://)?huggingface\.co/datasets/([\w.-]+/[\w.-]+?)/?", name)
    if re.fullmatch(DATASET_ID, name):
        return "It is an upload: set data.source to upload."
    if re.fullmatch(S3_URL, name):
        return "It is an object in S3: set data.source to s3."
    if address and re.fullmatch(HUB_NAME, address[1]):
        return f'Write the name alone: "{address[1]}".'
    return "Use owner/name, or upload a file with POST /datasets and set data.source to upload."


def _dataset_name_fits_source(spec: JobSpec) -> Iterator[Problem]:
    """`data.dataset` is a hub name, an upload's id or `s3://bucket/key`, as `data.source` says; `data.subset` and
    `data.revision` are the hub's."""
    name, source = spec.data.dataset, spec.data.source
    if source == "hub" and (re.fullmatch(DATASET_ID, name) or not re.fullmatch(HUB_NAME, name)):
        yield Problem(
            pointer="/data/dataset",
            code="bad_name",
            detail=f"{name[:80]!r} is not a hub name",
            remedy=_source_remedy(name),
        )
    if source == "upload" and not re.fullmatch(DATASET_ID, name):
        yield Problem(
            pointer="/data/dataset",
            code="bad_name",
            detail=f"{name[:80]!r} is not the id of an upload",
            remedy="Use the id that POST /datasets returned; it begins with ds-.",
        )
    if source == "s3" and not re.fullmatch(S3_URL, name):
        yield Problem(
            pointer="/data/dataset",
            code="bad_name",
            detail=f"{name[:80]!r} is not the address of an object",
            remedy="Use s3://bucket/folder/rows.jsonl, with letters, digits and !_.*'()=+@,:~- in the names.",
        )
    for field in ("subset", "revision"):
        if source != "hub" and getattr(spec.data, field) is not None:
            yield Problem(
                pointer=f"/data/{field}",
                code="not_applicable",
                detail=f"has no meaning where data.source is {source}",
                remedy="Leave it out.",
            )


def _columns_differ(spec: JobSpec) -> Iterator[Problem]:
    """`data.question_column` and `data.answer_column` differ."""
    if spec.data.question_column == spec.data.answer_column:
        yield Problem(
            pointer="/data/answer_column",
            code="same_column",
            detail="is also the question column, so the prompt would hold the answer",
            remedy="Name the column that holds the final answer.",
        )


def _cpu_jobs_ask_for_nothing_of_cuda(spec: JobSpec) -> Iterator[Problem]:
    """With `resources.gpus` 0: optimizer `adamw_torch`, precision `auto`, engine `auto` or `trl`, no
    `min_gpu_memory_gb`."""
    if spec.resources.gpus:
        return
    needs_cuda = {
        "/optimizer/name": (spec.optimizer.name != "adamw_torch", "the 8-bit optimizers need a GPU", "adamw_torch"),
        "/model/precision": (spec.model.precision != "auto", "a CPU trains in 32-bit only", "auto"),
        "/engine": (spec.engine == "unsloth", "unsloth needs a GPU", "auto or trl"),
    }
    for pointer, (broken, why, instead) in needs_cuda.items():
        if broken:
            yield Problem(
                pointer=pointer,
                code="needs_gpu",
                detail=f"{why}, and resources.gpus is 0",
                remedy=f"Use {instead}, or set resources.gpus to 1.",
            )
    if spec.resources.min_gpu_memory_gb is not None:
        yield Problem(
            pointer="/resources/min_gpu_memory_gb",
            code="not_applicable",
            detail="asks for GPU memory, and resources.gpus is 0",
            remedy="Leave it out, or set resources.gpus to 1.",
        )


def _lora_scale_is_sane(spec: JobSpec) -> Iterator[Problem]:
    """`lora.alpha` is at most 64 × `lora.rank`."""
    if spec.lora.alpha > 64 * spec.lora.rank:
        yield Problem(
            pointer="/lora/alpha",
            code="scale_too_large",
            detail=f"alpha/rank is {spec.lora.alpha / spec.lora.rank:g}; above 64 the first update destroys the model",
            remedy=f"Use at most {64 * spec.lora.rank}; the recipe uses alpha equal to rank.",
        )


RULES: tuple[Callable[[JobSpec], Iterator[Problem]], ...] = (
    _sequence_fits,
    _evaluation_fits,
    _accumulation_divides,
    _rows_fill_a_step,
    _step_is_bounded,
    _something_is_rewarded,
    _dataset_name_fits_source,
    _columns_differ,
    _cpu_jobs_ask_for_nothing_of_cuda,
    _lora_scale_is_sane,
)
