"""From a JSON value to a `JobSpec`, or to every problem in it at once, each with its field and its remedy.

Owns the wording of validation errors; the rules themselves are in `sections` and `rules`. Invariant: whatever
is wrong with a spec, `parse_spec` raises `SpecError` and nothing else, and each problem has a JSON pointer.
"""

from __future__ import annotations

import copy
import difflib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from pydantic import ValidationError

from grpo_core.errors import GrpoError
from grpo_core.spec.sections import FORMS, JobSpec

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

Path = tuple[str | int, ...]

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

    def as_dict(self) -> dict[str, str]:
        """The JSON form used in problem documents."""
        return {"pointer": self.pointer, "code": self.code, "detail": self.detail, "remedy": self.remedy}


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
        return JobSpec.model_validate(given)
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


def pointer_of(path: Path) -> str:
    """The RFC 6901 pointer of a path of keys and indexes."""
    return "".join(f"/{str(part).replace('~', '~0').replace('/', '~1')}" for part in path)


def _read_errors(error: ValidationError, data: dict[str, Any]) -> tuple[list[Problem], list[Path]]:
    problems: list[Problem] = []
    bad_paths: list[Path] = []
    for details in error.errors(include_url=False):
        if details["type"] == "spec_rules":
            problems += details.get("ctx", {})["problems"]
            continue
        path = _existing_path(details["loc"], data)
        bad_paths.append(path)
        if len(problems) < MAX_PROBLEMS:
            problems.append(_describe(details, path))
    return problems, [path for path in bad_paths if path]


def _existing_path(location: Path, data: Any) -> Path:
    """The part of pydantic's location that is in the document: it adds marks such as `[key]` of its own."""
    path: list[str | int] = []
    for part in location:
        if isinstance(data, dict) and part in data:
            data = cast("dict[str | int, Any]", data)[part]
        elif isinstance(data, list) and isinstance(part, int) and part < len(cast("list[Any]", data)):
            data = cast("list[Any]", data)[part]
        else:
            if isinstance(data, dict) and part != "[key]":
                path.append(part)
            break
        path.append(part)
    return tuple(path)


def _without(data: dict[str, Any], paths: list[Path]) -> dict[str, Any]:
    """A copy of `data` without the fields that hold `paths`: whole fields, since half a list would be bad again."""
    result = copy.deepcopy(data)
    for name, *inner in paths:
        section = result.get(str(name))
        if inner and isinstance(section, dict) and inner[0] in section:
            del section[inner[0]]
        else:
            result.pop(str(name), None)
    return result


