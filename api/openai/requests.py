"""Turns the body of OpenAI's create request into a job spec: `grpo_client.openai_jobs` maps it, this fills in the rest.

Owns what the mapping cannot know: the rows of the files, the job that a model is from, the devices of the workers; and
where in the request a problem of the spec is. Invariant: an error names a field of the request, never one of the spec.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, cast

from api.openai.errors import refusals
from api.openai.objects import OpenAIJobWarning
from api.problems import ApiError
from api.schemas import FieldProblem
from grpo_client import openai_jobs
from grpo_client.openai_jobs import EXTRA, GRADER, CannotMap, Mapped, Refusal
from grpo_core.estimates import SpecWarning
from grpo_core.spec import DATASET_ID, JobSpec, Problem, SpecError, parse_spec
from grpo_core.strict_json import parts_of
from jobs.errors import NotFound
from jobs.store.job import JobRecord

_SECTIONS: Final = {
    "data": "training_file",
    "model": "model",
    "from_checkpoint": "model",
    "rewards": GRADER,
    "name": "suffix",
    "metadata": "metadata",
}
"""The field of OpenAI's whose values a section of the spec depends on."""
_MODEL_HINT: Final = "Use a model that your workers can load, such as Qwen/Qwen2.5-7B-Instruct, or `job-ID:step-N`."


@dataclass(frozen=True, kw_only=True)
class Translated:
    """A create request as a spec."""

    spec: JobSpec
    mapped: Mapped
    extra: Mapping[str, Any]

    def warnings(self, suspicious: Iterable[SpecWarning] = ()) -> list[OpenAIJobWarning]:
        """The notes of the mapping, and warnings about the spec, by the fields of the request."""
        notes = [OpenAIJobWarning(param=one.param, code=one.code, message=one.message) for one in self.mapped.notes]
        return notes + [
            OpenAIJobWarning(param=_param(one.pointer, self.mapped, self.extra), code=one.code, message=one.message)
            for one in suspicious
        ]

    def refusal(self, problems: Iterable[Problem]) -> ApiError:
        """What is wrong with the spec, by the fields of the request."""
        return _refused(problems, self.mapped, self.extra)


def translate(body: Mapping[str, Any], owner: str, service: Any) -> Translated:
    """The spec of a create request. Raises `ApiError`."""
    extra = body.get(EXTRA)
    given = cast("dict[str, Any]", extra) if isinstance(extra, dict) else {}
    _check_model(body.get("model"))
    rows = _rows(body, "training_file", owner, service)
    validation_rows = _rows(body, "validation_file", owner, service)
    try:
        mapped = openai_jobs.to_spec(body, rows=rows, validation_rows=validation_rows)
    except CannotMap as error:
        raise refusals(map(_field, error.refusals)) from error
    _start_from(mapped, given, owner, service)
    if service.has_only_cpu_workers():
        _run_on_cpu(mapped)
    try:
        spec = parse_spec(mapped.spec)
    except SpecError as error:
        raise _refused(error.problems, mapped, given) from error
    return Translated(spec=spec, mapped=mapped, extra=given)


def _field(one: Refusal) -> FieldProblem:
    detail = f"{one.param}: {one.detail}"
    return FieldProblem(pointer="", parameter=one.param, code=one.code, detail=detail, remedy=one.remedy)


def _check_model(model: Any) -> None:
    if isinstance(model, str) and openai_jobs.is_openais_model(model):
        detail = f"{model[:80]!r} is a model of OpenAI's, which cannot be trained here"
        raise refusals([_field(Refusal(param="model", code="model_not_available", detail=detail, remedy=_MODEL_HINT))])


def _rows(body: Mapping[str, Any], name: str, owner: str, service: Any) -> int | None:
    """The number of rows of a file; None where the request does not name one."""
    file_id = body.get(name)
    if not isinstance(file_id, str) or not file_id:
        return None
    remedy = "Upload it with POST /v1/files and use the id that returns."
    detail = f"{file_id[:80]!r} is not one of your files"
    unknown = refusals([_field(Refusal(param=name, code="file_not_found", detail=detail, remedy=remedy))])
    if not re.fullmatch(DATASET_ID, file_id):
        raise unknown
    try:
        return service.get_dataset(file_id, owner).rows
    except NotFound as error:
        raise unknown from error


def _start_from(mapped: Mapped, extra: Mapping[str, Any], owner: str, service: Any) -> None:
    """Fill in the model and the adapter of the job that `model` names, and its last step where it names none."""
    if ("from_checkpoint", "job") not in mapped.sources:
        return
    start: dict[str, Any] = mapped.spec["from_checkpoint"]
    job_id = start["job"]
    try:
        source: JobRecord = service.get(job_id, owner)
    except NotFound as error:
        detail = f"{job_id} is not one of your jobs"
        raise refusals(
            [_field(Refusal(param="model", code="model_not_found", detail=detail, remedy=_MODEL_HINT))]
        ) from error
    if "step" not in start:
        steps = [one.step for one in service.checkpoints(job_id, owner)]
        if not steps:
            detail = f"{job_id} has no checkpoint"
            remedy = "Wait for its first one, or use its base model."
            raise refusals([_field(Refusal(param="model", code="model_not_found", detail=detail, remedy=remedy))])
        mapped.imply(("from_checkpoint", "step"), max(steps))
    for section, name in (("model", "name"), ("lora", "rank"), ("lora", "alpha"), ("lora", "target_modules")):
        if name not in extra.get(section, {}):
            mapped.imply((section, name), source.spec[section][name])


def _run_on_cpu(mapped: Mapped) -> None:
    """OpenAI's job says nothing of hardware: where no worker has a GPU, it is a job for a CPU, unless `grpo` says."""
    spec = mapped.spec
    if spec.get("resources"):
        return
    optimizer = spec.get("optimizer", {})
    if isinstance(optimizer, dict) and "name" not in optimizer:
        mapped.imply(("resources", "gpus"), 0)
        mapped.imply(("optimizer", "name"), "adamw_torch")
        message = "No connected worker has a GPU, so this job runs on a CPU; grpo.resources.gpus decides."
        mapped.note(f"{EXTRA}.resources", "runs_on_cpu", message)


def _refused(problems: Iterable[Problem], mapped: Mapped, extra: Mapping[str, Any]) -> ApiError:
    fields: list[FieldProblem] = []
    for one in problems:
        param = _param(one.pointer, mapped, extra)
        detail = f"{param}: {one.detail}"
        if any((known.parameter, known.code) == (param, one.code) for known in fields):
            continue  # a field that became two of the spec
        fields.append(FieldProblem(pointer="", parameter=param, code=one.code, detail=detail, remedy=one.remedy))
    return refusals(fields)


def _param(pointer: str, mapped: Mapped, extra: Mapping[str, Any]) -> str:
    """The field of the request that a field of the spec is from, or else the one of `grpo` that would set it."""
    parts = tuple(parts_of(pointer))
    if parts and not _has(extra, parts):
        for length in range(len(parts), 0, -1):
            param = mapped.sources.get(parts[:length])
            if param is not None:
                return ".".join((param, *parts[length:]))
        if parts[0] in _SECTIONS and parts[0] not in extra:
            return _SECTIONS[parts[0]]
    return ".".join((EXTRA, *parts))


def _has(section: Any, parts: tuple[str, ...]) -> bool:
    """Whether `grpo` has a field."""
    for name in parts:
        if not isinstance(section, dict) or name not in section:
            return False
        section = cast("dict[str, Any]", section)[name]
    return True
