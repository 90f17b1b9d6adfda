"""The job spec, section by section: every field, its limits and its default, which is the value of the recipe.

An empty spec is the recipe (with `rewards.mode` fixed and `model.precision` auto). Every value is explicit,
because library defaults drift. Rules that span fields are in `rules`; turning errors into advice in `problems`.
Invariant: a spec is frozen, and equal specs have equal hashes on every machine.
"""

from __future__ import annotations

import hashlib
import re
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Final, Literal, Self, cast, get_args

from pydantic import (
    ConfigDict,
    Field,
    JsonValue,
    Strict,
    ValidationError,
    field_serializer,
    field_validator,
    model_validator,
)

from grpo_core import strict_json
from grpo_core.rewards.graders.models import CLOSED, GRADER_NAME, MAX_GRADERS, AnyGrader, Grader, GraderLimits, OnError
from grpo_core.rewards.graders.models import FORMS as GRADER_FORMS
from grpo_core.rewards.tags import Tags
from grpo_core.section import Section, Since
from grpo_core.spec.patterns import compile_pattern

SCHEMA_VERSION = 1

SYSTEM_PROMPT = "采用下方格式回复用户问题:\n<reasoning>\n...\n</reasoning>\n<answer>\n...\n</answer>\n"

Projection = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PROJECTIONS: tuple[Projection, ...] = get_args(Projection)

Tracker = Literal["mlflow", "tensorboard", "trackio", "wandb"]
TRACKERS: tuple[Tracker, ...] = get_args(Tracker)

NAME_PART = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
HUB_NAME = rf"^{NAME_PART}(/{NAME_PART})?$"
REVISION = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
ULID = r"[0-9A-HJKMNP-TV-Z]{26}"
JOB_ID = rf"^job-{ULID}$"
DATASET_ID = rf"^ds-{ULID}$"
_KEY_PART = r"(?!\.\.?(?:/|$))[A-Za-z0-9!_.*'()=+@,:~-]+"
S3_URL = rf"^s3://(?P<bucket>[a-z0-9][a-z0-9.-]{{1,61}}[a-z0-9])/(?P<key>{_KEY_PART}(?:/{_KEY_PART})*)$"
ONE_LINE = r"^[^\x00-\x1f\x7f]+$"
TAG_NAME = r"^[a-z][a-z0-9_-]{0,31}$"
_PATH_STEP = r"[^.\[\]]+|\[\d{1,6}\]"
ANSWER_PATH = rf"(?:{_PATH_STEP})(?:\.[^.\[\]]+|\[\d{{1,6}}\])*"

FORMS = {
    HUB_NAME: "a name or owner/name, each of letters, digits, dots, dashes and underscores",
    REVISION: "a name of at most 64 letters, digits, dots, dashes and underscores",
    JOB_ID: "the id of a job: job- and 26 capital letters and digits",
    ONE_LINE: "one line of text",
    TAG_NAME: "a name of at most 32 small letters, digits, dashes and underscores that begins with a letter",
    **GRADER_FORMS,
}
"""Each pattern of a field, described in words."""

MAX_STEPS = 100_000