def _describe(details: ErrorDetails, path: Path) -> Problem:
    kind = details["type"]
    if kind == "extra_forbidden":
        return Problem(
            pointer=pointer_of(path),
            code="unknown_field",
            detail="is not a field of the spec",
            remedy=_nearest_field(path),
        )
    return Problem(
        pointer=pointer_of(path),
        code="missing_field" if kind == "missing" else "bad_value",
        detail=_message(details),
        remedy=_key_remedy(path) if details["loc"][-1:] == ("[key]",) else _remedy(_field_schema(path)),
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
    if kind == "string_pattern_mismatch":
        return "does not have the right form"
    text = re.sub(r" after validation, not .*", "", text)
    return re.sub(r"^(Input|String|Tuple|List|Dictionary) ", "", text).replace("a valid tuple", "a list")


def _field_schema(path: Path) -> dict[str, Any]:
    """The JSON Schema of the field at `path`, references resolved; empty where there is none."""
    root = _schema()
    node: Any = root
    for part in path:
        parent = _resolve(cast("dict[str, Any]", node), root)
        if isinstance(part, int):
            node = parent.get("items", {})
        else:
            node = parent.get("properties", {}).get(part) or _any_value(parent)
        if not isinstance(node, dict):  # `additionalProperties` may be a truth value
            return {}
    return _resolve(cast("dict[str, Any]", node), root)


def _any_value(node: dict[str, Any]) -> dict[str, Any]:
    """The schema of a mapping's values: pydantic lists it by key pattern where keys are restricted."""
    patterns = node.get("patternProperties")
    return next(iter(patterns.values())) if patterns else node.get("additionalProperties") or {}


def _schema() -> dict[str, Any]:
    from grpo_core.spec import json_schema

    return json_schema()


def _resolve(node: dict[str, Any], root: dict[str, Any]) -> dict[str, Any]:
    """Follow a reference, and take the non-null side of an optional field; the default stays."""
    result = dict(node)
    for option in node.get("anyOf", []):
        if option.get("type") != "null":
            result = {**option, **{key: value for key, value in node.items() if key != "anyOf"}}
    if "$ref" in result:
        target = root["$defs"][result.pop("$ref").rsplit("/", 1)[1]]
        result = {**target, **result}
    return result


def _nearest_field(path: Path) -> str:
    parent = _field_schema(path[:-1]) if path[:-1] else _schema()
    names = list(parent.get("properties", {}))
    close = difflib.get_close_matches(str(path[-1]), names, n=1)
    if close:
        return f"Did you mean {close[0]}?"
    return f"Remove it; the fields here are {', '.join(names)}." if names else "Remove it."


def _key_remedy(path: Path) -> str:
    """Advice on a key of a mapping such as `metadata`."""
    mapping = _field_schema(path[:-1] if len(path) > 1 else path)
    pattern = next(iter(mapping.get("patternProperties", {})), None)
    keys = {**mapping.get("propertyNames", {}), **({"pattern": pattern} if pattern else {})}
    return f"Each key is {_expected_text(keys)}."


def _remedy(field: dict[str, Any]) -> str:
    if not field:
        return "See the spec's schema at GET /schema/job."
    text = f"Give {_expected(field)}"
    default = field.get("default", ...)
    if default is None:
        text += "; the default is null"
    elif isinstance(default, str | int | float) and len(str(default)) <= _SHOWN_DEFAULT:
        text += f"; the default is {default}"
    return text + "."


def _expected(field: dict[str, Any]) -> str:
    """What the field takes, in words."""
    if "const" in field:
        return str(field["const"])
    if "enum" in field:
        return "one of " + ", ".join(str(value) for value in field["enum"])
    kind = field.get("type")
    if kind in ("integer", "number"):
        return _expected_number(field, "a whole number" if kind == "integer" else "a number")
    if kind == "string":
        return _expected_text(field)
    if kind == "array":
        return _expected_list(field)
    if kind == "object":
        return _expected_object(field)
    return "a value that the schema at GET /schema/job allows"


def _expected_list(field: dict[str, Any]) -> str:
    items = _resolve(field.get("items", {}), _schema())
    if "enum" in items:
        what = "different ones of " + ", ".join(items["enum"])
    else:
        what = "objects with " + " and ".join(items.get("properties", {}))
    return f"a list of {field.get('minItems', 0)} to {field['maxItems']} {what}"


def _expected_object(field: dict[str, Any]) -> str:
    if "required" in field:
        return "an object with " + " and ".join(field["required"])
    if "properties" in field:
        return "an object with any of " + ", ".join(field["properties"])
    return f"an object of at most {field['maxProperties']} pairs of text"


def _expected_number(field: dict[str, Any], noun: str) -> str:
    low, high = field.get("minimum"), field.get("maximum")
    if low is not None and high is not None:
        return f"{noun} from {_plain(low)} to {_plain(high)}"
    bounds = [
        f"{words} {_plain(field[bound])}"
        for bound, words in (
            ("exclusiveMinimum", "above"),
            ("minimum", "at least"),
            ("exclusiveMaximum", "below"),
            ("maximum", "at most"),
        )
        if bound in field
    ]
    return f"{noun} {' and '.join(bounds)}".rstrip()


def _plain(number: float) -> str:
    """Without the `.0` of a whole float."""
    return str(int(number)) if number == int(number) else str(number)


def _expected_text(field: dict[str, Any]) -> str:
    text = FORMS[field["pattern"]] if "pattern" in field else "text"
    if "maxLength" in field:
        text += f" of {field.get('minLength', 0)} to {field['maxLength']} characters"
    return text
