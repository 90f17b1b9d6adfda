"""The `sample` that graders read, made from a completion; and rendered templates.

Owns OpenAI's `sample` object and how JSON in completions is parsed. Invariant: no function here raises because of a
completion.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jsonschema_rs

from grpo_core.errors import GrpoError
from grpo_core.rewards.graders.protocol import Grade, GraderRow
from grpo_core.rewards.graders.templates import MissingValueError, Template


class SchemaError(GrpoError):
    """The JSON Schema is invalid or not supported."""


class Schema:
    """A compiled JSON Schema. References to other documents are refused, and nothing is ever fetched."""

    def __init__(self, schema: Mapping[str, Any]) -> None:
        try:
            self._validator = jsonschema_rs.validator_for(dict(schema), offline=True)
        except Exception as error:  # the library's errors have no common base class
            raise SchemaError(f"is not a valid JSON Schema: {str(error).splitlines()[0][:300]}") from error

    def fits(self, value: Any) -> bool:
        """Whether a value matches the schema."""
        try:
            return self._validator.is_valid(value)
        except Exception:  # noqa: BLE001 - raised for a value that is nested too deeply
            return False


def parse_json(text: str) -> Any:
    """Return the JSON value of a text; `...` if it is not JSON."""
    try:
        return json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return ...


def make_sample(text: str, response: Schema | None) -> dict[str, Any]:
    """Return OpenAI's sample. `response` is the schema of the job's response format, if it has one."""
    sample: dict[str, Any] = {
        "output_text": text,
        "output_tools": [],
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
    }
    if response is not None:
        value = parse_json(text)
        sample["output_json"] = value if value is not ... and response.fits(value) else None
    return sample


def render(templates: Sequence[Template], row: GraderRow) -> list[str] | Grade:
    """Return the rendered templates, or the grade of a row for which one has no value."""
    try:
        return [template.render(row.item, row.sample) for template in templates]
    except MissingValueError as missing:
        if missing.root == "sample":
            return Grade.worthless("sample_parse_error", f"the completion has no value for a template: {missing}")
        return Grade.failed("invalid_variable_error", f"the row has no value for a template: {missing}")


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
