"""Rules that involve several fields of a spec, so that an impossible job is refused before the model is loaded.

Each rule reads a spec whose fields are valid one by one and yields the problems it finds; its docstring is its
line in docs/reference/spec.md. Invariant: a rule names the field to change and what to change it to, and all rules
run, so that all problems are reported together.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace

from pydantic_core import PydanticCustomError

from grpo_core.rewards.graders.models import LabelModel
from grpo_core.rewards.tags import Tags
from grpo_core.spec.aliases import closest
from grpo_core.spec.grader_checks import bad_formula, problems_of
from grpo_core.spec.problems import Problem
from grpo_core.spec.sections import DATASET_ID, HUB_NAME, S3_URL, JobSpec, RewardWeights
from grpo_core.strict_json import pointer_of

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
    """If `evaluation.questions` is not 0: `sampling.max_prompt_tokens` + `evaluation.max_completion_tokens` is at most
    `model.max_sequence`, and the rows held out of training are at most half of `data.max_rows`."""
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


def _evaluations_during_training_are_possible(spec: JobSpec) -> Iterator[Problem]:
    """`evaluation.every`, `sample` and `stop_when` need `evaluation.questions`, of which `sample` are at most all;
    `stop_when` needs evaluations during training."""
    asked = spec.evaluation
    given = {"every": bool(asked.every), "sample": asked.sample is not None, "stop_when": asked.stop_when.is_set}
    if not asked.questions:
        for name in (name for name, is_given in given.items() if is_given):
            yield Problem(
                pointer=f"/evaluation/{name}",
                code="no_questions",
                detail="has no effect, because evaluation.questions is 0",
                remedy="Leave it out, or give the number of questions, such as 128.",
            )
        return
    if asked.sample is not None and asked.sample > asked.questions:
        yield Problem(
            pointer="/evaluation/sample",
            code="sample_too_large",
            detail=f"is {asked.sample}, of {asked.questions} questions",
            remedy=f"Use at most {asked.questions}, or raise evaluation.questions.",
        )
    if asked.stop_when.is_set and (asked.every == 0 or (asked.every or 0) >= spec.training.steps):
        yield Problem(
            pointer="/evaluation/every",
            code="never_evaluates",
            detail="leaves no evaluation during training, after which evaluation.stop_when could end the job",
            remedy="Leave it out, or use fewer steps than training.steps.",
        )


def _accumulation_divides(spec: JobSpec) -> Iterator[Problem]:
    """`sampling.gradient_accumulation` divides the completions of a step evenly."""
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
    """`data.max_rows`, minus the rows held out for evaluation, is at least `sampling.prompts_per_step`."""
    rows, held_out, prompts = spec.data.max_rows, spec.held_out_rows, spec.sampling.prompts_per_step
    if rows is not None and rows - held_out < prompts:
        yield Problem(
            pointer="/data/max_rows",
            code="too_few_rows",
            detail=f"{max(0, rows - held_out)} rows to train on cannot fill a step of {prompts} prompts",
            remedy=f"Use at least {prompts + held_out}, or lower sampling.prompts_per_step.",
        )


def _step_is_bounded(spec: JobSpec) -> Iterator[Problem]:
    """A step generates at most 8,192 completions and 16,777,216 tokens, a job at most 100,000,000 completions."""
    completions = spec.completions_per_step
    tokens = completions * (spec.sampling.max_prompt_tokens + spec.sampling.max_completion_tokens)
    if completions > MAX_COMPLETIONS_PER_STEP:
        yield Problem(
            pointer="/sampling/prompts_per_step",
            code="step_too_large",
            detail=f"a step would generate {completions} completions; at most {MAX_COMPLETIONS_PER_STEP} are accepted",
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
            detail=f"the job would generate {completions * spec.training.steps} completions; "
            f"at most {MAX_COMPLETIONS} are accepted",
            remedy="Lower training.steps, or split the job.",
        )


def _something_is_rewarded(spec: JobSpec) -> Iterator[Problem]:
    """At least one of `rewards.weights` is not 0, or there is a `rewards.formula`."""
    if spec.rewards.formula is None and not any(spec.rewards.weights.by_name.values()):
        yield Problem(
            pointer="/rewards/weights",
            code="no_reward",
            detail="every weight is 0, so nothing could be learnt",
            remedy="Give at least one reward a weight other than 0.",
        )


def _published_has_its_own_tags(spec: JobSpec) -> Iterator[Problem]:
    """`rewards.tags` is left out where `rewards.mode` is `published`."""
    if spec.rewards.mode == "published" and spec.rewards.tags.as_tags != Tags():
        yield Problem(
            pointer="/rewards/tags",
            code="not_applicable",
            detail="has no meaning where rewards.mode is published, whose tags are the recipe's",
            remedy="Leave it out, or set rewards.mode to fixed.",
        )


def _own_questions_are_asked(spec: JobSpec) -> Iterator[Problem]:
    """`evaluation.dataset` comes from `data.source`, needs `evaluation.questions`, and differs from `data.dataset`
    unless both are on the hub and their splits differ."""
    name = spec.evaluation.dataset
    if name is None:
        return
    pointer = "/evaluation/dataset"
    if not spec.evaluation.questions:
        yield Problem(
            pointer="/evaluation/questions",
            code="no_questions",
            detail=f"is 0, so nothing of {name[:80]!r} would be asked",
            remedy="Give the number of questions, such as 100.",
        )
    is_other_split = spec.data.source == "hub" and spec.evaluation.split != spec.data.split
    if name == spec.data.dataset and not is_other_split:
        yield Problem(
            pointer=pointer,
            code="same_dataset",
            detail="is the data set that is trained on",
            remedy="Leave it out to hold out the last rows of data.dataset.",
        )
    yield from _name_fits(name, spec.data.source, pointer)


def _source_remedy(name: str) -> str:
    """What to write instead of something that is not the name of a hub data set."""
    address = re.fullmatch(r"(?:https?://)?huggingface\.co/datasets/([\w.-]+/[\w.-]+?)/?", name)
    if re.fullmatch(DATASET_ID, name):
        return "It is an upload: set data.source to upload."
    if re.fullmatch(S3_URL, name):
        return "It is an object in S3: set data.source to s3."
    if address and re.fullmatch(HUB_NAME, address[1]):
        return f'Write the name alone: "{address[1]}".'
    return "Use owner/name, or upload a file with POST /datasets and set data.source to upload."


def _dataset_name_fits_source(spec: JobSpec) -> Iterator[Problem]:
    """`data.dataset` is a hub name, the id of an upload or `s3://bucket/key`, depending on `data.source`; `data.subset`
    and `data.revision` are only for `hub`."""
    source = spec.data.source
    yield from _name_fits(spec.data.dataset, source, "/data/dataset")
    for field in ("subset", "revision"):
        if source != "hub" and getattr(spec.data, field) is not None:
            yield Problem(
                pointer=f"/data/{field}",
                code="not_applicable",
                detail=f"has no meaning where data.source is {source}",
                remedy="Leave it out.",
            )


def _name_fits(name: str, source: str, pointer: str) -> Iterator[Problem]:
    if source == "hub" and (re.fullmatch(DATASET_ID, name) or not re.fullmatch(HUB_NAME, name)):
        yield Problem(
            pointer=pointer,
            code="bad_name",
            detail=f"{name[:80]!r} is not a hub name",
            remedy=_source_remedy(name),
        )
    if source == "upload" and not re.fullmatch(DATASET_ID, name):
        yield Problem(
            pointer=pointer,
            code="bad_name",
            detail=f"{name[:80]!r} is not the id of an upload",
            remedy="Use the id that POST /datasets returned; it starts with ds-.",
        )
    if source == "s3" and not re.fullmatch(S3_URL, name):
        yield Problem(
            pointer=pointer,
            code="bad_name",
            detail=f"{name[:80]!r} is not the address of an object",
            remedy="Use s3://bucket/folder/rows.jsonl, with letters, digits and !_.*'()=+@,:~- in the names.",
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
    """With `resources.gpus` 0, `optimizer.name` is `adamw_torch` if the job trains, `model.precision` `auto`, `engine`
    `auto`, `trl` or `native`, and `resources.min_gpu_memory_gb` null."""
    if spec.resources.gpus:
        return
    needs_cuda = {
        "/optimizer/name": (
            spec.has_steps and spec.optimizer.name != "adamw_torch",
            "the 8-bit optimizers need a GPU",
            "adamw_torch",
        ),
        "/model/precision": (spec.model.precision != "auto", "a CPU trains in 32-bit only", "auto"),
        "/engine": (spec.engine == "unsloth", "unsloth needs a GPU", "auto, trl or native"),
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


def _eight_bits_have_an_engine(spec: JobSpec) -> Iterator[Problem]:
    """With `model.precision` `8bit`: engine `native`."""
    if spec.model.precision == "8bit" and spec.engine != "native":
        yield Problem(
            pointer="/engine",
            code="precision_of_another_engine",
            detail=f"is {spec.engine}, and only native holds weights in 8 bits",
            remedy="Set engine to native, or model.precision to 4bit or 16bit.",
        )


def _trials_alone_have_rows(spec: JobSpec) -> Iterator[Problem]:
    """`trial` is left out unless `kind` is `try`."""
    if spec.kind != "try" and spec.trial.rows != type(spec.trial)().rows:
        yield Problem(
            pointer="/trial/rows",
            code="not_applicable",
            detail=f"has no meaning where kind is {spec.kind}",
            remedy='Leave it out, or set kind to "try".',
        )


def _sections_have_their_kind(spec: JobSpec) -> Iterator[Problem]:
    """`serving` and `export` are left out unless `kind` is theirs; an export names a job, and so does one that serves
    `serving.steps`; each step is named once."""
    for name, section in (("serving", spec.serving), ("export", spec.export)):
        if spec.kind != name and section != type(section)():
            yield Problem(
                pointer=f"/{name}",
                code="not_applicable",
                detail=f"has no meaning where kind is {spec.kind}",
                remedy=f'Leave it out, or set kind to "{name}".',
            )
    lacking = "/export/job" if spec.kind == "export" and spec.export.job is None else ""
    if spec.kind == "serving" and spec.serving.job is None and spec.serving.steps:
        lacking = "/serving/job"
    if lacking:
        yield Problem(
            pointer=lacking,
            code="missing_field",
            detail="is missing",
            remedy="Give the id of one of your jobs, whose adapter is meant.",
        )
    if spec.kind == "serving" and spec.serving.engine == "vllm" and spec.resources.gpus == 0:
        yield Problem(
            pointer="/serving/engine",
            code="not_applicable",
            detail="needs a GPU, and resources.gpus is 0",
            remedy='Set serving.engine to "auto", or resources.gpus to 1.',
        )
    if spec.export.type == "q8_0" and spec.export.format != "gguf":
        yield Problem(
            pointer="/export/type",
            code="not_applicable",
            detail="is a type of GGUF files alone",
            remedy='Set export.format to "gguf", or type to "auto".',
        )
    if spec.kind == "serving" and len(set(spec.serving.steps)) < len(spec.serving.steps):
        yield Problem(
            pointer="/serving/steps",
            code="repeated",
            detail="names a step twice",
            remedy="Name each step once.",
        )


def _other_kinds_do_not_train(spec: JobSpec) -> Iterator[Problem]:
    """With `kind` `serving` or `export`, the sections about training are left out, and so is `from_checkpoint`."""
    if spec.has_steps:
        return
    for name in ("optimizer", "training", "loss", "rewards", "evaluation", "guards", "audits", "from_checkpoint"):
        if getattr(spec, name) != type(spec).model_fields[name].get_default():
            yield Problem(
                pointer=f"/{name}",
                code="not_applicable",
                detail=f"has no meaning where kind is {spec.kind}",
                remedy="Leave it out.",
            )


def _several_ranks_have_an_engine(spec: JobSpec) -> Iterator[Problem]:
    """With `resources.gpus` or `resources.hosts` above 1: engine `native`, `trl` or `auto`, `lora.dropout` 0, and no
    more cards than a step has completions."""
    gpus, hosts, ranks = spec.resources.gpus, spec.resources.hosts, spec.resources.ranks
    where = f"{gpus} cards" if hosts == 1 else f"{hosts} hosts"
    one = f"resources.{'gpus' if hosts == 1 else 'hosts'} to 1"
    if ranks > 1 and spec.engine == "unsloth":
        yield Problem(
            pointer="/engine",
            code="one_gpu_only",
            detail=f"is {spec.engine}, and only native and trl train on {where}",
            remedy=f"Set engine to native or trl, or {one}.",
        )
    if ranks > 1 and spec.lora.dropout > 0 and spec.has_steps:
        yield Problem(
            pointer="/lora/dropout",
            code="one_gpu_only",
            detail=f"is {spec.lora.dropout:g}, and what it drops would depend on how a step is shared by {where}",
            remedy=f"Set lora.dropout to 0, or {one}.",
        )
    if ranks > spec.completions_per_step:
        yield Problem(
            pointer="/resources/gpus" if hosts == 1 else "/resources/hosts",
            code="too_many_gpus" if hosts == 1 else "too_many_hosts",
            detail=f"a step has {spec.completions_per_step} completions, too few for "
            + (where if hosts == 1 else f"the {ranks} processes on {where}"),
            remedy="Lower it, or draw more completions a step.",
        )


def _shared_weights_have_ranks(spec: JobSpec) -> Iterator[Problem]:
    """With `model.sharding` `full`, if the job trains: engine `native`, or `auto`, and `resources.gpus` or
    `resources.hosts` above 1."""
    if spec.model.sharding != "full" or not spec.has_steps:
        return
    if spec.engine not in ("native", "auto"):
        yield Problem(
            pointer="/engine",
            code="no_sharding",
            detail=f"is {spec.engine}, and only native shares the base model out among GPUs",
            remedy="Set engine to native, or leave out model.sharding.",
        )
    elif spec.resources.ranks == 1:
        yield Problem(
            pointer="/model/sharding",
            code="one_gpu_only",
            detail="is full, and the job has no second GPU to share the base model with",
            remedy="Set resources.gpus or resources.hosts to 2 or more, or leave it out.",
        )


def _one_host_serves(spec: JobSpec) -> Iterator[Problem]:
    """With `kind` `serving` or `export`, `resources.hosts` is 1."""
    if spec.resources.hosts > 1 and not spec.has_steps:
        yield Problem(
            pointer="/resources/hosts",
            code="not_applicable",
            detail=f"is {spec.resources.hosts}, and a job of kind {spec.kind} runs on one host",
            remedy="Leave it out.",
        )


def _fewer_hosts_are_fewer(spec: JobSpec) -> Iterator[Problem]:
    """`resources.min_hosts` is at most `resources.hosts`."""
    least, hosts = spec.resources.min_hosts, spec.resources.hosts
    if least is not None and least > hosts:
        yield Problem(
            pointer="/resources/min_hosts",
            code="more_than_hosts",
            detail=f"is {least}, more than the {hosts} of resources.hosts",
            remedy=f"Use at most {hosts}, or raise resources.hosts.",
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


def _graders_have_names_of_their_own(spec: JobSpec) -> Iterator[Problem]:
    """A grader's name is none of the recipe's five and not `total`; `rewards.weights` and `rewards.limits` name
    rewards that are there; `evaluation.metric` too."""
    taken = {*RewardWeights.model_fields, "total"}
    for name in taken & set(spec.rewards.graders):
        yield Problem(
            pointer=pointer_of(("rewards", "graders", name)),
            code="name_taken",
            detail=f"is called {name}, which records use for something else",
            remedy="Give the grader another name.",
        )
    for name in sorted(set(spec.rewards.weights.by_name) - set(spec.rewards.names)):
        yield Problem(
            pointer=pointer_of(("rewards", "weights", name)),
            code="unknown_field",
            detail="is not a field of the spec" if not spec.rewards.graders else "is the weight of no reward",
            remedy=closest(name, spec.rewards.names),
        )
    for name in sorted(set(spec.rewards.limits) - set(spec.rewards.graders)):
        yield Problem(
            pointer=pointer_of(("rewards", "limits", name)),
            code="unknown_grader",
            detail="is the limit of no grader",
            remedy=closest(name, tuple(spec.rewards.graders)),
        )
    metric = spec.evaluation.metric
    if metric is not None and metric not in (*spec.rewards.names, "total"):
        yield Problem(
            pointer="/evaluation/metric",
            code="unknown_reward",
            detail=f"{metric!r} is no reward of this job",
            remedy=closest(metric, (*spec.rewards.names, "total")),
        )


def _formula_is_sound(spec: JobSpec) -> Iterator[Problem]:
    """`rewards.formula` can be read, uses names of rewards only, and stands in place of `rewards.weights`."""
    if spec.rewards.formula is None:
        return
    yield from bad_formula("/rewards/formula", spec.rewards.formula, spec.rewards.names)
    if any(spec.rewards.weights.by_name.values()):
        yield Problem(
            pointer="/rewards/weights",
            code="weights_and_formula",
            detail="has no effect beside rewards.formula, which alone computes the reward",
            remedy="Leave weights out, and multiply in the formula.",
        )


def _graders_can_run(spec: JobSpec) -> Iterator[Problem]:
    """A grader reads `sample.output_json` only where `sampling.response_format` is given; `python` compiles and defines
    `grade`; a pattern is one of RE2's; a metric is one that is offered; a `label_model` stands inside a `multi`."""
    for name, grader in spec.rewards.graders.items():
        for problem in problems_of(grader, has_format=spec.sampling.response_format is not None):
            yield replace(problem, pointer=pointer_of(("rewards", "graders", name)) + problem.pointer)
        if isinstance(grader, LabelModel):
            yield Problem(
                pointer=pointer_of(("rewards", "graders", name, "type")),
                code="label_model_alone",
                detail="is label_model, which OpenAI takes only inside a multi",
                remedy='Put it into {"type": "multi", "graders": {"label": ...}, "calculate_output": "label"}.',
            )


RULES: tuple[Callable[[JobSpec], Iterator[Problem]], ...] = (
    _sequence_fits,
    _evaluation_fits,
    _evaluations_during_training_are_possible,
    _accumulation_divides,
    _rows_fill_a_step,
    _step_is_bounded,
    _something_is_rewarded,
    _graders_have_names_of_their_own,
    _formula_is_sound,
    _graders_can_run,
    _dataset_name_fits_source,
    _own_questions_are_asked,
    _published_has_its_own_tags,
    _columns_differ,
    _cpu_jobs_ask_for_nothing_of_cuda,
    _eight_bits_have_an_engine,
    _trials_alone_have_rows,
    _sections_have_their_kind,
    _other_kinds_do_not_train,
    _several_ranks_have_an_engine,
    _shared_weights_have_ranks,
    _one_host_serves,
    _fewer_hosts_are_fewer,
    _lora_scale_is_sane,
)
