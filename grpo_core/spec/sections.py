"""The job spec, section by section: what may be asked for, and the recipe's value for all that is not.

An empty spec is the recipe (with `rewards.mode` fixed and `model.precision` auto). Every value is explicit,
because library defaults drift. Rules that span fields are in `rules`; turning errors into advice in `problems`.
Invariant: a spec is frozen, and equal specs have equal hashes on every machine.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Any, Literal, Self, cast, get_args

from pydantic import BaseModel, ConfigDict, Field, Strict, field_validator, model_validator

from grpo_core import strict_json

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

FORMS = {
    HUB_NAME: "a name or owner/name, each of letters, digits, dots, dashes and underscores",
    REVISION: "a name of at most 64 letters, digits, dots, dashes and underscores",
    JOB_ID: "the id of a job: job- and 26 capital letters and digits",
    ONE_LINE: "one line of text",
}
"""Every pattern of a field, in words."""

Weight = Annotated[float, Field(ge=-100, le=100)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """Base of every section: frozen, strict about types, closed to unknown fields."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        validate_default=True,
    )

    @field_validator("*")
    @classmethod
    def _one_zero(cls, value: object) -> object:
        """-0.0 equals 0.0 and means the same, but prints differently: equal specs would differ in their digest."""
        return value + 0.0 if isinstance(value, float) else value


class ModelSection(Section):
    """The base model and how it is held in memory."""

    name: str = Field(default="Qwen/Qwen2.5-7B-Instruct", pattern=HUB_NAME)
    """A Hugging Face hub name, or the name of a folder in the worker's model directory."""
    revision: str | None = Field(default=None, pattern=REVISION)
    """Branch, tag or commit on the hub; null is the default branch."""
    max_sequence: int = Field(default=1024, ge=32, le=131_072)
    """Longest prompt plus completion, in tokens."""
    gpu_memory_share: float = Field(default=0.6, ge=0.05, le=0.95)
    """Share of the memory free on the card at the start that the rollout engine may fill."""
    precision: Literal["auto", "4bit", "16bit"] = "auto"
    """`auto`: fp32 on a CPU; 16-bit where the weights take at most 0.4 of the card, else 4-bit."""


class LoraSection(Section):
    """The adapter that is trained."""

    rank: int = Field(default=32, ge=1, le=256)
    """Width of the adapter's matrices."""
    alpha: int = Field(default=32, ge=1, le=1024)
    """The adapter's output is scaled by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, le=0.5)
    """Share of the adapter's inputs dropped while training."""
    target_modules: Annotated[tuple[Projection, ...], Strict(False)] = Field(
        default=PROJECTIONS, min_length=1, max_length=len(PROJECTIONS)
    )
    """The projections that get an adapter."""
    gradient_checkpointing: Literal["auto", "unsloth", "standard", "off"] = "auto"
    """`auto`: off where the card has room, which is faster; `unsloth` is that engine's own, `standard` for `trl`."""
    seed: int = Field(default=3407, ge=0, le=2**31 - 1)
    """Seeds the adapter's initial weights."""

    @field_validator("target_modules")
    @classmethod
    def _no_module_twice(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) != len(value):
            raise ValueError("names a module twice")
        return value


class OptimizerSection(Section):
    """The optimizer and its schedule."""

    name: Literal["paged_adamw_8bit", "adamw_8bit", "adamw_torch"] = "paged_adamw_8bit"
    """The 8-bit optimizers need a GPU; jobs with `resources.gpus` 0 take `adamw_torch`."""
    learning_rate: float = Field(default=5e-6, gt=0, le=1.0)
    """The peak, reached after warm-up."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of Adam's mean of gradients."""
    beta2: float = Field(default=0.99, ge=0, lt=1)
    """Decay of Adam's mean of squared gradients."""
    weight_decay: float = Field(default=0.1, ge=0, le=1)
    """Decoupled from the gradient, as AdamW does."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """The learning rate's course after warm-up."""
    warmup_ratio: Fraction = 0.1
    """Share of the steps over which the learning rate rises from zero."""
    max_grad_norm: float = Field(default=0.1, gt=0, le=1000)
    """Gradients are scaled down to this norm."""


