"""OpenAI's fine-tuning jobs as job specs, and back: which field becomes which.

Owns the mapping, which the service's routes below /v1/fine_tuning and `grpo import-openai` share; reads no file and
asks no server, and the service checks the values. Invariant: no field of a job is dropped in silence. Each one is
carried over, named in a note, or refused.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, NamedTuple, cast

Json = dict[str, Any]
Place = tuple[str, ...]
"""Keys that lead to a value of a spec."""

HYPERPARAMETERS: Final = "method.reinforcement.hyperparameters"
GRADER: Final = "method.reinforcement.grader"
FORMAT: Final = "method.reinforcement.response_format"
PLAIN: Final = {"type": "text"}
"""The response format that a job has without one."""
EXTRA: Final = "grpo"
"""The field of a job, OpenAI's `extra_body`, with sections of a job spec."""

LEARNING_RATE: Final = 5e-6
GENERATIONS: Final = 6
QUESTIONS: Final = 128
"""Rows that are held out for evaluations if the job asks for them and has no `validation_file`."""
HELD_OUT_SHARE: Final = 10
LEAST_QUESTIONS: Final = 10
MOST_VALIDATED: Final = 1000
"""Rows of a `validation_file` that are used."""
RECIPE_REWARDS: Final = ("correctness", "integer", "strict_format", "soft_format", "xml_count")
MODEL_OF_JOB: Final = re.compile(
    r"(?:ft:(?:[^\s]*:)?)?(?P<job>job-[0-9A-HJKMNP-TV-Z]{26})(?::(?:ckpt-)?step-(?P<step>[0-9]{1,6}))?"
)
"""A model that a job trained: `job-ID` or `job-ID:step-50`."""
_OF_OPENAI: Final = re.compile(r"(?:gpt-[0-9]|chatgpt-|o[0-9](?:-|$)|babbage-0|davinci-0|ft:).*", re.IGNORECASE)

How = Literal["mapped", "read as", "ignored", "refused"]


class FieldRow(NamedTuple):
    """One field of OpenAI's job, and what becomes of it."""

    param: str
    how: How
    ours: str
    """The fields of the spec; empty: none."""
    note: str = ""


TABLE: Final = (
    FieldRow("model", "mapped", "model.name, or from_checkpoint", "a hub name or a folder of models; or a job's model"),
    FieldRow("training_file", "mapped", "data.dataset", "data.source is upload and data.format messages"),
    FieldRow(
        "validation_file",
        "mapped",
        "evaluation.dataset, evaluation.questions",
        f"the first {MOST_VALIDATED} rows are the questions before, during and after training",
    ),
    FieldRow("suffix", "mapped", "name", "up to 64 characters"),
    FieldRow("metadata", "mapped", "metadata"),
    FieldRow("seed", "mapped", "training.seed, lora.seed", "without one, the recipe's 3407"),
    FieldRow("integrations", "mapped", "training.report_to", "`wandb` alone; the worker needs the package and a key"),
    FieldRow(
        "integrations[].wandb",
        "ignored",
        "",
        "project, entity, name and tags come from the worker's WANDB_ variables",
    ),
    FieldRow("method.type", "mapped", "", "`reinforcement` alone; others answer `unsupported_method`"),
    FieldRow(GRADER, "mapped", "rewards.graders", "unchanged, under its name; a `multi` may list its graders"),
    FieldRow(
        FORMAT,
        "mapped",
        "sampling.response_format",
        "checked, not enforced; name, schema and strict may also stand beside the type, as in Azure's examples",
    ),
    FieldRow(f"{HYPERPARAMETERS}.batch_size", "mapped", "sampling.prompts_per_step"),
    FieldRow(f"{HYPERPARAMETERS}.n_epochs", "mapped", "training.steps", "rows × epochs / batch size, rounded up"),
    FieldRow(
        f"{HYPERPARAMETERS}.learning_rate_multiplier", "mapped", "optimizer.learning_rate", "5e-6 × the multiplier"
    ),
    FieldRow(
        f"{HYPERPARAMETERS}.compute_multiplier",
        "read as",
        "sampling.generations",
        "6 × the multiplier, rounded, from 2 to 256 completions per prompt",
    ),
    FieldRow(
        f"{HYPERPARAMETERS}.eval_interval",
        "mapped",
        "evaluation.every",
        "without a validation_file, up to 128 rows (at most a tenth) are held out",
    ),
    FieldRow(f"{HYPERPARAMETERS}.eval_samples", "ignored", "", "an evaluation has one greedy answer to each question"),
    FieldRow(f"{HYPERPARAMETERS}.reasoning_effort", "ignored", "", "`default` is what happens"),
    FieldRow("method.reinforcement.tools", "refused", "", "Azure's; a completion is a single turn"),
    FieldRow("method.reinforcement.max_episode_steps", "refused", "", "Azure's; a completion is a single turn"),
    FieldRow("method.supervised", "refused", "", "GRPO alone is offered"),
    FieldRow("method.dpo", "refused", "", "GRPO alone is offered"),
    FieldRow(
        "hyperparameters",
        "refused",
        "",
        "the deprecated place; they belong to the method, and are ignored in a job that was retrieved",
    ),
    FieldRow("trainingType", "ignored", "", "Azure's; jobs run on the workers that the operator has"),
    FieldRow(EXTRA, "mapped", "every section", "sections of a job spec, sent as `extra_body`"),
)
"""Every field that is known; any other is refused."""

