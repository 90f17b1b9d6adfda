"""What a field of the spec takes, looked up in the JSON Schema and said in words.

Owns the wording of "Give ..."; which field is meant is `aliases`' and `problems`' to say. Invariant: what is said of a
field comes from its schema alone, so that it never differs from what is accepted.
"""

from __future__ import annotations

from functools import cache
from typing import Any, cast

from grpo_core.spec.sections import FORMS, JobSpec
from grpo_core.strict_json import Path


def field_schema(path: Path) -> dict[str, Any]:
    """The JSON Schema of the field at `path`, references resolved; empty where there is none."""
    root = schema()
    node: Any = root
    for part in path:
        parent = resolve(cast("dict[str, Any]", node), root)
        if part in (shapes := _shapes(parent)):
            node = {"$ref": shapes[part]}
        elif isinstance(part, int):
            node = parent.get("items", {})
        else:
            node = parent.get("properties", {}).get(part) or _any_value(parent)
        if not isinstance(node, dict):  # `additionalProperties` may be a truth value
            return {}
    return resolve(cast("dict[str, Any]", node), root)


def _shapes(node: dict[str, Any]) -> dict[str | int, str]:
    """The references to the shapes that an object may have, by its type."""
    return node.get("discriminator", {}).get("mapping", {})


def _any_value(node: dict[str, Any]) -> dict[str, Any]:
    """The schema of a mapping's values: pydantic lists it by key pattern where keys are restricted."""
    patterns = node.get("patternProperties")
    return next(iter(patterns.values())) if patterns else node.get("additionalProperties") or {}


@cache
def schema() -> dict[str, Any]:
    """The JSON Schema of a spec, as pydantic writes it."""
    return JobSpec.model_json_schema()


def resolve(node: dict[str, Any], root: dict[str, Any]) -> dict[str, Any]:
    """Follow a reference, and take the non-null side of an optional field; the default stays."""
    result = dict(node)
    for option in node.get("anyOf", []):
        if option.get("type") != "null":
            result = {**option, **{key: value for key, value in node.items() if key != "anyOf"}}
    if "$ref" in result:
        target = root["$defs"][result.pop("$ref").rsplit("/", 1)[1]]
        result = {**target, **result}
    return result


def expected(field: dict[str, Any]) -> str:
    """What the field takes, in words."""
    if "const" in field:
        return str(field["const"])
    if shapes := _shapes(field):
        return "an object whose type is one of " + ", ".join(map(str, shapes))
    if "enum" in field:
        return "one of " + ", ".join(str(value) for value in field["enum"])
    kind = field.get("type")
    if kind in ("integer", "number"):
        return _expected_number(field, "a whole number" if kind == "integer" else "a number")
    if kind == "string":
        return expected_text(field)
    if kind == "array":
        return _expected_list(field)
    if kind == "object":
        return _expected_object(field)
    return "a value that the schema at GET /schema/job allows"


def items_of(field: dict[str, Any]) -> dict[str, Any]:
    """The schema of a list's elements."""
    return resolve(field.get("items", {}), schema())


def _expected_list(field: dict[str, Any]) -> str:
    items = items_of(field)
    if "enum" in items:
        what = "different ones of " + ", ".join(items["enum"])
    elif items.get("type") == "string":
        what = "texts"
    elif "prefixItems" in field:
        return "a list of two numbers"
    else:
        what = "objects with " + " and ".join(items.get("properties", {}))
    return f"a list of {field.get('minItems', 0)} to {field['maxItems']} {what}"


def _expected_object(field: dict[str, Any]) -> str:
    if "required" in field:
        return "an object with " + " and ".join(field["required"])
    if "properties" in field:
        return "an object with any of " + ", ".join(field["properties"])
    values = resolve(_any_value(field), schema()) if _any_value(field) else {}
    of = "objects by name" if "properties" in values or _shapes(values) else "pairs of text"
    most = f" of at most {field['maxProperties']}" if "maxProperties" in field else " of"
    return f"an object{most} {of}"


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


def expected_text(field: dict[str, Any]) -> str:
    """What a text field takes, in words."""
    text = FORMS[field["pattern"]] if "pattern" in field else "text"
    if "maxLength" in field:
        text += f" of {field.get('minLength', 0)} to {field['maxLength']} characters"
    return text