class TrainingSection(Section):
    """How long, and what is kept on the way."""

    steps: int = Field(default=250, ge=1, le=100_000)
    """Optimizer steps."""
    log_every: int = Field(default=1, ge=1, le=1000)
    """Steps between two metric events."""
    save_steps: int = Field(default=250, ge=1, le=100_000)
    """Steps between two adapters that are kept for you."""
    checkpoint_every: int = Field(default=25, ge=1, le=100_000)
    """Steps between two checkpoints that a lost job goes on from."""
    seed: int = Field(default=3407, ge=0, le=2**31 - 1)
    """Seeds data order and sampling."""
    report_to: Annotated[tuple[Tracker, ...], Strict(False)] = Field(default=(), max_length=len(TRACKERS))
    """Trackers that get the metrics of each step too. Their packages and keys are the worker's; a tracker that fails is
    a warning and never ends the job."""

    @field_validator("report_to")
    @classmethod
    def _no_tracker_twice(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) != len(value):
            raise ValueError("names a tracker twice")
        return value


class SamplingSection(Section):
    """How completions are drawn. A step draws `prompts_per_step` × `generations` of them."""

    prompts_per_step: int = Field(default=1, ge=1, le=1024)
    """Questions asked in a step."""
    generations: int = Field(default=6, ge=2, le=256)
    """Completions of one prompt: the group that advantages are relative to."""
    gradient_accumulation: int = Field(default=1, ge=1, le=4096)
    """Parts the step's completions are split into to save memory; must divide them."""
    max_prompt_tokens: int = Field(default=256, ge=1, le=131_072)
    """Longer prompts (with the chat template) are dropped and counted."""
    max_completion_tokens: int = Field(default=200, ge=1, le=131_072)
    """Completions are cut off here."""
    temperature: float = Field(default=0.9, ge=0.01, le=5)
    """Divides the logits: higher is more varied."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Draw from the most likely tokens that make up this probability; 1 is off."""
    top_k: int = Field(default=0, ge=0, le=1_000_000)
    """Draw from this many of the most likely tokens; 0 is off."""
    repetition_penalty: float = Field(default=1.0, ge=0.1, le=10)
    """Above 1 makes tokens that occurred less likely; 1 is off."""


class LossSection(Section):
    """The GRPO objective."""

    type: Literal["grpo", "bnpo", "dr_grpo", "dapo"] = "grpo"
    """How token losses are averaged: per completion (`grpo`), over the micro-batch (`bnpo`), by a constant
    (`dr_grpo`) or over the whole step (`dapo`)."""
    beta: float = Field(default=0.04, ge=0, le=10)
    """Weight of the KL term; 0 drops the reference pass."""
    epsilon: float = Field(default=0.2, gt=0, lt=1)
    """Probability ratios are clipped to 1 ± epsilon."""
    scale_by: Literal["group", "batch", "none"] = "group"
    """Whose standard deviation divides the advantages."""
    iterations: int = Field(default=1, ge=1, le=16)
    """Optimizer passes over each batch of completions."""


class RewardWeights(Section):
    """What multiplies each reward. Weight 0 still records the raw value."""

    correctness: Weight = 1.0
    """Pays 2 for the right answer."""
    integer: Weight = 1.0
    """Pays 0.5 for an answer that is a whole number."""
    strict_format: Weight = 1.0
    """Pays 0.5 for the asked format, to the letter."""
    soft_format: Weight = 1.0
    """Pays 0.5 for the tags in the right order."""
    xml_count: Weight = 1.0
    """Pays up to 0.5 for the tags, each by itself, less what follows them."""


class RewardsSection(Section):
    """The five reward functions."""

    mode: Literal["fixed", "published"] = "fixed"
    """`published` is bit-faithful to the recipe, its faults included."""
    weights: RewardWeights = RewardWeights()