_OF_ANSWERS: Final = frozenset(
    {
        *("id", "object", "created_at", "error", "fine_tuned_model", "finished_at", "organization_id", "result_files"),
        *("status", "trained_tokens", "estimated_finish", "user_provided_suffix", "shared_with_openai", "eval_id"),
        *("usage_metrics", "updated_at", "warnings"),
    }
)
"""Fields of a job that was read from a service: its past, not the request."""


@dataclass(frozen=True, kw_only=True)
class Note:
    """What a job asks for and does not get, or gets in another form."""

    param: str
    code: str
    message: str


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """Why a field cannot be carried over, and what to do."""

    param: str
    code: str
    detail: str
    remedy: str


class CannotMap(Exception):
    """A job that cannot be a spec, with every reason."""

    def __init__(self, refusals: Iterable[Refusal]) -> None:
        self.refusals = list(refusals)
        super().__init__("\n".join(f"{one.param}: {one.detail}. {one.remedy}" for one in self.refusals))


@dataclass(kw_only=True)
class Mapped:
    """A job as a spec."""

    spec: Json = field(default_factory=dict[str, Any])
    sources: dict[Place, str] = field(default_factory=dict[Place, str])
    """The field of OpenAI's that each value of the spec is from."""
    notes: list[Note] = field(default_factory=list[Note])
    refusals: list[Refusal] = field(default_factory=list[Refusal])

    def put(self, param: str, place: Place, value: Any) -> None:
        """Set a value of the spec that a field asks for."""
        self.imply(place, value)
        self.sources[place] = param

    def imply(self, place: Place, value: Any) -> None:
        """Set a value of the spec that no field names, so that `grpo` may change it."""
        section = self.spec
        for name in place[:-1]:
            section = section.setdefault(name, {})
        section[place[-1]] = value

    def note(self, param: str, code: str, message: str) -> None:
        """Add a note."""
        self.notes.append(Note(param=param, code=code, message=message))

    def refuse(self, param: str, code: str, detail: str, remedy: str) -> None:
        """Add a refusal."""
        self.refusals.append(Refusal(param=param, code=code, detail=detail, remedy=remedy))


