"""From a JSON value to a `JobSpec`, or to every problem in it at once, each with its field and its remedy.

Owns the wording of validation errors; the rules themselves are in `sections` and `rules`. Invariant: whatever
is wrong with a spec, `parse_spec` raises `SpecError` and nothing else, and each problem has a JSON pointer.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from pydantic import ValidationError

from grpo_core.errors import GrpoError
from grpo_core.spec.aliases import meant_by
from grpo_core.spec.corrections import correction
from grpo_core.spec.hints import expected, expected_text, field_schema
from grpo_core.spec.sections import JobSpec
from grpo_core.strict_json import Path, pointer_of

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

MAX_PROBLEMS = 100
"""More are not listed: a body of junk must not cost seconds of advice."""
_SHOWN_DEFAULT = 60


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing wrong with a spec, and what to do about it."""

    pointer: str
    """RFC 6901 pointer to the field, empty for the whole document."""
    code: str
    detail: str
    remedy: str


class SpecError(GrpoError):
    """A spec with problems; `problems` holds every one of them, up to `MAX_PROBLEMS`."""

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = problems
        super().__init__("; ".join(f"{p.pointer or '/'} {p.detail}. {p.remedy}" for p in problems))


def parse_spec(data: object) -> JobSpec:
    """Validate a decoded JSON value; raises `SpecError` with every problem found.

    Fields that are bad by themselves are taken out and the rest is validated once more, so that rules which
    span fields are reported in the same answer.
    """
    if not isinstance(data, dict):
        problem = Problem(
            pointer="", code="not_an_object", detail="a spec is a JSON object", remedy="Send {} for the recipe."
        )
        raise SpecError([problem])
    given = cast("dict[str, Any]", data)
    try:
        spec = JobSpec.model_validate(given)
        vars(spec)["requested"] = given
        return spec
    except ValidationError as error:
        problems, bad_paths = _read_errors(error, given)
    if bad_paths:
        problems += _broken_rules(_without(given, bad_paths))
    raise SpecError(problems)


def _broken_rules(data: dict[str, Any]) -> list[Problem]:
    try:
        JobSpec.model_validate(data)
    except ValidationError as error:
        return [p for details in error.errors(include_url=False) for p in details.get("ctx", {}).get("problems", [])]
    return []


def _read_errors(error: ValidationError, data: dict[str, Any]) -> tuple[list[Problem], list[Path]]:
    problems: list[Problem] = []
    bad_paths: list[Path] = []
    for details in error.errors(include_url=False):
        if details["type"] == "spec_rules":
            problems += details.get("ctx", {})["problems"]
            continue
        path, schema_path = _existing_path(details["loc"], data)
        bad_paths.append(path)
        if len(problems) < MAX_PROBLEMS:
            problems.append(_describe(details, path, schema_path))
    return problems, [path for path in bad_paths if path]


def _existing_path(location: Path, data: Any) -> tuple[Path, Path]:
    """The part of pydantic's location that is in the document, without marks such as `[key]` that pydantic adds; and
    the same with the type of each object that may have several shapes, which selects its schema."""
    path: list[str | int] = []
    schema_path: list[str | int] = []
    for part in location:
        if isinstance(data, dict) and part in data:
            data = cast("dict[str | int, Any]", data)[part]
        elif isinstance(data, list) and isinstance(part, int) and part < len(cast("list[Any]", data)):
            data = cast("list[Any]", data)[part]
        elif isinstance(data, dict) and part == cast("dict[str, Any]", data).get("type"):
            schema_path.append(part)
            continue
        else:
            if isinstance(data, dict) and part != "[key]":
                path.append(part)
                schema_path.append(part)
            break
        path.append(part)
        schema_path.append(part)
    return tuple(path), tuple(schema_path)


def _without(data: dict[str, Any], paths: list[Path]) -> dict[str, Any]:
    """A copy of `data` without the fields that hold `paths`: whole fields, since half a list would be bad again."""
    result = copy.deepcopy(data)
    if any(path[:2] == ("rewards", "graders") for path in paths):
        # What names graders cannot be judged without them.
        paths = [*paths, *(("rewards", name) for name in ("weights", "formula", "limits")), ("evaluation", "metric")]
    for name, *inner in paths:
        section = result.get(str(name))
        if inner and isinstance(section, dict) and inner[0] in section:
            del section[inner[0]]
        else:
            result.pop(str(name), None)
    return result


def _describe(details: ErrorDetails, path: Path, schema_path: Path) -> Problem:
    kind = details["type"]
    if kind == "extra_forbidden":
        return Problem(
            pointer=pointer_of(path),
            code="unknown_field",
            detail="is not a field of the spec",
            remedy=meant_by(schema_path),
        )
    return Problem(
        pointer=pointer_of(path),
        code="missing_field" if kind in ("missing", "union_tag_not_found") else "bad_value",
        detail=_message(details),
        remedy=_key_remedy(path)
        if details["loc"][-1:] == ("[key]",)
        else _remedy(field_schema(schema_path), path, details.get("input")),
    )


def _message(details: ErrorDetails) -> str:
    """Pydantic's sentence, less what only a Python programmer would understand."""
    kind, text = details["type"], details["msg"]
    if kind == "value_error":
        return str(details.get("ctx", {}).get("error", ""))
    if kind in ("model_type", "dict_type"):
        return "should be an object"
    if kind == "missing":
        return "is required"
    if kind == "union_tag_not_found":
        return "has no type"
    if kind == "union_tag_invalid":
        return "is of a type that is not offered"
    if kind == "string_pattern_mismatch":
        return "does not have the right form"
    text = re.sub(r" after validation, not .*", "", text)
    return re.sub(r"^(Input|String|Tuple|List|Dictionary) ", "", text).replace("a valid tuple", "a list")


def _key_remedy(path: Path) -> str:
    """Advice on a key of a mapping such as `metadata`."""
    mapping = field_schema(path[:-1] if len(path) > 1 else path)
    pattern = next(iter(mapping.get("patternProperties", {})), None)
    keys = {**mapping.get("propertyNames", {}), **({"pattern": pattern} if pattern else {})}
    return f"Each key is {expected_text(keys)}."


def _remedy(field: dict[str, Any], path: Path, given: Any) -> str:
    if not field:
        return "See the spec's schema at GET /schema/job."
    better = correction(field, path, given, _refused)
    if better:
        return better
    text = f"Give {expected(field)}"
    default = field.get("default", ...)
    if default is None:
        text += "; the default is null"
    elif isinstance(default, str | int | float) and len(str(default)) <= _SHOWN_DEFAULT:
        text += f"; the default is {default}"
    return text + "."


def _refused(path: Path, value: Any) -> str | None:
    """The remedy that a spec with nothing but this value at `path` is answered with; None where it is accepted.

    Only what is said of that very field counts: of those beside it nothing is known here.
    """
    spec = value
    for part in reversed(path):
        spec = [spec] if isinstance(part, int) else {part: spec}
    pointer = pointer_of(tuple(0 if isinstance(part, int) else part for part in path))
    try:
        parse_spec(spec)
    except SpecError as error:
        return next((problem.remedy for problem in error.problems if problem.pointer == pointer), None)
    return None