Weight = Annotated[float, Field(ge=-100, le=100)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class ModelSection(Section):
    """The base model and how it is held in memory."""

    name: str = Field(default="Qwen/Qwen2.5-7B-Instruct", pattern=HUB_NAME)
    """A Hugging Face hub name, or the name of a folder in the worker's model directory."""
    revision: str | None = Field(default=None, pattern=REVISION)
    """Branch, tag or commit on the hub; null is the default branch."""
    max_sequence: int = Field(default=1024, ge=32, le=131_072)
    """Longest prompt plus completion, in tokens."""
    gpu_memory_share: float = Field(default=0.6, ge=0.05, le=0.95)
    """Share of the GPU memory that is free at the start for the rollout engine (vLLM) to use."""
    precision: Annotated[Literal["auto", "4bit", "8bit", "16bit"], Since(2, values=("8bit",))] = "auto"
    """`auto`: fp32 on a CPU; on a GPU 16-bit if the weights take at most 0.4 of its memory, otherwise 4-bit. `8bit` is
    FP8, with the engine `native` on GPUs of compute capability 8.9 and above."""
    sharding: Annotated[Literal["auto", "off", "full"], Since(2)] = "auto"
    """How the GPUs of a job hold the base model, with the engine `native`. `off`: each holds all of it. `full`: each
    holds a part of every layer, and gathers a layer while it is used, so that a model may be larger than a GPU; the
    results are the same. `auto`: `off` where the model fits a GPU, otherwise `full`."""


class LoraSection(Section):
    """The adapter that is trained."""

    rank: int = Field(default=32, ge=1, le=256)
    """LoRA rank r."""
    alpha: int = Field(default=32, ge=1, le=1024)
    """LoRA alpha: the adapter's output is scaled by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, le=0.5)
    """LoRA dropout: share of the adapter's inputs that is dropped in training."""
    target_modules: Annotated[tuple[Projection, ...], Strict(False)] = Field(
        default=PROJECTIONS, min_length=1, max_length=len(PROJECTIONS)
    )
    """The projections to adapt."""
    gradient_checkpointing: Literal["auto", "unsloth", "standard", "off"] = "auto"
    """`auto`: off if the GPU has enough memory, which is faster. `unsloth` is that engine's implementation; `trl`
    treats it as `standard`."""
    seed: int = Field(default=3407, ge=0, le=2**31 - 1)
    """Random seed for the adapter's initial weights."""

    @field_validator("target_modules")
    @classmethod
    def _no_module_twice(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) != len(value):
            raise ValueError("names a module twice")
        return value


class OptimizerSection(Section):
    """The optimizer and its schedule."""

    name: Literal["paged_adamw_8bit", "adamw_8bit", "adamw_torch"] = "paged_adamw_8bit"
    """The 8-bit optimizers need a GPU. Use `adamw_torch` with `resources.gpus` 0."""
    learning_rate: float = Field(default=5e-6, gt=0, le=1.0)
    """Peak learning rate, reached after warm-up."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Adam's decay rate for the mean of gradients."""
    beta2: float = Field(default=0.99, ge=0, lt=1)
    """Adam's decay rate for the mean of squared gradients."""
    weight_decay: float = Field(default=0.1, ge=0, le=1)
    """Weight decay, decoupled from the gradient as in AdamW."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate changes after warm-up."""
    warmup_ratio: Fraction = 0.1
    """Share of all steps in which the learning rate rises from zero to its peak."""
    max_grad_norm: float = Field(default=0.1, gt=0, le=1000)
    """Gradients with a larger norm are scaled down to this norm."""


class TrainingSection(Section):
    """How long to train, and what to keep."""

    steps: int = Field(default=250, ge=1, le=MAX_STEPS)
    """Number of optimizer steps."""
    log_every: int = Field(default=1, ge=1, le=1000)
    """Number of steps between two metric events."""
    save_steps: int = Field(default=250, ge=1, le=MAX_STEPS)
    """Number of steps between two checkpoints that are kept."""
    checkpoint_every: int = Field(default=25, ge=1, le=MAX_STEPS)
    """Number of steps between two checkpoints from which an interrupted job resumes. The last step has one too."""
    checkpoint_minutes: Annotated[float, Since(2)] = Field(default=30.0, gt=0, le=1440)
    """Longest time in minutes between two such checkpoints, for slow steps. The first step that ends after it is saved,
    also between those of `checkpoint_every`. To save by time alone, set `checkpoint_every` to `steps`."""
    seed: int = Field(default=3407, ge=0, le=2**31 - 1)
    """Random seed for the order of the data and for sampling."""
    report_to: Annotated[tuple[Tracker, ...], Strict(False)] = Field(default=(), max_length=len(TRACKERS))
    """Experiment trackers that also receive the metrics of each step. The worker must have their packages and keys. A
    tracker that fails causes a warning and never ends the job."""

    @field_validator("report_to")
    @classmethod
    def _no_tracker_twice(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) != len(value):
            raise ValueError("names a tracker twice")
        return value


class NamedSchema(Section):
    """A JSON Schema with its name."""

    name: str = Field(default="answer", min_length=1, max_length=64)
    """Kept and not used."""
    description: str | None = Field(default=None, max_length=4096)
    """Kept and not used."""
    json_schema: dict[str, JsonValue] = Field(default={}, alias="schema", max_length=1000)
    """Without references to other documents."""
    strict: bool | None = None
    """Kept and not used."""


class ResponseFormat(Section):
    """OpenAI's object of this name."""

    type: Literal["json_schema", "json_object"]
    """`json_object`: any JSON object."""
    json_schema: NamedSchema | None = None
    """With `json_schema`: which."""

    @model_validator(mode="after")
    def _schema_where_named(self) -> Self:
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("needs json_schema where its type is json_schema")
        return self


class SamplingSection(Section):
    """How completions are generated. A step generates `prompts_per_step` × `generations` of them."""

    prompts_per_step: int = Field(default=1, ge=1, le=1024)
    """Number of prompts in a step."""
    generations: int = Field(default=6, ge=2, le=256)
    """Number of completions for each prompt. They form the group in which advantages are computed."""
    gradient_accumulation: int = Field(default=1, ge=1, le=4096)
    """Number of parts in which a step's completions are trained, to save memory. Must divide them evenly."""
    max_prompt_tokens: int = Field(default=256, ge=1, le=131_072)
    """Prompts that are longer, including the chat template, are dropped and counted."""
    max_completion_tokens: int = Field(default=200, ge=1, le=131_072)
    """Completions are cut off at this length."""
    temperature: float = Field(default=0.9, ge=0.01, le=5)
    """Sampling temperature. Higher values give more varied completions."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample only from the most likely tokens with this total probability; 1 is off."""
    top_k: int = Field(default=0, ge=0, le=1_000_000)
    """Sample only from this number of most likely tokens; 0 is off."""
    repetition_penalty: float = Field(default=1.0, ge=0.1, le=10)
    """Values above 1 make tokens that already occurred less likely; 1 is off."""
    response_format: Annotated[ResponseFormat | None, Since(2)] = None
    """The JSON schema that completions should match; graders then read them as `sample.output_json`. It is checked, not
    enforced: the model may write anything else."""


class LossSection(Section):
    """The GRPO objective."""

    type: Literal["grpo", "bnpo", "dr_grpo", "dapo"] = "grpo"
    """How token losses are averaged: per completion (`grpo`), over the micro-batch (`bnpo`), divided by a constant
    (`dr_grpo`) or over the whole step (`dapo`)."""
    beta: float = Field(default=0.04, ge=0, le=10)
    """Weight of the KL term. With 0 the reference model is not computed."""
    epsilon: float = Field(default=0.2, gt=0, lt=1)
    """Probability ratios are clipped to 1 ± epsilon."""
    scale_by: Literal["group", "batch", "none"] = "group"
    """Divide advantages by the standard deviation of the group, of the batch, or not at all."""
    iterations: int = Field(default=1, ge=1, le=16)
    """Number of optimizer passes over each batch of completions."""


class RewardWeights(Section):
    """The weight of each reward. With weight 0 the raw value is still recorded. A grader's weight has its name."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Weight] = Field(init=False)  # pyright: ignore[reportIncompatibleVariableOverride]

    correctness: Weight = 1.0
    """2 if the answer is correct."""
    integer: Weight = 1.0
    """0.5 if the answer is a whole number."""
    strict_format: Weight = 1.0
    """0.5 if the completion matches the required format exactly."""
    soft_format: Weight = 1.0
    """0.5 if the tags are in the right order."""
    xml_count: Weight = 1.0
    """Up to 0.5: 0.125 for each tag, less a penalty for text after the last one."""

    @property
    def by_name(self) -> dict[str, float]:
        """Every weight by name, those of the five recipe rewards first."""
        return {**{name: getattr(self, name) for name in type(self).model_fields}, **(self.__pydantic_extra__ or {})}


class RewardTags(Section):
    """The format that the recipe's five rewards look for in mode `fixed`."""

    reasoning: str | None = Field(default="reasoning", pattern=TAG_NAME)
    """The tag around the reasoning, such as `think`; null is none."""
    answer: str | None = Field(default="answer", pattern=TAG_NAME)
    """The tag around the answer; `boxed`: the answer is in `\\boxed{}`; null: it is what follows the reasoning."""

    @property
    def as_tags(self) -> Tags:
        """The form that rewards take."""
        return Tags(self.reasoning, self.answer)


class RewardsSection(Section):
    """How completions are scored: the recipe's five rewards and your own graders."""

    mode: Literal["fixed", "published"] = "fixed"
    """`fixed` corrects the faults of the published rewards. `published` is bit-identical to the recipe."""
    weights: RewardWeights = RewardWeights()
    """If the spec has graders, the default is 0 for each of the five and 1 for a grader."""
    tags: Annotated[RewardTags, Since(2)] = RewardTags()
    """With other tags than the recipe's, and no `data.system_prompt`, an English one that asks for them is sent."""
    graders: Annotated[dict[Annotated[str, Field(pattern=GRADER_NAME)], Grader], Since(2)] = Field(
        default={}, max_length=MAX_GRADERS, json_schema_extra=CLOSED
    )
    """Your own rewards by name, each an object in OpenAI's format."""
    formula: Annotated[str | None, Since(2)] = Field(default=None, min_length=1, max_length=2000)
    """The reward of a completion, computed from the raw rewards by name, instead of `weights`: numbers, names,
    `+ - * / ^ ( )` and `min max abs floor ceil exp sqrt log`."""
    limits: Annotated[dict[Annotated[str, Field(pattern=GRADER_NAME)], GraderLimits], Since(2)] = Field(
        default={}, max_length=MAX_GRADERS, json_schema_extra=CLOSED
    )
    """Limits of a grader, by its name."""
    on_error: Annotated[OnError, Since(2)] = OnError()

    @model_validator(mode="before")
    @classmethod
    def _weights_of_graders(cls, data: Any) -> Any:
        """With graders the five count only where they are named, and with a formula no weight does."""
        if not isinstance(data, dict):
            return data
        given = cast("dict[str, Any]", data)
        graders, weights = given.get("graders"), given.get("weights", {})
        if not isinstance(weights, dict):
            return given
        of_graders: dict[str, float] = {}
        if isinstance(graders, dict) and given.get("formula") is None:
            of_graders = dict.fromkeys(cast("dict[str, Any]", graders), 1.0)
        if of_graders or given.get("formula") is not None:
            return {**given, "weights": {**dict.fromkeys(RewardWeights.model_fields, 0.0), **of_graders, **weights}}
        return given

    @field_serializer("graders")
    def _graders_as_given(self, graders: dict[str, AnyGrader]) -> dict[str, Any]:
        return {name: grader.model_dump(mode="json", exclude_unset=True) for name, grader in graders.items()}

    def unused_later_fields(self) -> set[str]:
        """Nothing of graders is said where there are none."""
        if not self.graders and self.formula is None:
            unused = {"graders", "formula", "limits", "on_error"}
            return unused | ({"tags"} & super().unused_later_fields())
        return super().unused_later_fields()

    @property
    def is_own(self) -> bool:
        """Whether a job is paid by anything but the recipe's five and their weights."""
        return bool(self.graders) or self.formula is not None

    @property
    def measure(self) -> str:
        """The reward that answers are judged by while training: `correctness`, or the grader that is paid most."""
        paid = {name: weight for name, weight in self.weights.by_name.items() if name in self.graders and weight > 0}
        if self.weights.correctness > 0 or not paid:
            return "correctness"
        return max(paid, key=lambda name: paid[name])

    @property
    def names(self) -> tuple[str, ...]:
        """Every reward that is computed and recorded, the five first."""
        return (*RewardWeights.model_fields, *self.graders)


class WorkedExample(Section):
    """One earlier chat turn that shows the format."""

    question: str = Field(min_length=1, max_length=4000)
    """Sent as the user's turn."""
    answer: str = Field(min_length=1, max_length=4000)
    """Sent as the assistant's turn, in the required format with reasoning and tags."""


class DataSection(Section):
    """The questions and their answers."""

    source: Literal["hub", "upload", "s3", "file"] = "hub"
    """`hub`: a Hugging Face data set. `upload`: one sent to `POST /datasets`. `s3`: a JSONL object in a bucket that
    the service allows. `file`: a local JSONL file, only with `python -m grpo_core`."""
    dataset: str = Field(default="swulling/gsm8k_chinese", min_length=1, max_length=512)
    """Hub name, upload id, `s3://bucket/key` or path."""
    subset: str | None = Field(default=None, pattern=REVISION)
    """Configuration name on the hub, for data sets with several."""
    split: str = Field(default="train", pattern=REVISION)
    """The split of a hub data set to train on."""
    revision: str | None = Field(default=None, pattern=REVISION)
    """Branch, tag or commit on the hub; null is the default branch."""
    format: Annotated[Literal["qa", "messages"], Since(2)] = "qa"
    """`qa`: a column holds the question. `messages`: a column holds a chat that ends with the user's turn."""
    question_column: str = Field(default="question_zh-cn", min_length=1, max_length=128)
    """The column with the question. For sources other than `hub` the default is `question`, with format `messages` it
    is `messages`."""
    answer_column: str = Field(default="answer_only", min_length=1, max_length=128)
    """The column with the final answer. For sources other than `hub`, and with format `messages`, the default is
    `answer`. Integers become text. Only needed if a reward compares with the answer."""
    answer_path: Annotated[str | None, Since(2)] = Field(default=None, min_length=1, max_length=256)
    """Path to the answer inside the answer column, if that holds an object, a list or JSON text: `ground_truth`,
    `answers[0].text`."""
    answer_pattern: Annotated[str | None, Since(2)] = Field(default=None, min_length=1, max_length=512)
    """A regular expression (RE2) that finds the answer in the column's text. The answer is the first group of the last
    match, or all of the match: `#### *(.+)` finds the answers of GSM8K."""
    system_prompt: str = Field(default=SYSTEM_PROMPT, max_length=8192)
    """The system message. If empty, none is sent."""
    examples: Annotated[tuple[WorkedExample, ...], Strict(False)] = Field(default=(), max_length=16)
    """Worked examples, inserted before each question as chat turns."""
    max_rows: int | None = Field(default=None, ge=1, le=10_000_000)
    """Use only this number of rows, from the start; null is all."""

    @field_validator("answer_pattern")
    @classmethod
    def _readable_pattern(cls, value: str | None) -> str | None:
        if value is not None:
            with suppress(ModuleNotFoundError):  # on a laptop without it; the service has it
                compile_pattern(value)
        return value

    @field_validator("answer_path")
    @classmethod
    def _readable_path(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(ANSWER_PATH, value):
            raise ValueError("is no path such as reward_model.ground_truth or answers[0].text")
        return value

    @model_validator(mode="before")
    @classmethod
    def _plain_column_names(cls, data: Any) -> Any:
        """Files, uploads and S3 objects have the columns `question` and `answer` by default."""
        if not isinstance(data, dict):
            return data
        given = cast("dict[str, Any]", data)
        if given.get("format") == "messages":
            return {"question_column": "messages", "answer_column": "answer", "system_prompt": "", **given}
        if given.get("source") in ("upload", "s3", "file"):
            return {"question_column": "question", "answer_column": "answer", **given}
        return given


class StopWhen(Section):
    """When an evaluation during training ends the job before its last step. Such a job succeeds."""

    no_better_for: int | None = Field(default=None, ge=1, le=1000)
    """After this number of evaluations in a row that were no better than the best one; null is never."""
    target: float | None = Field(default=None, ge=-1e9, le=1e9)
    """Once the metric is at least this; null is never. An accuracy is from 0 to 1."""

    @property
    def is_set(self) -> bool:
        """Whether the job may end early."""
        return self != StopWhen()


class EvaluationSection(Section):
    """Held-out questions, answered by the base model before training, and with the adapter during and after it."""

    questions: int = Field(default=0, ge=0, le=10_000)
    """Largest number of held-out questions; 0 is off. Answers are greedy and compared in pairs in the report."""
    split: str = Field(default="test", pattern=REVISION)
    """Held-out questions are the first rows of this split of a hub data set. If it equals `data.split`, and for other
    sources, the last training rows are held out instead."""
    max_completion_tokens: int = Field(default=512, ge=1, le=131_072)
    """Answers are cut off at this length. Make it large enough that few are."""
    dataset: Annotated[str | None, Since(2)] = Field(default=None, min_length=1, max_length=512)
    """A separate data set with the questions, from `data.source` and with the columns of `data`. null takes them from
    `data.dataset`."""
    metric: Annotated[str | None, Since(2)] = Field(default=None, pattern=GRADER_NAME)
    """The reward whose mean over these questions decides the verdict and the best step. null is the accuracy of answers
    (of the best step: right and in the required format) or, with graders, the total reward."""
    automatic: Annotated[bool, Since(2)] = False
    """Ask fewer questions, or none, if the data has too few rows or no such split, instead of failing. A job that is
    submitted without `questions` gets up to 128 of them, at most a tenth of the rows, and this if its data is not
    known yet."""
    every: Annotated[int | None, Since(2)] = Field(default=None, ge=0, le=MAX_STEPS)
    """Number of steps between two evaluations during training; 0 is none. null: up to 10 evaluations, as many as cost
    at most 5 % of training, and none with graders that call a model or an address; with `stop_when`, a tenth of the
    steps."""
    sample: Annotated[int | None, Since(2)] = Field(default=None, ge=1, le=10_000)
    """Number of the questions for evaluations during training, spread evenly; null is all, at most 64."""
    stop_when: Annotated[StopWhen, Since(2)] = StopWhen()


class GuardsSection(Section):
    """Early-stopping rules."""

    no_signal_steps: int = Field(default=100, ge=0, le=100_000)
    """Fail as `no_signal` after this number of steps in a row in which no group had any variance; 0 is off."""
    runaway_factor: float = Field(default=10_000.0, ge=0, le=1e12)
    """Fail as `diverged` after 5 steps in a row in which the loss or the gradient norm (before clipping) exceeds its
    median over the first 10 steps (at least 0.01) by this factor; 0 is off. A value that is not finite fails at
    once."""
    max_logprob_diff: float = Field(default=0.1, ge=0, le=100)
    """Fail as `diverged` if the mean difference between the log-probabilities of rollout engine and trainer exceeds
    this in a step; a fifth of it is a warning; 0 is off. Applies only if another program generates the completions."""


class AuditsSection(Section):
    """Thresholds of the audits, which warn about a run and never stop it (docs/why/audits.md). 0 turns an audit off. A
    window is 10 steps, or as many more as it takes to hold 128 completions."""

    no_variance: int = Field(default=20, ge=0, le=100_000)
    """Number of steps in a row in which no group had any variance."""
    format_gaming: float = Field(default=0.9, ge=0, le=1)
    """Share of a rise in rewards, each relative to its maximum, that did not come from correctness."""
    truncation: float = Field(default=0.3, ge=0, le=1)
    """Share of a window's completions that were cut off."""
    length_collapse: float = Field(default=3.0, ge=0, le=1000)
    """Factor by which completions are shorter than in the first window, without a rise in correctness."""
    length_growth: float = Field(default=2.0, ge=0, le=1000)
    """Factor by which completions are longer than in the first window, without a rise in correctness."""
    duplicates: float = Field(default=0.5, ge=0, le=1)
    """Share of a window's completions whose text repeats another of their group."""
    entropy_collapse: float = Field(default=5.0, ge=0, le=1e6)
    """Factor by which entropy is lower than in the first window, while not nearly all answers are right."""
    kl_runaway: float = Field(default=1.0, ge=0, le=1e6)
    """Median KL divergence from the base model in a window, in nats per token."""


class ResourcesSection(Section):
    """Requirements for the worker."""

    gpus: Annotated[int, Since(2, above=1)] = Field(default=1, ge=0, le=8)
    """Number of GPUs; 0 runs on a CPU worker. More than 1 share each step, with the engine `native` or
    `trl`."""
    min_gpu_memory_gb: int | None = Field(default=None, ge=1, le=1024)
    """Memory that each GPU must have, in GB; null is any."""
    hosts: Annotated[int, Since(2)] = Field(default=1, ge=1, le=64)
    """Number of hosts that share each step, each with `gpus` GPUs. More than 1 needs workers that are in a Ray
    cluster."""
    min_hosts: Annotated[int | None, Since(2)] = Field(default=None, ge=1, le=64)
    """Number of hosts with which a run may do if `hosts` are not free; null: it waits for all of them."""

    @property
    def ranks(self) -> int:
        """Number of processes that share a step."""
        return self.hosts * max(1, self.gpus)


class TrialSection(Section):
    """What a trial draws, with `kind` `try`."""

    rows: int = Field(default=20, ge=1, le=500)
    """Number of questions. Each gets `sampling.generations` completions; the number is rounded up to whole steps."""


class ServingSection(Section):
    """What answers requests, with `kind` `serving`, and until when."""

    job: str | None = Field(default=None, pattern=JOB_ID)
    """Serve the adapters of this job of yours, beside its base model; null serves `model` alone. What the job trained
    with takes the place of `model`, `lora`, `engine`, of its prompts and of the tokens of an answer."""
    steps: Annotated[tuple[Annotated[int, Field(ge=1, le=MAX_STEPS)], ...], Strict(False)] = Field(
        default=(), max_length=8
    )
    """Its checkpoints to serve, by their steps, beside its best or last adapter."""
    ttl_seconds: int = Field(default=900, ge=5, le=86_400)
    """Time after which serving ends, from when the model is loaded."""
    idle_seconds: int = Field(default=300, ge=2, le=86_400)
    """Time without a request after which it ends."""
    engine: Literal["auto", "native", "vllm", "transformers"] = "auto"
    """What computes the answers. `auto`: `native` for the models that it knows, else `vllm` on a GPU whose worker has
    it, else `transformers`, which answers one row after another. `vllm` needs a GPU."""


class ExportSection(Section):
    """What is exported, with `kind` `export`."""

    job: str | None = Field(default=None, pattern=JOB_ID)
    """Export the adapter of this job of yours. What the job trained with takes the place of `model`, `lora` and
    `engine`."""
    step: int | None = Field(default=None, ge=1, le=MAX_STEPS)
    """One of its checkpoints; null is its best or last adapter."""
    format: Literal["merged", "gguf"] = "merged"
    """`merged`: the whole model as safetensors, as transformers and vLLM load it. `gguf`: one file for llama.cpp and
    Ollama."""
    type: Literal["auto", "f16", "bf16", "q8_0"] = "auto"
    """The type of the weights. `auto`: the base's 16-bit type, or `f16` for `gguf`, which rounds least. `q8_0`, with
    about 8 bits, is for `gguf`."""


class CheckpointReference(Section):
    """A step of another job to start from."""

    job: str = Field(pattern=JOB_ID)
    """The other job's id."""
    step: int = Field(ge=1, le=100_000)
    """One of its checkpoints."""


STEPPING: Final = ("training", "try")
"""Kinds of jobs that go through training steps. The others read no data and pay no rewards."""


@dataclass(frozen=True, slots=True)
class SourceReference:
    """The adapters that a job of another kind than training reads."""

    section: Literal["serving", "export"]
    """The section that names them."""
    job: str
    steps: tuple[int, ...]
    """Checkpoints, besides the best or last adapter; an export has at most one, and takes it in that adapter's
    place."""


class JobSpec(Section):
    """One job. An empty spec is the published recipe."""

    schema_version: int = Field(default=SCHEMA_VERSION, json_schema_extra={"const": SCHEMA_VERSION})
    """The version of this schema."""
    name: str | None = Field(default=None, min_length=1, max_length=100, pattern=ONE_LINE)
    """A label."""
    kind: Annotated[Literal["training", "try", "serving", "export"], Since(2)] = "training"
    """`try`: only draw completions from the model that training would start from, score them, and say whether training
    would learn anything. `serving`: answer requests with a job's adapters. `export`: write a job's adapter in another
    form. Only `training` trains and saves an adapter."""
    metadata: dict[
        Annotated[str, Field(min_length=1, max_length=64, pattern=ONE_LINE)],
        Annotated[str, Field(max_length=512)],
    ] = Field(default={}, max_length=16, json_schema_extra={"additionalProperties": False})
    """Up to 16 key-value pairs, by which jobs can be filtered."""
    model: ModelSection = ModelSection()
    lora: LoraSection = LoraSection()
    optimizer: OptimizerSection = OptimizerSection()
    training: TrainingSection = TrainingSection()
    sampling: SamplingSection = SamplingSection()
    loss: LossSection = LossSection()
    rewards: RewardsSection = RewardsSection()
    data: DataSection = DataSection()
    engine: Annotated[Literal["auto", "unsloth", "trl", "native"], Since(2, values=("native",))] = "auto"
    """`native`: this project's own implementation, the fastest, for dense Llama, Mistral and Qwen models in 16-bit or
    on a CPU. `auto`: `native` where it can run the job, else Unsloth on a CUDA GPU, else plain TRL."""
    evaluation: EvaluationSection = EvaluationSection()
    guards: GuardsSection = GuardsSection()
    audits: AuditsSection = AuditsSection()
    resources: ResourcesSection = ResourcesSection()
    trial: Annotated[TrialSection, Since(2)] = TrialSection()
    serving: Annotated[ServingSection, Since(2)] = ServingSection()
    export: Annotated[ExportSection, Since(2)] = ExportSection()
    from_checkpoint: CheckpointReference | None = None
    """Start from the adapter that another of your jobs had after a step."""

    @model_validator(mode="before")
    @classmethod
    def _prompt_of_the_tags(cls, data: Any) -> Any:
        """With custom tags the default system prompt asks for them, unless the job has its own prompt."""
        if not isinstance(data, dict):
            return data
        given = cast("dict[str, Any]", data)
        rewards, section = given.get("rewards"), given.get("data", {})
        tags = cast("dict[str, Any]", rewards).get("tags") if isinstance(rewards, dict) else None
        if not isinstance(tags, dict) or not isinstance(section, dict) or "system_prompt" in section:
            return given
        try:
            chosen = RewardTags.model_validate(tags).as_tags
        except ValidationError:
            return given  # it is reported with the field
        return given if chosen == Tags() else {**given, "data": {**section, "system_prompt": chosen.prompt}}

    @model_validator(mode="before")
    @classmethod
    def _trial_draws_once(cls, data: Any) -> Any:
        """A trial draws each of its questions once; it neither evaluates nor saves, and nothing stops it early."""
        given = cast("dict[str, Any]", data) if isinstance(data, dict) else {}
        sections = {name: given.get(name, {}) for name in ("training", "guards", "loss")}
        if given.get("kind") != "try" or not all(isinstance(section, dict) for section in sections.values()):
            return data
        try:
            rows = TrialSection.model_validate(given.get("trial", {})).rows
            prompts = SamplingSection.model_validate(given.get("sampling", {})).prompts_per_step
        except ValidationError:
            return data  # they are reported with their fields
        never = {"save_steps": MAX_STEPS, "checkpoint_every": MAX_STEPS}
        training = {"steps": -(-rows // prompts), "log_every": 1, "report_to": (), **never}
        return {
            **given,
            "training": {**sections["training"], **training},
            "guards": {**sections["guards"], "no_signal_steps": 0, "runaway_factor": 0.0},
            "loss": {**sections["loss"], "iterations": 1},
            "evaluation": {},
        }

    @field_validator("schema_version")
    @classmethod
    def _known_version(cls, value: int) -> int:
        if value != SCHEMA_VERSION:
            raise ValueError(f"is {value}, and this service reads version {SCHEMA_VERSION}")
        return value

    @model_validator(mode="after")
    def _obey_the_rules(self) -> Self:
        from grpo_core.spec.rules import check  # rules read the sections: imported late to break the cycle

        check(self)
        return self

    @property
    def has_steps(self) -> bool:
        """Whether its run goes through training steps with data and rewards, as a trial's does too."""
        return self.kind in STEPPING

    @property
    def source(self) -> SourceReference | None:
        """The adapters of another job that it serves or exports; None if it names no job."""
        if self.kind == "serving" and self.serving.job is not None:
            return SourceReference("serving", self.serving.job, self.serving.steps)
        if self.kind == "export" and self.export.job is not None:
            step = self.export.step
            return SourceReference("export", self.export.job, () if step is None else (step,))
        return None

    @property
    def held_out_rows(self) -> int:
        """Rows taken from the end of the training data for evaluation; 0 if evaluation has a separate split."""
        own_split = self.data.source == "hub" and self.evaluation.split != self.data.split
        return 0 if own_split or self.evaluation.dataset is not None else self.evaluation.questions

    @property
    def completions_per_step(self) -> int:
        """Completions drawn for one optimizer step."""
        return self.sampling.prompts_per_step * self.sampling.generations

    @property
    def micro_batch(self) -> int:
        """Completions in one forward and backward pass."""
        return self.completions_per_step // self.sampling.gradient_accumulation

    def as_dict(self) -> dict[str, Any]:
        """The resolved spec as JSON types: every value explicit, those of later formats where they are used."""
        return self.model_dump(mode="json")

    @cached_property
    def requested(self) -> dict[str, Any]:
        """The spec as it was sent, before defaults; `parse_spec` sets it. Equal specs may differ in it."""
        return self.model_dump(mode="json", exclude_unset=True)

    def digest(self) -> str:
        """SHA-256 of the resolved spec in canonical JSON: equal requests have equal digests, in every release."""
        return hashlib.sha256(strict_json.canonical(self.as_dict()).encode()).hexdigest()