def to_spec(job: Mapping[str, Any], *, rows: int | None = None, validation_rows: int | None = None) -> Mapped:
    """The spec of a job: the body of a create request, or a job that was read from OpenAI or Azure.

    `rows` and `validation_rows` are those of its files; None: not known. Raises `CannotMap`.
    """
    found = Mapped()
    _unknown_fields(found, job)
    _common(found, job)
    method = _object(found, job.get("method"), "method")
    _method(found, job, method)
    reinforcement = _object(found, method.get("reinforcement"), "method.reinforcement")
    if method.get("type") == "reinforcement":
        _reinforcement(found, reinforcement, has_own_rewards=_has_rewards(job))
    given = _object(found, reinforcement.get("hyperparameters"), HYPERPARAMETERS)
    _hyperparameters(found, given, rows)
    _evaluation(found, job, given, rows, validation_rows)
    _extra(found, job.get(EXTRA))
    if found.refusals:
        raise CannotMap(found.refusals)
    return found


def is_openais_model(name: str) -> bool:
    """Whether a name is that of a model of OpenAI's, which cannot be trained elsewhere."""
    return bool(_OF_OPENAI.fullmatch(name)) and not MODEL_OF_JOB.fullmatch(name)


def _unknown_fields(found: Mapped, job: Mapping[str, Any]) -> None:
    known = {row.param.partition(".")[0].partition("[")[0] for row in TABLE}
    if _was_retrieved(job):
        known |= _OF_ANSWERS
    for name in job.keys() - known:
        if not _was_retrieved(job):
            found.refuse(name[:80], "unknown_parameter", "is not a field of a fine-tuning job", "Leave it out.")
        elif job[name] is not None:
            found.note(name[:80], "ignored", "It is not a field that a job is created with, and is ignored.")


def _was_retrieved(job: Mapping[str, Any]) -> bool:
    return job.get("object") == "fine_tuning.job"


def _common(found: Mapped, job: Mapping[str, Any]) -> None:
    model, training = _text(found, job, "model"), _text(found, job, "training_file")
    if model is not None:
        _model(found, model)
    if training is not None:
        found.imply(("data", "source"), "upload")
        found.put("training_file", ("data", "dataset"), training)
        found.imply(("data", "format"), "messages")
    suffix = job.get("suffix", job.get("user_provided_suffix"))
    if suffix is not None:
        if isinstance(suffix, str) and len(suffix) > 64:
            found.refuse("suffix", "string_above_max_length", f"has {len(suffix)} characters", "Use at most 64.")
        elif suffix != "":
            found.put("suffix", ("name",), suffix)
    if job.get("metadata") is not None:
        found.put("metadata", ("metadata",), job["metadata"])
    if job.get("seed") is not None:
        for section in ("training", "lora"):
            found.put("seed", (section, "seed"), job["seed"])
    _integrations(found, job.get("integrations"))
    if job.get("trainingType") is not None:
        found.note("trainingType", "ignored", "trainingType has no meaning here and is ignored.")


def _text(found: Mapped, job: Mapping[str, Any], name: str) -> str | None:
    value = job.get(name)
    if isinstance(value, str) and value:
        return value
    if value is None:
        found.refuse(name, "missing_required_parameter", "is required", f"Give {name}.")
    else:
        found.refuse(name, "invalid_type", "is not text", "Give a name, as text.")
    return None


def _model(found: Mapped, model: str) -> None:
    trained = MODEL_OF_JOB.fullmatch(model)
    if not trained:
        found.put("model", ("model", "name"), model)
        return
    found.put("model", ("from_checkpoint", "job"), trained["job"])
    if trained["step"]:
        found.put("model", ("from_checkpoint", "step"), int(trained["step"]))


def _integrations(found: Mapped, given: Any) -> None:
    if given is None or given == []:
        return
    if not isinstance(given, list):
        found.refuse("integrations", "invalid_type", "is not a list", 'Give [{"type": "wandb", "wandb": {...}}].')
        return
    for at, one in enumerate(cast("list[Any]", given)):
        kind = cast("Json", one).get("type") if isinstance(one, dict) else None
        if kind != "wandb":
            remedy = "Use wandb, or grpo.training.report_to for other trackers."
            found.refuse(f"integrations.{at}.type", "invalid_value", f"is {_shown(kind)}", remedy)
            continue
        settings = cast("Json", one).get("wandb")
        names = sorted(name for name, value in cast("Json", settings).items() if value) if settings else []
        if names:
            message = (
                f"The worker's own settings of wandb decide {', '.join(names)[:200]}; those of the job are ignored."
            )
            found.note(f"integrations.{at}.wandb", "ignored", message)
        found.put("integrations", ("training", "report_to"), ["wandb"])