class WorkedExample(Section):
    """One earlier chat turn that shows the format."""

    question: str = Field(min_length=1, max_length=4000)
    """Sent as the user's turn."""
    answer: str = Field(min_length=1, max_length=4000)
    """Sent as the assistant's turn, as it should look: with reasoning and tags."""


class DataSection(Section):
    """The questions and their answers."""

    source: Literal["hub", "upload", "s3", "file"] = "hub"
    """`hub`: a Hugging Face data set. `upload`: one sent to `POST /datasets`. `s3`: a JSONL object in a bucket that
    the service allows. `file`: a local JSONL file, only for `python -m grpo_core`."""
    dataset: str = Field(default="swulling/gsm8k_chinese", min_length=1, max_length=512)
    """Hub name, upload id, `s3://bucket/key` or path."""
    subset: str | None = Field(default=None, pattern=REVISION)
    """The hub's configuration name, where a data set has several."""
    split: str = Field(default="train", pattern=REVISION)
    """The part of a hub data set to train on."""
    revision: str | None = Field(default=None, pattern=REVISION)
    """Branch, tag or commit on the hub; null is the default branch."""
    question_column: str = Field(default="question_zh-cn", min_length=1, max_length=128)
    """For other sources than `hub` the default is `question`."""
    answer_column: str = Field(default="answer_only", min_length=1, max_length=128)
    """For other sources than `hub` the default is `answer`. Integers are read as their text."""
    system_prompt: str = Field(default=SYSTEM_PROMPT, max_length=8192)
    """Empty sends no system message."""
    examples: Annotated[tuple[WorkedExample, ...], Strict(False)] = Field(default=(), max_length=16)
    """Worked examples, put before each question as chat turns."""
    max_rows: int | None = Field(default=None, ge=1, le=10_000_000)
    """Use only the first rows; null is all."""

    @model_validator(mode="before")
    @classmethod
    def _plain_column_names(cls, data: Any) -> Any:
        """Files, wherever they are, name their columns `question` and `answer` unless told otherwise."""
        if not isinstance(data, dict):
            return data
        given = cast("dict[str, Any]", data)
        if given.get("source") in ("upload", "s3", "file"):
            return {"question_column": "question", "answer_column": "answer", **given}
        return given


class EvaluationSection(Section):
    """Questions that are never trained on, put to the base model before training and to the adapter after it."""

    questions: int = Field(default=0, ge=0, le=10_000)
    """How many, at most; 0 is off. Answered greedily, and compared in pairs in the report."""
    split: str = Field(default="test", pattern=REVISION)
    """The part of a hub data set they are the first rows of. Where it is `data.split`, and with any other source,
    the last rows are held out of training instead."""
    max_completion_tokens: int = Field(default=512, ge=1, le=131_072)
    """Answers are cut off here; enough that being cut off is not what is measured."""


class GuardsSection(Section):
    """When a run is stopped for its own good."""

    no_signal_steps: int = Field(default=100, ge=0, le=100_000)
    """Fail as `no_signal` after so many steps in a row in which no group had any variance; 0 is off."""
    runaway_factor: float = Field(default=10_000.0, ge=0, le=1e12)
    """Fail as `diverged` after 5 steps in a row whose loss or gradient norm (before clipping) is more than this
    many times its median over the run's first 10 steps, which counts as 0.01 if it is less; 0 is off. A value that
    is no number fails at once."""
    max_logprob_diff: float = Field(default=0.1, ge=0, le=100)
    """Fail as `diverged` when the mean difference between the log-probabilities of rollout engine and trainer is
    above this in a step; a fifth of it is a warning; 0 is off. Needs an engine that rolls out by another program."""


