"""The fields of graders in a job spec.

The first seven types have the fields of OpenAI and Azure, so that a grader written for them is read and written back
unchanged; `math`, `json_schema`, `regex` and `length` are specific to this project. Owns the validation of one grader;
`grpo_core.spec.rules` validates what depends on the rest of the spec. Invariant: a field that is not set is not
written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Final, Literal, Self, cast, get_args

from pydantic import Field, JsonValue, Strict, model_validator

from grpo_core.section import Section

GRADER_NAME: Final = r"^[a-z][a-z0-9_]{0,31}$"
MEMBER_NAME: Final = r"^[A-Za-z_][A-Za-z0-9_]{0,63}$"
MAX_GRADERS: Final = 32
MAX_TEMPLATE: Final = 32_768
MAX_SOURCE: Final = 256_000
SECRET: Final = r"^secret://[a-z][a-z0-9_-]{0,63}$"  # noqa: S105 - the form of a name
HEADER: Final = r"^[A-Za-z][A-Za-z0-9-]{0,127}$"
URL: Final = r"^https?://[^\s]+$"
CLOSED: Final[dict[str, JsonValue]] = {"additionalProperties": False}
"""JSON Schema of a mapping that allows no other keys than its patterns."""
FORMS: Final = {
    GRADER_NAME: "a name of at most 32 small letters, digits and underscores that begins with a letter",
    MEMBER_NAME: "a name of at most 64 letters, digits and underscores that begins with none of the digits",
    SECRET: "secret:// and the name of a secret that the operator has registered",
    HEADER: "a header's name of at most 128 letters, digits and dashes",
    URL: "an address that begins with http:// or https://",
}
"""Each pattern of a field, in words for error messages."""

_MOST: Final = 10**12
Number = Annotated[int, Field(ge=-_MOST, le=_MOST)] | Annotated[float, Field(ge=-_MOST, le=_MOST)]
"""A number as it was written: 1 stays 1 and 1.0 stays 1.0."""
Metric = Literal[
    "fuzzy_match", "bleu", "gleu", "rouge_1", "rouge_2", "rouge_3", "rouge_4", "rouge_5", "rouge_l", "cosine", "meteor"
]
NOT_OFFERED: Final = {
    "cosine": "needs an embedding model, which is not offered for training",
    "meteor": "needs word lists that are fetched at run time",
}
"""OpenAI's metrics that are not supported, and why."""


TemplateText = Annotated[str, Field(max_length=MAX_TEMPLATE)]


class GraderBase(Section):
    """Fields of every grader."""

    name: str | None = Field(default=None, max_length=256)
    """OpenAI's label of the grader; records use its key in `graders`."""
    pass_threshold: Number | None = None
    """Kept but not used: OpenAI's evaluations read it, training does not."""

    @property
    def templates(self) -> Iterator[tuple[str, str]]:
        """Yield every template with the pointer to it."""
        return iter(())

    @property
    def bounds(self) -> tuple[float | None, float | None]:
        """Return its lowest and highest score; None where only its author knows."""
        return 0.0, 1.0


class _Compares(GraderBase):
    """A grader that compares one text with another."""

    input: TemplateText
    """Template of the text that is graded, such as `{{sample.output_text}}`."""
    reference: TemplateText
    """Template of the text that it is compared with, such as `{{item.answer}}`."""

    @property
    def templates(self) -> Iterator[tuple[str, str]]:
        yield "/input", self.input
        yield "/reference", self.reference


class _Reads(GraderBase):
    """A grader that reads one text."""

    input: TemplateText = "{{sample.output_text}}"
    """Template of the text that is graded."""

    @property
    def templates(self) -> Iterator[tuple[str, str]]:
        yield "/input", self.input


class StringCheck(_Compares):
    """1 if two texts are equal, or one contains the other."""

    type: Literal["string_check"]
    """Which grader this is."""
    operation: Literal["eq", "ne", "like", "ilike"]
    """`eq`: equal; `ne`: not equal; `like`: the input contains the reference; `ilike`: the same, ignoring case."""


class TextSimilarity(_Compares):
    """How similar two texts are, from 0 to 1."""

    type: Literal["text_similarity"]
    """Which grader this is."""
    evaluation_metric: Metric
    """`fuzzy_match` (edit distance), `bleu`, `gleu`, `rouge_1` to `rouge_5` or `rouge_l`. OpenAI's
    `cosine` and `meteor` are not supported."""


class Python(GraderBase):
    """Your own function, `grade(sample, item)`, in a confined process."""

    type: Literal["python"]
    """Which grader this is."""
    source: str = Field(min_length=1, max_length=MAX_SOURCE)
    """Python that defines `def grade(sample, item)`, which returns a finite number."""
    image_tag: str | None = Field(default=None, max_length=64)
    """Kept but not used: the modules are those of the worker."""

    @property
    def bounds(self) -> tuple[float | None, float | None]:
        return None, None