def _method(found: Mapped, job: Mapping[str, Any], method: Mapping[str, Any]) -> None:
    remedy = 'Give {"type": "reinforcement", "reinforcement": {"grader": {...}}}.'
    kind = method.get("type")
    if job.get("method") is None:
        found.refuse("method", "unsupported_method", "is not given, which means supervised fine-tuning", remedy)
    elif kind != "reinforcement":
        found.refuse("method.type", "unsupported_method", f"is {_shown(kind)}, and GRPO alone is offered", remedy)
    for name in ("supervised", "dpo"):
        if method.get(name) and kind == "reinforcement":
            found.refuse(f"method.{name}", "unsupported_method", "is not offered", "Leave it out.")
    for name in method.keys() - {"type", "reinforcement", "supervised", "dpo"}:
        found.refuse(f"method.{name[:80]}", "unknown_parameter", "is not a field of a method", "Leave it out.")
    asked = job.get("hyperparameters")
    if not asked or (isinstance(asked, dict) and not any(map(_is_given, cast("Json", asked).values()))):
        return
    if _was_retrieved(job):
        found.note("hyperparameters", "ignored", f"What the service chose is ignored; {HYPERPARAMETERS} is read.")
    else:
        found.refuse("hyperparameters", "unsupported_method", "is not read", f"Put them into {HYPERPARAMETERS}.")


def _reinforcement(found: Mapped, given: Mapping[str, Any], *, has_own_rewards: bool) -> None:
    grader = given.get("grader")
    if grader is not None and not isinstance(grader, dict):
        found.refuse(GRADER, "invalid_type", "is not an object", "Give a grader, such as a string_check.")
    elif grader is not None:
        whole = with_named_members(cast("Json", grader))
        if "invalid_grade" in whole:  # in Azure's examples of a multi
            whole = {name: value for name, value in whole.items() if name != "invalid_grade"}
            message = "rewards.on_error decides what happens to completions that a grader fails to score."
            found.note(f"{GRADER}.invalid_grade", "ignored", message)
        found.put(GRADER, ("rewards", "graders", grader_key(whole)), whole)
        for path in _image_tags(whole, GRADER):
            found.note(path, "ignored", "A python grader finds the modules of the worker, whatever its image_tag.")
    elif not has_own_rewards:
        remedy = "Give a grader, or rewards in extra_body: {'grpo': {'rewards': {...}}}."
        found.refuse(GRADER, "missing_required_parameter", "is required", remedy)
    if given.get("response_format") not in (None, PLAIN):
        found.put(FORMAT, ("sampling", "response_format"), _nested(found, given["response_format"]))
    for name in ("tools", "max_episode_steps"):
        if given.get(name):
            path = f"method.reinforcement.{name}"
            found.refuse(
                path, "unsupported_parameter", "is not offered: a completion is a single turn", "Leave it out."
            )
    known = {"grader", "response_format", "tools", "max_episode_steps", "hyperparameters"}
    for name in given.keys() - known:
        path = f"method.reinforcement.{name[:80]}"
        found.refuse(path, "unknown_parameter", "is not a field of the method", "Leave it out.")


def _nested(found: Mapped, given: Any) -> Any:
    """A response format with the schema in `json_schema`; Azure's examples have its fields beside the type."""
    if not isinstance(given, dict) or "json_schema" in given or "schema" not in given:
        return cast("Any", given)
    form = dict(cast("Json", given))
    kind = form.pop("type", None)
    if kind != "json_schema":
        return cast("Any", given)
    found.note(FORMAT, "interpreted", f"The fields {', '.join(form)} are read as those of {FORMAT}.json_schema.")
    return {"type": kind, "json_schema": form}