class AuditsSection(Section):
    """From when on a run tells you to look: thresholds of the audits (docs/audits.md). 0 turns one off. They never stop
    a run. A window is 10 steps, or more where 10 hold fewer than 128 completions."""

    no_variance: int = Field(default=20, ge=0, le=100_000)
    """Steps in a row in which no group had any variance."""
    format_gaming: float = Field(default=0.9, ge=0, le=1)
    """Share of a rise of the rewards, each by what it can pay, that did not come from correctness."""
    truncation: float = Field(default=0.3, ge=0, le=1)
    """Share of a window's completions that were cut off."""
    length_collapse: float = Field(default=3.0, ge=0, le=1000)
    """Times shorter than in the first window, without a rise of correctness."""
    length_growth: float = Field(default=2.0, ge=0, le=1000)
    """Times longer than in the first window, without a rise of correctness."""
    duplicates: float = Field(default=0.5, ge=0, le=1)
    """Share of a window's completions whose group holds the same text again."""
    entropy_collapse: float = Field(default=5.0, ge=0, le=1e6)
    """Times lower than in the first window, while not nearly all answers are right."""
    kl_runaway: float = Field(default=1.0, ge=0, le=1e6)
    """Median KL divergence from the base model over a window, in nats a token."""


class ResourcesSection(Section):
    """What the worker must have."""

    gpus: int = Field(default=1, ge=0, le=1)
    """0 runs on a CPU worker; a job trains on one GPU at most."""
    min_gpu_memory_gb: int | None = Field(default=None, ge=1, le=1024)
    """Memory each GPU must have; null is any."""


class CheckpointReference(Section):
    """A step of another job to start from."""

    job: str = Field(pattern=JOB_ID)
    """The other job's id."""
    step: int = Field(ge=1, le=100_000)
    """One of its checkpoints."""


class JobSpec(Section):
    """One GRPO training job. An empty spec is the published recipe."""

    schema_version: int = Field(default=SCHEMA_VERSION, json_schema_extra={"const": SCHEMA_VERSION})
    """The version of this schema that the spec is written for."""
    name: str | None = Field(default=None, min_length=1, max_length=100, pattern=ONE_LINE)
    """A label for people."""
    metadata: dict[
        Annotated[str, Field(min_length=1, max_length=64, pattern=ONE_LINE)],
        Annotated[str, Field(max_length=512)],
    ] = Field(default={}, max_length=16, json_schema_extra={"additionalProperties": False})
    """Up to 16 pairs of your own; jobs can be listed by them."""
    model: ModelSection = ModelSection()
    lora: LoraSection = LoraSection()
    optimizer: OptimizerSection = OptimizerSection()
    training: TrainingSection = TrainingSection()
    sampling: SamplingSection = SamplingSection()
    loss: LossSection = LossSection()
    rewards: RewardsSection = RewardsSection()
    data: DataSection = DataSection()
    engine: Literal["auto", "unsloth", "trl"] = "auto"
    """`auto`: Unsloth on one CUDA GPU, else plain TRL."""
    evaluation: EvaluationSection = EvaluationSection()
    guards: GuardsSection = GuardsSection()
    audits: AuditsSection = AuditsSection()
    resources: ResourcesSection = ResourcesSection()
    from_checkpoint: CheckpointReference | None = None
    """Start from the adapter another of your jobs had at a step."""

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
    def held_out_rows(self) -> int:
        """Rows taken from the end of the training data for evaluation; 0 where they come from a split of their own."""
        apart = self.data.source == "hub" and self.evaluation.split != self.data.split
        return 0 if apart else self.evaluation.questions

    @property
    def completions_per_step(self) -> int:
        """Completions drawn for one optimizer step."""
        return self.sampling.prompts_per_step * self.sampling.generations

    @property
    def micro_batch(self) -> int:
        """Completions in one forward and backward pass."""
        return self.completions_per_step // self.sampling.gradient_accumulation

    def as_dict(self) -> dict[str, Any]:
        """The resolved spec as JSON types, every value explicit."""
        return self.model_dump(mode="json")

    def digest(self) -> str:
        """SHA-256 of the resolved spec in canonical JSON: equal requests have equal digests."""
        return hashlib.sha256(strict_json.canonical(self.as_dict()).encode()).hexdigest()