class Message(Section):
    """One turn of the judge's prompt."""

    role: Literal["user", "assistant", "system", "developer"]
    """Whose turn it is."""
    content: JsonValue
    """A template, or OpenAI's list of content blocks, whose texts are templates."""
    type: Literal["message"] | None = None
    """OpenAI's mark of a turn."""


class JudgeSampling(Section):
    """How the judge is sampled."""

    max_completions_tokens: int | None = Field(default=None, ge=1, le=1_000_000)
    """Largest number of tokens of an answer."""
    temperature: Number | None = Field(default=None, ge=0, le=2)
    """0 to 2; null is 0."""
    top_p: Number | None = Field(default=None, gt=0, le=1)
    """Draw from the most likely tokens that make up this probability."""
    seed: int | None = Field(default=None, ge=-(2**63), le=2**63 - 1)
    """Sent to the judge; null: the seed of the job."""
    reasoning_effort: str | None = Field(default=None, max_length=32)
    """Sent to the judge unchanged."""


Messages = Annotated[tuple[Message, ...], Strict(False), Field(min_length=1, max_length=64)]
Labels = Annotated[tuple[str, ...], Strict(False), Field(min_length=1, max_length=64)]


class _Judged(GraderBase):
    model: str = Field(min_length=1, max_length=128)
    """The name under which the operator registered a judge."""
    input: Messages
    """The judge's prompt; the text of each turn is a template."""
    sampling_params: JudgeSampling | None = None
    """Null: greedy."""

    @property
    def templates(self) -> Iterator[tuple[str, str]]:
        for index, message in enumerate(self.input):
            for place, text in texts_of(message.content):
                yield f"/input/{index}/content{place}", text


class ScoreModel(_Judged):
    """A judge that gives a number."""

    type: Literal["score_model"]
    """Which grader this is."""
    range: Annotated[tuple[Number, Number], Strict(False)] | None = None
    """The lowest and highest score that the judge may give; 0 and 1 by default."""

    @property
    def bounds(self) -> tuple[float | None, float | None]:
        low, high = self.range or (0, 1)
        return float(low), float(high)

    @model_validator(mode="after")
    def _range_rises(self) -> Self:
        low, high = self.bounds
        if low is None or high is None or low >= high:
            raise ValueError("has a range whose first number is not below its second")
        return self


class LabelModel(_Judged):
    """A judge that chooses a label: 1 if it is one that passes."""

    type: Literal["label_model"]
    """Which grader this is."""
    labels: Labels
    """The labels from which the judge chooses."""
    passing_labels: Labels
    """The labels that score 1."""

    @model_validator(mode="after")
    def _labels_are_known(self) -> Self:
        unknown = sorted(set(self.passing_labels) - set(self.labels))
        if unknown:
            raise ValueError(f"has passing_labels that are not among its labels: {', '.join(unknown)}")
        return self


Headers = Annotated[
    dict[Annotated[str, Field(pattern=HEADER)], Annotated[str, Field(max_length=128, pattern=SECRET)]],
    Field(max_length=16, json_schema_extra=CLOSED),
]


class Endpoint(GraderBase):
    """Your own server, which receives the completion and answers with a score."""

    type: Literal["endpoint"]
    """Which grader this is."""
    url: str = Field(max_length=2048, pattern=URL)
    """Its host must be one that the operator allows."""
    headers: Headers | None = None
    """Each value is `secret://name`; the operator sets the value of the secret."""
    rate_limit: Number | None = Field(default=None, gt=0, le=10_000)
    """Requests per second."""

    @property
    def bounds(self) -> tuple[float | None, float | None]:
        return None, None


class Math(_Compares):
    """1 if two answers are the same number or expression."""

    type: Literal["math"]
    """Which grader this is."""


class JsonSchema(_Reads):
    """1 if a text is JSON that matches a schema."""

    type: Literal["json_schema"]
    """Which grader this is."""
    json_schema: dict[str, JsonValue] = Field(alias="schema", max_length=1000)
    """A JSON Schema, without references to other documents."""


class Regex(_Reads):
    """1 if a pattern is found in a text."""

    type: Literal["regex"]
    """Which grader this is."""
    pattern: str = Field(min_length=1, max_length=4096)
    """In RE2's syntax, which has no look-around and no references to groups; `(?s)` lets a dot match line ends."""
    match: Literal["search", "full"] = "search"
    """`search`: anywhere; `full`: the whole text."""