def _has_rewards(job: Mapping[str, Any]) -> bool:
    extra = job.get(EXTRA)
    return isinstance(extra, dict) and bool(cast("Json", extra).get("rewards"))


def with_named_members(grader: Json) -> Json:
    """A `multi` with its graders by name: typed clients send a list of them, or a single one."""
    members = grader.get("graders")
    if grader.get("type") != "multi" or not members:
        return grader
    if isinstance(members, dict) and isinstance(cast("Json", members).get("type"), str):
        members = [members]
    if not isinstance(members, list):
        return grader
    named: Json = {}
    for member in cast("list[Any]", members):
        key = name = grader_key(cast("Json", member)) if isinstance(member, dict) else "grader"
        while key in named:
            key = f"{name[:28]}_{len(named)}"
        named[key] = member
    return {**grader, "graders": named}


def grader_key(grader: Mapping[str, Any]) -> str:
    """The key of a grader in `rewards.graders`: its name in small letters, digits and underscores."""
    name = grader.get("name")
    plain = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_") if isinstance(name, str) else ""
    plain = (plain if plain[:1].isalpha() else f"grader_{plain}".rstrip("_"))[:32].rstrip("_")
    return f"{plain[:26]}_score" if plain in RECIPE_REWARDS else plain


def _image_tags(grader: Json, path: str) -> Iterator[str]:
    if grader.get("image_tag"):
        yield f"{path}.image_tag"
    members = grader.get("graders")
    for name, member in cast("Json", members).items() if isinstance(members, dict) else ():
        if isinstance(member, dict):
            yield from _image_tags(cast("Json", member), f"{path}.graders.{name}")


@dataclass(frozen=True)
class _Number:
    """What a hyperparameter may be."""

    kinds: tuple[type[int | float], ...]
    expected: str

    def read(self, found: Mapped, given: Mapping[str, Any], name: str) -> Any:
        """Its value, or None if the job leaves it open or it was refused."""
        value = given.get(name)
        if not _is_given(value):
            return None
        if isinstance(value, self.kinds) and not isinstance(value, bool) and 0 < value < _LARGEST:
            return value
        remedy = f'Give "auto" or {self.expected}.'
        found.refuse(f"{HYPERPARAMETERS}.{name}", "invalid_value", f"is {_shown(value)}", remedy)
        return None


_LARGEST: Final = 10**12
_WHOLE: Final = _Number((int,), "a whole number from 1")
_POSITIVE: Final = _Number((int, float), "a number above 0")


def _hyperparameters(found: Mapped, given: Mapping[str, Any], rows: int | None) -> None:
    known = {row.param.rpartition(".")[2] for row in TABLE if row.param.startswith(HYPERPARAMETERS)}
    for name in given.keys() - known:
        path = f"{HYPERPARAMETERS}.{name[:80]}"
        found.refuse(path, "unknown_parameter", "is not a hyperparameter", f"Use {', '.join(sorted(known))}.")
    batch = _WHOLE.read(found, given, "batch_size")
    if batch is not None:
        found.put(f"{HYPERPARAMETERS}.batch_size", ("sampling", "prompts_per_step"), batch)
    epochs = _WHOLE.read(found, given, "n_epochs")
    if epochs is not None:
        _epochs(found, epochs, batch or 1, rows)
    rate = _POSITIVE.read(found, given, "learning_rate_multiplier")
    if rate is not None:
        _learning_rate(found, rate)
    compute = _POSITIVE.read(found, given, "compute_multiplier")
    if compute is not None:
        _compute(found, compute)
    effort = given.get("reasoning_effort")
    if effort not in (None, "default", "low", "medium", "high"):
        detail, remedy = f"is {_shown(effort)}", "Use default, low, medium or high."
        found.refuse(f"{HYPERPARAMETERS}.reasoning_effort", "invalid_value", detail, remedy)
    elif effort not in (None, "default"):
        message = f"reasoning_effort {effort} is ignored: completions end by themselves or at max_completion_tokens."
        found.note(f"{HYPERPARAMETERS}.reasoning_effort", "ignored", message)


def _epochs(found: Mapped, epochs: int, batch: int, rows: int | None) -> None:
    param = f"{HYPERPARAMETERS}.n_epochs"
    if rows is None:
        found.note(param, "rows_unknown", f"n_epochs {epochs} needs the number of rows of training_file to be steps.")
    else:
        found.put(param, ("training", "steps"), -(-rows * epochs // batch))


def _learning_rate(found: Mapped, multiplier: float) -> None:
    param = f"{HYPERPARAMETERS}.learning_rate_multiplier"
    if multiplier > 1e6:
        found.refuse(param, "invalid_value", "is more than 1e6", "Use one near 1.")
    else:
        found.put(param, ("optimizer", "learning_rate"), LEARNING_RATE * multiplier)


def _compute(found: Mapped, multiplier: float) -> None:
    param = f"{HYPERPARAMETERS}.compute_multiplier"
    if not 1.5 <= GENERATIONS * multiplier < 256.5:
        remedy = "Use one from 0.25 to 42, which give 2 to 252."
        found.refuse(param, "invalid_value", f"{multiplier:.6g} does not give 2 to 256 completions per prompt", remedy)
        return
    count = max(2, round(GENERATIONS * multiplier))
    found.put(param, ("sampling", "generations"), count)
    message = f"compute_multiplier {multiplier:g} is read as {count} completions for each prompt ({GENERATIONS} × it)."
    found.note(param, "interpreted", message)


def _evaluation(
    found: Mapped, job: Mapping[str, Any], given: Mapping[str, Any], rows: int | None, validation_rows: int | None
) -> None:
    validation = job.get("validation_file")
    every = _WHOLE.read(found, given, "eval_interval")
    samples = _WHOLE.read(found, given, "eval_samples")
    if samples not in (None, 1):
        message = (
            f"eval_samples {samples} is ignored: an evaluation has one greedy answer to each question; "
            "grpo.evaluation.sample sets how many questions it asks."
        )
        found.note(f"{HYPERPARAMETERS}.eval_samples", "ignored", message)
    if validation is not None and not isinstance(validation, str):
        found.refuse("validation_file", "invalid_type", "is not text", "Give the id of a file.")
        return
    if validation:
        questions = MOST_VALIDATED if validation_rows is None else min(validation_rows, MOST_VALIDATED)
        found.put("validation_file", ("evaluation", "dataset"), validation)
        found.imply(("evaluation", "questions"), questions)
        if validation_rows is not None and validation_rows > MOST_VALIDATED:
            message = (
                f"The first {MOST_VALIDATED} rows of {validation_rows} are used; grpo.evaluation.questions decides."
            )
            found.note("validation_file", "shortened", message)
    elif every:
        questions = _held_out(rows)
        if not questions:
            message = (
                f"eval_interval is ignored: {rows} rows are too few to hold some out. Give a validation_file for "
                "evaluations during training."
            )
            found.note(f"{HYPERPARAMETERS}.eval_interval", "ignored", message)
            return
        found.imply(("evaluation", "questions"), questions)
        if rows is None:
            found.imply(("evaluation", "automatic"), True)
    if every:
        found.put(f"{HYPERPARAMETERS}.eval_interval", ("evaluation", "every"), every)


def _held_out(rows: int | None) -> int:
    """How many rows of the training file are held out."""
    if rows is None:
        return QUESTIONS
    count = min(QUESTIONS, rows // HELD_OUT_SHARE)
    return count if count >= LEAST_QUESTIONS else 0


def _extra(found: Mapped, extra: Any) -> None:
    """Merge the sections of `grpo`, and refuse what says something else than a field that was mapped."""
    if extra is None:
        return
    if not isinstance(extra, dict):
        found.refuse(EXTRA, "invalid_type", "is not an object", 'Give sections of a job spec: {"lora": {"rank": 16}}.')
        return
    sections = copy.deepcopy(cast("Json", extra))
    for place, param in found.sources.items():
        other, at = _at(sections, place)
        if other is not _NOTHING and other != _at(found.spec, place[:at])[0]:
            path = ".".join((EXTRA, *place[:at]))
            detail = f"is {_shown(other)}, and {param} asks for something else"
            found.refuse(path, "conflict", detail, f"Leave out {path} or {param}.")
    _merge(found.spec, sections)


_NOTHING: Final = object()


def _at(section: Any, place: Place) -> tuple[Any, int]:
    """The value at a place, or the one in its way that is no object; and how many keys lead there."""
    for number, name in enumerate(place):
        if not isinstance(section, dict):
            return section, number
        if name not in section:
            return _NOTHING, number
        section = cast("Json", section)[name]
    return section, len(place)


def _merge(target: Json, other: Json) -> None:
    for name, value in other.items():
        there = target.get(name)
        if isinstance(there, dict) and isinstance(value, dict):
            _merge(cast("Json", there), cast("Json", value))
        else:
            target[name] = value


def from_spec(spec: Mapping[str, Any], *, rows: int | None = None, validation_rows: int | None = None) -> Json:
    """A spec as the body of a create request; what OpenAI has no field for is in `grpo`.

    `spec` is sparse: what it leaves out is left out. `rows` and `validation_rows` are those of its data sets.
    """
    left = copy.deepcopy(dict(spec))
    job: Json = {}
    hyperparameters: Json = {}
    method: Json = {}
    job["model"] = _model_of(left)
    data: Json = _section(left, "data")
    if data.get("source") == "upload" and "dataset" in data and data.get("format") == "messages":
        job["training_file"] = data.pop("dataset")
        del data["source"], data["format"]
    _evaluation_of(left, job, hyperparameters, rows, validation_rows)
    for param, name in (("suffix", "name"), ("metadata", "metadata")):
        if left.get(name) and not (param == "suffix" and len(str(left[name])) > 64):
            job[param] = left.pop(name)
    _seed_of(left, job)
    training: Json = _section(left, "training")
    if training.get("report_to") == ["wandb"]:
        job["integrations"] = [{"type": "wandb"}]
        del training["report_to"]
    grader = _grader_of(_section(left, "rewards"))
    if grader is not None:
        method["grader"] = grader
    sampling: Json = _section(left, "sampling")
    if sampling.get("response_format") is not None:
        method["response_format"] = sampling.pop("response_format")
    _hyperparameters_of(left, hyperparameters, rows)
    if hyperparameters:
        method["hyperparameters"] = hyperparameters
    job["method"] = {"type": "reinforcement", "reinforcement": method}
    left.pop("schema_version", None)
    extra = {name: value for name, value in left.items() if value != {}}
    if extra:
        job[EXTRA] = extra
    return {name: value for name, value in job.items() if value is not None}


def differences(job: Mapping[str, Any], back: Mapping[str, Any]) -> list[str]:
    """The fields of a job that another one lacks or has with another value, as paths with dots."""
    return sorted(_different(_asked(job), _asked(back), ()))


def _asked(job: Mapping[str, Any]) -> Json:
    """A job without what only tells of its past, nulls and what is left to the service."""
    past = _OF_ANSWERS | {"hyperparameters"} if _was_retrieved(job) else frozenset[str]()
    found: Json = {name: value for name, value in job.items() if name not in past and name != EXTRA}
    if job.get("user_provided_suffix") and "suffix" not in found:
        found["suffix"] = job["user_provided_suffix"]
    return _without_open(found)


def _without_open(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    kept = {name: _without_open(one) for name, one in cast("Json", value).items() if _is_given(one) and one != PLAIN}
    return {name: one for name, one in kept.items() if one not in ({}, [])}


def _different(one: Any, other: Any, path: Place) -> Iterator[str]:
    if isinstance(one, dict) and isinstance(other, dict):
        for name in cast("Json", one).keys() | cast("Json", other).keys():
            yield from _different(cast("Json", one).get(name), cast("Json", other).get(name), (*path, name))
    elif one != other:
        yield ".".join(path)


def _section(spec: Json, name: str) -> Json:
    section = spec.get(name)
    return cast("Json", section) if isinstance(section, dict) else {}


def _model_of(left: Json) -> str | None:
    start = left.get("from_checkpoint")
    if isinstance(start, dict) and "job" in start:
        del left["from_checkpoint"]
        step = cast("Json", start).get("step")
        return f"{start['job']}:step-{step}" if step is not None else str(start["job"])
    return _section(left, "model").pop("name", None)


def _evaluation_of(left: Json, job: Json, hyperparameters: Json, rows: int | None, validation_rows: int | None) -> None:
    evaluation: Json = _section(left, "evaluation")
    if evaluation.get("every"):
        hyperparameters["eval_interval"] = evaluation.pop("every")
    questions = evaluation.get("questions")
    if evaluation.get("dataset") and "training_file" in job:
        job["validation_file"] = evaluation.pop("dataset")
        expected = MOST_VALIDATED if validation_rows is None else min(validation_rows, MOST_VALIDATED)
        if questions in (expected, MOST_VALIDATED):
            del evaluation["questions"]
    elif hyperparameters and questions == _held_out(rows):
        del evaluation["questions"]
        if evaluation.get("automatic") is True:
            del evaluation["automatic"]


def _seed_of(left: Json, job: Json) -> None:
    training, lora = _section(left, "training"), _section(left, "lora")
    if training.get("seed") is not None and training.get("seed") == lora.get("seed"):
        job["seed"] = training.pop("seed")
        del lora["seed"]


def _grader_of(rewards: Json) -> Any:
    """The only grader, if it alone decides the reward; its weight does not matter to what is learnt."""
    graders = rewards.get("graders")
    if not isinstance(graders, dict) or len(cast("Json", graders)) != 1 or rewards.get("formula") is not None:
        return None
    ((key, grader),) = cast("Json", graders).items()
    weights = {name: weight for name, weight in _section(rewards, "weights").items() if weight}
    if grader_key(grader) != key or weights not in ({}, {key: 1}):
        return None
    rewards.pop("weights", None)
    del rewards["graders"]
    return grader


def _hyperparameters_of(left: Json, hyperparameters: Json, rows: int | None) -> None:
    sampling, training = _section(left, "sampling"), _section(left, "training")
    optimizer = _section(left, "optimizer")
    batch = sampling.pop("prompts_per_step", None)
    if batch is not None:
        hyperparameters["batch_size"] = batch
    steps = training.get("steps")
    if steps is not None and rows:
        epochs = steps * (batch or 1) // rows
        if epochs and -(-rows * epochs // (batch or 1)) == steps:
            hyperparameters["n_epochs"] = epochs
            del training["steps"]
    rate = optimizer.get("learning_rate")
    if rate is not None and (multiplier := _inverse(rate, lambda m: LEARNING_RATE * m, rate / LEARNING_RATE)):
        hyperparameters["learning_rate_multiplier"] = multiplier
        del optimizer["learning_rate"]
    count = sampling.get("generations")
    if count is not None and (multiplier := _inverse(count, lambda m: round(GENERATIONS * m), count / GENERATIONS)):
        hyperparameters["compute_multiplier"] = multiplier
        del sampling["generations"]


def _inverse(wanted: float, function: Callable[[float], float], near: float) -> float | None:
    """The shortest number that a function maps to the wanted one; None if there is none near."""
    for digits in range(1, 18):
        found = float(f"{near:.{digits}g}")
        if found > 0 and function(found) == wanted:
            return int(found) if found.is_integer() and found < 2**53 else found
    return None


def _object(found: Mapped, value: Any, param: str) -> Json:
    if value is None or isinstance(value, dict):
        return cast("Json", value or {})
    found.refuse(param, "invalid_type", "is not an object", "Give an object.")
    return {}


def _is_given(value: Any) -> bool:
    return value is not None and value != "auto"


def _shown(value: Any) -> str:
    return repr(value)[:60]