class Length(_Reads):
    """1 if a text has the right length, less if it is too short or too long."""

    type: Literal["length"]
    """Which grader this is."""
    unit: Literal["characters", "words", "lines"] = "characters"
    """The unit of the length. Words are separated by white space."""
    minimum: int = Field(default=0, ge=0, le=10_000_000)
    """Smallest length."""
    maximum: int | None = Field(default=None, ge=0, le=10_000_000)
    """Largest length; null: any."""
    falloff: int = Field(default=0, ge=0, le=10_000_000)
    """Outside the limits, the score falls linearly to 0 over this many units; 0: it is 0 at once."""

    @model_validator(mode="after")
    def _bounds_rise(self) -> Self:
        if self.maximum is not None and self.maximum < self.minimum:
            raise ValueError("has a maximum below its minimum")
        if self.maximum is None and self.minimum == 0:
            raise ValueError("needs a minimum or a maximum: without either every text scores 1")
        return self


Leaf = Annotated[
    StringCheck | TextSimilarity | Python | ScoreModel | LabelModel | Endpoint | Math | JsonSchema | Regex | Length,
    Field(discriminator="type"),
]


class Multi(GraderBase):
    """Several graders and the formula of their scores."""

    type: Literal["multi"]
    """Which grader this is."""
    graders: dict[Annotated[str, Field(pattern=MEMBER_NAME)], Leaf] = Field(
        min_length=1, max_length=MAX_GRADERS, json_schema_extra=CLOSED
    )
    """Graders by the names in the formula; none may be a `multi`."""
    calculate_output: str = Field(min_length=1, max_length=2000)
    """Numbers, the graders' names, `+ - * / ^ ( )` and `min max abs floor ceil exp sqrt log`."""

    @property
    def templates(self) -> Iterator[tuple[str, str]]:
        for name, grader in self.graders.items():
            for pointer, text in grader.templates:
                yield f"/graders/{name}{pointer}", text

    @property
    def bounds(self) -> tuple[float | None, float | None]:
        return None, None


AnyGrader = (
    StringCheck
    | TextSimilarity
    | Python
    | ScoreModel
    | LabelModel
    | Endpoint
    | Multi
    | Math
    | JsonSchema
    | Regex
    | Length
)
Grader = Annotated[AnyGrader, Field(discriminator="type")]
GRADER_TYPES: Final[tuple[str, ...]] = tuple(
    get_args(model.model_fields["type"].annotation)[0] for model in get_args(AnyGrader)
)


class GraderLimits(Section):
    """Limits of one grader."""

    row_seconds: float = Field(default=5.0, ge=0.01, le=120)
    """Seconds for one completion."""
    step_seconds: float | None = Field(default=None, ge=0.01, le=3600)
    """Seconds for all completions of a step; null: 60 for `python`, 10 for `math` and 300 for judges and endpoints."""
    memory_mb: int = Field(default=2048, ge=64, le=16_384)
    """Memory of the process that runs `python` or `math`."""
    fresh_process: bool = False
    """`python`: a new process for each completion, for graders that execute what the model wrote: in a shared process,
    that could change the grader for later completions."""
    budget_tokens: int | None = Field(default=None, ge=1, le=10**12)
    """Judges: tokens that the job may use for this one; null: any number."""


class OnError(Section):
    """What happens to completions that a grader fails to score."""

    policy: Literal["skip_group", "zero"] = "skip_group"
    """`skip_group`: every completion of that prompt gets the same reward, so that nothing is learnt from it. `zero`:
    the grader's score counts as 0."""
    max_share: float = Field(default=0.2, ge=0, le=1)
    """The job fails when more than this share of the completions in the window could not be scored."""
    window_steps: int = Field(default=10, ge=1, le=1000)
    """Number of steps in the window."""


def members_of(name: str, grader: AnyGrader) -> Mapping[str, AnyGrader]:
    """Return the graders to run for this one: itself, or the members of a `multi` as `name.member`."""
    if isinstance(grader, Multi):
        return {f"{name}.{key}": member for key, member in grader.graders.items()}
    return {name: grader}


def has_process(graders: Mapping[str, AnyGrader]) -> bool:
    """Whether one of them runs in a separate process, which must be confined."""
    members = (member for name, grader in graders.items() for member in members_of(name, grader).values())
    return any(isinstance(member, Python | Math) for member in members)


def calls_out(graders: Mapping[str, AnyGrader]) -> bool:
    """Whether one of them calls a model or an address, which may cost money."""
    members = (member for name, grader in graders.items() for member in members_of(name, grader).values())
    return any(isinstance(member, ScoreModel | LabelModel | Endpoint) for member in members)


def texts_of(content: Any) -> Iterator[tuple[str, str]]:
    """Yield the texts in a message's content with their places; content is a text, a block or a list of blocks."""
    if isinstance(content, str):
        yield "", content
    elif isinstance(content, dict):
        text = cast("dict[str, Any]", content).get("text")
        if isinstance(text, str):
            yield "/text", text
    elif isinstance(content, list):
        for index, block in enumerate(cast("list[Any]", content)):
            for place, text in texts_of(block):
                yield f"/{index}{place}", text
